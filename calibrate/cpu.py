"""A CPU as a device: the monotonic clock, resident memory, RAPL, a copying thread. Knows no model and no table.

Host and device are the same cores, so issuing work is part of its time and there is no launch cost of its own.
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
from typing import Any

from calibrate.device import DeviceFacts, Step, short_name
from helios_sim.errors import UserError
from helios_sim.live.energy import Rapl

SHARE_OF_AVAILABLE = 0.5  # of the memory that the system calls available: others live on the machine too
PROC = Path("/proc")


@dataclass(slots=True)
class CpuDevice:
    """`proc` is the folder of the kernel's counters; tests bring their own, and their own `rapl`."""

    facts: DeviceFacts
    rapl: Rapl = field(default_factory=Rapl)
    proc: Path = PROC
    asynchronous: bool = False
    host_buffers: tuple[str, ...] = ("host", "mapped_file")

    @classmethod
    def open(cls, memory_bytes: int | None = None, threads: int | None = None) -> CpuDevice:
        """Sets torch's threads; raises UserError when more are asked for than the process may use."""
        import torch

        allowed = len(os.sched_getaffinity(0))
        if threads is not None and not 1 <= threads <= allowed:
            raise UserError("device.threads", threads, f"1 to {allowed}", "leave it out or lower it")
        torch.set_num_threads(threads or allowed)
        model = _cpuinfo("model name") or platform.processor() or "cpu"
        if memory_bytes is None:
            memory_bytes = int((_kilobytes(PROC / "meminfo", "MemAvailable") or 0) * 1024 * SHARE_OF_AVAILABLE)
        used = torch.get_num_threads()
        facts = DeviceFacts(
            kind="cpu",
            name=f"{short_name(model)}-{used}core",
            description=f"{model}, {used} threads of {os.cpu_count()} cores, {_extensions()}",
            memory_bytes=memory_bytes,
            power_limit_w=None,
            versions={"torch": torch.__version__, "python": platform.python_version(), "linux": platform.release()},
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
        """Resident memory that is not a file's; what was freed goes back to the system first."""
        _trim()
        return _bytes(self.proc / "self" / "status", "RssAnon")

    def peak_bytes(self, step: Step) -> int | None:
        """The kernel's high-water mark of resident memory, reset before the step; the allocator is trimmed first."""
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

        noise = torch.randint(0, 256, (n_bytes,), dtype=torch.uint8)
        if kind == "host":
            return noise
        with tempfile.NamedTemporaryFile(suffix=".weights") as file:  # the mapping outlives the name
            file.write(noise.numpy().tobytes())
            file.flush()
            return torch.from_file(file.name, shared=True, size=n_bytes, dtype=torch.uint8)

    def start_copy(self, pairs: Sequence[tuple[Any, Any]], repeats: int = 1) -> ThreadCopy:
        import torch

        def copy() -> None:
            with torch.inference_mode():  # which holds for a thread, and the tensors may come from it
                for _ in range(repeats):
                    for source, target in pairs:
                        target.copy_(source)

        return ThreadCopy(copy)

    def waited_s(self) -> float | None:
        """Summed over the threads, by the scheduler's own count. A barrier of threads waits for the slowest."""
        total_ns = 0
        try:
            for thread in (self.proc / "self" / "task").iterdir():
                total_ns += int((thread / "schedstat").read_text().split()[1])
        except (OSError, IndexError, ValueError):
            return None
        return total_ns / 1e9

    def disturbance(self) -> dict[str, float]:
        """Seconds of the machine's time: stolen by other machines of the host, and used by anyone here."""
        ticks = os.sysconf("SC_CLK_TCK")
        try:
            fields = (self.proc / "stat").read_text().splitlines()[0].split()[1:]
        except (OSError, IndexError):
            return {}
        user, nice, system, _, _, _, _, steal = (int(f) / ticks for f in fields[:8])
        times = os.times()
        return {"stolen_s": steal, "used_by_all_s": user + nice + system, "used_here_s": times.user + times.system}


class ThreadCopy:
    """A copy in a thread of its own. The copying call releases the interpreter."""

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
        except Exception as error:  # of the thread; it belongs to who waits
            self._error = error
        self._end_s = perf_counter()

    def wait_s(self) -> float:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._end_s - self._start_s


def _cpuinfo(key: str) -> str | None:
    try:
        for line in (PROC / "cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    except OSError:
        pass
    return None


def _extensions() -> str:
    """Those that decide how fast matrices are."""
    flags = set((_cpuinfo("flags") or "").split())
    return " ".join(f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags) or platform.machine()


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
    """Gives freed memory back to the system, so that what is resident is what is in use."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # not glibc
        return
