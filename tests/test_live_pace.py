"""A device's pace: one step timed as the calibration timed it, and what a comparison makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from command_line import CommandLine  # noqa: E402
from helios_sim.live import pace  # noqa: E402
from helios_sim.live.device import CpuDevice  # noqa: E402
from helios_sim.live.model import SegmentedModel  # noqa: E402
from helios_sim.live.source import find_checkpoint  # noqa: E402
from helios_sim.profile.profile import Profile  # noqa: E402
from helios_sim.profile.store import read_profile, write_profile  # noqa: E402
from helios_sim.profile.synthetic import flat_profile  # noqa: E402
from helios_sim.study.pace import measured_pace  # noqa: E402
from live_study import HARDWARE, write_live_study  # noqa: E402
from tiny_models import FAMILIES, write_tiny  # noqa: E402

LAYERS, STEP_S = 6, 0.012


class Clocked(CpuDevice):
    """Steps take a time of their own on a clock of their own; every fifth is disturbed."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s, self.steps = 0.0, 0

    def prepare(self, step):
        def timed() -> object:
            self.steps += 1
            self.now_s += STEP_S * (10 if self.steps % 5 == 0 else 1)
            return step()

        return timed


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> Clocked:
    device = Clocked()
    monkeypatch.setattr(pace, "perf_counter", lambda: device.now_s)
    return device


def profile(layer_s: float | None) -> Profile:
    flat = flat_profile(0.001, n_layers=LAYERS, name="tiny")
    known = {} if layer_s is None else {"pace": {"batch": 2, "kv_tokens": 8, "layer_s": layer_s, "measurements": 3}}
    return replace(flat, provenance=replace(flat.provenance, details=known))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_median_of_a_layer_whatever_disturbs_some_steps(family: str, clocked: Clocked, tmp_path: Path) -> None:
    model = SegmentedModel.load(find_checkpoint(str(write_tiny(family, tmp_path / "tiny", layers=LAYERS))), 4)
    assert pace.layer_s(model, clocked, 2, 8) == pytest.approx(STEP_S / 4)  # layers that are not there do not run


def test_the_pace_is_now_over_then_and_unknown_where_nobody_timed_it(clocked: Clocked, tmp_path: Path) -> None:
    model = SegmentedModel.load(find_checkpoint(str(write_tiny("llama", tmp_path / "tiny", layers=LAYERS))))
    there = SimpleNamespace(layers={"tiny": LAYERS}, running=lambda name, layers: model)
    engine = SimpleNamespace(residents=there, device=clocked)
    assert measured_pace(engine, {"tiny": profile(STEP_S / LAYERS / 1.25)}) == pytest.approx(1.25)
    assert measured_pace(engine, {"tiny": profile(None)}) is None

    def full(name: str, layers: int) -> SegmentedModel:
        raise MemoryError("no room")

    there.running = full
    with pytest.raises(MemoryError):  # whose fault that is, is not the step's to hide
        measured_pace(engine, {"tiny": profile(1.0)})


def test_a_step_without_room_leaves_the_pace_unknown(clocked: Clocked, tmp_path: Path, monkeypatch) -> None:
    model = SegmentedModel.load(find_checkpoint(str(write_tiny("llama", tmp_path / "tiny", layers=LAYERS))))
    engine = SimpleNamespace(
        residents=SimpleNamespace(layers={"tiny": LAYERS}, running=lambda name, layers: model), device=clocked
    )

    def short(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(pace, "decode_step", short)
    assert measured_pace(engine, {"tiny": profile(1.0)}) is None


def test_a_comparison_shows_the_simulation_at_the_devices_pace(
    capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The profile's step is made up, so the pace is what the test makes it."""
    study = write_live_study(tmp_path)
    folder = tmp_path / "profiles" / f"tiny@{HARDWARE}"
    made_up = read_profile(folder)
    known = {**made_up.provenance.details, "pace": {"batch": 1, "kv_tokens": 4, "layer_s": 1.0, "measurements": 3}}
    write_profile(replace(made_up, provenance=replace(made_up.provenance, details=known)), folder)
    monkeypatch.setattr(pace, "layer_s", lambda *_: 2.0)
    loads = ("fidelity_live.loads=[0.5]", "fidelity_live.seconds=0.1", "fidelity_live.least_requests=8")
    said = CommandLine(capsys, monkeypatch, tmp_path)(*study, *loads)
    assert said.status in (0, 2), said.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    rows = next(iter(summary["fidelity"]["parts"].values()))
    tpot = next(row for row in rows if (row["group"], row["statistic"]) == ("TPOT", "mean"))
    assert tpot["paced"] == pytest.approx(2 * tpot["simulated"], rel=0.25)  # iterations twice as long, fewer at once
    assert tpot["paced"] > tpot["simulated"]
    assert tpot["paced_difference"] == pytest.approx(tpot["paced"] / tpot["measured"] - 1)
    gate = next(gate for gate in summary["gates"] if "full_depth, TPOT" in gate["name"])
    assert gate["value"] == pytest.approx(tpot["difference"])  # what is judged is the profile alone
    assert "at the device's pace" in summary["verdict"][1]
    assert "at its pace" in said.out
    assert "took 2.00 of its time" in said.out
