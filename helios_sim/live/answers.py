"""The text of one request as its model reads and writes it. Knows token ids, no slot and no time.

The texts of whoever may still be asked about. Knows requests by their numbers, no server and no slot.

Scores a served text at every exit in one prefill pass. Knows a model and a text, no server and no clock.

Reads served answers once more, at full depth: which of their tokens are full depth's own? Knows no server.

In one pass over prompt and answer K and V are exact everywhere, so a token is held against what the whole model says
of the very text before it. Near ties a pass over many tokens and a step of one can differ in bfloat16.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from helios_sim.exits.rule import ExitRule, FixedCap, PerToken
from helios_sim.live.exits import ExitReader
from helios_sim.live.memory.kv import Packed
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.rows import ObservedToken, OwedToken
from helios_sim.live.served import LiveModel
from helios_sim.policy.telemetry import Observation
from helios_sim.request import Request


@dataclass(slots=True)
class Answer:
    request: Request
    model: str
    prompt: list[int]
    planned_tokens: int
    before: str = ""  # answered by another model, and part of the prompt since
    tokens: list[int] = field(default_factory=list)  # answered by this one
    depths: list[int] = field(default_factory=list)  # layers that each of them ran
    seen: list[ObservedToken] = field(default_factory=list)  # of its first tokens, while it was observed
    cached: int = 0  # tokens whose K and V are in the slot, the first ones
    owed: list[OwedToken] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return len(self.tokens) >= self.planned_tokens

    def ids(self, start: int, stop: int) -> list[int]:
        """Of prompt and answer in one."""
        n = len(self.prompt)
        return self.prompt[start:stop] + self.tokens[max(0, start - n) : max(0, stop - n)]

    def lose_cache(self) -> None:
        self.cached = 0
        self.owed.clear()

    def choices(self, n_tokens: int) -> NDArray[np.int64]:
        """(n, E) token that each exit chose, of the first tokens."""
        return np.array([seen.choices for seen in self.seen[:n_tokens]], np.int64)

    def confidences(self, n_tokens: int) -> NDArray[np.float64]:
        """(n, E) confidence by the measure of the rule that they were observed under."""
        return np.array([seen.confidence for seen in self.seen[:n_tokens]], np.float64)


class Answers(dict[int, Answer]):
    """By the request's number: of everybody in the system, and of the latest `kept` who have completed and left.

    None: of everybody who ever ran.
    """

    def __init__(self, kept: int | None) -> None:
        super().__init__()
        self._kept = kept
        self._left: deque[int] = deque()

    def note_left(self, request_id: int) -> None:
        """The request has left the system. Only complete answers can be asked for after that."""
        if self._kept is None:
            return
        if self[request_id].complete:
            self._left.append(request_id)
        else:
            del self[request_id]
        while len(self._left) > self._kept:
            del self[self._left.popleft()]


@torch.inference_mode()
def score(
    data: LiveModel, model: SegmentedModel, exits: ExitReader, answer: Answer, exit_rule: ExitRule, now_ns: int
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
