"""What clients ask for, in token ids, and the book in which an engine looks it up by the number of the request.

The loop knows a request by its lengths in characters (`request.Request`). A request from a client has its own prompt
and its own limits, which stand here beside it until it has left.
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

    temperature: float = 0.0  # 0: the likeliest
    top_p: float = 1.0
    seed: int | None = None  # None: drawn anew for each request
    logprob: bool = False  # report the chosen token's own, and the likeliest token's beside it


@dataclass(frozen=True, slots=True)
class Ask:
    """A request of a client, as the front hands it to the engine. It can be pickled."""

    request_id: int  # counted on from request to request
    prompts: Mapping[str, tuple[int, ...]]  # the prompt's ids, by candidate: each has a tokenizer of its own
    chars: int  # of the prompt
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    model: str | None = None  # only this candidate may answer; None: whichever is loaded
    sampling: Sampling = Sampling()
    priority: int = 0


@dataclass(slots=True)
class Asked:
    """An `Ask` in the engine, with what is known of its answer so far."""

    ask: Ask
    n_tokens: int  # that the answer has at most; simulated: exactly
    produced: int = 0  # tokens so far, of all models
    logprobs: list[tuple[float, int, float]] = field(default_factory=list)  # of each token, and the likeliest's


class Book(dict[int, Asked]):
    """By request number, of all requests in the system, and of the latest that left: a probe may score their texts."""

    def __init__(self) -> None:
        super().__init__()
        self._left: deque[int] = deque()

    def of(self, request: Request) -> Asked | None:
        """None for a request that no client sent: those that warm up the engine."""
        return self.get(request.request_id)

    def note_left(self, request_id: int) -> None:
        """The request has left the system."""
        if request_id in self:
            self._left.append(request_id)
        while len(self._left) > SERVED_TEXTS:
            self.pop(self._left.popleft(), None)
