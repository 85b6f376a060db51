"""Decides which replica a request goes to.

That is what a router in front of servers knows too: whom it sent to where, and who has come back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import count

import numpy as np
from numpy.random import SeedSequence
from numpy.typing import NDArray

from helios_sim.core import route
from helios_sim.core.layout import NEVER, IntArray
from helios_sim.core.route import choose
from helios_sim.request import Request, RequestBlock

_DRAWS = 4096  # pairs at a time

Choice = Callable[[Request], int]
"""The number of the replica that a request goes to, which arrives now."""


class Router(StrEnum):
    ROUND_ROBIN = "round_robin"  # one after the other
    LEAST_LOADED = "least_loaded"  # fewest requests in it; the first of equals
    POWER_OF_TWO = "power_of_two"  # of two drawn at random the one with fewer requests; the first drawn of equals
    BY_TASK = "by_task"  # among those that are meant for the request's task: fewest requests, the first of equals


_NUMBERS = {
    Router.ROUND_ROBIN: route.ROUND_ROBIN,
    Router.LEAST_LOADED: route.LEAST_LOADED,
    Router.POWER_OF_TWO: route.POWER_OF_TWO,
    Router.BY_TASK: route.BY_TASK,
}


@dataclass(frozen=True, slots=True)
class Routing:
    router: Router = Router.ROUND_ROBIN
    seed: int = 0  # of what is drawn: the same for every arm of an experiment
    homes: tuple[tuple[int, ...], ...] = ()  # by task: the replicas that are meant for it; for by_task alone

    def is_fixed(self, replicas: int) -> bool:
        """Whether a request's replica is known before it arrives: it depends on no load."""
        if self.router is Router.BY_TASK:
            return all(len(home) == 1 for home in self.homes)
        return replicas == 1 or self.router is Router.ROUND_ROBIN

    def fixed_choice(self, replicas: int) -> Callable[[RequestBlock], NDArray[np.int64]]:
        """The replica of each request of consecutive blocks, (n,): for a routing that is fixed."""
        if self.router is Router.BY_TASK and replicas > 1:
            homes = np.array([home[0] for home in self.homes], np.int64)
            return lambda block: homes[block.task]
        sent = 0

        def in_turn(block: RequestBlock) -> NDArray[np.int64]:
            nonlocal sent
            first, sent = sent, sent + len(block)
            return np.arange(first, sent, dtype=np.int64) % replicas

        return in_turn

    @property
    def number(self) -> int:
        """As the loop names the router."""
        return _NUMBERS[self.router]

    def homes_table(self) -> IntArray:
        """(tasks, most) the replicas that are meant for each task; NEVER where there are no more."""
        table = np.full((len(self.homes), max(map(len, self.homes), default=0)), NEVER, np.int64)
        for task, home in enumerate(self.homes):
            table[task, : len(home)] = home
        return table

    def pairs(self, replicas: int) -> Pairs:
        """What `power_of_two` draws, request after request; (n, 2) zeros for other routers."""
        return Pairs(replicas if self.router is Router.POWER_OF_TWO else 1, self.seed)

    def choice(self, requests_in: Sequence[int]) -> Choice:
        """`requests_in` holds the number of requests in each replica, at any moment the present one.

        A single replica gets every request, whatever the router.
        """
        numbers, pairs, homes = count(), self.pairs(len(requests_in)), memoryview(self.homes_table())  # type: ignore[arg-type]

        def choose_next(request: Request) -> int:
            pair = memoryview(pairs.take(1))  # type: ignore[arg-type]
            return choose(self.number, next(numbers), request.task, pair, 0, homes, requests_in)

        return choose_next


class Pairs:
    """Two different replicas, all pairs alike, without end. Which two does not depend on anything that happens."""

    def __init__(self, replicas: int, seed: int) -> None:
        self._replicas = replicas
        self._rng = np.random.Generator(np.random.PCG64(SeedSequence(seed, spawn_key=tuple(b"router"))))
        self._drawn: IntArray = np.zeros((0, 2), np.int64)

    def take(self, n: int) -> IntArray:
        """The next n pairs, (n, 2)."""
        if self._replicas == 1:
            return np.zeros((n, 2), np.int64)
        while len(self._drawn) < n:
            one = self._rng.integers(0, self._replicas, _DRAWS)
            other = self._rng.integers(0, self._replicas - 1, _DRAWS)
            other += other >= one
            self._drawn = np.concatenate([self._drawn, np.column_stack([one, other])])
        taken, self._drawn = self._drawn[:n], self._drawn[n:]
        return taken
