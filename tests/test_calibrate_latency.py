"""Sampling, grids and tables against costs in closed form, on a device whose clock passes as it is told."""

from __future__ import annotations

import errno
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from calibrate.measure.grid import Axes, HeldOut, Place, errors, geometric, interpolate, refine
from calibrate.measure.sampling import (
    MORE_SAMPLES,
    MOST_CONTENDED,
    TURNS,
    Clock,
    Points,
    Sampler,
    TimingJob,
    TimingPoint,
    figure,
)
from fake_device import VirtualClock, VirtualDevice

A, B, C = TimingPoint("a", -1, 1), TimingPoint("b", -1, 2), TimingPoint("c", 0, 3, 4)


def job(clock: VirtualClock, point: TimingPoint, seconds: float) -> TimingJob:
    return TimingJob((point,), lambda: [lambda: clock.pass_s(seconds)], lambda laps_s: {point: laps_s[0]})


def sampler(folder: Path, clock: VirtualClock, budget_s: float = 1e9, **changes: Any) -> Sampler:
    device = VirtualDevice(clock, **changes)
    return Sampler(device, Points(folder / "points.parquet"), Clock(budget_s, clock))


def test_figures_are_quantiles_and_far_out_samples_are_counted_not_removed() -> None:
    found = figure([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.median_s, found.iqr_s, found.samples, found.outliers) == (3.0, 2.0, 5, 1)


def test_points_come_back_as_they_were_saved(tmp_path: Path) -> None:
    points = Points(tmp_path / "p" / "points.parquet")
    points.add({A: 1.0, B: 2.0})
    points.add({A: 3.0, C: 5.0}, contended=True)
    points.add({B: -1e-4})  # a difference of two steps, of which the larger was disturbed
    points.save()
    again = Points(tmp_path / "p" / "points.parquet")
    assert again.everything() == points.everything()
    assert again.samples_s(A) == (1.0,)  # the other one was taken while others had the cores
    assert (again.figure(A).contended, again.figure(C).contended) == (False, True)
    assert (again.count(C), again.known(C), again.figure(C).median_s) == (0, True, 5.0)
    assert not list((tmp_path / "p").glob("*.partial"))


@pytest.mark.parametrize("damage", ["no table", "cut short", "other columns", "no times"])
def test_damaged_points_are_measured_again(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "points.parquet"
    points = Points(path)
    points.add({A: 1.0})
    points.save()
    table = pq.read_table(path)
    match damage:
        case "no table":
            path.write_text("nothing")
        case "cut short":
            path.write_bytes(path.read_bytes()[:-20])
        case "other columns":
            pq.write_table(table.drop_columns("anchor"), path)
        case "no times":
            column = table.schema.get_field_index("samples_s")
            pq.write_table(table.set_column(column, "samples_s", [[[float("nan")]]]), path)
    assert not Points(path).everything()
    assert not path.exists()


@pytest.mark.parametrize("lack", [pa.ArrowMemoryError("malloc failed"), MemoryError(), OSError(errno.EMFILE, "files")])
def test_points_that_the_machine_cannot_read_now_are_no_damage(lack, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "points.parquet"
    path.write_bytes(b"samples")

    def read(*_: object, **__: object) -> None:
        raise lack

    monkeypatch.setattr("calibrate.measure.sampling.pq.read_table", read)
    with pytest.raises(type(lack)):
        Points(path)
    assert path.read_bytes() == b"samples"


def test_rounds_visit_all_jobs_before_any_comes_again(tmp_path: Path) -> None:
    clock = VirtualClock()
    order: list[TimingPoint] = []

    def seen(point: TimingPoint) -> TimingJob:
        def read(laps_s: Sequence[float]) -> dict[TimingPoint, float]:
            order.append(point)
            return {point: laps_s[0]}

        return replace(job(clock, point, 0.1), read=read)

    points = [TimingPoint("x", -1, i) for i in range(5)]
    assert sampler(tmp_path, clock).measure([seen(p) for p in points], 3)
    assert all(sorted(order[i : i + 5]) == points for i in (0, 5, 10))
    assert order[:5] != points or order[5:10] != points  # in an order of its own


def test_a_later_call_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    clock = VirtualClock()
    jobs = [job(clock, A, 1.0), job(clock, B, 2.0)]
    first = sampler(tmp_path, clock, budget_s=30.0)
    assert not first.measure(jobs, 20)
    assert 20.0 < clock.now_s <= 30.0
    done = first.points.count(A) + first.points.count(B)
    assert 0 < done < 40
    second = sampler(tmp_path, clock)
    assert second.measure(jobs, 20)
    assert (second.points.count(A), second.points.count(B)) == (20, 20)
    before_s = clock.now_s
    assert sampler(tmp_path, clock).measure(jobs, 20)
    assert clock.now_s == before_s  # nothing is measured twice


def test_samples_taken_while_others_had_the_cores_are_taken_again(tmp_path: Path) -> None:
    clock = VirtualClock()
    waited = iter([0.0, 1.0, 1.0, 2.0, 2.0, *[2.0] * 100])  # before and after each sample: two are spoilt
    s = sampler(tmp_path, clock, waiting=lambda: next(waited))
    assert s.measure([job(clock, A, 1.0)], 2)
    assert s.points.samples_s(A) == (1.0, 1.0)
    assert s.contended == {A: 2}


def test_a_machine_that_is_never_free_is_measured_all_the_same_and_that_is_known(tmp_path: Path) -> None:
    clock = VirtualClock()
    s = sampler(tmp_path, clock, waiting=clock)
    assert s.measure([job(clock, A, 1.0)], 2)
    assert s.points.figure(A).contended
    assert s.points.figure(A).samples == MOST_CONTENDED


def test_the_anchor_shows_a_drifting_clock(tmp_path: Path) -> None:
    clock = VirtualClock()
    s = sampler(tmp_path, clock)
    anchor = TimingJob((B,), lambda: [lambda: clock.pass_s(1.0 + clock.now_s / 1000)], lambda laps_s: {B: laps_s[0]})
    s.anchors = {"a": anchor, "other": anchor}
    s.measure([replace(job(clock, A, 1.0), anchor="a")], 100)
    drift, other = s.drift().values()  # timed at the same moments, though nothing was sampled beside the other
    assert drift == pytest.approx(other, rel=0.01)
    assert drift["slowest_over_median"] > 1.05
    assert drift["fastest_over_median"] < 0.95
    assert sampler(tmp_path, clock).drift() == {}


def test_samples_are_brought_to_one_pace(tmp_path: Path) -> None:
    """A machine that is up to 1.6 times as slow, in waves of 100 s for one kind of step and of 70 s for another."""
    clock = VirtualClock()

    def slowed(point: TimingPoint, seconds: float, wave_s: float, anchor: str = "") -> TimingJob:
        def step() -> None:
            clock.pass_s(seconds * (1.3 + 0.3 * math.sin(clock.now_s / wave_s * 2 * math.pi)))

        return TimingJob((point,), lambda: [step], lambda laps_s: {point: laps_s[0]}, anchor)

    jobs = [slowed(A, 0.5, 100, "hundred"), slowed(C, 2.0, 70, "seventy")]
    as_taken = sampler(tmp_path / "as_taken", clock)
    as_taken.measure(jobs, 40)
    at_one_pace = sampler(tmp_path / "at_one_pace", clock)
    at_one_pace.anchors = {"hundred": slowed(B, 0.05, 100), "seventy": slowed(B, 0.1, 70)}
    at_one_pace.reference_s = {"hundred": 0.06, "seventy": 0.11}
    at_one_pace.measure(jobs, 40)
    for point, median_s in ((A, 0.5 * 0.06 / 0.05), (C, 2.0 * 0.11 / 0.1)):
        found = at_one_pace.points.figure(point)
        assert found.median_s == pytest.approx(median_s, rel=0.02)
        assert found.iqr_s < 0.2 * as_taken.points.figure(point).iqr_s
    raw_s = {point: at_one_pace.points.figure(point).median_s for point in (A, C)}
    kept = Points(at_one_pace.points.path)
    for points in (at_one_pace.points, kept):  # what a later call reads belongs to the same anchors
        points.rescale({"hundred": 1.5})
        assert points.figure(A).median_s == pytest.approx(1.5 * raw_s[A])
        assert points.figure(C).median_s == raw_s[C]
        assert points.samples_s(A)[0] < 0.7  # kept as they are


def test_short_steps_take_turns_with_the_anchor_each_at_its_own_pace(tmp_path: Path) -> None:
    """A machine that takes longer for every step than for the one before: by the anchors around it each is the same."""
    clock = VirtualClock()
    built: list[TimingPoint] = []

    def slowing(point: TimingPoint, seconds: float) -> TimingJob:
        def build() -> list[Any]:
            built.append(point)
            return [lambda: clock.pass_s(seconds * (1.0 + clock.now_s / 50))]

        return TimingJob((point,), build, lambda laps_s: {point: laps_s[0]}, "a")

    s = sampler(tmp_path, clock)
    s.anchors, s.reference_s = {"a": slowing(B, 0.01)}, {"a": 0.01}
    s.measure([slowing(A, 0.01), slowing(C, 0.5)], 1)
    assert (s.points.count(A), s.points.count(C)) == (TURNS, 1)
    assert (built.count(A), built.count(C)) == (1, 1)
    assert s.points.samples_s(A) == pytest.approx([0.01] * TURNS, rel=1e-6)


def test_a_typical_anchor_is_the_middle_of_some_laps(tmp_path: Path) -> None:
    clock = VirtualClock()
    s = sampler(tmp_path, clock)
    assert s.typical_anchors_s() == {}
    laps_s = iter([9.0] + [1.0, 2.0, 3.0] * 10)  # the first one is not counted: it warms up
    s.anchors = {"a": TimingJob((B,), lambda: [lambda: clock.pass_s(next(laps_s))], lambda laps: {B: laps[0]})}
    assert s.typical_anchors_s() == {"a": 2.0}


def test_short_jobs_that_scatter_have_more_samples(tmp_path: Path) -> None:
    clock, rng = VirtualClock(), np.random.default_rng(0)

    def scattering(point: TimingPoint, seconds: float, share: float) -> TimingJob:
        step = lambda: clock.pass_s(seconds * (1 + share * rng.random()))  # noqa: E731
        return TimingJob((point,), lambda: [step], lambda laps_s: {point: laps_s[0]})

    s = sampler(tmp_path, clock)
    s.measure([scattering(A, 0.01, 0.5), scattering(B, 1.0, 0.5), scattering(C, 0.01, 0.001)], 3, more=True)
    assert (s.points.count(A), s.points.count(B)) == (3 * MORE_SAMPLES, 3)  # B is long
    assert s.points.count(C) == 3  # C is steady


def test_a_job_for_which_there_was_time_to_warm_up_but_for_no_sample_is_tried_again(tmp_path: Path) -> None:
    clock = VirtualClock()
    s = sampler(tmp_path, clock, budget_s=1.0)
    assert not s.measure([job(clock, A, 0.25)], 1, until_left_s=0.3)
    assert not s.points.known(A)
    assert s.measure([job(clock, A, 0.25)], 1, more=True) == s.points.known(A)


def test_geometric_axes_span_their_range() -> None:
    assert geometric(1, 32) == (1, 2, 4, 8, 16, 32)
    assert geometric(1, 1) == (1,)
    assert geometric(128, 2048, 4.0) == (128, 512, 2048)


def refined(
    function: Any, axes: Axes, tolerance: float = 0.03, noise: float = 0.0
) -> tuple[Axes, list[HeldOut], list[Place]]:
    asked: list[Place] = []

    def measure(places: Sequence[Place]) -> bool:
        asked.extend(places)
        return True

    def time_s(place: Place) -> float:
        return float(function(*place))

    axes, held_out = refine(axes, measure, time_s, time_s, lambda place: noise, tolerance)
    return axes, held_out, asked


def test_a_straight_line_needs_no_points_between_its_ends() -> None:
    axes, held_out, _ = refined(lambda rows: 5 + 2 * rows, Axes(((1, 512),)))
    assert axes.values == ((1, 512),)
    assert np.abs(errors(held_out)).max() < 1e-12
    plane, held_out, _ = refined(lambda a, b: 1 + a + 2 * b + 0.5 * a * b, Axes(((1, 64), (1, 1000))))
    assert plane.values == ((1, 64), (1, 1000))
    assert held_out


def test_a_knee_is_found_and_the_line_then_fits_everywhere() -> None:
    def roofline(rows: int) -> float:
        return max(100.0, float(rows))

    axes, held_out, _ = refined(roofline, Axes(((1, 1024),)))
    rows = np.arange(1, 1025)
    (grid,) = axes.values
    line = np.interp(rows, grid, [roofline(r) for r in grid])
    assert np.max(np.abs(line / [roofline(int(r)) for r in rows] - 1)) < 0.08  # a third beside the trial may miss more
    assert np.abs(errors(held_out)).max() <= 0.03
    assert len(grid) < 20


def test_both_axes_are_refined_where_they_bend() -> None:
    axes, held_out, _ = refined(lambda batch, kv: 10 + max(0, kv - 300) * batch, Axes(((1, 32), (1, 2048))))
    assert axes.values[0] == (1, 32)  # straight in the batch
    assert min(abs(v - 300) for v in axes.values[1]) < 60
    assert np.abs(errors(held_out)).max() <= 0.03


def test_noise_is_not_chased() -> None:
    rng = np.random.default_rng(0)
    wobble = {r: 100.0 + rng.normal(0, 10) for r in range(1, 2000)}
    _, _, chased = refined(lambda rows: wobble[rows], Axes((geometric(1, 1024),)), noise=0.0)
    _, _, left = refined(lambda rows: wobble[rows], Axes((geometric(1, 1024),)), noise=10.0)
    assert len(left) < len(chased) / 2


def test_time_that_runs_out_leaves_the_last_whole_grid() -> None:
    calls = 0

    def measure(places: Sequence[Place]) -> bool:
        nonlocal calls
        calls += 1
        return calls <= 2  # the grid and its first trials, no more

    def bent(place: Place) -> float:
        return float(place[0] ** 2)

    axes, held_out = refine(Axes(((1, 1000),)), measure, bent, bent, lambda p: 0.0, 0.03)
    assert axes.values == ((1, 1000),)
    assert held_out == []


def test_interpolation_is_what_profiles_do() -> None:
    axes = Axes(((1, 3), (10, 20)))
    times = {(1, 10): 1.0, (1, 20): 2.0, (3, 10): 3.0, (3, 20): 6.0}
    assert interpolate(axes, times, (2, 15)) == pytest.approx(3.0)
    assert interpolate(axes, times, (9, 99)) == pytest.approx(6.0)
