"""Ratios and their intervals: exact where they can be, with the promised coverage where they cannot."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from helios_sim.report.compare import Method, compare, interval_over_seeds
from helios_sim.report.metrics import Band, MetricValue, compute_metrics
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
        if ratio.method is Method.PAIRED_BOOTSTRAP:
            assert (ratio.low, ratio.high) == (1, 1), name


def test_pairing_removes_what_the_requests_have_in_common() -> None:
    ttfts = np.random.default_rng(0).lognormal(0, 1.5, 300)
    halved = compare([run(list(ttfts / 2))], [run(list(ttfts))])["ttft_s_mean"]
    assert halved.ratio == pytest.approx(0.5, rel=1e-6)
    assert halved.low is not None
    assert halved.high is not None
    assert halved.high - halved.low < 1e-6
    assert halved.n == 300


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for seed in range(60):
        base = rng.lognormal(0, 0.5, 80)
        ratio = compare([run(list(base * rng.lognormal(0, 0.3, 80)))], [run(list(base))], seed=seed)["ttft_s_mean"]
        assert ratio.low is not None
        assert ratio.high is not None
        hits += ratio.low <= np.exp(0.3**2 / 2) <= ratio.high
    assert scipy_stats.binomtest(hits, 60, 0.95).pvalue > 0.01


def test_same_seed_same_interval() -> None:
    rng = np.random.default_rng(8)
    a, b = run(list(rng.lognormal(0, 1, 50))), run(list(rng.lognormal(0, 1, 50)))
    assert compare([a], [b], seed=4) == compare([a], [b], seed=4)
    assert compare([a], [b], seed=4) != compare([a], [b], seed=5)


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
    assert more.method is Method.T_OVER_SEEDS
    assert more.low is not None
    assert more.high is not None
    assert more.ratio is not None
    assert more.low < more.ratio < more.high


def test_t_interval_is_the_textbook_one() -> None:
    values = [1.0, 2.0, 4.0, 4.5]
    logs = np.log(values)
    expected = np.exp(scipy_stats.t.interval(0.95, 3, np.mean(logs), scipy_stats.sem(logs)))
    assert interval_over_seeds(values) == pytest.approx(tuple(expected))
    assert interval_over_seeds([1.0]) is None


def test_bands_are_compared_end_with_end_and_undefined_ratios_are_left_out() -> None:
    records, _ = run([1.0, 2.0])
    ours: dict[str, MetricValue] = {"energy_j_per_char": Band(2, 6), "switches": 3, "agreement": None}
    theirs: dict[str, MetricValue] = {"energy_j_per_char": Band(4, 8), "switches": 0, "agreement": 1.0}
    ratios = compare([(records, ours)], [(records, theirs)])
    assert (ratios["energy_j_per_char"].low, ratios["energy_j_per_char"].high) == (0.5, 0.75)
    assert ratios["energy_j_per_char"].method is Method.BAND
    assert "switches" not in ratios  # nothing over zero
