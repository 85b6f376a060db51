"""Routing: decides which replica a request goes to.

It uses what a real router in front of servers knows: where it sent each request, which requests have ended, and, if
servers publish the KV blocks that they hold, what is cached where.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
from numpy.random import SeedSequence
from numpy.typing import NDArray

from helios_sim.core import route
from helios_sim.core.layout import NEVER, IntArray
from helios_sim.core.route import AWAY, choose
from helios_sim.request import Request, RequestBlock

if TYPE_CHECKING:
    from helios_sim.by_answer import ByAnswer
    from helios_sim.workload.faults import Outages

DOWN = AWAY  # added to the requests of a replica that is down, so that a router by load avoids it
_DRAWS = 4096  # pairs at a time

Choice = Callable[[Request], int]
"""Returns the number of the replica for a request that arrives now."""
CachedShare = Callable[[int, Request], float]
"""Returns the share of a request's prompt that is cached in the replica of this number."""


class Router(StrEnum):
    ROUND_ROBIN = "round_robin"  # one after the other
    LEAST_LOADED = "least_loaded"  # fewest requests in it; the first of equals
    POWER_OF_TWO = "power_of_two"  # of two drawn at random the one with fewer requests; the first drawn of equals
    SESSION = "session"  # all turns of a session to one replica, sessions one after the other
    PREFIX_AWARE = "prefix_aware"  # most of the prompt cached, less a penalty for load: `core/route.py:score`
    BY_TASK = "by_task"  # among replicas meant for the request's task: fewest requests, the first of equals


class AnswerRouter(StrEnum):
    """Routers that go by answers, defined in `by_answer`."""

    CASCADE = "cascade"  # the first kind answers, the next one again if that answer is not confident
    THOMPSON = "thompson"  # a bandit: draws the worth of each kind's answers, by task, and takes the best draw
    MIXED = "mixed"  # at random, each kind with its share: a control that looks at nothing
    BEST_ANSWER = "best_answer"  # the kind that the request's text costs the fewest bits: a bound, no real router


_NUMBERS = {
    Router.ROUND_ROBIN: route.ROUND_ROBIN,
    Router.LEAST_LOADED: route.LEAST_LOADED,
    Router.POWER_OF_TWO: route.POWER_OF_TWO,
    Router.SESSION: route.ROUND_ROBIN,  # its replicas are known beforehand: the loop does not choose
    Router.PREFIX_AWARE: route.PREFIX_AWARE,
    Router.BY_TASK: route.BY_TASK,
}


