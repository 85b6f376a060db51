"""Timings of points: samples are taken until they suffice or the time is spent, and are kept on disk.

A shared machine is faster in one second than in the next. An anchor, a reference step timed before and after every
sample, shows its current pace, and samples are rescaled to a common pace. Memory-bound and compute-bound work change
pace in different ways, so every job names the anchor of its kind. Rounds visit all jobs in random order, which spreads
the remaining drift. A sample during which other processes had the cores is set aside and taken again, unless that
happens too often.

One Parquet file holds every sample of every point and is replaced as a whole, so that an interrupted measurement can be
resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from calibrate.drafts import kept
from calibrate.measure.device import Step, TimedDevice
from helios_sim import files

STANDARD_ERROR = 0.929  # of a median of normal samples, in IQR / sqrt(n): 1.253 sigma, with sigma = IQR / 1.349
OUTLIER_IQRS = 3.0  # an outlier lies this many IQRs beyond the quartiles (Tukey's "far out")
STABLE = 0.1  # warm-up ends when two calls in a row differ by no more than this share
MAX_WARM_UPS = 3
LONG_S = 0.3  # a job that takes longer than this warms itself up
MOST_WAITED = 0.02  # share of a sample's time that its threads may wait for cores that others use
WAKE_S = 1e-4  # waking threads takes this long even on an idle machine
MOST_CONTENDED = 6  # contended samples of one job in a call, after which it is left as it is
REFERENCE_LAPS = 15
SAVE_EVERY_S = 10.0
LOOK_EVERY_S = 3.0
SHORT_S, MORE_SAMPLES, STEADY = 0.4, 4, 0.01  # a job this short gets up to 4 times the samples, unless this steady
TURNS, TURNS_BELOW_S = 3, 0.15  # turns with the anchor per visit to a short job: preparing it takes longer


class TimingPoint(NamedTuple):
    """One entry of one table. Tables by rows have `second` 0; tables of the whole model have layer class -1."""

    table: str
    layer_class: int
    first: int
    second: int = 0


@dataclass(frozen=True, slots=True)
class Figure:
    """Statistics of a point's samples."""

    median_s: float
    iqr_s: float
    samples: int
    outliers: int  # counted but not removed: they hardly move a median
    contended: bool = False  # all samples were taken while other processes had the cores

    @property
    def standard_error_s(self) -> float:
        return float(STANDARD_ERROR * self.iqr_s / np.sqrt(self.samples))


def figure(samples_s: Iterable[float]) -> Figure:
    """Median, IQR and outliers of the samples."""
    values = np.asarray(list(samples_s), dtype=np.float64)
    low, median, high = np.percentile(values, [25, 50, 75])
    reach = OUTLIER_IQRS * (high - low)
    outliers = int(np.count_nonzero((values < low - reach) | (values > high + reach)))
    return Figure(float(median), float(high - low), len(values), outliers)


