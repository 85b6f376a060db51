"""What serving needs from a device besides torch: free memory and blocks of it, copies from the host, prepared steps.

`CpuDevice` and `CudaDevice` implement the `Device` protocol. The calibration runs its steps through the same code, so
its profiles describe what is served.
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

from helios_sim.errors import TooLittleMemory

Step = Callable[[], object]
Pairs = Sequence[tuple[Tensor, Tensor]]  # (source, target) of the same shape
WARM_UP_CALLS = 3  # before a capture, so that libraries create their handles and workspaces outside it
ALIGNMENT = 256  # bytes: suits a card's loads, and is more than a cache line
LARGE_PAGE_BYTES = 2 << 20
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_SHARE = 0.9  # the rest is for other processes on a host, and for fragmentation on a card
_OOM_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


class Device(Protocol):
    torch_device: torch.device
    captures: bool  # whether steps can be captured as a graph and launched as one

    def host_empty(self, n_bytes: int) -> Tensor:
        """Host memory, uint8 (n_bytes,), of the kind that `copy` reads fastest."""
        ...

    def copy(self, pairs: Pairs, after_compute: bool = False) -> Callable[[], None]:
        """Start copying each pair while other work goes on. The returned function waits for the end.

        `after_compute`: start only when the work that this thread has issued so far is done, since it still reads the
        targets.
        """
        ...

    def release(self) -> None:
        """Return unused cached memory to the device, so that it counts as free."""
        ...

    def wait(self) -> None:
        """Wait until all issued work is done."""
        ...

    def prepare(self, step: Step) -> Step:
        """The step in its fastest form (a captured graph on a card). It uses the same tensors at every call."""
        ...


@dataclass(frozen=True, slots=True)
class GraphReplay:
    """A captured step. It refers to the original step to keep its tensors alive, since a graph only has addresses."""

    graph: Any
    step: Step

    def __call__(self) -> None:
        self.graph.replay()


class CpuDevice:
    """Host and device share memory and cores. A copy is done when `copy` returns."""

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
        """Does nothing: freed memory returns to the system by itself."""

    def wait(self) -> None:
        """Does nothing: a step is done when it returns."""

    def prepare(self, step: Step) -> Step:
        return step


class CudaDevice:
    """One card: pinned host memory, a stream for copies, captured graphs that share one memory pool.

    `cuda` is torch.cuda; a test may pass a fake.
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
        wait: Callable[[], None] = done.synchronize  # releases the GIL while it waits
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
            self._pool = cuda.graph_pool_handle()  # shared, since no two graphs run at the same time
        graph = cuda.CUDAGraph()
        # Only this thread's calls are captured; the copying thread goes on.
        with cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step()
        return GraphReplay(graph, step)


def open_device(name: str) -> Device:
    """The device named `cpu`, `cuda` or `cuda:N`."""
    device = torch.device(name)
    return CpuDevice() if device.type == "cpu" else CudaDevice(device)


def _nothing() -> None:
    """There is nothing to wait for."""


def block(n_bytes: int, device: torch.device) -> Tensor:
    """Allocate uint8 (n_bytes,) of undefined content, on large pages if the system has them.

    A decode reads every weight once per token. On pages of 4 KiB a CPU would look up a page for every 64 cache lines.
    Raises MemoryError, or torch's RuntimeError, if there is not enough memory.
    """
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
    with suppress(OSError):  # a kernel without large pages
        mapped.madvise(advice, start, whole_pages * LARGE_PAGE_BYTES)
    return memory[start : start + n_bytes]


def written_block(n_bytes: int, device: torch.device) -> Tensor:
    """Allocate zeros that have been written, so that no page fault happens at the first use."""
    return block(n_bytes, device).zero_()


def aligned(n_bytes: int) -> int:
    """`n_bytes` rounded up to the alignment."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def available_bytes(device: torch.device) -> int | None:
    """Free memory of the device; for a CPU also within its control group. None if the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [n for n in (_free_on_host(), _free_in_group()) if n is not None]
    return min(found) if device.type == "cpu" and found else None


def check_fits(name: str, needed_bytes: int, device: torch.device) -> None:
    """Raise UserError if weights of this size do not fit, before anything is allocated."""
    free = available_bytes(device)
    if free is not None and needed_bytes > free:
        raise TooLittleMemory(
            "memory", f"{free / 1e9:.2f} GB free on {device}", f"{needed_bytes / 1e9:.2f} GB for the weights of {name}",
            "load fewer layers, use bfloat16, choose a smaller model or free memory",
        )  # fmt: skip


def room_for_caches(device: torch.device, reserve_bytes: int) -> int | None:
    """How much of the free memory caches may take beside a reserve. None if the system does not tell."""
    free = available_bytes(device)
    return None if free is None else max(0, int(free * _SHARE) - reserve_bytes)


def oom_message(error: BaseException) -> str | None:
    """The message of an out-of-memory error, in any form that torch reports it, else None."""
    text = str(error) or type(error).__name__
    said = any(words in text.lower() for words in _OOM_WORDS)
    return text.splitlines()[0] if said or isinstance(error, MemoryError) else None


def _free_on_host() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _free_in_group() -> int | None:
    """Free bytes within a container's limit (cgroup v2), or None without a limit."""
    try:
        limit, used = (_CGROUP / "memory.max").read_text(), (_CGROUP / "memory.current").read_text()
        return int(limit) - int(used)
    except (OSError, ValueError):  # no such file, or "max": no limit
        return None
