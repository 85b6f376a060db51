"""Energy of iterations in joules, from the device's own counter, also with idle power subtracted.

Without a counter there is no energy: nothing is estimated from time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from calibrate.measure.device import Step, TimedDevice
from helios_sim.live.energy import ABSENT

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