class Points:
    """All samples in seconds. `save` is cheap enough to call after every few measurements.

    Samples taken while other processes had the cores are kept apart and used only if a point has no others. A point
    belongs to the anchor that was timed with its samples; its figure is that anchor's scale times the samples.
    """

    def __init__(self, path: Path) -> None:
        """Read the samples of earlier calls. A file that is no table of points is removed, with a warning."""
        self.path = path
        self._scales: Mapping[str, float] = {}
        self._anchors: dict[TimingPoint, str] = {}
        self._clean: dict[TimingPoint, list[float]] = {}
        self._contended: dict[TimingPoint, list[float]] = {}
        self._figures: dict[TimingPoint, Figure] = {}  # cached until a sample is added
        for name, layer_class, first, second, anchor, clean, contended in kept(path, _rows) or ():
            point = TimingPoint(name, layer_class, first, second)
            self._anchors[point] = anchor
            for of, samples in ((self._clean, clean), (self._contended, contended)):
                if samples:
                    of[point] = samples

    def add(self, samples: Mapping[TimingPoint, float], contended: bool = False, anchor: str = "") -> None:
        for point, time_s in samples.items():
            self._anchors.setdefault(point, anchor)
            (self._contended if contended else self._clean).setdefault(point, []).append(time_s)
            self._figures.pop(point, None)

    def count(self, point: TimingPoint) -> int:
        """The number of clean samples."""
        return len(self._clean.get(point, ()))

    def known(self, point: TimingPoint) -> bool:
        """Whether the point has any sample, clean or not."""
        return point in self._clean or point in self._contended

    def samples_s(self, point: TimingPoint) -> tuple[float, ...]:
        return tuple(self._clean.get(point) or self._contended[point])

    def figure(self, point: TimingPoint) -> Figure:
        """The point's figure. Raises KeyError if it was not measured."""
        found = self._figures.get(point)
        if found is None:
            scale = self._scales.get(self._anchors[point], 1.0)
            scaled_s = (scale * time_s for time_s in self.samples_s(point))
            found = replace(figure(scaled_s), contended=point not in self._clean)
            self._figures[point] = found
        return found

    def rescale(self, scales: Mapping[str, float]) -> None:
        """Set the scale of each anchor (1 for those not named)."""
        self._scales = scales
        self._figures.clear()

    def of(self, table: str, layer_class: int) -> dict[tuple[int, int], Figure]:
        """Figures of one table by (first, second), ascending."""
        found = [p for p in self._points() if p.table == table and p.layer_class == layer_class]
        return {(p.first, p.second): self.figure(p) for p in found}

    def everything(self) -> dict[TimingPoint, Figure]:
        return {point: self.figure(point) for point in self._points()}

    def _points(self) -> list[TimingPoint]:
        return sorted({*self._clean, *self._contended})

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        ordered = self._points()
        figures = [self.figure(p) for p in ordered]
        table = pa.table(
            {
                "table": pa.array([p.table for p in ordered]),
                "layer_class": pa.array([p.layer_class for p in ordered], pa.int16()),
                "first": pa.array([p.first for p in ordered], pa.int64()),
                "second": pa.array([p.second for p in ordered], pa.int64()),
                "anchor": pa.array([self._anchors[p] for p in ordered]),
                "median_s": pa.array([f.median_s for f in figures], pa.float64()),
                "iqr_s": pa.array([f.iqr_s for f in figures], pa.float64()),
                "samples": pa.array([f.samples for f in figures], pa.int64()),
                "outliers": pa.array([f.outliers for f in figures], pa.int64()),
                "samples_s": pa.array([self._clean.get(p, []) for p in ordered], pa.list_(pa.float64())),
                "contended_s": pa.array([self._contended.get(p, []) for p in ordered], pa.list_(pa.float64())),
            }
        )
        files.write_parquet(self.path, table)


def _rows(path: Path) -> list[tuple[Any, ...]]:
    """A row for each point: its table and place, its anchor and its samples. Raises ValueError for other values."""
    table = pq.read_table(path, use_threads=False, schema=None)
    names = (*TimingPoint._fields, "anchor", "samples_s", "contended_s")
    rows = list(zip(*(table[name].to_pylist() for name in names), strict=True))
    for name, layer_class, first, second, anchor, *samples in rows:
        plain = isinstance(name, str) and isinstance(anchor, str)
        plain = plain and all(isinstance(value, int) for value in (layer_class, first, second))
        # A sample may be below 0: attention is a difference of two times, and others may use the machine.
        if not plain or not all(-inf < time_s < inf for of in samples for time_s in of):
            raise ValueError(f"{name!r} at {first!r} is no point with its samples")
    return rows


@dataclass(frozen=True, slots=True)
class TimingJob:
    """Steps that are timed back to back, and what their laps mean.

    `build` makes the steps with their inputs; `read` turns the laps' seconds into samples of points. A job counts as
    measured as often as the first of its `points`. `anchor` names the anchor that is timed with it, if any.
    """

    points: tuple[TimingPoint, ...]
    build: Callable[[], Sequence[Step]]
    read: Callable[[Sequence[float]], Mapping[TimingPoint, float]]
    anchor: str = ""


class Clock:
    """A budget of seconds that starts when the object is created."""

    def __init__(self, budget_s: float, now_s: Callable[[], float] = monotonic) -> None:
        self._now_s, self._start_s, self._budget_s = now_s, now_s(), budget_s

    @property
    def spent_s(self) -> float:
        return self._now_s() - self._start_s

    @property
    def left_s(self) -> float:
        return self._budget_s - self.spent_s


