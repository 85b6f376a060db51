"""Decides which replica a request goes to. Knows how many requests each one has, and nothing else about them.

That is what a router in front of servers knows too: whom it sent to where, and who has come back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import cycle

import numpy as np
from numpy.random import SeedSequence
from numpy.typing import NDArray

from helios_sim.request import Request, RequestBlock

_DRAWS = 4096  # pairs at a time

Choice = Callable[[Request], int]
"""The number of the replica that a request goes to, which arrives now."""


class Router(StrEnum):
    ROUND_ROBIN = "round_robin"  # one after the other
    LEAST_LOADED = "least_loaded"  # fewest requests in it; the first of equals
    POWER_OF_TWO = "power_of_two"  # of two drawn at random the one with fewer requests; the first drawn of equals
    BY_TASK = "by_task"  # among those that are meant for the request's task: fewest requests, the first of equals


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

    def choice(self, requests_in: Sequence[int]) -> Choice:
        """`requests_in` holds the number of requests in each replica, at any moment the present one.

        A single replica gets every request, whatever the router.
        """
        match self.router:
            case Router.ROUND_ROBIN:
                turns = cycle(range(len(requests_in)))
                return lambda request: next(turns)
            case Router.LEAST_LOADED:
                return lambda request: requests_in.index(min(requests_in))
            case Router.POWER_OF_TWO:
                return _power_of_two(requests_in, self.seed)
            case Router.BY_TASK:
                homes, load = self.homes, requests_in.__getitem__
                return lambda request: min(homes[request.task], key=load)


def _power_of_two(requests_in: Sequence[int], seed: int) -> Choice:
    if len(requests_in) == 1:
        return lambda request: 0
    pairs = _pairs(len(requests_in), seed)

    def choose(request: Request) -> int:
        one, other = next(pairs)
        return other if requests_in[other] < requests_in[one] else one

    return choose


def _pairs(replicas: int, seed: int) -> Iterator[tuple[int, int]]:
    """Two different replicas, all pairs alike, without end. Which two does not depend on anything that happens."""
    rng = np.random.Generator(np.random.PCG64(SeedSequence(seed, spawn_key=tuple(b"router"))))
    while True:
        one = rng.integers(0, replicas, _DRAWS)
        other = rng.integers(0, replicas - 1, _DRAWS)
        other += other >= one
        yield from zip(one.tolist(), other.tolist(), strict=True)
