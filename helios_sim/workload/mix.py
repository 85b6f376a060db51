"""The mix of tasks: which task a request belongs to, and how the shares of tasks drift.

A drift says how far the mix has moved from the first shares (0) to the second (1) at a position along the workload. The
position is the request's index over the number of requests, or its arrival in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError, require_positive

Floats = NDArray[np.float64]


class Per(StrEnum):
    """The unit of a drift's position."""

    REQUESTS = "requests"  # index / number of requests, from 0 to 1
    SECONDS = "seconds"  # arrival; needs arrivals that are known before the run


@dataclass(frozen=True, slots=True)
class StepDrift:
    """A jump: the first shares before position `at`, the second from there on."""

    at: float

    def __post_init__(self) -> None:
        _require_position("workload.mix.at", self.at)

    def weight(self, position: Floats) -> Floats:
        return (position >= self.at).astype(np.float64)


@dataclass(frozen=True, slots=True)
class LinearDrift:
    """A ramp: the first shares until `start`, the second from `end` on, and linear between."""

    start: float
    end: float

    def __post_init__(self) -> None:
        _require_position("workload.mix.start", self.start)
        if not (math.isfinite(self.end) and self.end > self.start):
            raise UserError(
                "workload.mix.end", self.end, f"must lie after the start, {self.start}", "use a step for a jump"
            )

    def weight(self, position: Floats) -> Floats:
        return np.clip((position - self.start) / (self.end - self.start), 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class PeriodicDrift:
    """A cycle from the first shares to the second and back in every `period`: (1 - cos(2 pi position / period)) / 2."""

    period: float

    def __post_init__(self) -> None:
        require_positive("workload.mix.period", self.period, "give the length of one cycle")

    def weight(self, position: Floats) -> Floats:
        cycle: Floats = 0.5 - 0.5 * np.cos(position * (2 * math.pi / self.period))
        return cycle


Drift = StepDrift | LinearDrift | PeriodicDrift


@dataclass(frozen=True, slots=True)
class TaskMix:
    """Named tasks with their shares, and the shares to which they drift. Shares are scaled to a sum of 1."""

    tasks: tuple[str, ...]
    shares: tuple[float, ...]
    shares_after: tuple[float, ...] | None = None
    drift: Drift | None = None
    per: Per = Per.REQUESTS
    priorities: tuple[int, ...] | None = None  # by task; the lowest is served first; None means all are 0

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) != len(self.tasks) or not all(self.tasks):
            raise UserError("workload.mix.tasks", self.tasks, "must be different names, at least one", "rename")
        _require_shares("workload.mix.tasks", self.shares, len(self.tasks))
        if (self.shares_after is None) != (self.drift is None):
            raise UserError(
                "workload.mix.drift",
                None if self.drift is None else type(self.drift).__name__.removesuffix("Drift").lower(),
                "a drift and the shares that it leads to go together",
                "set both workload.mix.drift and workload.mix.after, or neither",
            )
        if self.shares_after is not None:
            _require_shares("workload.mix.after", self.shares_after, len(self.tasks))
        if self.priorities is not None and len(self.priorities) != len(self.tasks):
            raise UserError("workload.mix.priorities", self.priorities, "one for each task", "add or remove some")

    @classmethod
    def single(cls, task: str) -> TaskMix:
        return cls((task,), (1.0,))

    def needs_arrivals(self) -> bool:
        return self.drift is not None and self.per is Per.SECONDS

    def shares_at(self, position: Floats) -> Floats:
        """Shares (n, tasks) of the tasks at positions (n,); each row sums to 1."""
        return np.diff(self._cumulative(position), axis=1, prepend=0.0)

    def pick(self, uniform: Floats, position: Floats) -> NDArray[np.int64]:
        """Task index of each request from one uniform draw in [0, 1) each; shapes (n,)."""
        picked: NDArray[np.int64] = (uniform[:, None] >= self._cumulative(position)[:, :-1]).sum(axis=1, dtype=np.int64)
        return picked

    def priority(self, task: NDArray[np.int64]) -> NDArray[np.int64]:
        """Priority of each request by its task index, shape (n,)."""
        priorities = np.zeros(len(self.tasks)) if self.priorities is None else np.array(self.priorities)
        return priorities.astype(np.int64)[task]

    def _cumulative(self, position: Floats) -> Floats:
        before = _running_shares(self.shares)
        if self.drift is None or self.shares_after is None:
            return np.broadcast_to(before, (len(position), len(before)))
        weight = self.drift.weight(position)[:, None]
        blend: Floats = (1.0 - weight) * before + weight * _running_shares(self.shares_after)
        return blend


def _running_shares(shares: tuple[float, ...]) -> Floats:
    running = np.cumsum(np.asarray(shares, dtype=np.float64))
    scaled: Floats = running / running[-1]  # the last is exactly 1, as is the one before if the last share is 0
    return scaled


def _require_position(key: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise UserError(key, value, "must be a finite number of at least 0", "give a share of the run, or seconds")


def _require_shares(key: str, shares: Sequence[float], n_tasks: int) -> None:
    """Raises UserError unless there is one finite share of at least 0 for each task, and not all are 0."""
    if len(shares) != n_tasks:
        raise UserError(key, tuple(shares), f"must have one share for each of the {n_tasks} tasks", "add or remove")
    if not all(math.isfinite(share) and share >= 0 for share in shares) or not sum(shares) > 0:
        raise UserError(
            key, tuple(shares), "each share must be 0 or more and one above 0", "give shares such as 0.7 and 0.3"
        )