@dataclass(frozen=True, slots=True)
class Routing:
    """Which router sends requests to replicas, and what it goes by."""

    router: Router = Router.ROUND_ROBIN
    seed: int = 0  # of random draws, the same for every arm of an experiment
    homes: tuple[tuple[int, ...], ...] = ()  # by task: the replicas that are meant for it; for by_task alone
    by_answer: ByAnswer | None = None  # replaces `router` if given

    def is_fixed(self, replicas: int) -> bool:
        """Whether a request's replica is known before it arrives, since it depends on no load."""
        if self.by_answer is not None:
            return False
        if self.router is Router.BY_TASK:
            return all(len(home) == 1 for home in self.homes)
        return replicas == 1 or self.router in (Router.ROUND_ROBIN, Router.SESSION)

    def fixed_choice(
        self, replicas: int, outages: Outages | None = None
    ) -> Callable[[RequestBlock], NDArray[np.int64]]:
        """Return a function from consecutive blocks to the replica of each request, (n,). Only for a fixed routing."""
        if self.router is Router.BY_TASK and replicas > 1:
            homes = np.array([home[0] for home in self.homes], np.int64)
            return lambda block: homes[block.task]  # the requests of a task's only home wait while it is down
        sent = 0

        def in_turn(block: RequestBlock) -> NDArray[np.int64]:
            nonlocal sent
            first, sent = sent, sent + len(block)
            chosen = np.arange(first, sent, dtype=np.int64) % replicas
            if self.router is Router.SESSION:
                chosen = block.stream % replicas
            if outages is not None:
                for row, arrival_ns in enumerate(block.arrival_ns.tolist()):
                    number = int(chosen[row])
                    if outages.back_ns(number, arrival_ns) is not None:
                        back_ns = [outages.back_ns(replica, arrival_ns) for replica in range(replicas)]
                        chosen[row] = stand_in(number, range(replicas), back_ns)
            return chosen

        return in_turn

    def meant(self, task: int, replicas: int) -> Sequence[int]:
        """Return the replicas that are meant for a task."""
        return self.homes[task] if self.router is Router.BY_TASK and replicas > 1 else range(replicas)

    def again(
        self, number: int, task: int, lost_by: int, requests_in: Sequence[int], back_ns: Sequence[int | None]
    ) -> int:
        """Return the replica for the `number`-th of the requests that a fault hit in one replica at one time.

        A router by load takes the replica with the fewest requests among replicas that are up. Other routers send the
        requests to replicas that are up in turn, from the one after the replica that lost them. Nothing is drawn or
        counted, so that other requests go where they would have gone. `back_ns`: by replica, when it is up again; None
        if it is up.
        """
        replicas = len(back_ns)
        meant = self.meant(task, replicas)
        up = [r for r in _in_turn(lost_by, meant) if back_ns[r] is None]
        if not up:
            return stand_in(lost_by, meant, back_ns)
        if self.is_fixed(replicas):
            return up[number % len(up)]
        return min(up, key=lambda replica: requests_in[replica])

    @property
    def number(self) -> int:
        """Number of the router in the loop."""
        return _NUMBERS[self.router]

    def homes_table(self) -> IntArray:
        """Return the replicas that are meant for each task, (tasks, most); NEVER fills unused places."""
        table = np.full((len(self.homes), max(map(len, self.homes), default=0)), NEVER, np.int64)
        for task, home in enumerate(self.homes):
            table[task, : len(home)] = home
        return table

    def pairs(self, replicas: int) -> Pairs:
        """Return the draws of `power_of_two`, request after request; (n, 2) zeros for other routers."""
        return Pairs(replicas if self.router is Router.POWER_OF_TWO else 1, self.seed)

    def choice(self, requests_in: Sequence[int], cached_share: CachedShare) -> Choice:
        """Return the choice of one run. `requests_in`: requests in each replica now, kept up to date by the caller.

        A single replica gets every request, whatever the router.
        """
        if self.router is Router.SESSION:
            return lambda request: request.stream % len(requests_in)
        if self.router is Router.PREFIX_AWARE and len(requests_in) > 1:
            return lambda request: _by_prefix(request, requests_in, cached_share)
        numbers, pairs, homes = count(), self.pairs(len(requests_in)), memoryview(self.homes_table())  # type: ignore[arg-type]

        def choose_next(request: Request) -> int:
            pair = memoryview(pairs.take(1))  # type: ignore[arg-type]
            return choose(self.number, next(numbers), request.task, pair, 0, homes, requests_in)

        return choose_next


def _by_prefix(request: Request, requests_in: Sequence[int], cached_share: CachedShare) -> int:
    """Choose as `route.by_prefix` does, among replicas that are up; the first replica if none is up."""
    up = [number for number, inside in enumerate(requests_in) if inside < DOWN] or [0]
    total = sum(requests_in[number] for number in up)
    return max(up, key=lambda n: route.score(cached_share(n, request), requests_in[n], total, len(up)))


def stand_in(number: int, meant: Sequence[int], back_ns: Sequence[int | None]) -> int:
    """Return the replica in place of one that is down: the next one up among `meant`, else the first to be back."""
    in_turn = _in_turn(number, meant)
    found = next((replica for replica in in_turn if back_ns[replica] is None), None)
    return min(in_turn, key=lambda replica: back_ns[replica] or 0) if found is None else found


def _in_turn(after: int, meant: Sequence[int]) -> list[int]:
    return [*(r for r in meant if r > after), *(r for r in meant if r <= after)]


class Pairs:
    """Endless draws of two different replicas, all pairs equally likely, whatever happens in the run."""

    def __init__(self, replicas: int, seed: int) -> None:
        self._replicas = replicas
        self._rng = np.random.Generator(np.random.PCG64(SeedSequence(seed, spawn_key=tuple(b"router"))))
        self._drawn: IntArray = np.zeros((0, 2), np.int64)

    def take(self, n: int) -> IntArray:
        """Return the next n pairs, (n, 2)."""
        if self._replicas == 1:
            return np.zeros((n, 2), np.int64)
        while len(self._drawn) < n:
            one = self._rng.integers(0, self._replicas, _DRAWS)
            other = self._rng.integers(0, self._replicas - 1, _DRAWS)
            other += other >= one
            self._drawn = np.concatenate([self._drawn, np.column_stack([one, other])])
        taken, self._drawn = self._drawn[:n], self._drawn[n:]
        return taken
