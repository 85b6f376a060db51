"""`+experiment=fidelity_live`: the table from stand-in numbers, and the whole command on a tiny random model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from command_line import CommandLine
from helios_sim.errors import UserError
from helios_sim.profile.store import write_profile
from helios_sim.report.metrics import Band
from helios_sim.report.result import ComparedRow
from helios_sim.study.modes import LiveFidelityConfig
from helios_sim.study.schema import Config
from helios_sim.study.watched import LiveNotes
from helios_sim.validate.compare import energy_told
from helios_sim.validate.live import (
    Cell,
    Compared,
    NoTimeLeft,
    Profiled,
    TimeLeft,
    _as_time_allows,
    measured_profiles,
    rows_of,
)
from priced import priced_profile


def test_rows_hold_the_means_of_the_passes_and_how_far_they_lie_apart() -> None:
    live = {"ttft_s_p95": 0.2, "throughput_requests_per_s": 4.0, "switches": 1, "energy_wh_per_request": None}
    again = {"ttft_s_p95": 0.3, "throughput_requests_per_s": 4.0, "switches": 1, "energy_wh_per_request": 0.1}
    simulated = {"ttft_s_p95": 0.21, "throughput_requests_per_s": 3.9, "switches": 2, "energy_wh_per_request": None}
    paced = {"ttft_s_p95": 0.26, "throughput_requests_per_s": 4.1}
    rows = {
        (row.group, row.statistic, row.unit): row
        for row in rows_of([live, again], [simulated, simulated], [paced, paced])
    }
    late = rows["TTFT", "p95", "ms"]
    assert (late.measured, late.simulated, late.paced) == pytest.approx((250.0, 210.0, 260.0))
    assert late.runs == pytest.approx((200.0, 300.0))
    assert (late.difference, late.paced_difference) == pytest.approx((-0.16, 0.04))
    assert late.noise == pytest.approx(100.0 / 250.0)  # of two it is their distance
    assert rows["system", "throughput", "requests/s"].difference == pytest.approx(-0.025)
    assert rows["system", "switches", ""].difference == pytest.approx(1.0)
    half_known = rows["system", "energy", "Wh a request"]
    assert (half_known.measured, half_known.runs, half_known.noise) == (None, (), None)
    assert rows["E2E", "mean", "ms"].measured is None


def test_a_pace_that_one_pass_does_not_know_is_not_known() -> None:
    one = {"tpot_s_mean": 0.1}
    rows = rows_of([one, one], [one, one], [one, None])
    assert all(row.paced is None for row in rows)


def test_noise_is_the_distance_of_two_measurements_over_all_pairs() -> None:
    runs = (90.0, 100.0, 125.0)
    squares = [(a - b) ** 2 for place, a in enumerate(runs) for b in runs[place + 1 :]]
    row = ComparedRow("TPOT", "mean", "ms", measured=105.0, simulated=100.0, runs=runs)
    assert row.noise == pytest.approx((sum(squares) / 3) ** 0.5 / 105.0)


def test_measured_energy_stands_beside_the_middle_of_the_simulated_band() -> None:
    live = [{"energy_wh_per_request": value} for value in (0.020, 0.022)]
    simulated = [{"energy_wh_per_request": Band(0.010, 0.032)}] * 2
    rows = {row.statistic: row for row in rows_of(live, simulated, [None, None]) if row.group == "system"}
    energy = rows["energy"]
    assert (energy.measured, energy.simulated) == (pytest.approx(0.021), pytest.approx(0.021))
    assert energy.noise == pytest.approx(0.002 / 0.021)
    assert energy_told([(0.020, Band(0.010, 0.032)), (0.040, Band(0.010, 0.032)), (None, Band(0.1, 0.2))]) == [
        "Measured energy of a request lies in the simulated band in 1 of 2 runs."
    ]
    assert energy_told([(None, Band(0.1, 0.2)), (0.3, None)]) == []


def test_a_row_without_a_measurement_has_no_difference() -> None:
    assert ComparedRow("", "", "", 0.0, 1.0).difference is None
    assert ComparedRow("", "", "", None, 1.0).noise is None
    assert ComparedRow("", "", "", 1.0, 1.0, runs=(1.0,)).noise is None  # once is no noise


def test_a_row_knows_the_difference_at_the_devices_pace() -> None:
    row = ComparedRow("TPOT", "mean", "ms", measured=12.0, simulated=10.0, paced=12.6)
    assert row.paced_difference == pytest.approx(0.05)
    assert row.difference == pytest.approx(-1 / 6)
    assert ComparedRow("", "", "", 1.0, 1.0).paced_difference is None


def test_notes_of_two_runs_add_up() -> None:
    one = LiveNotes(
        10, engine_ns=90, forward_ns=70, waited_ns=20, host_ns=10, priced_ns=80, prompts_taken_ns=40,
        prompts_priced_ns=20,
    )  # fmt: skip
    both = LiveNotes.together([one, replace(one, engine_ns=110)])
    assert (both.iterations, both.engine_ns, both.forward_ns, both.host_ns) == (20, 200, 140, 20)
    assert both.price_error == pytest.approx(160 / 220 - 1)
    assert both.price_error_undisturbed == pytest.approx(160 / 180 - 1)
    assert both.price_errors_by_kind == pytest.approx((40 / 80 - 1, 120 / 140 - 1))
    assert both.pace is None
    assert LiveNotes.together([replace(one, pace=1.1), replace(one, pace=1.3)]).pace == pytest.approx(1.2)
    assert "took 1.20 of its time beside the profile" in replace(one, pace=1.2).sentence()
    assert LiveNotes(*[0] * 8).price_error is None
    assert LiveNotes(*[0] * 8).sentence() == "nothing ran"


class Spent:
    """A calibration for which there was no time."""

    returncode = 1


def test_a_calibration_without_time_does_not_end_the_comparison(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("helios_sim.validate.live.subprocess.run", lambda *_, **__: Spent())
    wanted = LiveFidelityConfig([0.5], calibrate_s=1)
    config = Config(models=["smollm2-135m"], hardware="epyc-2core", fidelity_live=wanted)
    found = measured_profiles(config, tmp_path)
    assert found.changes == {}
    assert found.within == 0.5
    assert "smollm2-135m could not be measured in 1 s" in found.notices[0]
    with pytest.raises(UserError, match="no profile of smollm2-135m on unknown"):
        measured_profiles(replace(config, hardware="unknown"), tmp_path)


def test_gates_are_as_wide_as_a_profile_that_was_measured_in_little_time(tmp_path: Path) -> None:
    profile = priced_profile()
    hurried = replace(profile, times_within=0.17)
    write_profile(hurried, tmp_path / hurried.name)
    config = Config(models=[profile.model.name], hardware=profile.hardware.name, profile_folder=str(tmp_path))
    found = measured_profiles(config, tmp_path)
    assert (found.changes, found.within) == ({}, 0.17)
    assert found.notices == (f"{profile.model.name} was measured in little time: its times are within 17%",)
    older = replace(profile, provenance=replace(profile.provenance, details={"short": {"within": 0.17}}))
    write_profile(older, tmp_path / "older" / profile.name)
    assert measured_profiles(replace(config, profile_folder=str(tmp_path / "older")), tmp_path).within == 0.17
    write_profile(profile, tmp_path / "unhurried" / profile.name)
    assert measured_profiles(replace(config, profile_folder=str(tmp_path / "unhurried")), tmp_path) == Profiled({})


@pytest.mark.parametrize(
    ("seconds", "loads"), [(1e9, [0.5, 1.0, 1.5]), (11.5, [0.5, 1.0]), (5.0, [0.5]), (2.5, [0.5]), (1.5, None)]
)
def test_as_many_loads_are_served_as_the_pace_so_far_allows(seconds: float, loads: list[float] | None) -> None:
    """A load takes twice as many seconds as its number, in each of two passes; only its share may be used up."""
    config = Config(fidelity_live=LiveFidelityConfig([1.5, 0.5, 1.0]))
    clock = [0.0]

    def run(one: Compared) -> Compared:
        clock[0] += 2 * one.cell.load
        return one.with_pass(SimpleNamespace(live=SimpleNamespace(wall_s=2 * one.cell.load)))

    left = TimeLeft(lambda: seconds - clock[0], lambda: seconds - clock[0])
    found = [Compared(Cell("arm", "", load, 1.0)) for load in (0.5, 1.0, 1.5)]
    try:
        for turn in range(2):
            found = _as_time_allows(config, found, turn, run, left)
    except NoTimeLeft:
        found = []
    assert [one.cell.load for one in found] == (loads or [])
    assert all(len(one.passes) == 2 for one in found)
    assert clock[0] <= max(seconds, 1.0)


LOADS = ("fidelity_live.loads=[0.5,1.5]", "fidelity_live.seconds=0.1", "fidelity_live.least_requests=8")


@pytest.fixture
def study(tmp_path: Path) -> tuple[str, ...]:
    pytest.importorskip("torch")
    from live_study import write_live_study

    return write_live_study(tmp_path)


@pytest.mark.live
def test_the_whole_command(command: CommandLine, study: tuple[str, ...], tmp_path: Path) -> None:
    said = command(*study, *LOADS)
    assert said.status in (0, 2), said.err  # the tiny model's profile is made up
    summary = said.summary
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["fidelity"]["parts"]) == [
        f"{arm}, {load} of capacity" for arm in ("full_depth", "early_exit") for load in ("50%", "150%")
    ]
    for rows in summary["fidelity"]["parts"].values():
        found = {(row["group"], row["statistic"], row["unit"]): row for row in rows}
        mean = found["TPOT", "mean", "ms"]
        assert mean["measured"] > 0
        assert mean["difference"] == pytest.approx(mean["simulated"] / mean["measured"] - 1)
        assert len(mean["runs"]) == 2
        assert mean["measured"] == pytest.approx(sum(mean["runs"]) / 2)
        assert mean["noise"] == pytest.approx(abs(mean["runs"][0] - mean["runs"][1]) / mean["measured"])
        assert found["ITL", "p99", "ms"]["measured"] > 0
    assert list(summary["arms"]) == [
        f"{kind}_{arm}" for arm in ("full_depth", "early_exit") for kind in ("live", "simulated")
    ]
    points = {(point["settings"]["load"], point["settings"]["pass"]): point["metrics"] for point in summary["points"]}
    assert set(points) == {(load, turn) for load in (0.5, 1.5) for turn in (1, 2)}
    for metrics in points.values():  # the same requests everywhere
        assert len({m["requests_completed"] for name, m in metrics.items() if name.endswith("full_depth")}) == 1
    assert len(summary["gates"]) == 6
    page = (tmp_path / "out" / "report.html").read_text()
    assert "noise" in page
    assert "iterations of" in page
    for name in ("spread_ttft", "spread_tpot"):
        assert (tmp_path / "out" / "figures" / f"{name}.png").stat().st_size > 0


@pytest.mark.live
@pytest.mark.usefixtures("sketched")
def test_finished_runs_are_kept_when_it_is_stopped(
    command: CommandLine, study: tuple[str, ...], tmp_path: Path, monkeypatch
) -> None:
    from helios_sim.study import runner

    run_job, ran = runner.run_job, []

    def stop_at_the_third(job):
        if job.config.mode == "live":
            ran.append(job.key)
            if len(ran) == 3:
                raise KeyboardInterrupt
        return run_job(job)

    monkeypatch.setattr(runner, "run_job", stop_at_the_third)
    assert command(*study, *LOADS).status == 1
    assert not (tmp_path / "out" / "summary.json").exists()
    said = command(*study, *LOADS)
    assert said.status in (0, 2)
    assert len(ran) == 2 + 1 + 6  # two finished, one was stopped, the other six of eight
    assert len(set(ran)) == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("fidelity_live.loads=[0.5,-1]", "fidelity_live.loads"),
        ("fidelity_live.seconds=0", "fidelity_live.seconds"),
        ("fidelity_live.passes=1", "fidelity_live.passes"),
        ("live.pace_every_s=0", "live.pace_every_s"),
        ("live.texts=nowhere", "live.texts"),
        ("policy=oracle", "oracle"),
    ],
)
def test_a_mistake_is_said_before_anything_is_written(
    command: CommandLine, study: tuple[str, ...], tmp_path: Path, change: str, part: str
) -> None:
    said = command(*study, LOADS[0], change)
    assert said.status == 1
    assert part in said.err
    assert not (tmp_path / "out").exists()
