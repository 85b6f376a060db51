"""What a device answered, written down and answered again: the same results to the last bit, without the device."""

from __future__ import annotations

import io
import json

import pytest

pytest.importorskip("torch")

from calibrate.campaigns.device import RecordingDevice, ReplayedDevice, measure_device
from calibrate.measure.devices import open_device
from fake_device import VirtualClock, VirtualDevice
from helios_sim.errors import UserError

SIZES = {"buffer_bytes": 1 << 20, "matrix_rows": 32, "copy_bytes": 1 << 16}
REHEARSAL = "experiments/card_campaign/rehearsal"


def recorded(device, now_s=None) -> tuple[dict, str]:
    file = io.StringIO()
    watched = RecordingDevice(device, file) if now_s is None else RecordingDevice(device, file, now_s)
    return measure_device(watched, "float32", watched.now_s, watched.sleep, **SIZES), file.getvalue()


def replayed(text: str, tmp_path) -> tuple[dict, ReplayedDevice]:
    path = tmp_path / "device.jsonl"
    path.write_text(text)
    device = ReplayedDevice(path)
    return measure_device(device, "float32", device.now_s, device.sleep, **SIZES), device


def test_a_cpu_measured_once_gives_the_same_report_without_it(tmp_path) -> None:
    found, text = recorded(open_device("cpu", 1 << 28, 1))
    again, device = replayed(text, tmp_path)
    assert again == found
    assert device.finished
    assert found["ceilings"]["flops_per_s"] > 0


def test_a_card_s_events_launches_and_energy_are_replayed(tmp_path, monkeypatch) -> None:
    """On a clock of its own that moves a little at every look, as a real one does."""
    clock = VirtualClock()

    def now_s() -> float:
        clock.pass_s(1e-3)
        return clock.now_s

    device = VirtualDevice(clock, asynchronous=True, power_w=lambda s: 90.0 * round(s, 2))
    monkeypatch.setattr(VirtualDevice, "laps_s", lambda self, steps: [1e-3 + 1e-6 * self.prepared for _ in steps])
    monkeypatch.setattr(VirtualDevice, "launch_s", lambda self, step: 5e-6)
    monkeypatch.setattr("calibrate.campaigns.device.time.sleep", clock.pass_s)
    found, text = recorded(device, now_s)
    assert found["power"]["idle_w"] == pytest.approx(90, rel=0.05)
    assert found["launch"]["host_s_per_kernel"] == pytest.approx(5e-6 / 200)
    again, other = replayed(text, tmp_path)
    assert again == found
    assert other.finished


def test_a_record_of_another_measurement_is_refused(tmp_path) -> None:
    _, text = recorded(open_device("cpu", 1 << 28, 1))
    lines = text.splitlines()
    with pytest.raises(UserError, match=r"record=.*of another measurement"):
        replayed("\n".join([lines[0], *lines[4:]]), tmp_path)
    with pytest.raises(UserError, match="after its end"):
        replayed("\n".join(lines[:-2]), tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        replayed("no json", tmp_path)


def test_the_record_beside_the_rehearsal_gives_its_report(repository) -> None:
    folder = repository / REHEARSAL
    summary = json.loads((folder / "summary.json").read_text())
    result = dict(summary["stages"]["ceilings"]["result"])
    device = ReplayedDevice(folder / "device.jsonl")
    sizes = {"buffer_bytes": 16 << 20, "matrix_rows": 128, "copy_bytes": 4 << 20}
    found = measure_device(device, result["ceilings"]["dtype"], device.now_s, device.sleep, **sizes)
    again = json.loads(json.dumps(found))
    again["facts"] = {name: again["facts"][name] for name in result["facts"]}  # others were asked for later
    assert again == result
