"""Seconds become whole nanoseconds in one way, and what does not fit is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from helios_sim.core import price
from helios_sim.core.layout import FOREVER_NS
from helios_sim.errors import UserError
from helios_sim.profile.synthetic import flat_profile
from helios_sim.request import all_to_ns, to_ns, whole_ns
from rig import full_depth, serve, workload

BEYOND = (float("nan"), float("inf"), -float("inf"), 1e13, -1e13)


def test_halves_go_to_even_everywhere() -> None:
    seconds = np.array([0.0, 0.5e-9, 1.5e-9, 2.5e-9, 1.2345678915, 4e9, 777_600_000.123456789])
    wanted = [0, 0, 2, 2, 1_234_567_892, 4_000_000_000_000_000_000, 777_600_000_123_456_896]
    assert [to_ns(float(each)) for each in seconds] == wanted
    assert all_to_ns(seconds).tolist() == wanted
    assert all_to_ns(-seconds).tolist() == [-each for each in wanted]
    assert whole_ns(seconds).tolist() == [max(each, 1) for each in wanted]
    assert [price.whole_ns(float(each)) for each in seconds] == [max(each, 1) for each in wanted]
    assert all_to_ns(np.array([1.25, 3.0]), "ms", 1_000_000).tolist() == [1_250_000, 3_000_000]


@pytest.mark.parametrize("seconds", BEYOND)
def test_what_does_not_fit_is_refused(seconds: float) -> None:
    with pytest.raises(UserError, match=r"arrival.*146 years"):
        to_ns(seconds, "arrival")
    with pytest.raises(UserError, match=r"arrivals.*146 years"):
        all_to_ns(np.array([1.0, seconds, 2.0]), "arrivals")
    for n in (1, 3):
        with pytest.raises(UserError, match="146 years"):
            whole_ns(np.full(n, seconds))
    assert price.whole_ns(seconds) == FOREVER_NS


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stepwise", [False, True])
def test_an_iteration_beyond_the_clock_ends_the_run_with_one_message(compiled: bool, stepwise: bool) -> None:
    """The third iteration ends after the last nanosecond that can be counted."""
    slow = replace(flat_profile(1.6e3), time_factor=1e6)
    with pytest.raises(UserError, match=r"iteration.*146 years"):
        serve(workload(2), full_depth(), {"flat": slow}, compiled=compiled, stepwise=stepwise)
