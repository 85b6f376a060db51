"""Energy from counters that only pretend: RAPL's folder, NVML's total, and a live run that reads one."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from command_line import CommandLine
from fake_device import FakeNvml, VirtualClock
from helios_sim.live import energy
from helios_sim.live.energy import ABSENT, Meter, NvmlCard, Rapl, open_counter

JOULES = 36.0
REQUESTS = 12


class Readings:
    """A counter that says one value after the other, the last one for good."""

    source = "a list"

    def __init__(self, *values_j: float | None) -> None:
        self.left_j, self.asked = list(values_j), 0

    def energy_j(self) -> float | None:
        self.asked += 1
        return self.left_j.pop(0) if len(self.left_j) > 1 else self.left_j[0]


def write_zone(folder: Path, zone: str, microjoules: int, name: str = "package-0") -> None:
    (folder / zone).mkdir(parents=True, exist_ok=True)
    (folder / zone / "name").write_text(f"{name}\n")
    (folder / zone / "energy_uj").write_text(str(microjoules))
    (folder / zone / "max_energy_range_uj").write_text("10000000")


def test_parts_of_a_package_and_the_whole_platform_are_not_counted_again(tmp_path: Path) -> None:
    write_zone(tmp_path, "intel-rapl:0", 3_000_000)
    write_zone(tmp_path, "intel-rapl:1", 4_000_000, "package-1")
    write_zone(tmp_path, "intel-rapl:0:0", 1_000_000, "core")
    write_zone(tmp_path, "intel-rapl:2", 9_000_000, "psys")
    assert Rapl(tmp_path).energy_j() == pytest.approx(7.0)


def test_a_meter_tells_what_the_counter_rose_by_though_it_began_anew(tmp_path: Path) -> None:
    clock = VirtualClock()
    write_zone(tmp_path, "intel-rapl:0", 9_000_000)
    meter = Meter(Rapl(tmp_path), "absent", clock)
    meter.start()
    clock.pass_s(5.0)
    write_zone(tmp_path, "intel-rapl:0", 2_500_000)  # of 10 J, after which it begins at 0
    meter.stop()
    assert meter.energy_j == pytest.approx(3.5)
    assert meter.why == ""
    write_zone(tmp_path, "intel-rapl:0", 4_000_000)
    meter.stop()
    assert meter.energy_j == pytest.approx(3.5)


def test_a_meter_looks_while_it_runs(monkeypatch) -> None:
    """Two new beginnings between two looks could not be told from one."""
    monkeypatch.setattr(energy, "LOOK_S", 0.001)
    counter, deadline = Readings(1.0), time.monotonic() + 10
    meter = Meter(counter, "absent")
    meter.start()
    while counter.asked < 5:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    meter.stop()
    asked = counter.asked
    time.sleep(0.02)
    assert counter.asked == asked


@pytest.mark.parametrize(
    ("counter", "seconds", "why"),
    [
        (None, 5.0, "absent"),
        (Readings(None), 5.0, "absent"),
        (Readings(1.0, None), 5.0, "absent"),
        (Readings(1.0, 2.0), 0.5, "less than the 1 s"),
    ],
)
def test_without_a_counter_or_time_for_it_there_is_no_energy_and_a_reason(counter, seconds: float, why: str) -> None:
    clock = VirtualClock()
    meter = Meter(counter, "absent", clock)
    assert meter.energy_j is None
    meter.start()
    clock.pass_s(seconds)
    meter.stop()
    assert meter.energy_j is None
    assert why in meter.why


def test_a_card_is_found_by_its_unique_id_and_counts_millijoules() -> None:
    clock = VirtualClock()
    nvml = FakeNvml(clock, watts=250)
    card = NvmlCard.of(nvml, SimpleNamespace(uuid="ab-c"), 3)
    assert card is not None
    clock.pass_s(4.0)
    assert card.energy_j() == pytest.approx(1000)
    assert nvml.asked == ["GPU-ab-c"]
    refusing = NvmlCard.of(FakeNvml(clock, unsupported=("energy", "limit")), SimpleNamespace(uuid="ab-c"), 0)
    assert refusing is not None
    assert refusing.energy_j() is None
    unknown = FakeNvml(clock, unsupported=("uuid",))
    assert NvmlCard.of(unknown, SimpleNamespace(uuid="ab-c"), 0) is None


def test_without_a_driver_a_card_has_no_counter(monkeypatch) -> None:
    monkeypatch.setattr(energy, "open_nvml", lambda: None)
    assert open_counter("cuda:1") is None
    assert isinstance(open_counter("cpu"), Rapl)


@pytest.fixture
def study(tmp_path: Path) -> tuple[str, ...]:
    pytest.importorskip("torch")
    from live_study import write_live_study

    return write_live_study(tmp_path)


class Rising:
    """A counter that rises by a joule whenever it is read."""

    source = "readings"

    def __init__(self) -> None:
        self.read = 0

    def energy_j(self) -> float:
        self.read += 1
        return float(self.read)


def test_what_is_left_out_is_not_counted() -> None:
    clock, counter = VirtualClock(), Rising()
    meter = Meter(counter, "absent", clock)
    with meter.left_out():  # before it starts there is nothing to leave out
        pass
    meter.start()
    for _ in range(3):
        with meter.left_out():
            counter.read += 10
    clock.pass_s(5.0)
    meter.stop()
    assert meter.energy_j == 3 + 1  # the readings before the blocks, and the last one


@pytest.mark.live
def test_the_pace_is_looked_at_within_a_run_whose_energy_is_counted(
    capsys, monkeypatch, tmp_path: Path, study: tuple[str, ...]
) -> None:
    monkeypatch.setattr(energy, "LEAST_S", 0.0)
    monkeypatch.setattr("helios_sim.study.live.open_counter", lambda device: Rising())
    said = CommandLine(capsys, monkeypatch, tmp_path)(*study, "mode=live", "live.pace_every_s=0.001")
    assert said.status == 0, said.err
    for arm in said.summary["arms"].values():  # each look is a reading more, and what it draws is left out
        assert arm["metrics"]["energy_wh_per_request"] > 1.5 / 3600 / REQUESTS


@pytest.mark.live
def test_a_live_run_s_energy_is_one_measured_value(capsys, monkeypatch, tmp_path: Path, study: tuple[str, ...]) -> None:
    asked: list[str] = []

    def counter(device: str) -> Readings:
        asked.append(device)
        return Readings(100.0, 100.0 + JOULES)

    monkeypatch.setattr(energy, "LEAST_S", 0.0)
    monkeypatch.setattr("helios_sim.study.live.open_counter", counter)
    said = CommandLine(capsys, monkeypatch, tmp_path)(*study, "mode=live")
    assert said.status == 0, said.err
    assert asked == ["cpu", "cpu"]  # one for each arm
    for arm in said.summary["arms"].values():
        metrics = arm["metrics"]
        assert metrics["requests_completed"] == REQUESTS
        assert metrics["energy_wh_per_request"] == pytest.approx(JOULES / 3600 / REQUESTS)
        chars = metrics["throughput_chars_per_s"] * metrics["span_s"]
        assert metrics["energy_j_per_char"] == pytest.approx(JOULES / chars)
    assert said.summary["provenance"]["inputs"]["energy"]["provenance_class"] == "measured"
    assert said.summary["provenance"]["inputs"]["energy"]["source"] == "a list"
    assert "Energy is not known" not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.live
def test_a_live_run_without_a_counter_says_so_and_estimates_nothing(
    capsys, monkeypatch, tmp_path: Path, study: tuple[str, ...]
) -> None:
    monkeypatch.setattr("helios_sim.study.live.open_counter", lambda device: Readings(None))
    said = CommandLine(capsys, monkeypatch, tmp_path)(*study, "mode=live")
    assert said.status == 0, said.err
    for arm in said.summary["arms"].values():
        assert arm["metrics"]["energy_wh_per_request"] is None
        assert arm["metrics"]["energy_j_per_char"] is None
    assert "energy" not in said.summary["provenance"]["inputs"]
    assert f"Energy is not known: {ABSENT['cpu']}." in (tmp_path / "out" / "report.html").read_text()


POLICY = """
from helios_sim import Completed, Deployment, FullDepth, KvRule, Placement, PowerAbove

