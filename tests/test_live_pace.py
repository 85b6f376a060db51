"""A device's pace: one step timed as the calibration timed it, and what a comparison makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from command_line import CommandLine  # noqa: E402
from helios_sim.live import pace  # noqa: E402
from helios_sim.live.checkpoint.source import find_checkpoint  # noqa: E402
from helios_sim.live.clock import WallClock  # noqa: E402
from helios_sim.live.device import CpuDevice  # noqa: E402
from helios_sim.live.energy import Meter  # noqa: E402
from helios_sim.live.model.decoder import SegmentedModel  # noqa: E402
from helios_sim.profile.pace import DECODE, PROMPT  # noqa: E402
from helios_sim.profile.profile import Profile  # noqa: E402
from helios_sim.profile.spec import Anchor, Anchors  # noqa: E402
from helios_sim.profile.store import read_profile, write_profile  # noqa: E402
from helios_sim.profile.synthetic import flat_profile  # noqa: E402
from helios_sim.study.live_replica import Pace  # noqa: E402
from live_study import HARDWARE, write_live_study  # noqa: E402
from tiny_models import FAMILIES, write_tiny  # noqa: E402

LAYERS, STEP_S = 6, 0.012
DECODES, PROMPTS = Anchor(2, 1.0, kv_tokens=8), Anchor(16, 1.0)


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


def profile(layer_s: float | None, with_prompts: bool = False) -> Profile:
    flat = flat_profile(0.001, n_layers=LAYERS, name="tiny")
    if layer_s is None:
        return flat
    prompt = replace(PROMPTS, layer_s=layer_s / 2) if with_prompts else None
    return replace(flat, anchors=Anchors(replace(DECODES, layer_s=layer_s), prompt))


class There:
    """As much of an engine as the pace asks for: one model in memory, on a clocked device."""

    def __init__(self, model: SegmentedModel, device: Clocked) -> None:
        self.residents, self.device, self.model, self.short = self, device, model, False

    @property
    def layers(self) -> dict[str, int]:
        return {"tiny": self.model.n_loaded}

    def running(self, name: str, layers: int) -> SegmentedModel:
        return self.model


def pace_of(
    engine: There, then_s: float | None, every_s: float | None = None, with_prompts: bool = False
) -> tuple[Pace, WallClock]:
    clock = WallClock()
    clock.sync()
    meter = Meter(None, "no counter")
    return Pace(engine, {"tiny": profile(then_s, with_prompts)}, clock, meter, every_s), clock


@pytest.fixture(params=FAMILIES)
def engine(request: pytest.FixtureRequest, clocked: Clocked, tmp_path: Path) -> There:
    weights = find_checkpoint(str(write_tiny(request.param, tmp_path / "tiny", layers=LAYERS)))
    return There(SegmentedModel.load(weights, 4), clocked)


def test_the_median_of_a_layer_whatever_disturbs_some_steps(engine: There) -> None:
    seen, _ = pace_of(engine, STEP_S / 4 / 1.25)  # layers that are not there do not run
    seen.look_beside()
    assert seen.mean(DECODE) == pytest.approx(1.25)


def test_the_pace_is_unknown_where_nobody_timed_the_step(engine: There) -> None:
    seen, _ = pace_of(engine, None, every_s=1e-9)
    seen.look_beside()
    seen.look_within("tiny")
    assert seen.mean(DECODE) is None


def test_a_step_without_room_leaves_the_pace_unknown(engine: There, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(pace, "anchor_step", short)
    seen, _ = pace_of(engine, 1.0)
    seen.look_beside()
    assert seen.mean(DECODE) is None


def test_within_a_run_one_step_is_timed_whenever_it_is_time_for_one(engine: There) -> None:
    seen, clock = pace_of(engine, STEP_S / 4 / 1.25, every_s=0.05)

    def look() -> None:
        """A decode's turn, and that of a prompt, which this profile does not tell of."""
        for _ in range(2):
            clock.real_start -= 0.06
            seen.look_within("tiny")

    look()
    ran = engine.device.steps
    seen.look_within("tiny")  # not yet
    assert engine.device.steps == ran == 1 + pace.WARM_STEPS
    look()
    assert engine.device.steps == 2 + pace.WARM_STEPS  # the same step
    engine.model.drop_layers(3)
    engine.device.steps = 10  # so that no step is disturbed
    look()
    assert engine.device.steps == 11 + pace.WARM_STEPS  # another one: a layer has left
    assert seen.mean(DECODE) == pytest.approx((1.25 + 1.25 + 1.25 * 4 / 3) / 3)
    beside = engine.device.steps
    seen.look_beside()  # it is known from within
    assert engine.device.steps == beside


def test_decodes_and_prompts_take_turns_each_against_its_own_time(engine: There) -> None:
    seen, clock = pace_of(engine, STEP_S / 4 / 1.25, every_s=0.05, with_prompts=True)
    for step in range(6):
        clock.real_start -= 0.06
        engine.device.steps = 10  # so that no step is disturbed
        seen.look_within("tiny")
        assert engine.device.steps == 11 + (pace.WARM_STEPS if step < 2 else 0)
    assert seen.mean(DECODE) == pytest.approx(1.25)
    assert seen.mean(PROMPT) == pytest.approx(2.5)


@pytest.mark.parametrize("every", [(), ("live.pace_every_s=0.001",)])
def test_a_comparison_shows_the_simulation_at_the_devices_pace(
    capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, every: tuple[str, ...]
) -> None:
    """The profile's step is made up, so the pace is what the test makes it."""
    study = write_live_study(tmp_path)
    folder = tmp_path / "profiles" / f"tiny@{HARDWARE}"
    made_up = read_profile(folder)
    anchors = Anchors(replace(DECODES, layer_s=1.0 / LAYERS), replace(PROMPTS, layer_s=0.5 / LAYERS))
    write_profile(replace(made_up, anchors=anchors), folder)
    monkeypatch.setattr(pace, "seconds", lambda *_: 2.0)
    loads = ("fidelity_live.loads=[0.5]", "fidelity_live.seconds=0.1", "fidelity_live.least_requests=8")
    said = CommandLine(capsys, monkeypatch, tmp_path)(*study, *loads, *every)
    assert said.status in (0, 2), said.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    rows = next(iter(summary["fidelity"]["parts"].values()))
    tpot = next(row for row in rows if (row["group"], row["statistic"]) == ("TPOT", "mean"))
    assert tpot["paced"] == pytest.approx(2 * tpot["simulated"], rel=0.25)  # iterations twice as long, fewer at once
    assert tpot["paced"] > tpot["simulated"]
    assert tpot["paced_difference"] == pytest.approx(tpot["paced"] / tpot["measured"] - 1)
    gate = next(gate for gate in summary["gates"] if "full_depth, TPOT" in gate["name"])
    assert gate["value"] == pytest.approx(tpot["paced_difference"])
    assert "the simulation at the device's pace keeps" in summary["verdict"][0]
    assert "at the device's pace" in summary["verdict"][1]
    assert "at its pace" in said.out
    assert "took 2.00 of its time beside the profile, a prompt 4.00" in said.out
