"""A simulated run beside a measured one: the compared figures, as data for tables and drawings."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from helios_sim.report.records import Records

FloatArray = NDArray[np.float64]
STATISTICS = ("mean", "median", "p90", "p95", "p99")


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """One figure of both runs; None where it is undefined or not in the log."""

    group: str  # TTFT, TPOT, ITL, E2E, system
    statistic: str
    unit: str
    measured: float | None  # the mean, where it was measured several times; so is what is simulated
    simulated: float | None
    paced: float | None = None  # simulated at the pace that the device had meanwhile, where that is known
    runs: tuple[float, ...] = ()  # each measurement, where there are several

    @property
    def name(self) -> str:
        return self.statistic if self.group == "system" else f"{self.group} {self.statistic}"

    @property
    def difference(self) -> float | None:
        """Simulated over measured, less 1."""
        return _less_one(self.simulated, self.measured)

    @property
    def paced_difference(self) -> float | None:
        """The same of the simulation at the device's pace."""
        return _less_one(self.paced, self.measured)

    @property
    def noise(self) -> float | None:
        """How far two measurements of the same figure differ, as a share of their mean.

        The root mean square over all pairs, which is the root of 2 times the standard deviation.
        """
        if len(self.runs) < 2 or not self.measured:
            return None
        return sqrt(2.0) * float(np.std(self.runs, ddof=1)) / abs(self.measured)


@dataclass(frozen=True, slots=True, eq=False)
class RequestTimes:
    """TTFT, TPOT or E2E of every request of one part, for each run an ascending array (n,)."""

    part: str
    name: str  # TTFT, TPOT, E2E
    measured_s: tuple[FloatArray, ...]
    simulated_s: tuple[FloatArray, ...]


@dataclass(frozen=True, slots=True)
class Count:
    """Running or waiting requests over time, of both runs at the same k times, shape (k,) each."""

    name: str
    time_s: FloatArray
    measured: FloatArray
    simulated: FloatArray


@dataclass(frozen=True, slots=True)
class LoadError:
    """Relative changes of the derived figures under a slower profile, at one load."""

    load: float  # arrivals over the log's own
    changes: tuple[tuple[str, float], ...]  # (figure, relative change)


@dataclass(frozen=True, slots=True)
class Fidelity:
    """All that was compared."""

    # (what, its rows): of a log all requests, then parts of them; of a live server each arm at each load
    parts: tuple[tuple[str, tuple[ComparedRow, ...]], ...]
    counts: tuple[Count, ...]
    load_errors: tuple[LoadError, ...]
    profile_error: float  # that load_errors assume
    terms: tuple[tuple[str, str], ...]  # named quantities: what and how much
    spreads: tuple[RequestTimes, ...] = ()

    @property
    def rows(self) -> tuple[ComparedRow, ...]:
        return self.parts[0][1]

    @property
    def paced(self) -> bool:
        """Whether the device's pace was measured beside anything."""
        return any(row.paced is not None for _, rows in self.parts for row in rows)

    @property
    def repeated(self) -> bool:
        """Whether anything was measured more than once."""
        return any(len(row.runs) > 1 for _, rows in self.parts for row in rows)


def _less_one(value: float | None, over: float | None) -> float | None:
    return None if value is None or not over else value / over - 1.0


def compared_rows(measured: Records, simulated: Records, itl_ms: tuple[float | None, ...]) -> tuple[ComparedRow, ...]:
    """TTFT, TPOT, ITL (of the simulation; a log has no gaps between tokens), E2E, span and throughput."""
    rows = []
    for group, of in (("TTFT", _ttft), ("TPOT", _tpot), ("E2E", _e2e)):
        if group == "E2E":
            rows += [ComparedRow("ITL", s, "ms", None, v) for s, v in zip(STATISTICS, itl_ms, strict=False)]
        both = (statistics(of(measured)), statistics(of(simulated)))
        rows += [ComparedRow(group, s, "ms", a, b) for s, a, b in zip(STATISTICS, *both, strict=True)]
    spans = [records.span_ns() for records in (measured, simulated)]
    span_s = [None if span is None else span / 1e9 for span in spans]
    tokens, n = int(measured.output_tokens.sum()), len(measured)
    of_system = (("makespan", "s", None), ("throughput", "tokens/s", tokens), ("throughput", "requests/s", n))
    for figure, unit, total in of_system:
        log, model = (s if s is None or total is None else total / s for s in span_s)
        rows.append(ComparedRow("system", figure, unit, log, model))
    return tuple(rows)


def statistics(values_ms: FloatArray) -> tuple[float | None, ...]:
    """Mean, median, p90, p95, p99; None each without values."""
    if not len(values_ms):
        return (None,) * len(STATISTICS)
    return float(values_ms.mean()), *(float(p) for p in np.percentile(values_ms, (50, 90, 95, 99)))


def _ttft(records: Records) -> FloatArray:
    return records.ttft_ns() / 1e6


def _e2e(records: Records) -> FloatArray:
    return records.e2e_ns() / 1e6


def _tpot(records: Records) -> FloatArray:
    tpot_ns, defined = records.tpot_ns()
    return tpot_ns[defined] / 1e6
