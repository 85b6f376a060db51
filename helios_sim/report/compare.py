"""Figures of an arm and its ratios to the baseline with their intervals, over runs that match by seed and requests."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from helios_sim import on_disk
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
from helios_sim.report.percentiles import Percentiles, Ranked, Sifted
from helios_sim.report.records import Records
from helios_sim.report.series import Series
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
    """A ratio arm / baseline, with bounds at the 95 % level if the method gives them."""

    ratio: float | None
    low: float | None
    high: float | None
    method: Method
    n: int  # number of paired requests or seeds


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
    """The interval of each metric that is defined in every run: for its mean over the runs, or within a single run.

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
    """The interval within one run of the share of completed and dropped requests that meet every SLO."""

    def met(part: Records) -> IntArray:
        counted = part.completed | part.has_status(Status.DROPPED)
        good = np.zeros(len(part), np.int64)
        good[part.completed] = meets(part, slo)
        return good[counted]

    series = records.series(met)
    found = _of_sums(series, Series(lambda: (np.ones_like(block) for block in series)))
    if found is None or found.without is None:
        return Interval(None, None, Method.NONE, 1)
    low, high = bounds(found.whole, found.without, share=True, in_order=True)
    return _interval(low, high, Method.WITHIN_RUN, len(series))


def interval_of(name: str, values: Sequence[MetricValue]) -> Interval:
    """The interval of a metric's mean over seeds, from its values; with one seed only for exact metrics."""
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
    """The ratio of whole-run figures; None if it is undefined."""
    our_bands, their_bands = ([v for v in values if isinstance(v, Band)] for values in (ours, theirs))
    if len(our_bands) == len(ours) and len(their_bands) == len(theirs):
        # Ends of bands are compared with each other: each end is one power model for both arms.
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
    """The ratio of the means over seeds; None if it is undefined."""
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
    """Make a ratio with its bounds, if there are any. That of shares is at most 1 over the baseline's share."""
    found = _interval(low, high, method, n)
    if found.low is None or found.high is None:
        return Ratio(value, None, None, found.method, n)
    most = max(value, 1 / min(theirs)) if _is_share(name) and min(theirs) > 0 else found.high
    return Ratio(value, min(found.low, value), max(value, min(found.high, most)), found.method, n)


def _mean_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    base = sum(theirs)
    return sum(ours) / base if base > 0 else None


Rows = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Requests:
    """Completed requests in order. Columns are made when they are asked for, since runs may be long."""

    records: Records
    other: Records | None  # if given, only requests that it completed too
    rows: Rows | None  # rows of the requests; None if records are on disk, where they are found for each part
    n: int
    latest: dict[str, Percentiles] = field(default_factory=dict)  # percentiles of the time that was asked for last

    @classmethod
    def of(cls, records: Records, other: Records | None = None) -> _Requests:
        """The completed requests of `records`, or those that `other` completed too."""
        rows = None if records.on_disk else next(_shared(records, other))[1]
        n = sum(int(np.count_nonzero(each)) for _, each in _shared(records, other)) if rows is None else int(rows.sum())
        return cls(records, other, rows, n)

    def parts(self) -> Iterator[tuple[Records, Rows]]:
        """Yield parts of the records, and the rows of each that belong to the requests."""
        return _shared(self.records, self.other) if self.rows is None else iter([(self.records, self.rows)])

    def times(self, name: str) -> Iterator[tuple[FloatArray | IntArray, Rows]]:
        """Yield the time of each request, and where it is defined, part by part."""
        return (_time_ns(name, part, rows) for part, rows in self.parts())

    def ranked(self, name: str) -> Percentiles | None:
        """Percentiles of the defined values of a time; None if there are none."""
        if name not in self.latest:
            self.latest.clear()
            if self.rows is None and self.n > on_disk.SPAN_ROWS:
                sifted = Sifted(lambda: self.times(name), self.n, list(_QUANTILES.values()))
                if not sifted.counted:
                    return None
                self.latest[name] = sifted
                return sifted
            parts = list(self.times(name))
            values, counted = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
            if not counted.any():
                return None
            self.latest[name] = Ranked(values, counted)
        return self.latest[name]

    def mean(self, name: str) -> _Statistic | None:
        """The mean of the defined values of a time."""
        if self.rows is not None:
            values, counted = next(self.times(name))
            return _of_sums(Series(lambda: [values]), Series(lambda: [counted]))
        return _of_sums(
            Series(lambda: (values for values, _ in self.times(name))),
            Series(lambda: (counted for _, counted in self.times(name))),
        )

    def counts(self, name: str) -> Series:
        """Whole numbers; 0 for unknown bits, with which no figure is made."""
        return Series(lambda: (_count(name, part, rows) for part, rows in self.parts()))


