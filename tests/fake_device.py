"""For tests of calibration: a device on a clock of its own, and an NVML that only pretends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from calibrate.measure.device import DeviceFacts, Step


@dataclass
class VirtualClock:
    """Seconds that pass only when somebody says so."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds


@dataclass
class VirtualCopy:
    seconds: float

    def wait_s(self) -> float:
        return self.seconds


@dataclass
class VirtualDevice:
    """Steps take what they pass on the clock. `power_w` drives the energy counter, `waiting` spoils samples."""

    clock: VirtualClock
    facts: DeviceFacts = field(
        default_factory=lambda: DeviceFacts("cpu", "virtual-1core", "a clock", 1 << 30, None, {"torch": "none"})
    )
    asynchronous: bool = False
    host_buffers: tuple[str, ...] = ("host",)
    power_w: Callable[[float], float] | None = None  # joules since the start, by the clock
    waiting: Callable[[], float] = lambda: 0.0  # a rising counter
    bytes_per_s: float = 1e9
    prepared: int = 0

    @property
    def torch_device(self) -> str:
        return "cpu"

    def prepare(self, step: Step) -> Step:
        self.prepared += 1
        return step

    def laps_s(self, steps: Sequence[Step]) -> list[float]:
        laps = []
        for step in steps:
            before_s = self.clock.now_s
            step()
            laps.append(self.clock.now_s - before_s)
        return laps

    def launch_s(self, step: Step) -> float:
        return sum(self.laps_s([step]))

    def wait(self) -> None:
        return None

    def peak_bytes(self, step: Step) -> int | None:
        step()
        return 12345

    def used_bytes(self) -> int | None:
        return None

    def energy_j(self) -> float | None:
        return None if self.power_w is None else self.power_w(self.clock.now_s)

    def host_buffer(self, n_bytes: int, kind: str) -> Any:
        import torch

        return torch.ones(n_bytes, dtype=torch.uint8)

    def start_copy(self, pairs: Sequence[tuple[Any, Any]], repeats: int = 1) -> VirtualCopy:
        return VirtualCopy(repeats * sum(source.nbytes for source, _ in pairs) / self.bytes_per_s)

    def waited_s(self) -> float | None:
        return self.waiting()

    def disturbance(self) -> dict[str, float]:
        return {}


class NvmlError(Exception):
    pass


class FakeNvml:
    """An energy counter in mJ that rises with the clock; questions in `unsupported` are refused."""

    NVMLError = NvmlError

    def __init__(self, clock: VirtualClock, watts: float = 300.0, unsupported: tuple[str, ...] = ()) -> None:
        self._clock, self._watts, self._unsupported = clock, watts, unsupported
        self.asked: list[str] = []

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self._refuse("uuid")
        self.asked.append(uuid)
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self._refuse("energy")
        return int(self._clock.now_s * self._watts * 1e3)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        self._refuse("limit")
        return 700_000

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return 1980

    def nvmlDeviceGetTemperature(self, handle: str, kind: int) -> int:
        return 41

    def _refuse(self, what: str) -> None:
        if what in self._unsupported:
            raise NvmlError(what)
