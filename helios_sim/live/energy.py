"""Energy in joules from a device's own counter: RAPL for a machine's processors, NVML for a card.

A counter only rises, and it counts everything that the device does, for any process. Without a counter there is no
energy: nothing is estimated from time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")
ABSENT = {  # why there is no energy, by kind of device
    "cpu": "no RAPL counter under /sys/class/powercap that this process may read",
    "cuda": "the driver gives no energy counter for this card",
}
LEAST_S = 1.0  # a card's counter moves 10 to 50 times a second, so shorter runs are too imprecise
LOOK_S = 30.0  # RAPL wraps around after about 10 minutes at full power, and only one wrap can be detected


class Counter(Protocol):
    """An energy counter. `source` says what it counts and where it is read."""

    @property
    def source(self) -> str: ...

    def energy_j(self) -> float | None:
        """Joules since some moment in the past. None if it cannot be read."""
        ...


@dataclass(slots=True)
class Rapl:
    """RAPL counters of all processor packages. `powercap` is the kernel's folder of them; a test may pass another."""

    powercap: Path = POWERCAP
    _seen: dict[Path, tuple[float, float]] = field(default_factory=dict)  # last reading, sum of wrap-arounds

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
    """Whether the folder is a whole package. Its parts, and the whole platform, would count energy twice."""
    if folder.name.count(":") != 1:
        return False
    try:
        return not (folder / "name").read_text().startswith("psys")
    except OSError:  # without a name file
        return True


@dataclass(frozen=True, slots=True)
class NvmlCard:
    """One card as its driver reports it. `nvml` is the pynvml module; a test may pass a fake."""

    nvml: Any
    handle: Any

    @classmethod
    def of(cls, nvml: Any, properties: Any, index: int) -> NvmlCard | None:
        """The card with torch's `properties`. None if the driver does not know it.

        It is found by its unique id if torch gives one: NVML numbers all cards, torch only the visible ones.
        """
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
        """Call one of NVML's functions for this card. None if the card does not support it."""
        try:
            return float(getattr(self.nvml, question)(self.handle, *arguments)) * scale
        except self.nvml.NVMLError:
            return None


def open_nvml() -> Any | None:
    """The initialized pynvml module. None if it or the driver is missing."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # NVML has error classes of its own, and is optional
        return None
    return pynvml


def open_counter(device: str) -> Counter | None:
    """The counter of `cpu`, `cuda` or `cuda:N`. None if a card's driver cannot be asked."""
    if device == "cpu":
        return Rapl()
    nvml = open_nvml()
    if nvml is None:
        return None
    import torch

    index = int(device.partition(":")[2] or 0)
    return NvmlCard.of(nvml, torch.cuda.get_device_properties(index), index)


def may_be_counted(device: str) -> bool:
    """Whether the device has a counter, as far as that is known without opening the device itself."""
    return Rapl().energy_j() is not None if device == "cpu" else open_nvml() is not None


class Meter:
    """Measures joules from `start` to `stop`. It also reads the counter in between, to miss no wrap-around."""

    def __init__(self, counter: Counter | None, absent: str, now_s: Callable[[], float] = time.monotonic) -> None:
        """`absent`: why there is no energy if the counter is None or cannot be read."""
        self._counter, self._absent, self._now_s = counter, absent, now_s
        self._began: tuple[float, float | None] | None = None
        self._ended: tuple[float, float | None] | None = None
        self._left_out_j = 0.0
        self._stopped = threading.Event()
        self._one_reader = threading.Lock()  # since a counter keeps its last reading
        self._looking: threading.Thread | None = None

    @property
    def source(self) -> str:
        return "" if self._counter is None else self._counter.source

    def start(self) -> None:
        self._began = self._reading()
        self._looking = threading.Thread(target=self._look, name="energy", daemon=True)
        self._looking.start()

    def stop(self) -> None:
        """Stop measuring. Only the first call counts."""
        if self._ended is None:
            self._stopped.set()
            if self._looking is not None:
                self._looking.join()
            self._ended = self._reading()

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Do not count what is drawn inside the `with` block.

        A card's counter moves 10 to 50 times a second, so a short block is imprecise; over many, the sum is right on
        average.
        """
        before_j = self._reading()[1]
        yield
        after_j = self._reading()[1]
        if before_j is not None and after_j is not None and self._began is not None and self._ended is None:
            self._left_out_j += after_j - before_j

    @property
    def energy_j(self) -> float | None:
        """The joules, or None for the reason in `why`."""
        if self.why or self._began is None or self._ended is None:
            return None
        began_j, ended_j = self._began[1], self._ended[1]
        return None if began_j is None or ended_j is None else ended_j - began_j - self._left_out_j

    def so_far_j(self) -> float | None:
        """Joules from `start` until now, or until `stop`. None before `start`, or if the counter cannot be read."""
        if self._began is None or self._began[1] is None:
            return None
        now_j = self._reading()[1] if self._ended is None else self._ended[1]
        return None if now_j is None else now_j - self._began[1] - self._left_out_j

    @property
    def why(self) -> str:
        """Why there is no energy; "" if there is."""
        if self._began is None or self._ended is None:
            return "nothing ran"
        if self._began[1] is None or self._ended[1] is None:
            return self._absent
        long_enough = self._ended[0] - self._began[0] >= LEAST_S
        return "" if long_enough else f"the run took less than the {LEAST_S:g} s that the counter needs"

    def _reading(self) -> tuple[float, float | None]:
        with self._one_reader:
            return self._now_s(), None if self._counter is None else self._counter.energy_j()

    def _look(self) -> None:
        while not self._stopped.wait(LOOK_S):
            self._reading()
