"""A CPU and a CUDA card as a `TimedDevice`.

On a CPU, host and device are the same cores, so issuing work is part of its time and has no launch cost of its own. For
a card, `torch` and `nvml` (the pynvml module) are passed in, so that tests can use fakes.
"""

from __future__ import annotations

import ctypes
import os
import platform
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from calibrate.measure.device import DeviceFacts, Step, TimedDevice, short_name
from helios_sim.errors import UserError
from helios_sim.live.energy import NvmlCard, Rapl, open_nvml

if TYPE_CHECKING:
    from helios_sim.live.cuda import Card

NOISE_BYTES = 64 << 20  # drawn once and repeated, since drawing gigabytes takes many seconds
SHARE_OF_AVAILABLE = 0.5  # of the available memory, since the machine is shared
PROC = Path("/proc")
LEAD_CYCLES = 400_000  # the card spins for about 0.2 ms, so that launches are queued before the first one runs


@dataclass(slots=True)
class TimedCpu:
    """A CPU: monotonic clock, resident memory, RAPL, a copying thread.

    `proc` is the folder of the kernel's counters; tests may pass their own, and their own `rapl`.
    """

    facts: DeviceFacts
    rapl: Rapl = field(default_factory=Rapl)
    proc: Path = PROC
    asynchronous: bool = False
    host_buffers: tuple[str, ...] = ("host", "mapped_file")

    @classmethod
    def open(cls, memory_bytes: int | None = None, threads: int | None = None) -> TimedCpu:
        """Set torch's threads and describe the CPU. Raises UserError for more threads than the process may use."""
        import torch

        allowed = len(os.sched_getaffinity(0))
        if threads is not None and not 1 <= threads <= allowed:
            raise UserError("device.threads", threads, f"1 to {allowed}", "leave it out or lower it")
        torch.set_num_threads(threads or allowed)
        model = cpuinfo("model name") or platform.processor() or "cpu"
        if memory_bytes is None:
            memory_bytes = int((_kilobytes(PROC / "meminfo", "MemAvailable") or 0) * 1024 * SHARE_OF_AVAILABLE)
        used = torch.get_num_threads()
        facts = DeviceFacts(
            kind="cpu",
            name=f"{short_name(model)}-{used}core",
            description=f"{model}, {used} threads of {os.cpu_count()} cores, {_extensions()}",
            memory_bytes=memory_bytes,
            power_limit_w=None,
            versions={
                "torch": torch.__version__, "python": platform.python_version(), "linux": platform.release(),
                **({"OMP_WAIT_POLICY": os.environ["OMP_WAIT_POLICY"]} if "OMP_WAIT_POLICY" in os.environ else {}),
            },
            computes_bfloat16=bool(_flags() & {"avx512_bf16", "amx_bf16"}),
        )
        return cls(facts)

    @property
    def torch_device(self) -> str:
        return "cpu"

    def prepare(self, step: Step) -> Step:
        return step

    def laps_s(self, steps: Sequence[Step]) -> list[float]:
        marks = [perf_counter()]
        for step in steps:
            step()
            marks.append(perf_counter())
        return [b - a for a, b in pairwise(marks)]

    def launch_s(self, step: Step) -> float:
        step()
        return 0.0

    def wait(self) -> None:
        return None

    def used_bytes(self) -> int | None:
        """Resident anonymous memory, after freed memory was returned to the system."""
        _trim()
        return _bytes(self.proc / "self" / "status", "RssAnon")

    def peak_bytes(self, step: Step) -> int | None:
        """The kernel's high-water mark of resident memory, reset before the step, after trimming the allocator."""
        _trim()
        try:
            (self.proc / "self" / "clear_refs").write_text("5")
        except OSError:
            return None
        before = _bytes(self.proc / "self" / "status", "VmRSS")
        step()
        peak = _bytes(self.proc / "self" / "status", "VmHWM")
        return None if before is None or peak is None else max(0, peak - before)

    def energy_j(self) -> float | None:
        return self.rapl.energy_j()

    def host_buffer(self, n_bytes: int, kind: str) -> Any:
        import torch

        noise = fill_with_noise(torch.empty(n_bytes, dtype=torch.uint8))
        if kind == "host":
            return noise
        with tempfile.NamedTemporaryFile(suffix=".weights") as file:  # the mapping outlives the file's name
            file.write(noise.numpy().tobytes())
            file.flush()
            return torch.from_file(file.name, shared=True, size=n_bytes, dtype=torch.uint8)

    def start_copy(self, pairs: Sequence[tuple[Any, Any]], repeats: int = 1) -> ThreadCopy:
        import torch

        def copy() -> None:
            with torch.inference_mode():  # set per thread; the tensors may be inference tensors
                for _ in range(repeats):
                    for source, target in pairs:
                        target.copy_(source)

        return ThreadCopy(copy)

    def waited_s(self) -> float | None:
        """The scheduler's count, summed over the threads, since a barrier waits for the slowest thread."""
        total_ns = 0
        try:
            for thread in (self.proc / "self" / "task").iterdir():
                total_ns += int((thread / "schedstat").read_text().split()[1])
        except (OSError, IndexError, ValueError):
            return None
        return total_ns / 1e9

    def disturbance(self) -> dict[str, float]:
        """Seconds of CPU time stolen by the hypervisor, used by all processes, and used by this one."""
        ticks = os.sysconf("SC_CLK_TCK")
        try:
            fields = (self.proc / "stat").read_text().splitlines()[0].split()[1:]
        except (OSError, IndexError):
            return {}
        user, nice, system, _, _, _, _, steal = (int(f) / ticks for f in fields[:8])
        times = os.times()
        return {"stolen_s": steal, "used_by_all_s": user + nice + system, "used_here_s": times.user + times.system}


