"""Reads served answers once more, at full depth: which of their tokens are full depth's own? Knows no server.

In one pass over prompt and answer K and V are exact everywhere, so a token is held against what the whole model says
of the very text before it. Near ties a pass over many tokens and a step of one can differ in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from helios_sim.live.answer import Answer
from helios_sim.live.kv import Packed
from helios_sim.live.model import SegmentedModel
from helios_sim.live.served import LiveModel


def agreed_tokens(models: Mapping[str, LiveModel], answers: Iterable[Answer], device: str = "cpu") -> dict[int, int]:
    """Tokens that agree, by the request's number. One model after the other is loaded whole."""
    by_model: dict[str, list[Answer]] = {}
    for answer in answers:
        by_model.setdefault(answer.model, []).append(answer)
    found = {}
    for name, of_model in by_model.items():
        live = models[name]
        whole = SegmentedModel.load(live.checkpoint, dtype=live.dtype, device=device)
        for answer in of_model:
            found[answer.request.request_id] = _agreed(whole, answer)
    return found


@torch.inference_mode()
def _agreed(whole: SegmentedModel, answer: Answer) -> int:
    n = len(answer.tokens)
    if not n:
        return 0
    ids = [*answer.prompt, *answer.tokens]
    step = Packed(whole.architecture, 1, len(ids) - 1, whole.dtype, whole.device)
    hidden = whole.embed(torch.tensor(ids[:-1], device=whole.device), step.positions)
    hidden = whole.run(hidden, 0, whole.n_loaded, step)
    said = whole.logits(hidden[-n:]).argmax(-1)
    return int((said == torch.tensor(answer.tokens, device=whole.device)).sum())
