"""Figures of an arm and its ratios to the baseline with their intervals, over runs that match by seed and requests."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from helios_sim.report.intervals import (
    LEVEL,
    FloatArray,
    Interval,
    Method,
    bounds,
    left_out,
    mean_bounds,
    ratio_bounds,
    stretches,
)
from helios_sim.report.metrics import COUNTS, DEFINITIONS, Band, Metrics, MetricValue, meets
from helios_sim.report.percentiles import Ranked
from helios_sim.report.records import Records
from helios_sim.request import NS_PER_S, Slo, Status

Run = tuple[Records, Metrics]
IntArray = NDArray[np.int64]

_TIMES = ("queue_s", "ttft_s", "tpot_s", "e2e_s")
_QUANTILES = {"p50": 50, "p90": 90, "p95": 95, "p99": 99}
# Quotients of two sums over the completed requests: (above, below).
_QUOTIENTS = {
    "layers_per_token": ("layers_run", "output_tokens"),
    "agreement": ("agreed_tokens", "output_tokens"),
    "early_exit_fraction": ("early_tokens", "output_tokens"),
    "breach_fraction": ("breach_tokens", "output_tokens"),
    "bits_per_char": ("microbits", "output_chars"),
}


@dataclass(frozen=True, slots=True)
class Ratio:
    """arm / baseline; `low` and `high` bound it at the 95 % level where the method gives bounds."""

    ratio: float | None
    low: float | None
    high: float | None
    method: Method
    n: int  # paired requests or seeds behind it


def compare(
    arm: Sequence[Run], baseline: Sequence[Run], *, names: Collection[str] | None = None, level: float = LEVEL
) -> dict[str, Ratio]:
    """Ratios of all metrics that have one, over replicates that match by position (same seed, same requests).

    Metrics of requests are those of the requests that both arms completed. A ratio is that of the means over the seeds.
    `names`: only of these metrics; None: of all. `level`: of the intervals.
    """
    if len(arm) != len(baseline):
        raise ValueError(f"{len(arm)} replicates of the arm, {len(baseline)} of the baseline")
    shared = [(_Requests.of(a, b), _Requests.of(b, a)) for (a, _), (b, _) in zip(arm, baseline, strict=True)]
    ratios: dict[str, Ratio] = {}
    for name in arm[0][1]:
        ours, theirs = [m[name] for _, m in arm], [m[name] for _, m in baseline]
        if None in ours or None in theirs or (names is not None and name not in names):
            continue
        ratio = _of_requests(name, shared, level) or _of_system(name, ours, theirs, level)
        if ratio is not None:
            ratios[name] = ratio
    return ratios


def intervals_of(runs: Sequence[Run], names: Collection[str] | None = None) -> dict[str, Interval]:
    """The interval of each metric that is defined in every run: of its mean over the runs, or within the only one.

    `names`: only of these metrics; None: of all.
    """
    found = {}
    requests = _Requests.of(runs[0][0]) if len(runs) == 1 else None
    for name in runs[0][1]:
        values = [metrics[name] for _, metrics in runs]
        if None in values or (names is not None and name not in names):
            continue
        interval = interval_of(name, values)
        if requests is not None and interval.method is Method.NONE:
            interval = _within_run(name, requests) or interval
        found[name] = interval
    return found


def attainment_of(records: Records, slo: Slo) -> Interval:
    """The interval, within one run, of the share of requests that meet every SLO, of completed and dropped ones."""
    counted = records.completed | records.has_status(Status.DROPPED)
    met = np.zeros(len(records), np.int64)
    met[records.completed] = meets(records, slo)
    found = _of_sums(met[counted], np.ones(int(counted.sum()), np.int64))
    if found is None or found.without is None:
        return Interval(None, None, Method.NONE, 1)
    low, high = bounds(found.whole, found.without, share=True, in_order=True)
    return _interval(low, high, Method.WITHIN_RUN, int(counted.sum()))


def interval_of(name: str, values: Sequence[MetricValue]) -> Interval:
    """The interval of the mean of a metric over seeds, from its values alone; of one seed only for what is exact."""
    n = len(values)
    bands = [value for value in values if isinstance(value, Band)]
    if bands:
        return Interval(float(np.mean([b.low for b in bands])), float(np.mean([b.high for b in bands])), Method.BAND, n)
    if n == 1:
        return Interval(None, None, Method.EXACT if name in COUNTS else Method.NONE, 1)
    low, high = mean_bounds(np.array(values, np.float64), share=_is_share(name))
    return _interval(low, high, Method.OVER_SEEDS, n)


def _interval(low: FloatArray, high: FloatArray, method: Method, n: int) -> Interval:
    known = bool(np.isfinite(low) and np.isfinite(high))
    return Interval(float(low), float(high), method, n) if known else Interval(None, None, Method.NONE, n)


def _is_share(name: str) -> bool:
    return name in DEFINITIONS and DEFINITIONS[name].unit == "share"


def _of_requests(name: str, shared: Sequence[tuple[_Requests, _Requests]], level: float) -> Ratio | None:
    """The ratio of a metric of requests over those that both arms completed; None for other metrics."""
    found = [(_statistic(name, ours), _statistic(name, theirs)) for ours, theirs in shared]
    if any(a is None or b is None for a, b in found) or not min(ours.n for ours, _ in shared):
        return None
    if len(shared) > 1:
        values = [float(a.whole) for a, _ in found if a], [float(b.whole) for _, b in found if b]
        return _over_seeds(name, *values, level)
    (ours, theirs), n = found[0], shared[0][0].n
    assert ours is not None
    assert theirs is not None
    if not theirs.whole > 0:
        return None
    value = float(ours.whole / theirs.whole)
    if ours.without is None or theirs.without is None:
        return Ratio(value, None, None, Method.NONE, n)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = bounds(np.array(value), ours.without / theirs.without, in_order=True, level=level)
    return _ratio(name, value, low, high, Method.WITHIN_RUN, n, [float(theirs.whole)])


def _of_system(name: str, ours: Sequence[MetricValue], theirs: Sequence[MetricValue], level: float) -> Ratio | None:
    """Ratio from whole-run figures; None where it is undefined."""
    our_bands, their_bands = ([v for v in values if isinstance(v, Band)] for values in (ours, theirs))
    if len(our_bands) == len(ours) and len(their_bands) == len(theirs):
        # The same power model for both arms at either end: the ends are compared with each other.
        low = _mean_ratio([v.low for v in our_bands], [v.low for v in their_bands])
        high = _mean_ratio([v.high for v in our_bands], [v.high for v in their_bands])
        if low is None or high is None:
            return None
        return Ratio(None, min(low, high), max(low, high), Method.BAND, len(ours))
    a, b = ([float(v) for v in values if isinstance(v, int | float)] for values in (ours, theirs))
    if len(a) < len(ours) or len(b) < len(theirs):
        return None
    return _over_seeds(name, a, b, level)


def _over_seeds(name: str, ours: Sequence[float], theirs: Sequence[float], level: float) -> Ratio | None:
    """The ratio of the means over seeds; None where it is undefined."""
    value, n = _mean_ratio(ours, theirs), len(ours)
    if value is None:
        return None
    if n == 1:
        return Ratio(value, None, None, Method.EXACT if name in COUNTS else Method.NONE, n)
    low, high = ratio_bounds(np.array(ours, np.float64), np.array(theirs, np.float64), level)
    return _ratio(name, value, low, high, Method.OVER_SEEDS, n, theirs)


def _ratio(
    name: str, value: float, low: FloatArray, high: FloatArray, method: Method, n: int, theirs: Sequence[float]
) -> Ratio:
    """With its bounds, if there are any; no share is above 1, and so its ratio not above 1 over the baseline's."""
    found = _interval(low, high, method, n)
    if found.low is None or found.high is None:
        return Ratio(value, None, None, found.method, n)
    most = max(value, 1 / min(theirs)) if _is_share(name) and min(theirs) > 0 else found.high
    return Ratio(value, min(found.low, value), max(value, min(found.high, most)), found.method, n)