class ThreadCopy:
    """A copy in its own thread. The copying call releases the GIL."""

    def __init__(self, copy: Callable[[], None]) -> None:
        self._end_s = 0.0
        self._error: Exception | None = None
        self._copy = copy
        self._start_s = perf_counter()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._copy()
        except Exception as error:  # raised again by wait_s
            self._error = error
        self._end_s = perf_counter()

    def wait_s(self) -> float:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._end_s - self._start_s


def fill_with_noise(memory: Any) -> Any:
    """Fill the tensor, uint8 (n_bytes,), with random bytes and return it."""
    import torch

    drawn = torch.randint(0, 256, (min(NOISE_BYTES, len(memory)),), dtype=torch.uint8)
    for piece in memory.split(NOISE_BYTES):
        piece.copy_(drawn[: len(piece)])
    return memory


def cpuinfo(key: str) -> str | None:
    """The first value of a key in /proc/cpuinfo, or None."""
    try:
        for line in (PROC / "cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    except OSError:
        pass
    return None


def _extensions() -> str:
    """The instruction sets that decide how fast matrix products are."""
    flags = _flags()
    return " ".join(f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags) or platform.machine()


def _flags() -> set[str]:
    return set((cpuinfo("flags") or "").split())


def _kilobytes(path: Path, key: str) -> int | None:
    try:
        for line in path.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return None


def _bytes(path: Path, key: str) -> int | None:
    found = _kilobytes(path, key)
    return None if found is None else found * 1024


def _trim() -> None:
    """Return freed memory to the system, so that resident memory is memory in use."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # not glibc
        return


@dataclass(slots=True)
class TimedCuda:
    """A card: events, captured graphs, the allocator's counts, NVML, a copy stream.

    Steps are captured and copied with the `Card` that serving uses.
    """

    torch: Any
    driver: NvmlCard | None  # None: the driver cannot be asked
    index: int
    facts: DeviceFacts
    card: Card
    asynchronous: bool = True
    host_buffers: tuple[str, ...] = ("pinned", "pageable")

    @classmethod
    def open(cls, index: int = 0, memory_bytes: int | None = None) -> TimedCuda:
        """Open a card. Raises UserError if torch does not see it."""
        import torch

        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
            raise UserError("device", f"cuda:{index}", f"torch sees {seen} cards", "use device=cpu, or install CUDA")
        return cls.of(torch, open_nvml(), index, memory_bytes)

    @classmethod
    def of(cls, torch: Any, nvml: Any | None, index: int, memory_bytes: int | None = None) -> TimedCuda:
        from helios_sim.live.cuda import Card

        properties = torch.cuda.get_device_properties(index)
        versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda), "python": platform.python_version()}
        driver = None if nvml is None else NvmlCard.of(nvml, properties, index)
        limit_w: float | None = None
        if driver is not None:
            versions["driver"] = str(driver.nvml.nvmlSystemGetDriverVersion())
            limit_w = driver.answer("nvmlDeviceGetEnforcedPowerLimit", 1e-3)
        facts = DeviceFacts(
            kind="cuda",
            name=short_name(properties.name),
            description=f"{properties.name}, {properties.multi_processor_count} multiprocessors",
            memory_bytes=int(properties.total_memory) if memory_bytes is None else memory_bytes,
            power_limit_w=limit_w,
            versions=versions,
            computes_bfloat16=True,
        )
        return cls(torch, driver, index, facts, Card.of(torch.cuda, index))

    @property
    def torch_device(self) -> str:
        return f"cuda:{self.index}"

    def prepare(self, step: Step) -> Step:
        """The step as a captured graph. Raises what the capture raises: nothing is timed that would not be served."""
        return self.card.captured(step)

    def laps_s(self, steps: Sequence[Step]) -> list[float]:
        cuda = self.torch.cuda
        events = [cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
        self.wait()
        cuda._sleep(LEAD_CYCLES)
        events[0].record()
        for step, event in zip(steps, events[1:], strict=True):
            step()
            event.record()
        events[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]

    def launch_s(self, step: Step) -> float:
        self.wait()
        start_s = perf_counter()
        step()
        issued_s = perf_counter() - start_s
        self.wait()
        return issued_s

    def wait(self) -> None:
        self.torch.cuda.synchronize()

    def used_bytes(self) -> int | None:
        return int(self.torch.cuda.memory_allocated())

    def peak_bytes(self, step: Step) -> int | None:
        cuda = self.torch.cuda
        self.wait()
        cuda.reset_peak_memory_stats()
        before = int(cuda.memory_allocated())
        step()
        self.wait()
        return int(cuda.max_memory_allocated()) - before

    def energy_j(self) -> float | None:
        return None if self.driver is None else self.driver.energy_j()

    def host_buffer(self, n_bytes: int, kind: str) -> Any:
        import torch

        from helios_sim.live.cuda import page_locked

        pinned = kind == "pinned"
        return fill_with_noise(
            page_locked(n_bytes, self.torch.cuda) if pinned else torch.empty(n_bytes, dtype=torch.uint8)
        )

    def start_copy(self, pairs: Sequence[tuple[Any, Any]], repeats: int = 1) -> StreamCopy:
        return StreamCopy(self.torch.cuda, self.card.copies, pairs, repeats)

    def waited_s(self) -> float | None:
        return None  # launches are queued ahead, so the device's times are not affected

    def disturbance(self) -> dict[str, float]:
        """The current clock and temperature: a card that is hot or at its power limit slows down."""
        if self.driver is None:
            return {}
        found: dict[str, float] = {}
        for key, name, argument in (
            ("sm_clock_mhz", "nvmlDeviceGetClockInfo", 1),  # NVML_CLOCK_SM
            ("temperature_c", "nvmlDeviceGetTemperature", 0),  # NVML_TEMPERATURE_GPU
        ):
            value = self.driver.answer(name, 1.0, argument)
            if value is not None:
                found[key] = value
        return found


class StreamCopy:
    """A copy on its own stream, timed by events there."""

    def __init__(self, cuda: Any, stream: Any, pairs: Sequence[tuple[Any, Any]], repeats: int) -> None:
        self._start, self._end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        with cuda.stream(stream):
            self._start.record()
            for _ in range(repeats):
                for source, target in pairs:
                    target.copy_(source, non_blocking=True)
            self._end.record()

    def wait_s(self) -> float:
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / 1e3


def open_device(name: str, memory_bytes: int | None = None, threads: int | None = None) -> TimedDevice:
    """The device named `cpu`, `cuda` or `cuda:N`.

    `memory_bytes`: memory that the engine may use (None: half of a CPU's available memory, all of a card's). Raises
    UserError if the device is unknown or absent.
    """
    if name == "cpu":
        return TimedCpu.open(memory_bytes, threads)
    if name == "cuda" or (name.startswith("cuda:") and name[5:].isdigit()):
        return TimedCuda.open(int(name[5:] or 0), memory_bytes)
    raise UserError("device", name, "cpu, cuda or cuda:N", "choose one of these")
