"""Warm-up and interleaved repeats until the samples suffice or the time is spent. Knows neither models nor tables.

A shared machine is faster in one second than in the next. An anchor job, timed before and after every sample, says how
fast it was just then, and samples are brought to its pace; what waits for memory and what computes change pace
each in their own way, so jobs name the anchor that is of their kind. Rounds that visit all jobs, each in an order of
its own, spread what is left. A sample during which other processes had the cores is no sample of this device: it is set
aside and taken again, unless that happens too often to go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic

import numpy as np

from calibrate.device import Device, Step
from calibrate.points import Point, Points, figure

STABLE = 0.1  # warm-up ends when two calls in a row differ by no more than this share
MAX_WARM_UPS = 3
LONG_S = 0.3  # a job that takes longer than this warms itself up
MOST_WAITED = 0.02  # share of a sample's time that its threads may stand waiting for others to leave the cores
WAKE_S = 1e-4  # waking threads takes them that long on an idle machine too
SHORT_S, MORE_SAMPLES, STEADY = 0.4, 4, 0.01  # a job this short has up to so many times the samples, unless so steady
TURNS, TURNS_BELOW_S = 3, 0.15  # with the anchor, in a visit to a job that takes less: making it ready takes longer
MOST_CONTENDED = 6  # such samples of one job in a call; then it is left as it is
REFERENCE_LAPS = 15
SAVE_EVERY_S = 10.0
LOOK_EVERY_S = 3.0


@dataclass(frozen=True, slots=True)
class Job:
    """Steps timed back to back, and what their laps mean.

    `build` makes the steps (inputs included); `read` turns the laps' seconds into samples of points. A job counts as
    measured as often as the first of its `points` is. `anchor` names the one that is timed beside it, if there is such.
    """

    points: tuple[Point, ...]
    build: Callable[[], Sequence[Step]]
    read: Callable[[Sequence[float]], Mapping[Point, float]]
    anchor: str = ""


class Clock:
    """A budget of seconds that began when this was made."""

    def __init__(self, budget_s: float, now_s: Callable[[], float] = monotonic) -> None:
        self._now_s, self._start_s, self._budget_s = now_s, now_s(), budget_s

    @property
    def spent_s(self) -> float:
        return self._now_s() - self._start_s

    @property
    def left_s(self) -> float:
        return self._budget_s - self.spent_s


class Sampler:
    """Takes samples of jobs into `points`.

    One of `anchors` is timed beside each of them. With `reference_s`, samples are what they would have been had their
    anchor taken so long. Every few seconds all anchors are timed, whatever is sampled then, so that their middles are
    of the same time: `anchor_laps_s` keeps the seconds that each took in this call.
    """

    def __init__(
        self,
        device: Device,
        points: Points,
        clock: Clock,
        *,
        seed: int = 0,
        progress: Callable[[str, float], None] | None = None,
    ) -> None:
        self.device, self.points, self.clock = device, points, clock
        self.anchors: Mapping[str, Job] = {}
        self.reference_s: Mapping[str, float] = {}
        self.anchor_laps_s: dict[str, list[float]] = {}
        self.contended: dict[Point, int] = {}  # samples of this call taken while others had the cores
        self._progress = progress
        self._rng = np.random.default_rng(seed)
        self._cost_s: dict[Point, float] = {}  # of the last visit
        self._turns: dict[Point, int] = {}  # samples of a visit
        self._totals_s: dict[Point, list[float]] = {}
        self._anchor_steps: dict[str, list[Step]] = {}
        self._last_save_s = self._last_look_s = -np.inf

    def measure(self, jobs: Sequence[Job], samples: int, until_left_s: float = 0.0, more: bool = False) -> bool:
        """Rounds over the jobs until each has `samples`, or the machine proved too busy; false when time ran out.

        A job that takes several turns a visit has as many times the samples. With `more`, short jobs that scatter have
        more again: small steps cost little to time, and are what is served most.
        A sample is not begun where it would leave less than `until_left_s` of the budget, going by its last cost.
        """
        waiting = list(jobs)
        while True:
            waiting = [job for job in waiting if self._wanting(job, samples, more)]
            if not waiting:
                break
            begun = 0
            for index in self._rng.permutation(len(waiting)):
                job = waiting[index]
                if self.clock.left_s - self._cost_s.get(job.points[0], 0.0) > until_left_s:
                    self._sample(job)
                    self._housekeeping()
                    begun += 1
            if self._progress is not None:
                self._progress(jobs[0].points[0].table, self.clock.spent_s)
            if not begun:
                break
        self.points.save()
        return not waiting

    def _wanting(self, job: Job, samples: int, more: bool) -> bool:
        first = job.points[0]
        turns = self._turns.get(first, 1)
        if more and self._cost_s.get(first, SHORT_S) < SHORT_S * turns and not self._steady(job):
            samples *= MORE_SAMPLES
        return self.points.count(first) < samples * turns and self.contended.get(first, 0) < MOST_CONTENDED

    def _steady(self, job: Job) -> bool:
        """All its laps together, in this call."""
        whole = figure(self._totals_s[job.points[0]])
        return whole.standard_error_s <= STEADY * whole.median_s

    def drift(self) -> dict[str, dict[str, float]]:
        """How the time of each anchor moved; without those that were measured less than twice."""
        return {name: _moved(laps_s) for name, laps_s in self.anchor_laps_s.items() if len(laps_s) > 1}

    def _sample(self, job: Job) -> None:
        start_s = self.clock.spent_s
        if self.anchors and start_s - self._last_look_s >= LOOK_EVERY_S:
            self._look()
        first = job.points[0]
        anchor = self._anchor(job.anchor)
        steps = [self.device.prepare(step) for step in job.build()]
        if first not in self._cost_s:
            warm_s = self._warm_up(steps)
            self._turns[first] = TURNS if anchor and warm_s < TURNS_BELOW_S else 1
        elif self._cost_s[first] < LONG_S or self._turns[first] > 1:
            self.device.laps_s(steps)  # the last job left other data in the caches and other threads awake
        turns = self._turns[first]
        all_s, waited_s = self._laps([*anchor, *[*steps, *anchor] * turns])
        self._cost_s[first] = self.clock.spent_s - start_s
        contended = waited_s > MOST_WAITED * sum(all_s) + WAKE_S
        if contended:
            self.contended[first] = self.contended.get(first, 0) + 1
        for laps_s in self._at_one_pace(job.anchor, all_s, len(anchor), len(steps)):
            self._totals_s.setdefault(first, []).append(sum(laps_s))
            self.points.add(job.read(laps_s), contended, job.anchor)

    def typical_anchors_s(self) -> dict[str, float]:
        """Of each, the middle of some laps in a row."""
        found = {name: self._anchor(name) for name in self.anchors}
        return {
            name: figure([sum(self.device.laps_s(steps)) for _ in range(REFERENCE_LAPS)]).median_s
            for name, steps in found.items()
        }

    def _look(self) -> None:
        """All anchors, unless others have the cores just now."""
        ready = {name: self._anchor(name) for name in self.anchors}
        laps_s, waited_s = self._laps([step for steps in ready.values() for step in steps])
        self._last_look_s = self.clock.spent_s
        if waited_s > MOST_WAITED * sum(laps_s) + WAKE_S:
            return
        for name, steps in ready.items():
            self.anchor_laps_s.setdefault(name, []).append(sum(laps_s[: len(steps)]))
            laps_s = laps_s[len(steps) :]

    def _anchor(self, name: str) -> list[Step]:
        """Its steps, none without one. They are made once, before a job's own are."""
        if name in self.anchors and name not in self._anchor_steps:
            self._anchor_steps[name] = [self.device.prepare(step) for step in self.anchors[name].build()]
            self.device.laps_s(self._anchor_steps[name])
        return self._anchor_steps.get(name, [])

    def _at_one_pace(self, name: str, laps_s: Sequence[float], of_anchor: int, of_steps: int) -> list[list[float]]:
        """Of each turn the steps' laps, as they would be had the anchor before and after it taken `reference_s`."""
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
        """Seconds of each step, and seconds that threads waited for cores meanwhile."""
        before_s = self.device.waited_s()
        laps_s = self.device.laps_s(steps)
        after_s = self.device.waited_s()
        return laps_s, 0.0 if before_s is None or after_s is None else after_s - before_s

    def _warm_up(self, steps: Sequence[Step]) -> float:
        """Seconds of the last time."""
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
