"""Requests of clients in token ids, and the book in which an engine looks them up by request number.

The loop knows a request by its lengths in characters (`request.Request`). The prompt and the limits of a client's
request are kept here until the request has left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from helios_sim.request import Request
from helios_sim.serving.replica import SERVED_TEXTS


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen from the logits."""

    temperature: float = 0.0  # 0: the likeliest token
    top_p: float = 1.0
    seed: int | None = None  # None: a new one is drawn for each request
    logprob: bool = False  # report the logprobs of the chosen and of the likeliest token


@dataclass(frozen=True, slots=True)
class Ask:
    """A client's request, as the front sends it to the engine. It can be pickled."""

    request_id: int  # counts up from request to request
    prompts: Mapping[str, tuple[int, ...]]  # token ids of the prompt by candidate, since each has its own tokenizer
    chars: int  # characters of the prompt
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    model: str | None = None  # only this candidate may answer; None: the one that is loaded
    sampling: Sampling = Sampling()
    priority: int = 0


@dataclass(slots=True)
class Asked:
    """An `Ask` in the engine, and its answer so far."""

    ask: Ask
    n_tokens: int  # length of the answer: at most when live, exactly when simulated
    produced: int = 0  # tokens of the answer so far, by all models
    logprobs: list[tuple[float, int, float]] = field(default_factory=list)  # of each token; likeliest id, its logprob


class Book(dict[int, Asked]):
    """Clients' requests by number: all in the system, and the latest that left, since a probe may score their texts."""

    def __init__(self) -> None:
        super().__init__()
        self._left: deque[int] = deque()

    def of(self, request: Request) -> Asked | None:
        """Looks up a request. Returns None if no client sent it, as when the engine is warmed up."""
        return self.get(request.request_id)

    def note_left(self, request_id: int) -> None:
        """Notes that a request has left the system, and forgets the oldest that left."""
        if request_id in self:
            self._left.append(request_id)
        while len(self._left) > SERVED_TEXTS:
            self.pop(self._left.popleft(), None)
