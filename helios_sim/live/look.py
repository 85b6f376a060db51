"""What an exit says about rows whose hidden states are at hand. Knows heads and confidences, no rule and no cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from helios_sim.exits.rule import Confidence
from helios_sim.live.heads import ExitHeads
from helios_sim.live.model import SegmentedModel


@dataclass(frozen=True, slots=True)
class Look:
    """Of n rows, on the host. `finite`: the logits were numbers; without them token and confidence mean nothing."""

    tokens: list[int]
    confidence: list[float] | None
    finite: list[bool]


class Exits:
    """A model's exits by depth. At a depth without heads the model's own norm and head are used as they are."""

    def __init__(self, heads: ExitHeads, n_layers: int) -> None:
        self.heads = heads
        self._index = {depth: i for i, depth in enumerate((*heads.exits, n_layers))}

    @torch.inference_mode()
    def look(self, model: SegmentedModel, depth: int, hidden: Tensor, measure: Confidence | None) -> Look:
        """hidden (n, d) after `depth` layers, through the head. One transfer to the host.

        `measure`: also give this confidence (None: none). That of a classifier does not come from the head, but is
        fetched in the same transfer.
        """
        tokens, confidence, best = self.on_device(model, depth, hidden, measure)
        columns = [tokens.double(), best.double()] if confidence is None else [
            tokens.double(), best.double(), confidence.double()
        ]  # fmt: skip
        rows = torch.stack(columns).tolist()
        finite = [value - value == 0.0 for value in rows[1]]
        return Look([int(t) for t in rows[0]], None if confidence is None else rows[2], finite)

    @torch.inference_mode()
    def tokens(self, model: SegmentedModel, adapted: Tensor) -> Look:
        """What states (n, d) that are adapted already say, whatever depths they come from. One transfer."""
        best = model.logits(adapted).max(-1)
        rows = torch.stack((best.indices.double(), best.values.double())).tolist()
        return Look([int(t) for t in rows[0]], None, [value - value == 0.0 for value in rows[1]])

    def on_device(
        self, model: SegmentedModel, depth: int, hidden: Tensor, measure: Confidence | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Tokens (n,), confidence (n,) if asked for, and the largest logit (n,), all still on the device."""
        index = self._index.get(depth)
        logits = model.logits(self.adapted(model, depth, hidden))
        if measure is None:
            best = logits.max(-1)
            return best.indices, None, best.values
        if measure is Confidence.CLASSIFIER:
            best = logits.max(-1)
            return best.indices, self.classify(depth, hidden), best.values
        logits = logits.float()
        temperature = 1.0 if index is None else self.heads.temperature[index]
        if temperature != 1.0:
            logits = logits / temperature
        best = logits.max(-1)
        total = logits.logsumexp(-1)
        sure = (best.values - total).exp()
        if measure is Confidence.MARGIN:
            sure = sure - (logits.topk(2, dim=-1).values[:, 1] - total).exp()
        return best.indices, sure, best.values

    def adapted(self, model: SegmentedModel, depth: int, hidden: Tensor) -> Tensor:
        """Hidden states (n, d) after `depth` layers as the model's own norm and head read them."""
        index = self._index.get(depth)
        return hidden if index is None else self.heads.adapt(index, hidden).to(model.dtype)

    def classify(self, depth: int, hidden: Tensor) -> Tensor:
        """The cheap check's answer (n,). UserError for heads without one."""
        index = self._index.get(depth)
        if index is None:
            raise ValueError(f"no head at layer {depth}; heads at {tuple(self._index)}")
        return self.heads.classify(index, hidden)
