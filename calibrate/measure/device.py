"""What measuring needs from a device (`TimedDevice`), and the energy of iterations from its own counter.

Every measurement goes through this protocol. `devices.py` implements it for a CPU and for a CUDA card; a test may pass
its own. Times are seconds of the device: on a card the time between two events on its stream, on a CPU the monotonic
clock around the same work, since there host and device are the same cores. Energy is in joules, also with idle power
subtracted; a device without a counter has none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from helios_sim.live.energy import ABSENT

Step = Callable[[], object]


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """Facts about a device that need no measurement; None if the device does not tell."""

    kind: str  # cpu or cuda
    name: str  # short, for names of profiles: epyc-2core, h100-80gb-hbm3
    description: str
    memory_bytes: int  # memory that the engine may use
    power_limit_w: float | None
    versions: Mapping[str, str] = field(default_factory=dict)
    computes_bfloat16: bool = False  # natively


class Copy(Protocol):
    """A copy in progress."""

    def wait_s(self) -> float:
        """Wait for its end. Returns the seconds from its start to its end."""
        ...


class TimedDevice(Protocol):
    """One device with everything that measurements need."""

    facts: DeviceFacts
    asynchronous: bool  # the host issues work and goes on, so that launches and synchronization cost extra time
    host_buffers: tuple[str, ...]  # kinds of host memory to load weights from, the engine's kind first

    @property
    def torch_device(self) -> str: ...

    def prepare(self, step: Step) -> Step:
        """The step in its fastest form: a captured graph if the device supports it."""
        ...

    def laps_s(self, steps: Sequence[Step]) -> list[float]:
        """Device seconds of each step, run back to back."""
        ...

    def launch_s(self, step: Step) -> float:
        """Host seconds to issue the step to an idle device, without waiting for it."""
        ...

    def wait(self) -> None:
        """Wait until the device is idle."""
        ...

    def peak_bytes(self, step: Step) -> int | None:
        """The rise in memory use while the step ran; None if the device cannot tell."""
        ...

    def used_bytes(self) -> int | None:
        """Memory in use. None if the device cannot tell."""
        ...

    def energy_j(self) -> float | None:
        """An energy counter in joules that only rises. None if there is none."""
        ...

    def host_buffer(self, n_bytes: int, kind: str) -> Any:
        """A tensor of `n_bytes` noise in the given kind of host memory."""
        ...

    def start_copy(self, pairs: Sequence[tuple[Any, Any]], repeats: int = 1) -> Copy:
        """Start copying each pair's first tensor into its second, `repeats` times, while other work goes on."""
        ...

    def waited_s(self) -> float | None:
        """A counter of the seconds in which this process was ready to run but others had its cores.

        None if that does not affect the device's times.
        """
        ...

    def disturbance(self) -> dict[str, float]:
        """Readings that show whether others use the machine or its clock is throttled."""
        ...


def short_name(description: str) -> str:
    """A short name for folders: `NVIDIA H100 80GB HBM3` becomes `h100-80gb-hbm3`."""
    words = description.lower().replace("(r)", "").replace("(tm)", "").replace("_", " ").split()
    return "-".join(w for w in words if w not in {"nvidia", "amd", "intel", "cpu", "processor", "@"})


POLL_S = 2.0  # how long the counter is watched to find its period
PERIODS = 50  # updates of the counter per window, so that an error of one at each end is under 4 %
LEAST_WINDOW_S = 1.0
MOST_WINDOW_S = 10.0


@dataclass(frozen=True, slots=True)
class StepEnergy:
    """One kind of iteration. `above_idle_j`: its energy minus that of the idle device in the same time."""

    time_s: float
    energy_j: float
    above_idle_j: float
    power_w: float
    iterations: int


@dataclass(frozen=True, slots=True)
class Energy:
    """Energy by kind of iteration. The counter moves every `period_s`; each reading lasts `window_s`."""

    period_s: float
    window_s: float
    idle_w: float  # with the model resident
    steps: dict[str, StepEnergy]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Energy:
        return cls(**{**data, "steps": {k: StepEnergy(**v) for k, v in data["steps"].items()}})


def measure_energy(
    device: TimedDevice,
    steps: Mapping[str, Step],
    now_s: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Energy | None:
    """Measure the energy of each step. None without a counter, or if it does not move within two seconds of work."""
    if device.energy_j() is None or not steps:
        return None
    first = next(iter(steps.values()))
    period_s = _period_s(device, first, now_s)
    if period_s is None:
        return None
    window_s = min(MOST_WINDOW_S, max(LEAST_WINDOW_S, PERIODS * period_s))
    device.wait()
    sleep(window_s / 2)  # let clocks and fans settle
    idle_j, idle_s = _window(device, lambda: sleep(window_s), now_s)
    idle_w = idle_j / idle_s
    found = {}
    for name, step in steps.items():
        prepared = device.prepare(step)
        device.laps_s([prepared])
        done = 0

        def work(prepared: Step = prepared) -> None:
            nonlocal done
            end_s = now_s() + window_s
            while now_s() < end_s:
                for _ in range(8):
                    prepared()
                device.wait()
                done += 8

        energy_j, taken_s = _window(device, work, now_s)
        found[name] = StepEnergy(
            taken_s / done, energy_j / done, (energy_j - idle_w * taken_s) / done, energy_j / taken_s, done
        )
    return Energy(period_s, window_s, idle_w, found)


def why_absent(device: TimedDevice) -> str:
    """The reason why a device has no energy, for the record."""
    return ABSENT[device.facts.kind]


def _period_s(device: TimedDevice, step: Step, now_s: Callable[[], float]) -> float | None:
    """Median time between changes of the counter while the device works; None after fewer than three changes."""
    changes: list[float] = []
    last, end_s = device.energy_j(), now_s() + POLL_S
    while now_s() < end_s:
        step()
        device.wait()
        value = device.energy_j()
        if value != last:
            changes.append(now_s())
            last = value
    return float(np.median(np.diff(changes))) if len(changes) >= 3 else None


def _window(device: TimedDevice, work: Callable[[], None], now_s: Callable[[], float]) -> tuple[float, float]:
    """The (joules, seconds) that the work takes."""
    start_j, start_s = device.energy_j(), now_s()
    work()
    end_j, end_s = device.energy_j(), now_s()
    assert start_j is not None
    assert end_j is not None
    return end_j - start_j, end_s - start_s
