"""The plan of faults: which fault strikes which replica at what time.

It is drawn from the seed alone, so every policy meets the same faults. A plan is a stream in order of time, and endless
if a kind of fault has a rate. Each kind and replica has its own random stream: adding a fault moves no other fault and
no request.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.random import SeedSequence

from helios_sim.request import LATEST_NS, NS_PER_S


class FaultKind(StrEnum):
    REPLICA_DIES = "replica_dies"  # its requests are lost; it is back, with its deployment, when the fault ends
    ITERATION_FAILS = "iteration_fails"  # the iteration in progress fails, and its requests are lost
    OUT_OF_MEMORY = "out_of_memory"  # OOM in the iteration in progress: its requests rerun, half as many at once
    LOAD_FAILS = "load_fails"  # the load in progress, or the next one, fails: the copied weights are not there
    TRANSFER_STALLS = "transfer_stalls"  # the transfer in progress, or the next one, takes `lasts_ns` longer
    SLOW_CARD = "slow_card"  # iterations that begin before the fault ends take `factor` times as long


LOSING = (FaultKind.REPLICA_DIES, FaultKind.ITERATION_FAILS)  # requests hit by these are sent again or dropped
_STATES = (FaultKind.REPLICA_DIES, FaultKind.SLOW_CARD)  # faults that last; no second one begins while one lasts


@dataclass(frozen=True, slots=True)
class FaultSpec:
    """Settings of one kind of fault: when it strikes each of its replicas."""

    kind: FaultKind
    at_ns: tuple[int, ...] = ()  # above 0
    rate_per_hour: float | None = None  # random faults of each replica (exponential gaps)
    replicas: tuple[int, ...] | None = None  # None means all
    lasts_ns: int = 0
    factor: float = 1.0  # slowdown of a slow card


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that begins at `time_ns` or, with `ends`, is over then."""

    time_ns: int
    kind: FaultKind
    replica: int
    lasts_ns: int = 0
    factor: float = 1.0
    ends: bool = False

    @property
    def until_ns(self) -> int:
        return self.time_ns + self.lasts_ns


@dataclass(frozen=True, slots=True)
class Struck:
    """The effect of a fault. `hit` is false if there was nothing for it to strike."""

    time_ns: int
    kind: FaultKind
    replica: int
    hit: bool
    until_ns: int
    retried: int = 0  # requests hit and sent again
    lost: int = 0  # requests hit and dropped
    wasted_tokens: int = 0  # output tokens that the retried and lost requests had by then


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """The faults of a run, and how often a request that they hit is retried."""

    specs: tuple[FaultSpec, ...]
    retries: int  # how often a request that a fault hit is sent again before it is dropped
    seed: int

    def faults(self, replicas: int) -> Iterator[Fault]:
        """All faults in order of time. At equal times, ends come before beginnings, then the order is replica, kind."""
        streams = [
            self._stream(spec, replica)
            for spec in self.specs
            for replica in (range(replicas) if spec.replicas is None else spec.replicas)
        ]
        return heapq.merge(*streams, key=lambda fault: (fault.time_ns, not fault.ends, fault.replica, fault.kind))

    def outages(self, replica: int) -> Iterator[tuple[int, int]]:
        """The outages of a replica in order of time: when it dies and when it is back, in ns."""
        for spec in self.specs:
            if spec.kind is FaultKind.REPLICA_DIES and (spec.replicas is None or replica in spec.replicas):
                yield from ((f.time_ns, f.until_ns) for f in self._stream(spec, replica) if not f.ends)

    def _stream(self, spec: FaultSpec, replica: int) -> Iterator[Fault]:
        free_ns = 0
        for time_ns in heapq.merge(sorted(spec.at_ns), self._random_ns(spec, replica)):
            if time_ns < free_ns:
                continue
            yield Fault(time_ns, spec.kind, replica, spec.lasts_ns, spec.factor)
            if spec.kind in _STATES:
                free_ns = time_ns + spec.lasts_ns
                yield Fault(free_ns, spec.kind, replica, factor=spec.factor, ends=True)

    def _random_ns(self, spec: FaultSpec, replica: int) -> Iterator[int]:
        if spec.rate_per_hour is None:
            return
        key = (*b"faults", *spec.kind.encode(), replica)
        rng = np.random.Generator(np.random.PCG64(SeedSequence(self.seed, spawn_key=key)))
        time_ns, mean_ns = 0, 3600 / spec.rate_per_hour * NS_PER_S
        while True:
            time_ns += max(1, round(float(rng.exponential(mean_ns))))
            if time_ns > LATEST_NS / 2:
                return
            yield time_ns


class Outages:
    """Outages of all replicas, known beforehand: tells which are down when a request arrives."""

    def __init__(self, plan: FaultPlan, replicas: int) -> None:
        self._coming = [plan.outages(replica) for replica in range(replicas)]
        self._known: list[list[tuple[int, int]]] = [[] for _ in range(replicas)]

    def back_ns(self, replica: int, arrival_ns: int) -> int | None:
        """The time at which a replica that is down at this arrival is back; None if the replica is up.

        At equal times, requests arrive before replicas die or come back. Arrivals must not decrease.
        """
        known = self._known[replica]
        while known and known[0][1] < arrival_ns:
            del known[0]
        while not known:
            found = next(self._coming[replica], None)
            if found is None:
                return None
            if found[1] >= arrival_ns:
                known.append(found)
        return known[0][1] if known[0][0] < arrival_ns else None
