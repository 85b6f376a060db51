"""Work on the streams of a strict card touches the same bytes only in order, and host memory is locked to the byte."""

from __future__ import annotations

from queue import SimpleQueue
from typing import Any

import pytest
import torch

from helios_sim.errors import TooLittleMemory
from helios_sim.live import device as device_module
from helios_sim.live.cuda import CudaDevice, page_locked
from helios_sim.live.device import aligned
from helios_sim.live.exits import Row
from helios_sim.live.graphs import GraphedDecodes
from helios_sim.live.memory.kv import KvCache, PromptStep
from helios_sim.live.memory.residents import Residents
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.served import LiveModel
from live_rig import LAYERS, live_model
from strict_cuda import StrictCuda, Unordered
from tiny_models import write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LiveModel:
    return live_model(write_tiny("llama", tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def cuda() -> Any:
    strict = StrictCuda()
    with strict.watched():
        yield strict


@pytest.fixture
def on(cuda: StrictCuda) -> CudaDevice:
    return CudaDevice(torch.device("cpu"), cuda)


def loaded(residents: Residents, name: str) -> None:
    found: SimpleQueue[Exception | None] = SimpleQueue()
    residents.load(name, found.put)
    error = found.get(timeout=20)
    if error is not None:
        raise error


def run(model: SegmentedModel, layers: int) -> None:
    """A prompt through the layers, for whose end nobody waits."""
    cache = KvCache(model.architecture, layers, 1, 8, model.dtype, model.device)
    step = PromptStep(cache, 0, 5)
    model.run(model.embed(step.positions, step.positions), 0, layers, step)


def test_the_card_tells_of_work_without_an_order(cuda: StrictCuda, on: CudaDevice) -> None:
    source, target = on.host_empty(64), torch.zeros(64, dtype=torch.uint8)
    with pytest.raises(Unordered, match="zeros on stream 0"):
        on.copy([(source, target)])
    on.copy([(source, target)], on.mark())
    with pytest.raises(Unordered, match="the host and copy_"):
        source.numpy()[:] = 1


def test_loads_wait_for_what_still_reads_the_memory_that_they_take(on: CudaDevice, tiny: LiveModel) -> None:
    residents = Residents({"a": tiny, "b": tiny}, on, weight_bytes=int(1.2 * tiny.checkpoint.architecture.weight_values(
        LAYERS)) * 4)  # fmt: skip
    residents.hold({"a": LAYERS})  # the memory has been filled with zeros, on the other stream
    run(residents.running("a", LAYERS), LAYERS)
    residents.hold({"b": LAYERS})
    loaded(residents, "b")
    run(residents.running("b", LAYERS), LAYERS)
    residents.close()


def test_layers_that_stream_through_a_window_wait_for_those_before(on: CudaDevice, tiny: LiveModel) -> None:
    residents = Residents({"b": tiny, "a": tiny}, on)
    residents.hold({"a": 1})
    residents.hold({"a": 1, "b": LAYERS})
    with residents.whole("b") as model:
        run(model, LAYERS)
    loaded(residents, "b")
    residents.close()


def test_numbers_of_a_band_are_not_overwritten_before_they_are_read(on: CudaDevice, tiny: LiveModel) -> None:
    model = SegmentedModel.load(tiny.checkpoint)
    cache = KvCache(model.architecture, LAYERS, 4, 32)
    captured = GraphedDecodes(model, cache, on)
    for start, end in ((0, 2), (2, LAYERS), (0, 2), (2, LAYERS)):  # without a look at any result in between
        hidden = None if not start else torch.zeros(2, model.architecture.d_model)
        captured.run([Row(0, 5, 7, LAYERS), Row(1, 3, 9, LAYERS)], hidden, start, end)


def test_host_memory_is_locked_once_for_a_model_and_not_a_byte_too_much(
    cuda: StrictCuda, on: CudaDevice, tmp_path: Any
) -> None:
    tiny, locked = live_model(write_tiny("llama", tmp_path)), cuda.runtime.locked
    residents = Residents({"a": tiny}, on)
    residents.hold({"a": LAYERS})
    (n_bytes,) = locked.values()
    weights = SegmentedModel.load(tiny.checkpoint).weight_bytes
    assert aligned(weights) <= n_bytes <= weights + 20 * LAYERS * 256  # every part is aligned
    memory = page_locked(1 << 20, cuda)
    assert len(locked) == 2
    del memory
    assert len(locked) == 1
    residents.close()
    assert not cuda.runtime.unmapped


def test_host_memory_for_all_weights_is_asked_for_before_any_is_read(
    on: CudaDevice, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = live_model(write_tiny("llama", tmp_path))
    whole = tiny.checkpoint.architecture.weight_values(LAYERS) * 4
    monkeypatch.setattr(device_module, "available_bytes", lambda device: whole - 1)
    with pytest.raises(TooLittleMemory, match="in host memory"):
        Residents({"a": tiny}, on).hold({"a": 1})


def test_memory_that_cannot_be_locked_is_a_shortage(cuda: StrictCuda, on: CudaDevice) -> None:
    cuda.runtime.refuses = True
    with pytest.raises(MemoryError, match="page-locked"):
        on.host_empty(4096)
    assert torch.ones(1).tolist() == [1.0], "the next launch raises an error that is not its own"
