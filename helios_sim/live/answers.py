"""The text of each request: what its model reads and writes, for how long it is kept, and how it is scored.

`score` and `agreed_tokens` read a served text once more in one prefill pass, in which K and V are exact everywhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from helios_sim.exits.rule import MEASURES, ExitRule, FixedCap, PerToken
from helios_sim.live.exits import ExitReader, ObservedToken, OwedToken
from helios_sim.live.looks import Foresight
from helios_sim.live.memory.kv import Packed
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.served import LiveModel
from helios_sim.policy.telemetry import Observation
from helios_sim.request import Request

if TYPE_CHECKING:
    from helios_sim.live.release import RampedToken


@dataclass(slots=True)
class Answer:
    """The prompt and the answer so far of one request on one model, in token ids."""

    request: Request
    model: str
    prompt: list[int]
    planned_tokens: int
    before: str = ""  # text that other models answered before; now part of the prompt
    tokens: list[int] = field(default_factory=list)  # answered by this model
    depths: list[int] = field(default_factory=list)  # layers that each token ran
    sure: list[float] = field(default_factory=list)  # the model's confidence in each token that was judged
    seen: list[ObservedToken] = field(default_factory=list)  # its observed first tokens
    cached: int = 0  # how many of its first tokens have K and V in the slot
    read: int = 0  # how many of its first tokens have K and V in the drafter's slot
    owed: list[OwedToken] = field(default_factory=list)
    ramped: list[RampedToken] = field(default_factory=list)  # what ramps said about each token that passed them
    waits: OwedToken | None = None  # its next token, if that waits at an exit for other rows

    @property
    def complete(self) -> bool:
        return len(self.tokens) >= self.planned_tokens

    def ids(self, start: int, stop: int) -> list[int]:
        """Token ids start..stop-1 of prompt and answer together."""
        n = len(self.prompt)
        return self.prompt[start:stop] + self.tokens[max(0, start - n) : max(0, stop - n)]

    def lose_cache(self) -> None:
        self.cached, self.read, self.waits = 0, 0, None
        self.owed.clear()

    @property
    def written(self) -> int:
        """How many of its first tokens have K and V in the slot, even if only in the first layers."""
        return self.cached + (self.waits is not None)

    def choices(self, n_tokens: int) -> NDArray[np.int64]:
        """The token that each exit chose for the first tokens, (n, E)."""
        return np.array([seen.choices for seen in self.seen[:n_tokens]], np.int64)

    def confidences(self, n_tokens: int) -> NDArray[np.float64]:
        """The exits' confidences for the first tokens, (n, E), in the measure of the rule at that time."""
        return np.array([seen.confidence for seen in self.seen[:n_tokens]], np.float64)


class Answers(dict[int, Answer]):
    """Answers by request number: of all requests in the system, and of the latest `kept` that completed and left.

    If `kept` is None, answers of all requests that ever ran.
    """

    def __init__(self, kept: int | None) -> None:
        super().__init__()
        self._kept = kept
        self._left: deque[int] = deque()

    def note_left(self, request_id: int, again: bool = False) -> None:
        """Record that the request has left the system. From then on only a complete answer is kept.

        `again`: the request will start over, so its answer is dropped.
        """
        if again:
            del self[request_id]
        elif self._kept is not None and self[request_id].complete:
            self._left.append(request_id)
        elif self._kept is not None:
            del self[request_id]
        if self._kept is None:
            return
        while len(self._left) > self._kept:
            del self[self._left.popleft()]


@torch.inference_mode()
def score(
    data: LiveModel, model: SegmentedModel, exits: ExitReader, answer: Answer, exit_rule: ExitRule, now_ns: int
) -> Observation:
    """Compute what this model would choose at each exit for every token of the answer, given the text before."""
    n = len(answer.tokens)
    ids = [*answer.prompt, *answer.tokens][: model.architecture.max_context_tokens]
    measure = exit_rule.confidence if isinstance(exit_rule, FixedCap | PerToken) else None
    foresight = Foresight(model, exits) if measure is not None and MEASURES[measure].proposes else None
    hidden, step = _embedded(model, ids[:-1])
    choices, confidences, start = [], [], 0
    for e, depth in enumerate(data.exits):
        hidden = model.run(hidden, start, depth, step)
        said = exits.read(model, depth, hidden[-n:], measure if foresight is None else None)
        choices.append(said.tokens)
        sure = said.confidence if foresight is None else foresight.says(e, hidden[-n:], said)
        confidences.append(sure or [0.0] * len(said.tokens))
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
    """Make an observation from choices and confidences (n, E). Bits are None, since the text is the model's own."""
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
    """Count the tokens of each answer that full depth would have chosen too, by request number.

    Each token is compared with the whole model's choice given the text before it. At near ties in bfloat16, one pass
    over many tokens can differ from single steps. The models are loaded one after the other.
    """
    by_model: dict[str, list[Answer]] = {}
    for answer in answers:
        by_model.setdefault(answer.model, []).append(answer)
    found = {}
    for name, of_model in by_model.items():
        live = models[name]
        whole = SegmentedModel.load(live.checkpoint, dtype=live.dtype, device=device)
        for answer in of_model:
            found[answer.request.request_id] = sum(agreements(whole, answer))
    return found


@torch.inference_mode()
def agreements(whole: SegmentedModel, answer: Answer) -> list[bool]:
    """Whether this model would have chosen each token of the answer, given the tokens before it."""
    n = len(answer.tokens)
    if not n:
        return []
    ids = [*answer.prompt, *answer.tokens]
    hidden, step = _embedded(whole, ids[:-1])
    hidden = whole.run(hidden, 0, whole.n_loaded, step)
    said = whole.logits(hidden[-n:]).argmax(-1)
    found: list[bool] = (said == torch.tensor(answer.tokens, device=whole.device)).tolist()
    return found


def _embedded(model: SegmentedModel, ids: list[int]) -> tuple[Tensor, Packed]:
    """Embedded tokens of one whole text, with the attention step for running it."""
    step = Packed(model.architecture, 1, len(ids), model.dtype, model.device)
    return model.embed(torch.tensor(ids, device=model.device), step.positions), step
