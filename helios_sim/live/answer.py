"""The text of one request as its model reads and writes it. Knows token ids, no slot and no time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from helios_sim.live.leaving import Owed, Seen
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
    seen: list[Seen] = field(default_factory=list)  # of its first tokens, while it was observed
    cached: int = 0  # tokens whose K and V are in the slot, the first ones
    owed: list[Owed] = field(default_factory=list)

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
