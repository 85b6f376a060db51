"""Starts and stops replicas with load, by the rule of Kubernetes' HorizontalPodAutoscaler for an average value.

Every `every_ns` the number of replicas wanted is the requests in the system divided by `requests_per_replica`, rounded
up, from `least` to all there are. More replicas are started at once: a draining one serves again, any other takes
`start_ns` until it serves. Fewer are kept only if no more were wanted for `down_after_ns` (the stabilisation window):
then the replicas with the fewest requests drain. A draining replica gets no requests, and is off when a later look
finds it empty. Requests stay where the router sent them; waiting requests are not moved to a replica that starts. Cards
are paid for from the start of a replica until it is off. A replica that is off has lost its prefix cache.

https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/ (algorithm, sync period 15 s, stabilisation
window 300 s).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class Scaling:
    """Settings of the autoscaler. Times are in ns."""

    least: int
    requests_per_replica: float
    every_ns: int
    down_after_ns: int
    start_ns: int
    first: int | None = None  # replicas that serve at the beginning; None: `least`

    def wanted(self, requests: int, most: int) -> int:
        """The replicas wanted for so many requests in the system."""
        return min(max(-int(-requests // self.requests_per_replica), self.least), most)


class _State(Enum):
    OFF = "off"
    STARTING = "starting"
    UP = "up"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Scaled:
    """What an autoscaler did: when each replica was on, and how many replicas were on over time."""

    on_ns: tuple[tuple[tuple[int, int], ...], ...]
    counts: tuple[tuple[int, int, int], ...]  # time in ns, replicas that serve, replicas that are on
    starts: int  # replicas started, without those at the beginning

    def mean(self, first_ns: int, last_ns: int) -> float:
        """The mean number of replicas that were on between these times."""
        inside = sum(
            max(0, min(until, last_ns) - max(since, first_ns)) for spans in self.on_ns for since, until in spans
        )
        return inside / (last_ns - first_ns)


class Autoscaler:
    """Switches replicas of one run on and off. It is called at `next_ns`, until the last request has arrived."""

    def __init__(self, scaling: Scaling, replicas: int, requests_in: Callable[[int], int]) -> None:
        """`requests_in` returns how many requests are in a replica now."""
        self._scaling, self._requests_in = scaling, requests_in
        first = scaling.least if scaling.first is None else scaling.first
        self._states = [_State.UP if number < first else _State.OFF for number in range(replicas)]
        self._since_ns = [0] * replicas
        self._ready_ns: dict[int, int] = {}  # when each starting replica will serve
        self._on_ns: list[list[tuple[int, int]]] = [[] for _ in range(replicas)]
        self._counts: list[tuple[int, int, int]] = []
        self._starts = 0
        self._gone: list[int] = []  # replicas that went off since `gone` was last called
        # time and replicas wanted at each look of the stabilisation window
        self._recent: deque[tuple[int, int]] = deque([(0, first)])
        self._look_ns = scaling.every_ns
        self._count(0)

    @property
    def next_ns(self) -> int:
        """The time of the next look, or at which a replica has started."""
        return min(self._look_ns, *self._ready_ns.values()) if self._ready_ns else self._look_ns

    def serves(self, number: int) -> bool:
        """Whether a router may send requests to this replica."""
        return self._states[number] is _State.UP

    def gone(self) -> list[int]:
        """Return the replicas that went off since the last call."""
        found, self._gone = self._gone, []
        return found

    def look(self, now_ns: int) -> None:
        for number in [number for number, ready_ns in self._ready_ns.items() if ready_ns == now_ns]:
            del self._ready_ns[number]
            self._states[number] = _State.UP
        if now_ns == self._look_ns:
            self._look_ns += self._scaling.every_ns
            self._scale(now_ns)
        self._count(now_ns)

    def finish(self, end_ns: int) -> Scaled:
        """Return what was done, when the last request has left at `end_ns`."""
        on_ns = [list(spans) for spans in self._on_ns]
        for number, state in enumerate(self._states):
            if state is not _State.OFF:
                on_ns[number].append((self._since_ns[number], max(end_ns, self._since_ns[number])))
        return Scaled(tuple(map(tuple, on_ns)), tuple(self._counts), self._starts)

    def _scale(self, now_ns: int) -> None:
        requests = [self._requests_in(number) for number in range(len(self._states))]
        for number in self._in(_State.DRAINING):
            if not requests[number]:
                self._states[number] = _State.OFF
                self._gone.append(number)
                self._on_ns[number].append((self._since_ns[number], now_ns))
        wanted = self._scaling.wanted(sum(requests), len(requests))
        self._recent.append((now_ns, wanted))
        while self._recent[0][0] < now_ns - self._scaling.down_after_ns:
            self._recent.popleft()
        coming = len(self._in(_State.UP)) + len(self._in(_State.STARTING))
        for number in [*self._in(_State.DRAINING), *self._in(_State.OFF)][: max(0, wanted - coming)]:
            if self._states[number] is _State.DRAINING:
                self._states[number] = _State.UP
            else:
                self._states[number], self._since_ns[number] = _State.STARTING, now_ns
                self._ready_ns[number] = now_ns + self._scaling.start_ns
                self._starts += 1
        fewer = coming - max(wanted for _, wanted in self._recent)
        up = sorted(self._in(_State.UP), key=lambda number: (requests[number], -number))
        for number in up[: max(0, min(fewer, len(up) - 1))]:  # starting replicas are not stopped
            self._states[number] = _State.DRAINING

    def _in(self, state: _State) -> list[int]:
        return [number for number, its in enumerate(self._states) if its is state]

    def _count(self, now_ns: int) -> None:
        row = (now_ns, len(self._in(_State.UP)), len(self._states) - len(self._in(_State.OFF)))
        if not self._counts or self._counts[-1][1:] != row[1:]:
            self._counts.append(row)
