"""Scores a served text at every exit in one prefill pass. Knows a model and a text, no server and no clock."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from helios_sim.exits.rule import ExitRule, FixedCap, PerToken
from helios_sim.live.answer import Answer
from helios_sim.live.kv import Packed
from helios_sim.live.look import Exits
from helios_sim.live.model import SegmentedModel
from helios_sim.live.served import LiveModel
from helios_sim.policy.telemetry import Observation


@torch.inference_mode()
def score(
    data: LiveModel, model: SegmentedModel, exits: Exits, answer: Answer, exit_rule: ExitRule, now_ns: int
) -> Observation:
    """Every token of the answer as this model would have chosen it at each exit, prompt and answer before it given."""
    n = len(answer.tokens)
    ids = [*answer.prompt, *answer.tokens][: model.architecture.max_context_tokens]
    measure = exit_rule.confidence if isinstance(exit_rule, FixedCap | PerToken) else None
    step = Packed(model.architecture, 1, len(ids) - 1, model.dtype, model.device)
    hidden = model.embed(torch.tensor(ids[:-1], device=model.device), step.positions)
    choices, confidences, start = [], [], 0
    for depth in data.exits:
        hidden = model.run(hidden, start, depth, step)
        look = exits.look(model, depth, hidden[-n:], measure)
        choices.append(look.tokens)
        confidences.append(look.confidence or [0.0] * len(look.tokens))
        start = depth
    return observation(data, answer, np.array(choices).T, np.array(confidences).T, exit_rule, now_ns)


def observation(
    data: LiveModel,
    answer: Answer,
    choices: NDArray[np.int64],
    confidences: NDArray[np.float64],
    exit_rule: ExitRule,
    now_ns: int,
) -> Observation:
    """From choices and confidences (n, E). The text is the model's own, so its bits say nothing: None."""
    agrees = choices == choices[:, -1:]
    threshold = exit_rule.threshold if isinstance(exit_rule, FixedCap | PerToken) else None
    return Observation(
        model=answer.model,
        request_id=answer.request.request_id,
        time_ns=now_ns,
        confident=agrees if threshold is None else confidences >= threshold,
        agrees=agrees,
        bits=None,
        chars=len(data.decode(answer.tokens[: len(choices)])),
    )