class Watches:
    def start(self, situation):
        self.model, candidate = next(iter(situation.candidates.items()))
        self.deep = candidate.offline.exits[-1]
        return self.full("begin")

    def decide(self, cause, telemetry):
        if isinstance(cause, PowerAbove):
            return self.full(f"{telemetry.energy.joules > 0}: drew more than {cause.watts} W", ())
        return None

    def full(self, reason, triggers=(PowerAbove(1.0, 0.1), Completed(1))):
        return Deployment(Placement(self.model, self.deep), FullDepth(), kv_rule=KvRule.NONE, reason=reason,
                          triggers=triggers)
"""


@pytest.mark.live
@pytest.mark.parametrize("counted", [True, False])
def test_a_policy_sees_the_power_of_a_device_that_has_a_counter(
    capsys, monkeypatch, tmp_path: Path, study: tuple[str, ...], counted: bool
) -> None:
    """The counter rises by 1000 J whenever it is read, every tenth of a second: more than a watt."""
    counter = Readings(*(1000.0 * n for n in range(1, 9999)))
    monkeypatch.setattr(energy, "LEAST_S", 0.0)
    monkeypatch.setattr("helios_sim.study.live.open_counter", lambda device: counter)
    monkeypatch.setattr("helios_sim.study.build.may_be_counted", lambda device: counted)
    (tmp_path / "watches.py").write_text(POLICY)
    monkeypatch.syspath_prepend(tmp_path)
    said = CommandLine(capsys, monkeypatch, tmp_path)(
        *study, "mode=live", "policy=custom", "policy.object=watches:Watches", "workload.n_requests=40"
    )
    if not counted:
        assert said.status == 1
        assert "PowerAbove only where power is known" in said.err
        return
    assert said.status == 0, said.err
    assert "True: drew more than 1.0 W" in (tmp_path / "out" / "report.html").read_text()
