"""A `StrictCuda` on a virtual clock, whose graphs take as long as they are told to."""

from __future__ import annotations

from typing import Any

from fake_device import VirtualClock
from strict_cuda import Event, Graph, StrictCuda


class ClockedEvent(Event):
    """Remembers when the card's clock passed it."""

    cuda: FakeCuda
    at_s = 0.0

    def record(self, stream: Any = None) -> None:
        super().record(stream)
        self.at_s = self.cuda.clock.now_s

    def elapsed_time(self, end: Any) -> float:
        return (end.at_s - self.at_s) * 1e3


class ClockedGraph(Graph):
    cuda: FakeCuda

    def replay(self) -> None:
        self.cuda.replays += 1
        self.cuda.clock.pass_s(self.cuda.captured_s)


class FakeCuda(StrictCuda):
    """`captured_s` is what a replay takes."""

    def __init__(self, clock: VirtualClock, captured_s: float = 0.002) -> None:
        super().__init__()
        self.clock, self.captured_s = clock, captured_s
        self.synchronized = self.slept = 0
        self.allocated, self.peak = 1000, 1000

    def Event(self, enable_timing: bool = False) -> ClockedEvent:
        return ClockedEvent(self)

    def CUDAGraph(self) -> ClockedGraph:
        return ClockedGraph(self)

    def synchronize(self, device: Any = None) -> None:
        self.synchronized += 1
        super().synchronize(device)

    def _sleep(self, cycles: int) -> None:
        self.slept += cycles

    def memory_allocated(self) -> int:
        return self.allocated

    def max_memory_allocated(self) -> int:
        return self.peak

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.allocated
