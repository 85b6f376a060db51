"""Captures on a card as strict as torch 2.11 and 2.13: every one succeeds, and what fails is said."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from calibrate.measure.ceilings import measure_ceilings
from calibrate.measure.devices import TimedCuda
from helios_sim.live.cuda import Card, CudaDevice
from helios_sim.live.device import Step, open_device
from strict_cuda import INVALID, STREAMS, VERSIONS, StrictCuda


@pytest.fixture(params=VERSIONS)
def cuda(request: pytest.FixtureRequest) -> Any:
    strict = StrictCuda(request.param)
    with strict.watched():
        yield strict


def timed(cuda: StrictCuda, monkeypatch: pytest.MonkeyPatch) -> TimedCuda:
    monkeypatch.setattr(TimedCuda, "torch_device", property(lambda self: "cpu"))
    fake = SimpleNamespace(cuda=cuda, __version__=cuda.version, version=SimpleNamespace(cuda="13.0"))
    return TimedCuda.of(fake, None, 0)


def device(cuda: StrictCuda) -> CudaDevice:
    return CudaDevice(torch.device("cpu"), cuda)


def product() -> tuple[Step, torch.Tensor]:
    """A step with a product of matrices, and where it writes."""
    a, b, out = torch.randn(2, 8), torch.randn(8, 8), torch.zeros(2, 8)
    return lambda: out.copy_(torch.mm(a, b)), out


def test_the_first_stage_of_a_campaign_captures_one_step_after_the_other(
    cuda: StrictCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measure_ceilings(timed(cuda, monkeypatch), "bfloat16", buffer_bytes=1 << 20, matrix_rows=32)
    assert found.read_bytes_per_s > 0
    assert cuda.captures == 5
    assert not cuda.pinned_pools  # the workspace was there before
    torch.randn(3)


def test_after_a_switch_of_models_their_steps_are_captured(cuda: StrictCuda) -> None:
    on = device(cuda)
    first = [on.prepare(product()[0]) for _ in range(2)]
    for step in first:
        step()
    del first, step
    again, out = product()
    replay = on.prepare(again)
    out.zero_()
    replay()
    assert out.any()
    assert not cuda.pinned_pools


def test_a_step_that_is_no_longer_needed_takes_nothing_from_the_others(cuda: StrictCuda) -> None:
    on = device(cuda)
    kept, gone = on.prepare(product()[0]), on.prepare(product()[0])
    del gone
    on.prepare(product()[0])()
    kept()


def test_a_result_that_somebody_keeps_stops_no_later_capture(cuda: StrictCuda) -> None:
    """Its memory belongs to the graphs' pool, which then cannot be freed when they are gone."""
    on, kept = device(cuda), []
    step = on.prepare(lambda: kept.append(torch.ones(3) + 1))
    del step
    assert kept
    on.prepare(product()[0])()


def test_memory_of_graphs_returns_when_none_is_needed(cuda: StrictCuda) -> None:
    on = device(cuda)
    steps = [on.prepare(product()[0]) for _ in range(3)]
    (pool,) = cuda.pools
    assert cuda.pools[pool].used_by == 3
    steps.clear()
    on.release()
    assert pool not in cuda.pools


@pytest.mark.parametrize("asks", [lambda x: x.sum().item(), lambda x: x + torch.tensor([1.0]), lambda x: x.tolist()])
def test_a_capture_that_fails_is_an_error_and_leaves_no_trace(cuda: StrictCuda, asks: Any) -> None:
    on, x, stream = device(cuda), torch.ones(1), cuda.current_stream()
    kept = on.prepare(product()[0])  # whose pool is in use
    with pytest.raises(RuntimeError, match=f"{INVALID}|not permitted when stream is capturing"):
        on.prepare(lambda: asks(x))
    assert cuda.current_stream() is stream
    torch.randn(3)  # the generator has left the capture
    on.prepare(product()[0])()
    kept()
    gc.collect()
    assert not cuda.dangling


def test_the_measuring_device_times_nothing_that_cannot_be_captured(
    cuda: StrictCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.ones(1)
    with pytest.raises(RuntimeError, match=f"{INVALID}|not permitted when stream is capturing"):
        timed(cuda, monkeypatch).prepare(lambda: x.item())


def test_no_garbage_is_collected_inside_a_capture(cuda: StrictCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hold host memory or kernels, and a thread that captures may neither unlock nor unload any."""
    on, runtime, inside = device(cuda), cuda.cudart(), []
    unlock = runtime.cudaHostUnregister

    def noted(address: int) -> int:
        inside.append(cuda.capturing is not None)
        return unlock(address)

    monkeypatch.setattr(runtime, "cudaHostUnregister", noted)

    def step() -> None:
        ring: list[object] = [on.host_empty(64)] if cuda.capturing is None else waiting.pop()
        if cuda.capturing is None:
            waiting.append(ring)
        ring.append(ring)  # only the collector finds it
        del ring
        for _ in range(100_000):
            held.append([])

    waiting: list[list[object]] = []
    held: list[object] = []
    gc.freeze()  # so that what is there already does not put off a collection of all that is not
    gc.collect()
    try:
        on.prepare(step)
    finally:
        gc.unfreeze()
    assert gc.isenabled()
    waiting.clear()
    gc.collect()
    assert inside
    assert not any(inside)


def test_out_of_memory_inside_a_capture_is_out_of_memory(cuda: StrictCuda) -> None:
    on = device(cuda)
    kept = on.prepare(product()[0])
    cuda.fails = lambda captures: True
    with pytest.raises(MemoryError, match="CUDA out of memory"):
        on.prepare(product()[0])
    cuda.fails = lambda captures: False
    torch.randn(3)
    on.prepare(product()[0])()
    kept()


def test_attention_does_not_plan_for_every_shape(cuda: StrictCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    for opened in (device, lambda cuda: timed(cuda, monkeypatch)):
        torch.backends.cuda.enable_cudnn_sdp(True)
        Card.of.cache_clear()
        opened(cuda)
        assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_copies_never_share_a_stream_with_captures(cuda: StrictCuda) -> None:
    """torch hands out the same streams again."""
    found = [device(cuda) for _ in range(STREAMS + 2)]
    for on in found:
        on.prepare(product()[0])
    assert len(cuda._streams) == 3  # captures, loads, and layers that come late


def test_a_card_beside_the_first_is_captured_on_its_own_stream() -> None:
    cuda = StrictCuda(cards=2)
    with cuda.watched():
        on = CudaDevice(torch.device("cpu", 1), cuda)
        assert cuda.current_device() == 1
        on.prepare(product()[0])()


def test_the_name_of_a_card_has_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helios_sim.live.cuda.CudaDevice", lambda device, kernels: device)
    monkeypatch.setattr("helios_sim.live.device.kernels_for", lambda device, kernels: None)
    assert [open_device(name).index for name in ("cuda", "cuda:1")] == [0, 1]  # type: ignore[attr-defined]
