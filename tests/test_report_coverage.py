"""Synthetic studies with a known effect: of 1,000 of each size, 95 % intervals hold it 93 to 97 % of the time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from helios_sim.report.columns import Maybe
from helios_sim.report.compare import compare
from helios_sim.report.intervals import LEVEL, STRETCHES, left_out, ratio_bounds, run_ratio_bounds, stretches, student
from helios_sim.report.metrics import MetricValue, compute_metrics
from helios_sim.report.records import Records
from helios_sim.serving.stats import RunStats
from test_report_metrics import record

FloatArray = NDArray[np.float64]

STUDIES, REQUESTS = 1000, 200
EFFECT = 0.83  # of the arm's mean time over the baseline's, over all seeds


def study(
    seeds: int, *, seed_sd: float, alike: float = 0.5, studies: int = STUDIES
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Times of the requests of both arms, (studies, seeds, requests) each, and the effect in each seed.

    The arms share the requests of a seed and how busy it was. What a seed adds to the effect is lognormal, and so is
    what each request adds, in which neighbours are alike: the correlation of two in a row is `alike`.
    """
    rng = np.random.default_rng([seeds, round(1000 * seed_sd), round(100 * alike)])
    shape = (studies, seeds, REQUESTS)
    busy = rng.normal(0, 0.2, (studies, seeds, 1))
    of_seed = np.exp(rng.normal(-(seed_sd**2) / 2, seed_sd, (studies, seeds, 1)))
    own = rng.normal(0, 0.2, shape)
    for i in range(1, REQUESTS):
        own[..., i] = alike * own[..., i - 1] + (1 - alike**2) ** 0.5 * own[..., i]
    theirs = np.exp(busy + rng.normal(0, 0.8, shape))
    ours = EFFECT * of_seed * theirs * np.exp(own - 0.2**2 / 2)
    return ours, theirs, EFFECT * of_seed[..., 0]


def covered(low: FloatArray, high: FloatArray, truth: float | FloatArray) -> float:
    return float(np.mean((low <= truth) & (truth <= high)))


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 8, 16])
@pytest.mark.parametrize("seed_sd", [0.0, 0.05, 0.15, 0.3])
def test_intervals_over_seeds_hold_the_effect_over_all_seeds(seeds: int, seed_sd: float) -> None:
    ours, theirs, _ = study(seeds, seed_sd=seed_sd)
    assert 0.93 <= covered(*ratio_bounds(ours.mean(axis=-1), theirs.mean(axis=-1)), EFFECT) <= 0.97


@pytest.mark.parametrize("alike", [0.0, 0.5, 0.8])
def test_an_interval_within_a_run_holds_the_effect_in_its_seed(alike: float) -> None:
    """That is all it claims: of the effect over all seeds it holds much less."""
    ours, theirs, of_seed = study(1, seed_sd=0.15, alike=alike, studies=4 * STUDIES)
    starts = stretches(REQUESTS)[:-1]
    sums = [np.add.reduceat(times[:, 0], starts, axis=-1) for times in (ours, theirs)]
    low, high = run_ratio_bounds(*sums)
    assert 0.93 <= covered(low, high, of_seed[:, 0]) <= 0.97
    assert covered(low, high, EFFECT) < 0.6


@pytest.mark.parametrize("seeds", [1, 3])
def test_studies_get_these_intervals(seeds: int) -> None:
    """What `compare` makes of records is what the studies above were covered by."""
    ours, theirs, _ = study(seeds, seed_sd=0.15, studies=5)
    for a, b in zip(ours, theirs, strict=True):
        found = compare([run(times) for times in a], [run(times) for times in b])["e2e_s_mean"]
        if seeds > 1:
            expected = ratio_bounds(a.mean(axis=-1), b.mean(axis=-1))
        else:
            starts = stretches(REQUESTS)[:-1]
            expected = run_ratio_bounds(np.add.reduceat(a[0], starts), np.add.reduceat(b[0], starts))
        assert (found.low, found.high) == pytest.approx([float(bound) for bound in expected], rel=1e-6)


def run(times_s: FloatArray) -> tuple[Records, dict[str, MetricValue]]:
    """A request each second that takes so long."""
    plain = Records.of([record(i, i, i + 0.001, i + 1, 10) for i in range(len(times_s))])
    ends = plain.arrival_ns + np.rint(times_s * 1e9).astype(np.int64)
    records = replace(plain, last_token_ns=Maybe(ends, plain.last_token_ns.present))
    return records, compute_metrics(records, RunStats())


def test_what_is_left_out_is_left_out() -> None:
    total, without = left_out(np.array([[1.0, 2.0, 4.0]]))
    assert (total.tolist(), without.tolist()) == ([7.0], [[6.0, 5.0, 3.0]])


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 25, 1000])
def test_stretches_hold_all_requests_once_and_none_where_there_is_one(n: int) -> None:
    ends = stretches(n)
    assert (ends[0], ends[-1]) == (0, n if n > 1 else 0)
    assert (np.diff(ends) >= 2).all()
    assert len(ends) - 1 <= 10


def test_students_t_is_scipys() -> None:
    from scipy.special import stdtrit

    for degrees in (1, 2, STRETCHES - 1, 39):
        for level in (LEVEL, 0.999):
            assert student(degrees, level) == float(stdtrit(degrees, 0.5 + level / 2))
