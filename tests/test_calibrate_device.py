"""Devices: a CPU by its kernel's counters, a CUDA card by a torch and an NVML that only pretend."""

from __future__ import annotations

import gc
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calibrate.measure.device import DeviceFacts, short_name
from calibrate.measure.devices import TimedCpu, TimedCuda, open_device
from clocked_cuda import FakeCuda
from fake_device import FakeNvml, VirtualClock
from helios_sim.errors import UserError
from helios_sim.live.cuda import WARM_UP_CALLS
from helios_sim.live.energy import Rapl

torch = pytest.importorskip("torch")
FACTS = DeviceFacts("cpu", "x-1core", "x", 1 << 30, None)
MIB = 1 << 20


def cuda_device(cuda: FakeCuda, nvml: Any = None) -> TimedCuda:
    fake = SimpleNamespace(cuda=cuda, __version__="2.0", version=SimpleNamespace(cuda="13.0"))
    return TimedCuda.of(fake, nvml, 0)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda0", ""])
def test_an_unknown_device_is_refused_with_what_there_is(name: str) -> None:
    with pytest.raises(UserError, match="cpu, cuda or cuda:N"):
        open_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here")
def test_an_absent_card_is_one_message() -> None:
    with pytest.raises(UserError, match="sees 0 cards"):
        open_device("cuda:3")