class Sampler:
    """Takes samples of jobs and adds them to `points`.

    One of `anchors` is timed with each sample. With `reference_s`, samples are rescaled to the pace at which their
    anchor takes that long. Every few seconds all anchors are timed together, so that their medians cover the same time:
    `anchor_laps_s` keeps their seconds in this call.
    """

    def __init__(
        self,
        device: TimedDevice,
        points: Points,
        clock: Clock,
        *,
        seed: int = 0,
        progress: Callable[[str, float], None] | None = None,
    ) -> None:
        self.device, self.points, self.clock = device, points, clock
        self.anchors: Mapping[str, TimingJob] = {}
        self.reference_s: Mapping[str, float] = {}
        self.anchor_laps_s: dict[str, list[float]] = {}
        self.contended: dict[TimingPoint, int] = {}  # number of contended samples in this call
        self._progress = progress
        self._rng = np.random.default_rng(seed)
        self._cost_s: dict[TimingPoint, float] = {}  # seconds of the last visit
        self._turns: dict[TimingPoint, int] = {}  # samples per visit
        self._totals_s: dict[TimingPoint, list[float]] = {}
        self._anchor_steps: dict[str, list[Step]] = {}
        self._steps: dict[TimingPoint, list[Step]] = {}  # kept on a card, where preparing a step captures a graph
        self._last_save_s = self._last_look_s = -np.inf

    def sketch(self, jobs: Sequence[TimingJob], until_left_s: float = 0.0) -> bool:
        """Visit each job that has no sample yet, once and briefly. Returns False if time ran out before."""
        for job in jobs:
            if not self.points.known(job.points[0]):
                if self.clock.left_s - self._expected_s(job) <= until_left_s:
                    break
                self._sample(job, until_left_s, brief=True)
                self._housekeeping()
                if self._progress is not None:
                    self._progress(job.points[0].table, self.clock.spent_s)
        self.points.save()
        return all(self.points.known(job.points[0]) for job in jobs)

    def measure(self, jobs: Sequence[TimingJob], samples: int, until_left_s: float = 0.0, more: bool = False) -> bool:
        """Visit the jobs in rounds until each has `samples` or proved too contended. Returns False if time ran out.

        A job with several turns per visit gets as many times the samples. With `more`, short jobs that scatter get even
        more: small steps cost little to time and are served most. A sample is not begun if it would leave less than
        `until_left_s` of the budget, going by the job's last cost, or by the cost of other jobs of its table.
        """
        waiting = list(jobs)
        while True:
            waiting = [job for job in waiting if self._wanting(job, samples, more)]
            if not waiting:
                break
            begun = 0
            for index in self._rng.permutation(len(waiting)):
                job = waiting[index]
                if self.clock.left_s - self._expected_s(job) > until_left_s:
                    self._sample(job, until_left_s)
                    self._housekeeping()
                    begun += 1
            if self._progress is not None:
                self._progress(jobs[0].points[0].table, self.clock.spent_s)
            if not begun:
                break
        self.points.save()
        return not waiting

    def _wanting(self, job: TimingJob, samples: int, more: bool) -> bool:
        first = job.points[0]
        turns = self._turns.get(first, 1)
        if more and self._cost_s.get(first, SHORT_S) < SHORT_S * turns and not self._steady(job):
            samples *= MORE_SAMPLES
        return self.points.count(first) < samples * turns and self.contended.get(first, 0) < MOST_CONTENDED

    def _steady(self, job: TimingJob) -> bool:
        """Whether the sum of the job's laps is known precisely enough in this call."""
        totals_s = self._totals_s.get(job.points[0])
        if totals_s is None:  # there was time for a warm-up, but for no sample
            return False
        whole = figure(totals_s)
        return whole.standard_error_s <= STEADY * whole.median_s

    def drift(self) -> dict[str, dict[str, float]]:
        """How the time of each anchor moved, for anchors that were measured at least twice."""
        return {name: _moved(laps_s) for name, laps_s in self.anchor_laps_s.items() if len(laps_s) > 1}

    def _expected_s(self, job: TimingJob) -> float:
        """Expected seconds of a visit: the job's last one, else the dearest of its table; 0 if none is known."""
        first = job.points[0]
        if first in self._cost_s:
            return self._cost_s[first]
        return max((cost_s for point, cost_s in self._cost_s.items() if point.table == first.table), default=0.0)

    def _sample(self, job: TimingJob, until_left_s: float = -np.inf, brief: bool = False) -> None:
        """Visit the job. No sample is taken if the warm-up shows that it would leave less than `until_left_s`.

        A brief visit warms up once and takes one turn.
        """
        start_s = self.clock.spent_s
        if self.anchors and start_s - self._last_look_s >= LOOK_EVERY_S:
            self._look()
        first = job.points[0]
        anchor = self._anchor(job.anchor)
        steps = self._prepared(job)
        if first not in self._cost_s or brief:
            warm_s = sum(self.device.laps_s(steps)) if brief else self._warm_up(steps)
            turns = self._turns[first] = TURNS if anchor and warm_s < TURNS_BELOW_S and not brief else 1
            if self.clock.left_s - turns * warm_s <= until_left_s:
                self._cost_s[first] = self.clock.spent_s - start_s + turns * warm_s
                return
        elif self._cost_s[first] < LONG_S or self._turns[first] > 1:
            self.device.laps_s(steps)  # refill the caches and wake the threads after the previous job
        turns = self._turns[first]
        all_s, waited_s = self._laps([*anchor, *[*steps, *anchor] * turns])
        self._cost_s[first] = self.clock.spent_s - start_s
        contended = waited_s > MOST_WAITED * sum(all_s) + WAKE_S
        if contended:
            self.contended[first] = self.contended.get(first, 0) + 1
        for laps_s in self._at_one_pace(job.anchor, all_s, len(anchor), len(steps)):
            self._totals_s.setdefault(first, []).append(sum(laps_s))
            self.points.add(job.read(laps_s), contended, job.anchor)

    def _prepared(self, job: TimingJob) -> list[Step]:
        """The job's steps. A card keeps them captured for the next visit, a CPU gets new inputs each time."""
        steps = self._steps.get(job.points[0]) or [self.device.prepare(step) for step in job.build()]
        if self.device.asynchronous:
            self._steps[job.points[0]] = steps
        return steps

    def typical_anchors_s(self, within_s: float = np.inf) -> dict[str, float]:
        """The median seconds of each anchor over some laps in a row, of one lap or more if they take `within_s`."""
        found = {}
        for name in self.anchors:
            steps, until_s = self._anchor(name), self.clock.spent_s + within_s / len(self.anchors)
            laps_s = [sum(self.device.laps_s(steps))]
            while len(laps_s) < REFERENCE_LAPS and self.clock.spent_s < until_s:
                laps_s.append(sum(self.device.laps_s(steps)))
            found[name] = figure(laps_s).median_s
        return found

    def _look(self) -> None:
        """Time all anchors, unless other processes have the cores."""
        ready = {name: self._anchor(name) for name in self.anchors}
        laps_s, waited_s = self._laps([step for steps in ready.values() for step in steps])
        self._last_look_s = self.clock.spent_s
        if waited_s > MOST_WAITED * sum(laps_s) + WAKE_S:
            return
        for name, steps in ready.items():
            self.anchor_laps_s.setdefault(name, []).append(sum(laps_s[: len(steps)]))
            laps_s = laps_s[len(steps) :]

    def _anchor(self, name: str) -> list[Step]:
        """The anchor's steps, made once; empty if there is no such anchor."""
        if name in self.anchors and name not in self._anchor_steps:
            self._anchor_steps[name] = [self.device.prepare(step) for step in self.anchors[name].build()]
            self.device.laps_s(self._anchor_steps[name])
        return self._anchor_steps.get(name, [])

    def _at_one_pace(self, name: str, laps_s: Sequence[float], of_anchor: int, of_steps: int) -> list[list[float]]:
        """The laps of the steps in each turn, rescaled so that the anchor before and after takes `reference_s`."""
        starts = range(0, len(laps_s), of_anchor + of_steps)
        anchors_s = [sum(laps_s[start : start + of_anchor]) for start in starts]
        found = []
        for turn, start in enumerate(starts[: len(laps_s) // (of_anchor + of_steps)]):
            pace = 1.0
            if of_anchor and name in self.reference_s:
                pace = (anchors_s[turn] + anchors_s[turn + 1]) / 2 / self.reference_s[name]
            found.append([lap_s / pace for lap_s in laps_s[start + of_anchor : start + of_anchor + of_steps]])
        return found

    def _laps(self, steps: Sequence[Step]) -> tuple[list[float], float]:
        """Seconds of each step, and the seconds that threads waited for cores meanwhile."""
        before_s = self.device.waited_s()
        laps_s = self.device.laps_s(steps)
        after_s = self.device.waited_s()
        return laps_s, 0.0 if before_s is None or after_s is None else after_s - before_s

    def _warm_up(self, steps: Sequence[Step]) -> float:
        """Run the steps until they are stable. Returns the seconds of the last run."""
        last_s = sum(self.device.laps_s(steps))
        if last_s > LONG_S:
            return last_s
        for _ in range(MAX_WARM_UPS - 1):
            before_s, last_s = last_s, sum(self.device.laps_s(steps))
            if abs(last_s - before_s) <= STABLE * before_s:
                break
        return last_s

    def _housekeeping(self) -> None:
        now_s = self.clock.spent_s
        if now_s - self._last_save_s >= SAVE_EVERY_S:
            self.points.save()
            self._last_save_s = now_s


def _moved(laps_s: Sequence[float]) -> dict[str, float]:
    f = figure(laps_s)
    return {
        "measurements": len(laps_s),
        "median_s": f.median_s,
        "iqr_over_median": f.iqr_s / f.median_s,
        "slowest_over_median": max(laps_s) / f.median_s,
        "fastest_over_median": min(laps_s) / f.median_s,
    }
