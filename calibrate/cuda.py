"""A CUDA card as a device: events, captured graphs, the allocator's own counts, NVML, a copy stream. Knows no model.

`torch` and `nvml` (the pynvml module) come in as arguments, so that tests can bring their own.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Any

from calibrate.device import DeviceFacts, Step, short_name
from helios_sim.errors import UserError
from helios_sim.live.energy import NvmlCard, open_nvml

WARM_UP_CALLS = 3  # before a capture: libraries make their handles and workspaces outside it
LEAD_CYCLES = 400_000  # the card spins for some 0.2 ms, so that launches are queued before the first one runs


@dataclass(slots=True)
class CudaDevice:
    """One card. `eager` collects why steps could not be captured: their device time then includes launch gaps."""

    torch: Any
    card: NvmlCard | None  # as its driver tells of it; None: the driver cannot be asked
    index: int
    facts: DeviceFacts
    eager: list[str] = field(default_factory=list)
    asynchronous: bool = True
    host_buffers: tuple[str, ...] = ("pinned", "pageable")
    _pool: Any = None
    _stream: Any = None

    @classmethod
    def open(cls, index: int = 0, memory_bytes: int | None = None) -> CudaDevice:
        """Raises UserError when torch sees no such card."""
        import torch

        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
            raise UserError("device", f"cuda:{index}", f"torch sees {seen} cards", "use device=cpu, or install CUDA")
        torch.cuda.set_device(index)
        return cls.of(torch, open_nvml(), index, memory_bytes)

    @classmethod
    def of(cls, torch: Any, nvml: Any | None, index: int, memory_bytes: int | None = None) -> CudaDevice:
        properties = torch.cuda.get_device_properties(index)
        versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda), "python": platform.python_version()}
        card = None if nvml is None else NvmlCard.of(nvml, properties, index)
        limit_w: float | None = None
        if card is not None:
            versions["driver"] = str(card.nvml.nvmlSystemGetDriverVersion())
            limit_w = card.answer("nvmlDeviceGetEnforcedPowerLimit", 1e-3)
        facts = DeviceFacts(
            kind="cuda",
            name=short_name(properties.name),
            description=f"{properties.name}, {properties.multi_processor_count} multiprocessors",
            memory_bytes=int(properties.total_memory) if memory_bytes is None else memory_bytes,
            power_limit_w=limit_w,
            versions=versions,
        )
        return cls(torch, card, index, facts)

    @property
    def torch_device(self) -> str:
        return f"cuda:{self.index}"

    def prepare(self, step: Step) -> Step:
        cuda = self.torch.cuda
        side, main = cuda.Stream(), cuda.current_stream()
        side.wait_stream(main)
        with cuda.stream(side):
            for _ in range(WARM_UP_CALLS):
                step()
        main.wait_stream(side)
        self.wait()
        if self._pool is None:
            self._pool = cuda.graph_pool_handle()  # shared: the graphs never run at the same time
        graph = cuda.CUDAGraph()
        try:
            with cuda.graph(graph, pool=self._pool):
                step()
        except RuntimeError as error:
            self.eager.append(str(error).splitlines()[0])
            self.wait()
            return step
        from helios_sim.live.device import GraphReplay  # torch is loaded by now

        return GraphReplay(graph, step)

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
        return None if self.card is None else self.card.energy_j()

    def host_buffer(self, n_bytes: int, kind: str) -> Any:
        noise = self.torch.randint(0, 256, (n_bytes,), dtype=self.torch.uint8)
        return noise.pin_memory() if kind == "pinned" else noise

    def start_copy(self, pairs: Sequence[tuple[Any, Any]], repeats: int = 1) -> StreamCopy:
        if self._stream is None:
            self._stream = self.torch.cuda.Stream()
        return StreamCopy(self.torch.cuda, self._stream, pairs, repeats)

    def waited_s(self) -> float | None:
        return None  # launches are queued ahead of the card

    def disturbance(self) -> dict[str, float]:
        """The clock and the temperature now: a card that is hot or at its power limit slows down."""
        if self.card is None:
            return {}
        found: dict[str, float] = {}
        for key, name, argument in (
            ("sm_clock_mhz", "nvmlDeviceGetClockInfo", 1),  # NVML_CLOCK_SM
            ("temperature_c", "nvmlDeviceGetTemperature", 0),  # NVML_TEMPERATURE_GPU
        ):
            value = self.card.answer(name, 1.0, argument)
            if value is not None:
                found[key] = value
        return found


class StreamCopy:
    """A copy on a stream of its own, timed by events there."""

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