def test_names_fit_folders() -> None:
    assert short_name("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert short_name("AMD EPYC") == "epyc"
    assert "@" not in short_name("Intel(R) Xeon(R) CPU @ 2.20GHz")


def test_the_cpu_is_described_by_itself() -> None:
    before = torch.get_num_threads()
    try:
        device = open_device("cpu", memory_bytes=123, threads=1)
        assert device.facts.name.endswith("-1core")
        assert device.facts.memory_bytes == 123
        assert device.facts.versions["torch"] == torch.__version__
        assert open_device("cpu", threads=1).facts.memory_bytes > 100 * MIB
        with pytest.raises(UserError, match="threads"):
            open_device("cpu", threads=10_000)
    finally:
        torch.set_num_threads(before)


def peak_of_one_block_after_another() -> int | None:
    device = TimedCpu(FACTS)

    def step() -> None:
        held = torch.ones(64 * MIB, dtype=torch.uint8)
        del held
        gc.collect()
        torch.ones(16 * MIB, dtype=torch.uint8)

    return device.peak_bytes(step)


def test_a_cpus_peak_is_what_a_step_held_at_most() -> None:
    """In a fresh process: blocks that fit into gaps of a used heap stay resident there when they are freed."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        peak = fresh.submit(peak_of_one_block_after_another).result()
    if peak is None:
        pytest.skip("this kernel has no high-water mark to reset")
    assert 60 * MIB < peak < 76 * MIB


def test_a_cpus_memory_grows_by_what_is_written() -> None:
    device = TimedCpu(FACTS)
    before = device.used_bytes()
    held = torch.ones(64 * MIB, dtype=torch.uint8)
    after = device.used_bytes()
    if before is None or after is None:
        pytest.skip("this kernel does not tell")
    assert 60 * MIB < after - before < 76 * MIB
    assert len(held) == 64 * MIB


def write_rapl(folder: Path, microjoules: int) -> None:
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "energy_uj").write_text(str(microjoules))
        (folder / name / "max_energy_range_uj").write_text("10000000")


def test_rapl_counts_packages_once_and_survives_their_wrapping(tmp_path: Path) -> None:
    device = TimedCpu(FACTS, rapl=Rapl(tmp_path))
    assert device.energy_j() is None  # never invented
    write_rapl(tmp_path, 9_000_000)
    assert device.energy_j() == pytest.approx(2 * 9.0)  # a package's parts are inside it
    write_rapl(tmp_path, 2_000_000)
    assert device.energy_j() == pytest.approx(2 * 12.0)
    write_rapl(tmp_path, 1_000_000)
    assert device.energy_j() == pytest.approx(2 * 21.0)


def test_a_cpus_copies_run_beside_and_bring_their_errors_home() -> None:
    device = TimedCpu(FACTS)
    for kind in device.host_buffers:
        source = device.host_buffer(MIB, kind)
        target = torch.zeros(MIB, dtype=torch.uint8)
        assert device.start_copy([(source, target)]).wait_s() > 0
        assert torch.equal(source, target)
        assert source.float().std() > 50  # noise, since zeros can be quicker
    with pytest.raises(RuntimeError):
        device.start_copy([(torch.zeros(3), torch.zeros(4))]).wait_s()


def test_a_cpu_without_the_kernels_counters_says_nothing(tmp_path: Path) -> None:
    device = TimedCpu(FACTS, proc=tmp_path)
    assert (device.waited_s(), device.used_bytes(), device.peak_bytes(lambda: None)) == (None, None, None)
    assert device.disturbance() == {}
    assert device.laps_s([lambda: None, lambda: None])[0] >= 0


def test_waiting_for_cores_is_summed_over_threads(tmp_path: Path) -> None:
    for thread, ns in (("7", 250_000_000), ("8", 500_000_000)):
        (tmp_path / "self" / "task" / thread).mkdir(parents=True)
        (tmp_path / "self" / "task" / thread / "schedstat").write_text(f"123 {ns} 5")
    assert TimedCpu(FACTS, proc=tmp_path).waited_s() == pytest.approx(0.75)


def test_a_card_runs_captured_graphs_timed_by_events() -> None:
    clock = VirtualClock()
    cuda = FakeCuda(clock, captured_s=0.002)
    device = cuda_device(cuda)
    called: list[int] = []
    replay = device.prepare(lambda: called.append(1))
    assert cuda.captures == 1
    assert len(called) == WARM_UP_CALLS + 1  # and once under capture
    assert device.laps_s([replay, replay]) == pytest.approx([0.002, 0.002])
    assert (cuda.replays, len(called)) == (2, WARM_UP_CALLS + 1)
    assert cuda.slept > 0  # the card is kept busy until the launches are queued


def test_a_launch_does_not_wait_for_the_card() -> None:
    cuda = FakeCuda(VirtualClock())
    device = cuda_device(cuda)
    seen: list[int] = []
    assert 0 <= device.launch_s(lambda: seen.append(cuda.synchronized)) < 0.1
    assert seen == [1]  # idle before
    assert cuda.synchronized == 2  # and again after, outside the time


def test_a_cards_memory_is_its_allocators_count() -> None:
    cuda = FakeCuda(VirtualClock())
    device = cuda_device(cuda)

    def step() -> None:
        cuda.peak = cuda.allocated + 4096

    assert device.peak_bytes(step) == 4096
    assert device.used_bytes() == 1000
    assert device.facts.memory_bytes == 139 << 30


def test_a_cards_energy_is_nvmls_counter_in_joules() -> None:
    clock = VirtualClock()
    nvml = FakeNvml(clock, watts=300)
    device = cuda_device(FakeCuda(clock), nvml)
    clock.pass_s(2.0)
    assert device.energy_j() == pytest.approx(600)
    assert nvml.asked[0] == "GPU-ab-c"  # not by index: NVML counts cards that torch may not see
    assert device.facts.power_limit_w == pytest.approx(700)
    assert device.disturbance()["sm_clock_mhz"] == 1980


def test_energy_is_absent_without_nvml_and_where_the_card_refuses() -> None:
    clock = VirtualClock()
    assert cuda_device(FakeCuda(clock)).energy_j() is None
    refusing = cuda_device(FakeCuda(clock), FakeNvml(clock, unsupported=("energy", "limit")))
    assert refusing.energy_j() is None
    assert refusing.facts.power_limit_w is None


def test_a_card_copies_on_a_stream_of_its_own() -> None:
    clock = VirtualClock()
    cuda = FakeCuda(clock)
    device = cuda_device(cuda)
    streams: list[Any] = []

    class Target:
        def copy_(self, source: Any, non_blocking: bool) -> None:
            assert non_blocking
            streams.append(cuda.current_stream())
            clock.pass_s(0.25)

    assert device.start_copy([(None, Target()), (None, Target())], repeats=2).wait_s() == pytest.approx(1.0)
    assert len(set(map(id, streams))) == 1
    assert streams[0] is not cuda.default
    assert device.start_copy([(None, Target())]).wait_s() == pytest.approx(0.25)
    assert len(set(map(id, streams))) == 1  # the same stream again
