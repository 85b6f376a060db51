"""The cap rule and the history it rests on: closed forms and properties."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helios_sim.policy.cap import Evidence, choose_cap, upper_bounds
from helios_sim.policy.history import OBSERVATIONS_KEPT, HistoryTable
from helios_sim.policy.telemetry import Observation
from policy_example import large, observed, offline, small

EXITS = (2, 4, 8)


def evidence_of(counts: list[list[int]], tokens: int = 100) -> Evidence:
    differs = np.array(counts, dtype=np.int64)
    return Evidence(np.full(len(differs), tokens, dtype=np.int64), differs, np.ones(len(differs)))


evidences = st.lists(
    st.lists(st.integers(0, 100), min_size=2, max_size=2).map(lambda c: [*sorted(c, reverse=True), 0]), min_size=1
).map(evidence_of)


def test_equal_prompts_have_no_spread_so_the_bound_is_the_share() -> None:
    share, bound = upper_bounds(evidence_of([[7, 3, 0]] * 12), np.random.default_rng(0))
    assert share == pytest.approx([0.07, 0.03, 0.0])
    assert bound == pytest.approx([0.07, 0.03, 0.0])


def test_the_bound_is_the_normal_quantile_for_many_prompts() -> None:
    """Shares 0 or 0.2 at equal odds, 400 prompts: mean 0.1, standard error 0.1 / 20; the 95 % quantile is 1.645."""
    counts = [[20, 0, 0] if i % 2 else [0, 0, 0] for i in range(400)]
    _, bound = upper_bounds(evidence_of(counts), np.random.default_rng(0))
    assert bound[0] == pytest.approx(0.1 + 1.645 * 0.1 / 20, abs=0.0012)


def test_confident_or_not_the_shallowest_exit_within_the_bound_is_the_cap() -> None:
    evidence = evidence_of([[7, 3, 0]] * 5)
    caps = [choose_cap(EXITS, evidence, e, np.random.default_rng(0)).layers for e in (0.08, 0.07, 0.05, 0.02, 0.0)]
    assert caps == [2, 2, 4, 8, 8]


def test_few_prompts_that_vary_need_a_deeper_cap_than_many() -> None:
    few, many = evidence_of([[0, 0, 0], [16, 0, 0]]), evidence_of([[0, 0, 0], [16, 0, 0]] * 200)
    assert choose_cap(EXITS, many, 0.1, np.random.default_rng(0)).layers == 2
    assert choose_cap(EXITS, few, 0.1, np.random.default_rng(0)).layers == 4


@given(evidence=evidences, low=st.floats(0, 1), high=st.floats(0, 1), seed=st.integers(0, 100))
def test_a_looser_floor_never_deepens_the_cap_and_full_depth_is_the_end(evidence, low, high, seed) -> None:
    low, high = sorted((low, high))
    strict = choose_cap(EXITS, evidence, low, np.random.default_rng(seed))
    loose = choose_cap(EXITS, evidence, high, np.random.default_rng(seed))
    assert loose.layers <= strict.layers <= EXITS[-1]
    assert strict == choose_cap(EXITS, evidence, low, np.random.default_rng(seed))  # the same to the last bit
    assert sorted(strict.upper_bound, reverse=True) == list(strict.upper_bound)  # as the counts are


@given(evidence=evidences, factor=st.floats(0.01, 100))
def test_only_relative_weights_matter(evidence, factor) -> None:
    scaled = replace(evidence, weights=evidence.weights * factor)
    a, b = (upper_bounds(e, np.random.default_rng(0))[1] for e in (evidence, scaled))
    assert a == pytest.approx(b)


def test_a_barred_exit_is_passed_over_but_full_depth_never() -> None:
    evidence = evidence_of([[0, 0, 0]] * 5)
    assert choose_cap(EXITS, evidence, 0.1, np.random.default_rng(0), (False, True, True)).layers == 4
    assert choose_cap(EXITS, evidence, 0.1, np.random.default_rng(0), (False, False, False)).layers == 8


def table(half_life: float = 100.0) -> HistoryTable:
    return HistoryTable({"small": small(), "large": large()}, half_life)


def test_offline_evidence_weighs_alike_until_something_is_observed() -> None:
    evidence = table().evidence("small", completed_requests=5000)
    assert np.all(evidence.weights == 1.0)
    assert len(evidence.tokens) == 40


def test_weights_halve_with_age_and_offline_evidence_is_as_old_as_the_run() -> None:
    history = table(half_life=100.0)
    history.add(observed("small", {2: 0.1, 4: 0.0}), 100)
    history.add(observed("small", {2: 0.2, 4: 0.0}), 300)
    weights = history.evidence("small", 300).weights
    assert weights[:40] == pytest.approx(0.125)
    assert weights[40:] == pytest.approx([0.25, 1.0])
    shares = history.shares("small")
    expected = (0.125 * 40 * 4 + 0.25 * 10 + 1.0 * 20) / (0.125 * 4000 + 25 + 100)
    assert shares.disagreement[0] == pytest.approx(expected)
    assert history.evidence("large", 300).weights == pytest.approx(1.0)


def test_evidence_too_old_to_count_is_left_out_not_underflowed() -> None:
    history = table(half_life=1.0)
    history.add(observed("small", {2: 0.5, 4: 0.0}), 10_000)
    evidence = history.evidence("small", 20_000)
    assert len(evidence.tokens) == 1
    assert np.all(np.isfinite(upper_bounds(evidence, np.random.default_rng(0))[1]))
    assert history.shares("small").disagreement == pytest.approx([0.5, 0.0])


def test_the_table_keeps_histogram_confidence_and_bits() -> None:
    history = table(half_life=1.0)
    bits = np.array([[3.0, 2.0], [1.0, 2.0]], dtype=np.float32)
    confident = np.array([[True, True], [False, False]])
    agrees = np.array([[True, True], [False, True]])
    history.add(Observation("small", 0, 0, confident, agrees, bits, chars=8), 10_000)
    shares = history.shares("small")
    assert shares.exit_histogram == pytest.approx([0.5, 0.5])  # not confident anywhere: runs to the end
    assert shares.confident == pytest.approx([0.5, 0.5])
    assert shares.disagreement == pytest.approx([0.5, 0.0])
    assert shares.bits_per_char == pytest.approx([0.5, 0.5])


def test_an_empty_observation_says_nothing_and_old_ones_make_room() -> None:
    history = table()
    history.add(observed("small", {2: 0.0, 4: 0.0}, tokens=0), 0)
    assert history.observed_prompts("small") == 0
    for i in range(OBSERVATIONS_KEPT + 3):
        history.add(observed("small", {2: 0.0, 4: 0.0}, tokens=2), i)
    assert history.observed_prompts("small") == OBSERVATIONS_KEPT + 3
    assert len(history.evidence("small", 1000).tokens) == 40 + OBSERVATIONS_KEPT


def test_rows_are_json() -> None:
    history = table()
    history.add(observed("large", {2: 0.1, 8: 0.0}), 7)
    rows = json.loads(json.dumps(history.rows(10)))
    assert rows["large"]["age_requests"] == 3
    assert rows["small"]["age_requests"] is None
    assert sum(rows["small"]["exit_histogram"]) == pytest.approx(1.0)


def test_offline_helper_is_consistent() -> None:
    made = offline("x", EXITS, (0.1, 0.05, 0.0), (0.5, 0.7, 1.0))
    assert made.exit_share == pytest.approx([0.5, 0.2, 0.3])
