"""Devices for serving, with what torch does not offer: free memory, large blocks, copies, prepared steps.

`CpuDevice` here and `CudaDevice` in `cuda.py` implement the `Device` protocol. The calibration runs its steps through
the same code, so its profiles describe what is served.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from helios_sim.errors import TooLittleMemory
from helios_sim.live.kernels.choice import kernels_for
from helios_sim.live.kernels.interface import TORCH, Kernels

Step = Callable[[], object]
Pairs = Sequence[tuple[Tensor, Tensor]]  # (source, target) of the same shape
ALIGNMENT = 256  # bytes: suits a card's loads, and is more than a cache line
LARGE_PAGE_BYTES = 2 << 20
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_SHARE = 0.9  # the rest is for other processes on a host, and for fragmentation on a card
_OOM_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


class Mark(Protocol):
    """A moment in the order of the work that a thread has issued to a device."""

    def synchronize(self) -> None:
        """Wait until everything issued before it is done."""
        ...


class Device(Protocol):
    torch_device: torch.device
    captures: bool  # whether steps can be captured as a graph and launched as one
    kernels: Kernels  # of decode steps

    def host_empty(self, n_bytes: int) -> Tensor:
        """Host memory, uint8 (n_bytes,), of the kind that `copy` reads fastest."""
        ...

    def mark(self) -> Mark:
        """Mark the work that this thread has issued so far."""
        ...

    def copy(self, pairs: Pairs, after: Mark | None = None) -> Callable[[], None]:
        """Start copying each pair while other work goes on. The returned function waits for the end.

        `after`: start only when the marked work is done, since it still reads the targets.
        """
        ...

    def prefetch(self, pairs: Pairs, after: Mark | None = None) -> Callable[[], None]:
        """Start copying each pair, in parallel with copies by `copy`.

        Call the returned function to let all work that this thread issues afterwards wait for the end of the copies,
        while the host goes on.
        """
        ...

    def release(self) -> None:
        """Return unused cached memory to the device, so that it counts as free."""
        ...

    def wait(self) -> None:
        """Wait until all issued work is done, copies included."""
        ...

    def prepare(self, step: Step) -> Step:
        """The step in its fastest form (a captured graph on a card). It uses the same tensors at every call."""
        ...


class CpuDevice:
    """Host and device share memory and cores. A copy is done when `copy` returns."""

    captures = False

    def __init__(self, kernels: Kernels = TORCH) -> None:
        self.torch_device, self.kernels = torch.device("cpu"), kernels

    def host_empty(self, n_bytes: int) -> Tensor:
        return block(n_bytes, self.torch_device)

    def mark(self) -> Mark:
        return _DONE

    @torch.inference_mode()
    def copy(self, pairs: Pairs, after: Mark | None = None) -> Callable[[], None]:
        for source, target in pairs:
            target.copy_(source)
        return _nothing

    def prefetch(self, pairs: Pairs, after: Mark | None = None) -> Callable[[], None]:
        return self.copy(pairs, after)

    def release(self) -> None:
        """Do nothing, since freed memory returns to the system by itself."""

    def wait(self) -> None:
        """Do nothing, since a step is done when it returns."""

    def prepare(self, step: Step) -> Step:
        return step


def open_device(name: str, kernels: str | None = None) -> Device:
    """Open the device `cpu`, `cuda` or `cuda:N`. `kernels`: triton, torch or flashinfer; None for what suits it.

    Raises UserError for kernels that the device cannot run.
    """
    device = torch.device(name)
    if device.type == "cpu":
        return CpuDevice(kernels_for(device, kernels))
    from helios_sim.live.cuda import CudaDevice

    device = torch.device("cuda", device.index or 0)
    return CudaDevice(device, kernels=kernels_for(device, kernels))


class _Done:
    """The mark of a device on which everything issued is done at once."""

    def synchronize(self) -> None:
        """Return at once."""


_DONE = _Done()


def _nothing() -> None:
    """Do nothing, since there is nothing to wait for."""


def block(n_bytes: int, device: torch.device) -> Tensor:
    """Allocate uint8 (n_bytes,) of undefined content, on large pages if the system has them.

    A decode reads every weight once per token. On pages of 4 KiB a CPU would look up a page for every 64 cache lines.
    Raises MemoryError, or torch's RuntimeError, if there is not enough memory.
    """
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or n_bytes < LARGE_PAGE_BYTES:
        return torch.empty(n_bytes, dtype=torch.uint8, device=device)
    return mapped(n_bytes)[2]


def mapped(n_bytes: int) -> tuple[mmap.mmap, memoryview, Tensor]:
    """Map private host memory on large pages. Returns the mapping, a view of it, and the memory as uint8 (n_bytes,).

    The view is freed when no tensor needs it any more. The memory is unmapped when all three are gone, and only then do
    weak references to the mapping call back.
    """
    try:
        pages = mmap.mmap(-1, n_bytes + LARGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{n_bytes} bytes: {error.strerror}") from error
    view = memoryview(pages)
    memory = torch.frombuffer(view, dtype=torch.uint8)
    start = -memory.data_ptr() % LARGE_PAGE_BYTES
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux
    whole_pages = n_bytes // LARGE_PAGE_BYTES
    if advice is not None and whole_pages:
        with suppress(OSError):  # a kernel without large pages
            pages.madvise(advice, start, whole_pages * LARGE_PAGE_BYTES)
    return pages, view, memory[start : start + n_bytes]


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
    """Bytes of free memory that caches may take, after a reserve. None if the system does not tell."""
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