def _mean_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    base = sum(theirs)
    return sum(ours) / base if base > 0 else None


@dataclass(frozen=True, slots=True)
class _Requests:
    """Completed requests in their order; a column is made when it is asked for, since runs may be long."""

    records: Records
    rows: NDArray[np.bool_]
    n: int
    latest: dict[str, Ranked] = field(default_factory=dict)  # of one time, whose percentiles are asked for in a row

    @classmethod
    def of(cls, records: Records, other: Records | None = None) -> _Requests:
        """The completed ones of `records`, or those that `other` completed too."""
        rows = records.completed
        if other is not None:
            rows = rows & np.isin(records.request_id, other.request_id[other.completed], assume_unique=True)
        return cls(records, rows, int(rows.sum()))

    def time_ns(self, name: str) -> tuple[FloatArray | IntArray, NDArray[np.bool_] | None]:
        """(n,) the time of each request, and where it is defined; None: for all."""
        r, rows = self.records, self.rows
        if name == "tpot_s":
            gaps = (r.output_tokens - 1)[rows]
            decode_ns = (r.last_token_ns.values - r.first_token_ns.values)[rows]
            return np.where(gaps > 0, decode_ns / np.maximum(gaps, 1), 0.0), gaps > 0
        until = {"queue_s": r.scheduled_ns, "ttft_s": r.first_token_ns, "e2e_s": r.last_token_ns}[name]
        return (until.values - r.arrival_ns)[rows], None

    def ranked(self, name: str) -> Ranked | None:
        """A time where it is defined; None: nowhere."""
        if name not in self.latest:
            self.latest.clear()
            values, defined = self.time_ns(name)
            counted = np.ones(self.n, np.bool_) if defined is None else defined
            if not counted.any():
                return None
            self.latest[name] = Ranked(values, counted)
        return self.latest[name]

    def count(self, name: str) -> IntArray:
        """(n,) whole numbers; of bits that are not known 0: then no figure is."""
        column = self.records.microbits.values if name == "microbits" else getattr(self.records, name)
        return column[self.rows].astype(np.int64)


