"""Joules from counters that only pretend: the arithmetic, the counter's period, and honest absence."""

from __future__ import annotations

import pytest

from calibrate.measure.device import LEAST_WINDOW_S, PERIODS, measure_energy, why_absent
from fake_device import VirtualClock, VirtualDevice

STEP_S = 0.005


def device_with(
    counter_period_s: float, idle_w: float = 70.0, busy_w: float = 370.0
) -> tuple[VirtualDevice, VirtualClock]:
    """A counter that moves every `counter_period_s`, of a device that draws more while steps run."""
    clock = VirtualClock()
    busy_s = 0.0

    def joules(now_s: float) -> float:
        ticks = int(now_s / counter_period_s + 1e-9)
        seen_s = ticks * counter_period_s
        seen_busy_s = min(busy_s, seen_s)
        return idle_w * seen_s + (busy_w - idle_w) * seen_busy_s

    device = VirtualDevice(clock, power_w=joules)

    def step() -> None:
        nonlocal busy_s
        busy_s += STEP_S
        clock.pass_s(STEP_S)

    device.step = step  # type: ignore[attr-defined]
    return device, clock


@pytest.mark.parametrize("period_s", [0.02, 0.1])
def test_energy_is_what_a_step_draws_and_idle_power_is_taken_off(period_s: float) -> None:
    device, clock = device_with(period_s)
    found = measure_energy(device, {"decode": device.step}, clock, clock.pass_s)  # type: ignore[attr-defined]
    assert found is not None
    assert found.period_s == pytest.approx(period_s, rel=0.3)
    assert found.window_s >= max(LEAST_WINDOW_S, 0.7 * PERIODS * period_s)
    assert found.idle_w == pytest.approx(70, rel=0.05)
    decode = found.steps["decode"]
    assert decode.time_s == pytest.approx(STEP_S, rel=1e-6)
    assert decode.energy_j == pytest.approx(370 * STEP_S, rel=0.05)
    assert decode.above_idle_j == pytest.approx(300 * STEP_S, rel=0.07)
    assert decode.power_w == pytest.approx(370, rel=0.05)
    assert found == type(found).from_json(found.to_json())


def test_without_a_counter_there_is_no_energy_and_a_reason() -> None:
    clock = VirtualClock()
    device = VirtualDevice(clock)
    assert measure_energy(device, {"decode": lambda: clock.pass_s(1)}, clock, clock.pass_s) is None
    assert "RAPL" in why_absent(device)


def test_a_counter_that_does_not_move_is_no_counter() -> None:
    clock = VirtualClock()
    device = VirtualDevice(clock, power_w=lambda now_s: 5.0)
    assert measure_energy(device, {"decode": lambda: clock.pass_s(0.01)}, clock, clock.pass_s) is None
