"""Ratios and their intervals: exact where they can be, with the promised coverage where they cannot."""

from __future__ import annotations

import numpy as np
import pytest

from helios_sim.report.compare import compare, intervals_of
from helios_sim.report.intervals import Method
from helios_sim.report.metrics import Band, MetricValue, compute_metrics
from helios_sim.report.percentiles import FEWEST_BEYOND
from helios_sim.report.records import Records
from helios_sim.serving.stats import RunStats
from report_example import example_records
from test_report_metrics import dropped, record

Run = tuple[Records, dict[str, MetricValue]]


def run(ttfts_s: list[float], tokens: int = 10) -> Run:
    records = Records.of([record(i, i, i + t, i + t + 1, tokens) for i, t in enumerate(ttfts_s)])
    return records, compute_metrics(records, RunStats(batch_capacity_blocks=100))


def test_an_arm_against_itself_is_one_without_doubt() -> None:
    records = example_records("helios", 1)
    metrics = compute_metrics(records, RunStats())
    for name, ratio in compare([(records, metrics)], [(records, metrics)]).items():
        assert ratio.ratio == pytest.approx(1), name
        if ratio.method is Method.WITHIN_RUN:
            assert (ratio.low, ratio.high) == (1, 1), name


def test_pairing_removes_what_the_requests_have_in_common() -> None:
    ttfts = np.random.default_rng(0).lognormal(0, 1.5, 300)
    halved = compare([run(list(ttfts / 2))], [run(list(ttfts))])["ttft_s_mean"]
    assert halved.ratio == pytest.approx(0.5, rel=1e-6)
    assert halved.low is not None
    assert halved.high is not None
    assert halved.high - halved.low < 1e-6
    assert halved.n == 300


def test_runs_of_several_seeds_are_paired_by_seed() -> None:
    """Seeds that differ a lot in both arms alike leave no doubt about the ratio."""
    rng = np.random.default_rng(8)
    base = [list(size * rng.lognormal(0, 1, 50)) for size in (1.0, 3.0, 9.0)]
    ratio = compare([run([t / 2 for t in ttfts]) for ttfts in base], [run(ttfts) for ttfts in base])["ttft_s_mean"]
    assert (ratio.ratio, ratio.low, ratio.high) == pytest.approx((0.5, 0.5, 0.5), rel=1e-6)
    assert (ratio.method, ratio.n) == (Method.OVER_SEEDS, 3)


def test_the_ratio_is_that_of_the_means_in_the_table() -> None:
    ours, theirs = ([run([1.0, 2.0]), run([4.0, 3.0])], [run([2.0, 2.0]), run([3.0, 3.0])])
    found = compare(ours, theirs)["ttft_s_mean"]
    assert found.ratio == pytest.approx((1.5 + 3.5) / (2 + 3))


def test_one_seed_is_said_to_be_one() -> None:
    rng = np.random.default_rng(8)
    a, b = run(list(rng.lognormal(0, 1, 50))), run(list(rng.lognormal(0, 1, 50)))
    assert compare([a], [b])["ttft_s_mean"].method is Method.WITHIN_RUN
    found = intervals_of([a])
    assert found["ttft_s_mean"].method is Method.WITHIN_RUN
    assert found["throughput_requests_per_s"].method is Method.NONE
    assert found["requests_completed"].method is Method.EXACT
    assert set(found) == {name for name, value in a[1].items() if value is not None}


def test_a_percentile_with_too_little_beyond_it_has_no_interval() -> None:
    rng = np.random.default_rng(8)
    few, enough = (run(list(rng.lognormal(0, 1, n))) for n in (99 * FEWEST_BEYOND, 100 * FEWEST_BEYOND))
    assert intervals_of([few])["ttft_s_p99"].method is Method.NONE
    found = intervals_of([enough])["ttft_s_p99"]
    p99 = enough[1]["ttft_s_p99"]
    assert found.low is not None
    assert found.high is not None
    assert isinstance(p99, float)
    assert found.low < p99 < found.high


def test_only_requests_that_both_arms_completed_are_paired() -> None:
    base = run([1.0, 1.0, 1.0])
    rows = [record(0, 0, 2, 3, 10), record(1, 1, 3, 4, 10), dropped(2)]
    records = Records.of(rows)
    ratio = compare([(records, compute_metrics(records, RunStats()))], [base])["ttft_s_mean"]
    assert (ratio.ratio, ratio.n) == (2.0, 2)


def test_system_metrics_have_an_interval_only_over_seeds() -> None:
    a, b = run([1.0, 2.0]), run([2.0, 2.0])
    one = compare([a], [b])["throughput_requests_per_s"]
    assert one.method is Method.NONE
    assert one.low is None
    more = compare([a, run([1.0, 1.5])], [b, run([2.0, 2.5])])["throughput_requests_per_s"]
    assert more.method is Method.OVER_SEEDS
    assert more.low is not None
    assert more.high is not None
    assert more.ratio is not None
    assert more.low < more.ratio < more.high


def test_bands_are_compared_end_with_end_and_undefined_ratios_are_left_out() -> None:
    records, _ = run([1.0, 2.0])
    ours: dict[str, MetricValue] = {"energy_j_per_char": Band(2, 6), "switches": 3, "agreement": None}
    theirs: dict[str, MetricValue] = {"energy_j_per_char": Band(4, 8), "switches": 0, "agreement": 1.0}
    ratios = compare([(records, ours)], [(records, theirs)])
    assert (ratios["energy_j_per_char"].low, ratios["energy_j_per_char"].high) == (0.5, 0.75)
    assert ratios["energy_j_per_char"].method is Method.BAND
    assert "switches" not in ratios  # nothing over zero
