"""What every exit says about tokens whose hidden states are at hand. Knows heads and models, no text and no rule.

Where the model computes in bfloat16 its logits are rounded to 8 bits, too coarse for confidences and for the first
choice among near equals. The largest ones and the reference's are therefore computed once more in float32 from the same
hidden state; the many small ones only enter the sum of the softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from calibrate.training import largest

if TYPE_CHECKING:
    from torch import Tensor

    from helios_sim.live.model.decoder import SegmentedModel
    from helios_sim.live.model.heads import ExitHeads

_EXACT = 8  # largest logits that are computed again
_CHUNK_TOKENS, _SUM_ROWS = 256, 4
LN2 = 0.6931471805599453


@dataclass(frozen=True, slots=True, eq=False)
class Observed:
    """N tokens at E exits, the last being full depth."""

    choice: NDArray[np.int64]  # (N, E) most probable token
    confidence: NDArray[np.float32]  # (N, E) its probability, logits divided by the exit's temperature
    margin: NDArray[np.float32]  # (N, E) minus the second's
    bits: NDArray[np.float32]  # (N, E) -log2 of the probability of the reference token, likewise
    classifier: NDArray[np.float32] | None  # (N, E) 1 - (1 - p) x risk_scale, p of agreement

    @property
    def agree(self) -> NDArray[np.bool_]:
        return self.choice == self.choice[:, -1:]


def observe(
    model: SegmentedModel, heads: ExitHeads, hidden: Sequence[Tensor], reference: NDArray[np.int64]
) -> Observed:
    """`hidden` holds (N, d) at every early exit and after the last layer; reference (N,) is the text's own token."""
    import torch

    with torch.inference_mode():
        words = torch.from_numpy(reference).to(model.device)
        columns = [
            [
                _exit(model, heads.adapt(e, part).to(model.dtype), heads.temperature[e], known)
                for part, known in zip(state.split(_CHUNK_TOKENS), words.split(_CHUNK_TOKENS), strict=True)
            ]
            for e, state in enumerate(hidden)
        ]
        checks = None
        if heads.has_check:
            checks = np.column_stack([heads.classify(e, state).cpu().numpy() for e, state in enumerate(hidden)])
    choice, confidence, margin, bits = (
        np.column_stack([np.concatenate([part[i] for part in column]) for column in columns]) for i in range(4)
    )
    return Observed(
        choice.astype(np.int64),
        confidence.astype(np.float32),
        margin.astype(np.float32),
        bits.astype(np.float32),
        None if checks is None else checks.astype(np.float32),
    )


def _exit(
    model: SegmentedModel, state: Tensor, temperature: float, reference: Tensor
) -> tuple[NDArray[np.float64], ...]:
    """choice, confidence, margin and bits, (n,) each, for states (n, d) that go through final norm and head."""
    import torch

    normed = model.normed(state)
    logits = normed @ model.outer.head.T
    coarse, tokens = largest(logits, _EXACT)
    tokens = torch.cat((tokens, reference[:, None]), 1)
    exact = torch.einsum("nd,nkd->nk", normed.float(), model.outer.head[tokens].float()) / temperature
    peak = exact[:, :_EXACT].amax(1, keepdim=True)
    rows = [
        few.float().div_(temperature).sub_(p).exp_().sum(-1)  # few rows at a time stay in the processor's cache
        for few, p in zip(logits.split(_SUM_ROWS), peak.split(_SUM_ROWS), strict=True)
    ]
    total = torch.cat(rows).double()
    fine, rough = exact[:, :_EXACT].double() - peak, coarse.double() / temperature - peak
    total += (fine.exp() - rough.exp()).sum(1)
    best = fine.sort(descending=True)
    choice = tokens[:, :_EXACT].gather(1, best.indices[:, :1])[:, 0]
    probability = best.values[:, :2].exp() / total[:, None]
    surprise = (total.log() - (exact[:, -1].double() - peak[:, 0])) / LN2
    return tuple(t.cpu().numpy() for t in (choice, probability[:, 0], probability[:, 0] - probability[:, 1], surprise))
