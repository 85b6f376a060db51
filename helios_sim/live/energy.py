"""Joules by a device's own counter: RAPL of a machine's processors, NVML's total of a card. Knows no model, no request.

A counter only rises, and counts all that the device does, whoever asked for it. Where there is none, there is no
energy: nothing is estimated from time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")
ABSENT = {  # by kind of device: why there is no energy
    "cpu": "no RAPL counter under /sys/class/powercap that this process may read",
    "cuda": "the driver gives no energy counter for this card",
}
LEAST_S = 1.0  # a card's counter moves 10 to 50 times a second: over less than this its ends weigh too much
LOOK_S = 30.0  # RAPL begins anew after some 10 minutes at full power, and only one new beginning can be told


class Counter(Protocol):
    """`source` says what is counted, and by whom."""

    @property
    def source(self) -> str: ...

    def energy_j(self) -> float | None:
        """Joules since some moment in the past; None where it cannot be read."""
        ...


@dataclass(slots=True)
class Rapl:
    """All processor packages together. `powercap` is the kernel's folder of them; a test brings its own."""

    powercap: Path = POWERCAP
    _seen: dict[Path, tuple[float, float]] = field(default_factory=dict)  # last reading, sum of what wrapped

    @property
    def source(self) -> str:
        return "RAPL, all processor packages of the machine"

    def energy_j(self) -> float | None:
        total_j, found = 0.0, False
        for package in sorted(self.powercap.glob("intel-rapl:[0-9]*")):
            if not _is_package(package):
                continue
            try:
                now_j = int((package / "energy_uj").read_text()) / 1e6
                range_j = int((package / "max_energy_range_uj").read_text()) / 1e6
            except (OSError, ValueError):
                return None
            last_j, wrapped_j = self._seen.get(package, (now_j, 0.0))
            if now_j < last_j:
                wrapped_j += range_j
            self._seen[package] = (now_j, wrapped_j)
            total_j, found = total_j + now_j + wrapped_j, True
        return total_j if found else None


def _is_package(folder: Path) -> bool:
    """Neither a part of a package nor the whole platform: both are counted a second time."""
    if folder.name.count(":") != 1:
        return False
    try:
        return not (folder / "name").read_text().startswith("psys")
    except OSError:  # it has no name
        return True


@dataclass(frozen=True, slots=True)
class NvmlCard:
    """One card as its driver tells of it. `nvml` is the pynvml module; a test brings its own."""

    nvml: Any
    handle: Any

    @classmethod
    def of(cls, nvml: Any, properties: Any, index: int) -> NvmlCard | None:
        """By torch's properties of the card: its unique id where torch tells it, since NVML counts all cards and torch
        only those that are visible. None where the driver does not know it."""
        uuid = getattr(properties, "uuid", None)
        try:
            if uuid is None:
                return cls(nvml, nvml.nvmlDeviceGetHandleByIndex(index))
            text = str(uuid)
            return cls(nvml, nvml.nvmlDeviceGetHandleByUUID(text if text.startswith("GPU-") else f"GPU-{text}"))
        except nvml.NVMLError:
            return None

    @property
    def source(self) -> str:
        return "NVML, total energy of the card"

    def energy_j(self) -> float | None:
        return self.answer("nvmlDeviceGetTotalEnergyConsumption", 1e-3)

    def answer(self, question: str, scale: float = 1.0, *arguments: int) -> float | None:
        """None where this card does not answer."""
        try:
            return float(getattr(self.nvml, question)(self.handle, *arguments)) * scale
        except self.nvml.NVMLError:
            return None


def open_nvml() -> Any | None:
    """The pynvml module, ready to be asked; None where it or the driver is not there."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # NVML has error classes of its own, and is optional
        return None
    return pynvml


def open_counter(device: str) -> Counter | None:
    """Of `cpu`, `cuda` or `cuda:N`; None where a card's driver cannot be asked."""
    if device == "cpu":
        return Rapl()
    nvml = open_nvml()
    if nvml is None:
        return None
    import torch

    index = int(device.partition(":")[2] or 0)
    return NvmlCard.of(nvml, torch.cuda.get_device_properties(index), index)


class Meter:
    """Joules from `start` to `stop`. In between it looks now and then, so that no new beginning is missed."""

    def __init__(self, counter: Counter | None, absent: str, now_s: Callable[[], float] = time.monotonic) -> None:
        """`absent`: why there is no energy where the counter is None or does not answer."""
        self._counter, self._absent, self._now_s = counter, absent, now_s
        self._began: tuple[float, float | None] | None = None
        self._ended: tuple[float, float | None] | None = None
        self._stopped = threading.Event()
        self._looking: threading.Thread | None = None

    @property
    def source(self) -> str:
        return "" if self._counter is None else self._counter.source

    def start(self) -> None:
        self._began = self._reading()
        self._looking = threading.Thread(target=self._look, name="energy", daemon=True)
        self._looking.start()

    def stop(self) -> None:
        """The first call counts."""
        if self._ended is None:
            self._stopped.set()
            if self._looking is not None:
                self._looking.join()  # one reader at a time: the counter remembers what it said last
            self._ended = self._reading()

    @property
    def energy_j(self) -> float | None:
        """None where `why` says why."""
        if self.why or self._began is None or self._ended is None:
            return None
        began_j, ended_j = self._began[1], self._ended[1]
        return None if began_j is None or ended_j is None else ended_j - began_j

    @property
    def why(self) -> str:
        """Why there is no energy; "" where there is."""
        if self._began is None or self._ended is None:
            return "nothing ran"
        if self._began[1] is None or self._ended[1] is None:
            return self._absent
        long_enough = self._ended[0] - self._began[0] >= LEAST_S
        return "" if long_enough else f"the run took less than the {LEAST_S:g} s that the counter needs"

    def _reading(self) -> tuple[float, float | None]:
        return self._now_s(), None if self._counter is None else self._counter.energy_j()

    def _look(self) -> None:
        while not self._stopped.wait(LOOK_S):
            self._reading()
