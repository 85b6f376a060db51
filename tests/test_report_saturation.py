"""How much an error of the profile moves TTFT, from the records of one run, against runs with the error in them."""

from __future__ import annotations

import numpy as np
import pytest

from helios_sim.profile.synthetic import flat_profile
from helios_sim.report.cautions import ttft_sensitivity
from helios_sim.report.records import Records
from helios_sim.workload import Constant, DrawnLengths, Exponential, Fixed, Poisson, TaskMix, Workload
from rig import full_depth, serve


def mean_ttft_ns(workload: Workload, time_factor: float) -> tuple[Records, float]:
    profile = flat_profile(0.001).scaled(time_factor)
    served = serve(workload, full_depth(batch_limit=2), {"flat": profile})
    records = Records.of(served.records)
    return records, float(np.mean(records.ttft_ns()))


@pytest.mark.parametrize("rate", [20.0, 130.0, 200.0, 400.0])
def test_sensitivity_is_what_a_slower_profile_does(rate: float) -> None:
    """Two places and 20 ms of service: saturated from 100 requests/s on."""
    lengths = DrawnLengths(Fixed(4), Fixed(20))
    workload = Workload(Constant(rate), lengths, TaskMix.single("text"), 400, chars_per_token=None)
    records, before = mean_ttft_ns(workload, 1.0)
    _, after = mean_ttft_ns(workload, 1.01)
    assert ttft_sensitivity(records) == pytest.approx((after / before - 1) / 0.01, rel=0.05)


def test_it_grows_towards_saturation() -> None:
    lengths = DrawnLengths(Fixed(4), Exponential(20))
    found = []
    for rate in (20.0, 70.0, 105.0):
        workload = Workload(Poisson(rate), lengths, TaskMix.single("text"), 600, chars_per_token=None)
        found.append(ttft_sensitivity(mean_ttft_ns(workload, 1.0)[0]))
    assert 1 <= found[0] < 2 < found[1] < found[2]
