"""What serving needs from a device beside torch itself: host memory to load from, copies, steps at their best.

A CPU and a CUDA card are two implementations of it. Knows no model and no request. The calibration runs its steps in
the same way, so its profiles mean what is served.


Memory for weights and caches, on large pages where the system has them. Knows bytes, no tensor's meaning.

A decode reads every weight once and comes back to it a token later: on pages of 4 KiB a CPU looks up a page for every
64 cache lines of that. A card has pages of its own.


How much memory is free, and whether it was that which ran out. Knows no weights and no cache.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from helios_sim.errors import UserError

Step = Callable[[], object]
Pairs = Sequence[tuple[Tensor, Tensor]]  # (source, target) of the same shape
WARM_UP_CALLS = 3  # before a capture: libraries make their handles and workspaces outside it


class Device(Protocol):
    torch_device: torch.device
    captures: bool  # steps can be captured, and are then launched as one

    def host_empty(self, n_bytes: int) -> Tensor:
        """Host memory (n_bytes,) of bytes, from which `copy` is at its fastest."""
        ...

    def copy(self, pairs: Pairs, after_compute: bool = False) -> Callable[[], None]:
        """Starts to copy each pair beside whatever else runs; what it returns waits for the end.

        `after_compute`: not before what this thread has issued so far is computed, since that still reads the targets.
        """
        ...

    def release(self) -> None:
        """Gives memory that nothing uses back to the device, so that it counts as free."""
        ...

    def wait(self) -> None:
        """Returns when everything that was issued is computed."""
        ...

    def prepare(self, step: Step) -> Step:
        """The step as it runs at its best. It reads and writes the same tensors at every call."""
        ...


@dataclass(frozen=True, slots=True)
class GraphReplay:
    """A captured step, with what it reads and writes: a graph knows addresses and keeps nothing alive."""

    graph: Any
    step: Step

    def __call__(self) -> None:
        self.graph.replay()


class CpuDevice:
    """Host and device are the same memory and the same cores. A copy is done when `copy` returns."""

    captures = False

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    def host_empty(self, n_bytes: int) -> Tensor:
        return block(n_bytes, self.torch_device)

    @torch.inference_mode()
    def copy(self, pairs: Pairs, after_compute: bool = False) -> Callable[[], None]:
        for source, target in pairs:
            target.copy_(source)
        return _nothing

    def release(self) -> None:
        """What is freed is the system's at once, or soon."""

    def wait(self) -> None:
        """A step is computed when it returns."""

    def prepare(self, step: Step) -> Step:
        return step


class CudaDevice:
    """One card: pinned host memory, a stream for copies, captured graphs that share one pool of memory.

    `cuda` is torch.cuda; a test may bring its own.
    """

    captures = True

    def __init__(self, torch_device: torch.device, cuda: Any = torch.cuda) -> None:
        self.torch_device, self._cuda = torch_device, cuda
        self._copies = cuda.Stream(torch_device)
        self._pool: Any = None

    def host_empty(self, n_bytes: int) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, pairs: Pairs, after_compute: bool = False) -> Callable[[], None]:
        done = self._cuda.Event()
        if after_compute:
            self._copies.wait_stream(self._cuda.current_stream(self.torch_device))
        with torch.inference_mode(), self._cuda.stream(self._copies):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
            done.record()
        wait: Callable[[], None] = done.synchronize  # which lets other threads run
        return wait

    def release(self) -> None:
        self._cuda.empty_cache()

    def wait(self) -> None:
        self._cuda.synchronize(self.torch_device)

    def prepare(self, step: Step) -> Step:
        cuda = self._cuda
        side, main = cuda.Stream(self.torch_device), cuda.current_stream(self.torch_device)
        side.wait_stream(main)
        with cuda.stream(side):
            for _ in range(WARM_UP_CALLS):
                step()
        main.wait_stream(side)
        cuda.synchronize(self.torch_device)
        if self._pool is None:
            self._pool = cuda.graph_pool_handle()  # shared: the graphs never run at the same time
        graph = cuda.CUDAGraph()
        # Only this thread's calls matter to the capture: the copying thread goes on.
        with cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step()
        return GraphReplay(graph, step)


def open_device(name: str) -> Device:
    """`cpu`, `cuda` or `cuda:N`."""
    device = torch.device(name)
    return CpuDevice() if device.type == "cpu" else CudaDevice(device)


def _nothing() -> None:
    """There is nothing to wait for."""


ALIGNMENT = 256  # bytes: what a card's loads want, and more than a cache line
LARGE_PAGE_BYTES = 2 << 20


def block(n_bytes: int, device: torch.device) -> Tensor:
    """(n_bytes,) uint8, its content undefined. MemoryError or torch's RuntimeError where there is no room."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux
    whole_pages = n_bytes // LARGE_PAGE_BYTES
    if device.type != "cpu" or advice is None or not whole_pages:
        return torch.empty(n_bytes, dtype=torch.uint8, device=device)
    try:
        mapped = mmap.mmap(-1, n_bytes + LARGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{n_bytes} bytes: {error.strerror}") from error
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    start = -memory.data_ptr() % LARGE_PAGE_BYTES
    with suppress(OSError):  # a kernel without them
        mapped.madvise(advice, start, whole_pages * LARGE_PAGE_BYTES)
    return memory[start : start + n_bytes]


def written_block(n_bytes: int, device: torch.device) -> Tensor:
    """The same full of zeros that were written, not promised: nobody waits for pages when it is used."""
    return block(n_bytes, device).zero_()


def aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_SHARE = 0.9  # others grow too: processes on a host, an allocator's gaps on a card
_SHORTAGES = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


def available_bytes(device: torch.device) -> int | None:
    """Free memory of the device, of a CPU also within its control group; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [n for n in (_free_on_host(), _free_in_group()) if n is not None]
    return min(found) if device.type == "cpu" and found else None


def check_fits(name: str, needed_bytes: int, device: torch.device) -> None:
    """Raises UserError, before anything is allocated, where the weights cannot fit."""
    free = available_bytes(device)
    if free is not None and needed_bytes > free:
        raise UserError(
            "memory", f"{free / 1e9:.2f} GB free on {device}", f"{needed_bytes / 1e9:.2f} GB for the weights of {name}",
            "load fewer layers, use bfloat16, choose a smaller model or free memory",
        )  # fmt: skip


def room_for_caches(device: torch.device, reserve_bytes: int) -> int | None:
    """Of the memory that is free now, what caches may take beside a reserve; None where the system does not tell."""
    free = available_bytes(device)
    return None if free is None else max(0, int(free * _SHARE) - reserve_bytes)


def oom_message(error: BaseException) -> str | None:
    """What the error says, if it says that memory has run out; torch has several ways to say so."""
    text = str(error) or type(error).__name__
    said = any(words in text.lower() for words in _SHORTAGES)
    return text.splitlines()[0] if said or isinstance(error, MemoryError) else None


def _free_on_host() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _free_in_group() -> int | None:
    """Of a container with a limit (cgroup v2)."""
    try:
        limit, used = (_CGROUP / "memory.max").read_text(), (_CGROUP / "memory.current").read_text()
        return int(limit) - int(used)
    except (OSError, ValueError):  # no such file, or "max": no limit
        return None
