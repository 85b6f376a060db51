"""A CUDA card, for serving and for measuring: captured graphs, page-locked host memory, copies beside computation.

A process has one `Card` for each card that it uses, with one stream for all captures, one for all loads, and one for
late layers, since torch has only 32 streams and hands them out in turn. Captures keep three rules, which suit torch
2.11 to 2.13:

- A step is warmed up on the capture stream. The libraries for matrix products keep a workspace for each stream, which
  is thus allocated before the capture and outside of the graphs' memory pool.
- A graph that is not needed any more is destroyed only when none of them is needed: since torch 2.12, destroying one
  frees that workspace, and all the others hold its address.
- Then the next graph gets another pool, since torch refuses to capture into a pool after all of its graphs are gone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import finalize

import torch
from torch import Tensor

from helios_sim.live.device import Mark, Pairs, Step, mapped, oom_message
from helios_sim.live.kernels.interface import TORCH, Kernels

WARM_UP_CALLS = 2  # before a capture: libraries load their kernels, and allocate their handles and workspaces


@dataclass(frozen=True, slots=True, weakref_slot=True)
class GraphReplay:
    """A captured step. It refers to the original step to keep its tensors alive, since a graph only has addresses."""

    graph: Any
    step: Step

    def __call__(self) -> None:
        self.graph.replay()


class Card:
    """State that a process has once for each card. `cuda` is torch.cuda; a test may pass a fake."""

    def __init__(self, cuda: Any, index: int) -> None:
        """Make it the process's current card, since captures and events belong to the current card."""
        self._cuda, self._index = cuda, index
        cuda.set_device(index)
        # cuDNN's attention plans for a third of a second at every new shape, and nearly every iteration has a new one.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self._captures, self.copies, self.coming = (cuda.Stream(index) for _ in range(3))
        self._pool = cuda.graph_pool_handle()  # shared, since no two graphs run at the same time
        self._needed = 0
        self._unneeded: list[Any] = []
        self._failed: list[Any] = []

    @staticmethod
    @cache
    def of(cuda: Any, index: int) -> Card:
        """Return the process's only object for this card."""
        return Card(cuda, index)

    def captured(self, step: Step) -> GraphReplay:
        """Warm up and capture the step. Raises MemoryError if memory does not suffice, else what the step raises."""
        cuda, own, main = self._cuda, self._captures, self._cuda.current_stream(self._index)
        own.wait_stream(main)
        with cuda.stream(own):
            for _ in range(WARM_UP_CALLS):
                step()
        main.wait_stream(own)
        graph = cuda.CUDAGraph()
        self._needed += 1
        short: str | None = None
        try:
            # The outer block returns to the previous stream even if a capture cannot begin or end.
            # Only this thread's calls are captured: the copying thread goes on.
            kept = cuda.graph(graph, pool=self._pool, stream=own, capture_error_mode="thread_local")
            with cuda.stream(own), _uncollected(), kept:
                step()
        except BaseException as error:
            self._recover(graph)
            short = next((said for one in _chain(error) if (said := oom_message(one)) is not None), None)
            if short is None:
                raise
        if short is not None:  # outside `except`, since the error keeps the tensors of its frames alive
            raise MemoryError(short)
        replay = GraphReplay(graph, step)
        finalize(replay, self._drop, graph).atexit = False
        return replay

    def _recover(self, graph: Any) -> None:
        """Clean up after a failed capture, since parts of torch still take it to be running.

        The generator gets a fresh state. The pool may count as in use, so the next graph gets another one. The
        allocator may ask the graph whether it still captures, so it is never destroyed.
        """
        generator = self._cuda.default_generators[self._index]
        generator.graphsafe_set_state(generator.clone_state())
        self._failed.append(graph)
        self._needed -= 1
        self._pool = self._cuda.graph_pool_handle()

    def _drop(self, graph: Any) -> None:
        self._unneeded.append(graph)
        self._needed -= 1
        if not self._needed:
            self._cuda.synchronize(self._index)
            for each in self._unneeded:
                each.reset()
            self._unneeded.clear()
            self._pool = self._cuda.graph_pool_handle()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep Python from collecting garbage during a capture. Torch has not collected any before it since 2.9.

    A collection may unlock host memory, or unload a kernel of Triton's, and that would end the capture.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and the chain of errors that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def page_locked(n_bytes: int, cuda: Any) -> Tensor:
    """Host memory, uint8 (n_bytes,), from which a card copies at full speed while the host goes on.

    It is locked in place: torch's own pinned memory is rounded up to a power of two. Raises MemoryError if the system
    does not allow it.
    """
    pages, used, memory = mapped(n_bytes)
    runtime, address = cuda.cudart(), memory.data_ptr()
    status = int(runtime.cudaHostRegister(address, n_bytes, 0))
    if status:
        # The runtime keeps this error until it is read, which torch does after its next launch.
        with suppress(RuntimeError):
            cuda._sleep(1)
        raise MemoryError(f"{n_bytes} bytes of host memory cannot be page-locked: CUDA error {status}")

    def unlock(mapping: object = pages) -> None:  # keeps the mapping until it is unlocked
        runtime.cudaHostUnregister(address)

    finalize(used, unlock).atexit = False
    return memory


class CudaDevice:
    """One card as a `Device`."""

    captures = True

    def __init__(self, torch_device: torch.device, cuda: Any = torch.cuda, kernels: Kernels = TORCH) -> None:
        self.torch_device, self._cuda, self.kernels = torch_device, cuda, kernels
        self._card = Card.of(cuda, torch_device.index or 0)

    def host_empty(self, n_bytes: int) -> Tensor:
        return page_locked(n_bytes, self._cuda)

    def mark(self) -> Mark:
        event = self._cuda.Event()
        event.record(self._cuda.current_stream(self.torch_device))
        return event

    def copy(self, pairs: Pairs, after: Mark | None = None) -> Callable[[], None]:
        done = self._copied(self._card.copies, pairs, after)
        wait: Callable[[], None] = done.synchronize  # releases the GIL while it waits
        return wait

    def prefetch(self, pairs: Pairs, after: Mark | None = None) -> Callable[[], None]:
        done = self._copied(self._card.coming, pairs, after)

        def wait() -> None:
            self._cuda.current_stream(self.torch_device).wait_event(done)

        return wait

    def _copied(self, stream: Any, pairs: Pairs, after: Mark | None) -> Any:
        """Start the copies on this stream. Returns the event at their end."""
        done = self._cuda.Event()
        if after is not None:
            stream.wait_event(after)
        with torch.inference_mode(), self._cuda.stream(stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
            done.record()
        return done

    def release(self) -> None:
        self._cuda.empty_cache()

    def wait(self) -> None:
        self._cuda.synchronize(self.torch_device)

    def prepare(self, step: Step) -> Step:
        return self._card.captured(step)
