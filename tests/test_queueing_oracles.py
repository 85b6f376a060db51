"""Waiting times of a server with a flat profile against the closed forms of queueing theory."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from helios_sim.profile.synthetic import flat_profile
from helios_sim.workload import Constant, DrawnLengths, Exponential, Fixed, Poisson, TaskMix, Workload
from rig import full_depth, serve

pytestmark = pytest.mark.slow

ITERATION_S = 0.001
OUTPUT_TOKENS = 200  # a request takes one iteration for its prompt and one for each further token
SERVICE_S = ITERATION_S * OUTPUT_TOKENS
ONE_TASK = TaskMix.single("text")


def waits_s(load: float, output, requests: int, seed: int) -> np.ndarray:
    workload = Workload(
        Poisson(load / SERVICE_S), DrawnLengths(Fixed(1), output), ONE_TASK, requests, chars_per_token=None
    )
    flat = {"flat": flat_profile(ITERATION_S)}
    served = serve(workload, full_depth(batch_limit=1), flat, seed=seed, compiled=True)  # a million iterations
    return np.array([(r.scheduled_ns - r.arrival_ns) / 1e9 for r in served.by_request()])


RUNS = {0.3: (10, 500), 0.6: (10, 800), 0.9: (10, 1800)}  # load: independent runs, requests of each


@pytest.mark.parametrize("load", RUNS)
def test_mean_wait_of_m_d_1(load: float) -> None:
    """Pollaczek-Khinchine with constant service: W = rho s / (2 (1 - rho))."""
    assert_mean_wait(load, Fixed(OUTPUT_TOKENS), load * SERVICE_S / (2 * (1 - load)))


@pytest.mark.parametrize("load", RUNS)
def test_mean_wait_of_m_m_1(load: float) -> None:
    """W = rho s / (1 - rho)."""
    assert_mean_wait(load, Exponential(OUTPUT_TOKENS), load * SERVICE_S / (1 - load))


def assert_mean_wait(load: float, output, expected_s: float) -> None:
    """Within Student's t over independent runs, 99.9 %. The first requests meet an empty server and do not count."""
    from scipy.stats import t

    runs, requests = RUNS[load]
    means = [waits_s(load, output, requests, seed)[requests // 6 :].mean() for seed in range(runs)]
    half = t.ppf(0.9995, runs - 1) * np.std(means, ddof=1) / np.sqrt(runs)
    assert half < expected_s, "the runs are too few to tell anything"
    assert abs(np.mean(means) - expected_s) < half


def test_every_wait_follows_lindleys_recursion() -> None:
    """W(n+1) = max(0, W(n) + S(n) - A(n+1)), exactly, for every request of a run near saturation."""
    workload = Workload(
        Poisson(0.95 / SERVICE_S), DrawnLengths(Fixed(1), Exponential(OUTPUT_TOKENS)), ONE_TASK, 1500,
        chars_per_token=None,
    )  # fmt: skip
    served = serve(workload, full_depth(batch_limit=1), {"flat": flat_profile(ITERATION_S)}).by_request()
    wait_ns = 0
    for earlier, later in pairwise(served):
        service_ns = earlier.output_tokens * 1_000_000
        wait_ns = max(0, wait_ns + service_ns - (later.arrival_ns - earlier.arrival_ns))
        assert later.scheduled_ns - later.arrival_ns == wait_ns


def test_d_d_1_never_waits_below_saturation() -> None:
    workload = Workload(
        Constant(1 / SERVICE_S), DrawnLengths(Fixed(1), Fixed(OUTPUT_TOKENS)), ONE_TASK, 50, chars_per_token=None
    )
    served = serve(workload, full_depth(batch_limit=1), {"flat": flat_profile(ITERATION_S)})
    assert served.seconds_in_system().tolist() == pytest.approx([SERVICE_S] * 50, abs=1e-12)


def test_closed_form_of_a_batch_that_starts_together() -> None:
    """Without queueing a request takes one iteration for its prompt and one for each further token."""
    workload = Workload(Constant(1e6), DrawnLengths(Fixed(3), Fixed(7)), ONE_TASK, 4, chars_per_token=None)
    served = serve(workload, full_depth(), {"flat": flat_profile(ITERATION_S)})
    assert max(r.last_token_ns for r in served.records) == pytest.approx(8 * 1_000_000, abs=10)
