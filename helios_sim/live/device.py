"""What serving needs from a device beside torch itself: host memory to load from, copies, steps at their best.

A CPU and a CUDA card are two implementations of it. Knows no model and no request. The calibration runs its steps in
the same way, so its profiles mean what is served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from helios_sim.live.pages import block

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
class Replay:
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
        return Replay(graph, step)


def open_device(name: str) -> Device:
    """`cpu`, `cuda` or `cuda:N`."""
    device = torch.device(name)
    return CpuDevice() if device.type == "cpu" else CudaDevice(device)


def _nothing() -> None:
    """There is nothing to wait for."""
