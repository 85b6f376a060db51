"""Bytes that shapes predict against the device's own count, and the rates of copies."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from calibrate.measure.devices import TimedCpu  # noqa: E402
from calibrate.measure.memory import COPY_BYTES, Memory, grown, measure_loads, measure_memory  # noqa: E402
from calibrate.measure.subject import Subject, TableLimits  # noqa: E402
from helios_sim.live.model.architecture import model_spec  # noqa: E402
from tiny_models import write_tiny  # noqa: E402
from virtual_subject import ARCHITECTURE, VirtualSubject  # noqa: E402


def test_predictions_are_the_tensors_bytes(tmp_path: Any) -> None:
    from helios_sim.live.checkpoint.source import find_checkpoint
    from helios_sim.live.model.decoder import SegmentedModel

    checkpoint = find_checkpoint(str(write_tiny("qwen2", tmp_path, layers=2)))
    device = TimedCpu.open(memory_bytes=1 << 30, threads=1)
    model, _ = grown(device, lambda: SegmentedModel.load(checkpoint))
    subject = Subject(model, device, TableLimits(2, 64, 64, 128, 8))
    spec = model_spec(checkpoint.architecture, "tiny", 4.0)
    with torch.no_grad():
        found = measure_memory(subject, spec, 123)
    assert found.weights.predicted == model.weight_bytes
    assert found.weights.measured == 123
    assert found.layer_bytes == sum(t.nbytes for t in subject.layer_tensors(0))
    assert found.kv.predicted == 2 * 2 * 128 * checkpoint.architecture.kv_width * 4
    assert found == Memory.from_json(found.to_json())


def test_the_reserve_is_what_was_measured_or_else_the_formula() -> None:
    subject = VirtualSubject()
    spec = model_spec(ARCHITECTURE, "virtual", 4.0)
    found = measure_memory(subject, spec, None)
    assert found.activation_reserve_bytes == 12345  # the virtual device's peak
    subject.device.peak_bytes = lambda step: None  # type: ignore[method-assign]
    unknown = measure_memory(subject, spec, None)
    assert unknown.activations.measured is None
    assert unknown.activation_reserve_bytes == unknown.activations.predicted > 0


def test_grown_is_the_difference_of_two_counts() -> None:
    class Counting:
        used = iter([100, 350])

        def used_bytes(self) -> int:
            return next(self.used)

        def wait(self) -> None: ...

    assert grown(Counting(), lambda: "made") == ("made", 250)


def test_loads_run_at_the_rate_of_the_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibrate.measure.memory.MEANWHILE_S", 0.01)
    subject = VirtualSubject(bytes_per_s=2e9)
    found = measure_loads(subject)
    assert found.bytes_per_s == {"host": pytest.approx(2e9)}
    assert found.iqr_share["host"] == pytest.approx(0.0)
    assert found.engine_bytes_per_s == pytest.approx(2e9)
    assert found.slowdown == pytest.approx(1.0)  # on a clock that copies do not slow down
    assert found.layer_bytes == 256
    assert found.checkpoint_bytes_per_s is None


def test_a_real_copy_beside_real_iterations(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from helios_sim.live.checkpoint.source import find_checkpoint
    from helios_sim.live.model.decoder import SegmentedModel

    monkeypatch.setattr("calibrate.measure.memory.MEANWHILE_S", 0.05)
    monkeypatch.setitem(COPY_BYTES, "cpu", 1 << 20)
    checkpoint = find_checkpoint(str(write_tiny("llama", tmp_path, layers=2)))
    device = TimedCpu.open(memory_bytes=1 << 30, threads=1)
    subject = Subject(SegmentedModel.load(checkpoint), device, TableLimits(2, 16, 16, 32, 8))
    with torch.no_grad():
        found = measure_loads(subject, reload=lambda: 1000)
    assert set(found.bytes_per_s) == {"host", "mapped_file"}
    assert all(rate > 1e6 for rate in found.bytes_per_s.values())
    assert found.slowdown >= 1.0
    assert found.meanwhile_bytes_per_s > 1e5
    assert found.checkpoint_bytes_per_s is not None


def test_the_pool_leaves_room_beside_weights_that_fill_most_of_the_memory(tmp_path: Any) -> None:
    from helios_sim.live.checkpoint.source import find_checkpoint
    from helios_sim.live.model.decoder import SegmentedModel

    model = SegmentedModel.load(find_checkpoint(str(write_tiny("llama", tmp_path, layers=2))))
    memory_bytes = int(1.25 * model.weight_bytes)
    device = TimedCpu.open(memory_bytes=memory_bytes, threads=1)
    subject = Subject(model, device, TableLimits(4096, 4, 4, 8, 4))
    token_bytes = 2 * 2 * model.architecture.kv_width * 4  # K and V, two layers
    assert subject.holds(1, 12)  # what a single request takes
    assert subject.pool_tokens * token_bytes < memory_bytes - model.weight_bytes
    roomy = Subject(model, TimedCpu.open(memory_bytes=100 * model.weight_bytes, threads=1), TableLimits(64, 4, 4, 8, 4))
    assert roomy.pool_tokens == 64 * 8