@dataclass(frozen=True, slots=True)
class _Statistic:
    """A figure of requests, and the same without each stretch of them, shape (stretches,); None: too few for that."""

    whole: FloatArray
    without: FloatArray | None


def _within_run(name: str, requests: _Requests) -> Interval | None:
    """The interval of a metric of requests along one run; None for other metrics."""
    found = _statistic(name, requests)
    if found is None or found.without is None:
        return None
    scale = NS_PER_S if DEFINITIONS[name].unit == "s" else 1.0
    if name == "bits_per_char":
        scale = 1e6
    low, high = bounds(found.whole / scale, found.without / scale, share=_is_share(name), in_order=True)
    return _interval(low, high, Method.WITHIN_RUN, requests.n)


def _statistic(name: str, requests: _Requests) -> _Statistic | None:
    """Of requests alone: times in ns, bits in millionths. None for other metrics, and where it is not defined."""
    if name in _QUOTIENTS:
        above, below = (requests.count(column) for column in _QUOTIENTS[name])
        return _of_sums(above, below)
    time, _, statistic = name.rpartition("_")
    if time not in _TIMES or statistic not in ("mean", *_QUANTILES):
        return None
    if statistic != "mean":
        ranked = requests.ranked(time)
        return None if ranked is None else _Statistic(*ranked.percentile_and_without(_QUANTILES[statistic]))
    values, defined = requests.time_ns(time)
    counted = np.ones(requests.n, np.bool_) if defined is None else defined
    return _of_sums(values, counted) if counted.any() else None


def _of_sums(above: FloatArray | IntArray, below: IntArray | NDArray[np.bool_]) -> _Statistic | None:
    """The sum of one column over that of another."""
    over = int(below.sum())
    if not over:
        return None
    whole, starts = np.array(above.sum() / over), stretches(len(above))[:-1]
    if len(starts) < 2:
        return _Statistic(whole, None)
    (_, top), (_, bottom) = (left_out(np.add.reduceat(column, starts, dtype=above.dtype)) for column in (above, below))
    with np.errstate(divide="ignore", invalid="ignore"):
        return _Statistic(whole, top / bottom)