def _shared(records: Records, other: Records | None) -> Iterator[tuple[Records, Rows]]:
    """Yield parts of the records, and the requests of each that were completed, also by `other`."""
    if other is None:
        yield from ((part, part.completed) for part in records.parts())
    elif records.on_disk and _same_rows(records, other):
        for ours, theirs in zip(records.parts(), other.parts(), strict=True):
            yield ours, ours.completed & theirs.completed
    else:
        ids = np.concatenate([part.request_id[part.completed] for part in other.parts()])
        for part in records.parts():
            yield part, part.completed & np.isin(part.request_id, ids, assume_unique=True)


def _same_rows(records: Records, other: Records) -> bool:
    """Whether both have the same requests, part by part."""
    if not other.on_disk or len(records) != len(other):
        return False
    pairs = zip(records.parts(), other.parts(), strict=True)
    return all(np.array_equal(ours.request_id, theirs.request_id) for ours, theirs in pairs)


def _time_ns(name: str, r: Records, rows: Rows) -> tuple[FloatArray | IntArray, Rows]:
    """(n,) the time of each request, and whether it is defined."""
    if name == "tpot_s":
        gaps = (r.output_tokens - 1)[rows]
        decode_ns = (r.last_token_ns.values - r.first_token_ns.values)[rows]
        return np.where(gaps > 0, decode_ns / np.maximum(gaps, 1), 0.0), gaps > 0
    until = {"queue_s": r.scheduled_ns, "ttft_s": r.first_token_ns, "e2e_s": r.last_token_ns}[name]
    times_ns = (until.values - r.arrival_ns)[rows]
    return times_ns, np.ones(len(times_ns), np.bool_)


def _count(name: str, r: Records, rows: Rows) -> IntArray:
    column = r.microbits.values if name == "microbits" else getattr(r, name)
    return np.asarray(column[rows], np.int64)


@dataclass(frozen=True, slots=True)
class _Statistic:
    """A figure of requests, and the figures without each stretch of them, (stretches,), None if there are too few."""

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
    """The statistic for a metric of requests: times in ns, bits in millionths. None for others, and if undefined."""
    if name in _QUOTIENTS:
        above, below = _QUOTIENTS[name]
        return _of_sums(requests.counts(above), requests.counts(below))
    time, _, statistic = name.rpartition("_")
    if time not in _TIMES or statistic not in ("mean", *_QUANTILES):
        return None
    if statistic != "mean":
        ranked = requests.ranked(time)
        return None if ranked is None else _Statistic(*ranked.percentile_and_without(_QUANTILES[statistic]))
    return requests.mean(time)


def _of_sums(above: Series, below: Series) -> _Statistic | None:
    """The sum of one column divided by that of another, both (n,)."""
    over = below.total()
    if not over:
        return None
    whole = np.array(float(above.total()) / over)
    ends = stretches(len(above))
    if len(ends) < 3:
        return _Statistic(whole, None)
    (_, top), (_, bottom) = (left_out(column.by_stretch(ends)) for column in (above, below))
    with np.errstate(divide="ignore", invalid="ignore"):
        return _Statistic(whole, top / bottom)
