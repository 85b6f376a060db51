"""A model as it runs while it is trained to exit early: low-rank changes beside its weights, some layers left out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from calibrate.exits.low_rank import Factors, Place
from helios_sim.live.kernels.interface import TorchKernels

if TYPE_CHECKING:
    from torch import Tensor

    from helios_sim.live.memory.kv import Packed
    from helios_sim.live.model.decoder import SegmentedModel


class LowRankProducts(TorchKernels):
    """torch's operations, with W + B A in the place of W for weights that have factors. Only factors get gradients."""

    name = "torch, with low-rank changes"

    def __init__(self, changed: Iterable[tuple[Tensor, Factors]]) -> None:
        self._changed = {id(weight): (weight, factors) for weight, factors in changed}  # the weight keeps its id

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, slots: Tensor | None = None) -> Tensor:
        import torch.nn.functional as F

        whole = super().product(x, weight, bias, slots)
        if (found := self._changed.get(id(weight))) is None:
            return whole
        _, of = found
        return whole + F.linear(F.linear(x, of.down.to(x.dtype)), of.up.to(x.dtype))


def with_changes(model: SegmentedModel, factors: Mapping[Place, Factors]) -> SegmentedModel:
    """The model with W + B A in the factors' places. It shares all weights with `model`."""
    found = copy.copy(model)
    found.kernels = LowRankProducts((getattr(model.layers[layer], part), of) for (layer, part), of in factors.items())
    return found


def without_some(
    model: SegmentedModel,
    rows: Tensor,
    depths: Sequence[int],
    left_in: NDArray[np.bool_],
    attend: Callable[[int, int], Packed],
) -> list[Tensor]:
    """Hidden states (B T, d) at each depth for texts (B, T). `left_in` (L, B): whether a text runs a layer.

    A text that leaves a layer out keeps its state. `attend(B, T)` gives the attention of B texts of T tokens.
    """
    import torch

    texts, tokens = rows.shape
    state = model.embed(rows.flatten(), attend(texts, tokens).positions)
    found = []
    for layer in range(depths[-1]):
        stay = np.flatnonzero(left_in[layer])
        if len(stay) == texts:
            state = model.run(state, layer, layer + 1, attend(texts, tokens))
        elif len(stay):
            index = torch.from_numpy(stay).to(state.device)
            apart = state.view(texts, tokens, -1)
            run = model.run(apart[index].flatten(0, 1), layer, layer + 1, attend(len(stay), tokens))
            state = apart.index_copy(0, index, run.view(len(stay), tokens, -1)).flatten(0, 1)
        if layer + 1 in depths:
            found.append(state)
    return found
