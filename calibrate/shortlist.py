"""A check that reads a shortlist of the vocabulary: its tokens, its probability, its cost. Knows no text and no rule.

The largest probability among the N most frequent tokens alone, read through the exit's adapter. It is too high where
the exit's own token is not on the list, so it is calibrated against agreement with full depth like every other check.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from calibrate.training import Tensors, choices

if TYPE_CHECKING:
    from torch import Tensor

    from helios_sim.live.model.architecture import Architecture
    from helios_sim.live.model.decoder import SegmentedModel

Array = NDArray[np.float64]


def frequent_tokens(texts: Iterable[NDArray[np.int64]], count: int, vocabulary: int) -> NDArray[np.int64]:
    """The tokens that occur most often in the texts, (count,), most frequent first; ties by their number."""
    occurrences = np.zeros(vocabulary, dtype=np.int64)
    for tokens in texts:
        occurrences += np.bincount(tokens, minlength=vocabulary)
    return np.argsort(-occurrences, kind="stable")[:count].astype(np.int64)


def shortlist_logit(model: SegmentedModel, adapter: Tensors, hidden: Tensor, words: Tensor) -> Array:
    """log(p / (1 - p)) of the largest probability among `words` (N,), for hidden states (n, d): (n,), uncalibrated."""
    p = choices(model, adapter, hidden, words)[1].double().cpu().numpy().clip(1e-6, 1 - 1e-6)
    return np.log(p / (1 - p))


def in_layers(weights: int, architecture: Architecture) -> float:
    """So many weights in layer equivalents: one layer's weights are 1. What counts where bandwidth is the limit."""
    return weights / sum(int(np.prod(shape)) for shape in architecture.layer_shapes().values())
