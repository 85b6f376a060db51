"""Arrival processes: when requests arrive.

Each specification makes a sampler that gives the arrivals of consecutive requests. Open arrivals draw gaps with
mean 1 and scale them by the rate, so two rates see the same gaps (common random numbers).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from helios_sim.errors import UserError, require_count, require_positive
from helios_sim.request import LATEST_NS, NS_PER_S, all_to_ns
from helios_sim.workload.traces import RequestTrace

ArrivalSampler = Callable[[int, int], NDArray[np.int64]]
"""(index of the first request, number of requests) -> arrivals in ns, shape (number,), not decreasing."""

_RATE_FIX = "give requests per second, for instance 6.0"


@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent exponential gaps; the first arrival comes after the first gap."""

    rate_per_s: float

    def __post_init__(self) -> None:
        require_positive("workload.arrivals.rate_per_s", self.rate_per_s, _RATE_FIX)

    def sampler(self, rng: Generator) -> ArrivalSampler:
        return _renewal(rng.standard_exponential, self.rate_per_s)


@dataclass(frozen=True, slots=True)
class Gamma:
    """Independent gamma gaps with this coefficient of variation: shape 1 / cv^2, scale cv^2 / rate.

    With a CV of 1 the arrivals are those of `Poisson`, draw for draw.
    """

    rate_per_s: float
    cv: float  # standard deviation of a gap over its mean; above 1 is burstier than Poisson

    def __post_init__(self) -> None:
        require_positive("workload.arrivals.rate_per_s", self.rate_per_s, _RATE_FIX)
        require_positive("workload.arrivals.cv", self.cv, "use constant arrivals for a CV of 0")

    def sampler(self, rng: Generator) -> ArrivalSampler:
        shape = self.cv**-2
        return _renewal(lambda n: rng.standard_gamma(shape, n) / shape, self.rate_per_s)


@dataclass(frozen=True, slots=True)
class Constant:
    """Equal gaps; the first arrival is at 0."""

    rate_per_s: float

    def __post_init__(self) -> None:
        require_positive("workload.arrivals.rate_per_s", self.rate_per_s, _RATE_FIX)

    def sampler(self, rng: Generator) -> ArrivalSampler:
        return lambda first, n: _arrivals_ns(np.arange(first, first + n) / self.rate_per_s)


@dataclass(frozen=True, slots=True)
class AllAtOnce:
    """Every request arrives at 0: the server works through a full queue."""

    def sampler(self, rng: Generator) -> ArrivalSampler:
        return _at_zero


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """A closed loop: `users` requests are in the system at any time. The server takes the next when one completes.

    The blocks carry arrival 0; a request's arrival is the moment at which the server releases it.
    """

    users: int

    def __post_init__(self) -> None:
        require_count("workload.arrivals.users", self.users, "give the number of users, for instance 1")

    def sampler(self, rng: Generator) -> ArrivalSampler:
        return _at_zero


@dataclass(frozen=True, slots=True)
class TraceArrivals:
    """The arrivals of a recorded trace, the first at 0, `rate_scale` times as fast."""

    trace: RequestTrace
    rate_scale: float = 1.0

    def __post_init__(self) -> None:
        require_positive("workload.arrivals.rate_scale", self.rate_scale, "use 1.0 for the recorded speed")
        if self.trace.arrival_ns is None:
            raise UserError(
                "workload.arrivals.trace",
                self.trace.source,
                f"must be a trace with arrivals; {self.trace.no_arrivals}",
                "say so in the file, or draw the arrivals (Poisson, Gamma, ...) and use this trace for the lengths",
            )

    def sampler(self, rng: Generator) -> ArrivalSampler:
        arrival_ns = self.trace.arrival_ns
        assert arrival_ns is not None
        if self.rate_scale == 1.0:
            return lambda first, n: arrival_ns[first : first + n].copy()
        arrival_s = arrival_ns / (NS_PER_S * self.rate_scale)
        return lambda first, n: _arrivals_ns(arrival_s[first : first + n])


Arrivals = Poisson | Gamma | Constant | AllAtOnce | ClosedLoop | TraceArrivals


def _renewal(draw_unit_gaps: Callable[[int], NDArray[np.float64]], rate_per_s: float) -> ArrivalSampler:
    elapsed = 0.0  # time of the latest arrival, in mean gaps

    def sample(first: int, n: int) -> NDArray[np.int64]:
        nonlocal elapsed
        gaps = draw_unit_gaps(n)
        gaps[0] += elapsed  # the running sum goes on in the same order whatever the size of a block
        clock = np.cumsum(gaps)
        elapsed = float(clock[-1])
        return _arrivals_ns(clock / rate_per_s)

    return sample


def _at_zero(first: int, n: int) -> NDArray[np.int64]:
    return np.zeros(n, dtype=np.int64)


def _arrivals_ns(times_s: NDArray[np.float64]) -> NDArray[np.int64]:
    """Converts ascending seconds, shape (n,), to whole nanoseconds. UserError if they leave the range of int64."""
    if not times_s[-1] <= LATEST_NS / NS_PER_S:
        raise UserError(
            "workload.arrivals",
            float(times_s[-1]),
            "the last arrival, in seconds, must lie within 146 years",
            "raise the rate or ask for fewer requests",
        )
    return all_to_ns(times_s, "workload.arrivals")
