"""The cap rule and the history it rests on: closed forms and properties."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helios_sim.policy.assess import Assessor
from helios_sim.policy.cap import CapChoice, Evidence, choose_cap, weighed
from helios_sim.policy.history import OBSERVATIONS_KEPT, HistoryTable
from helios_sim.policy.telemetry import Observation
from policy_example import large, observed, offline, situation, small

EXITS = (2, 4, 8)


def evidence_of(counts: list[list[int]], tokens: int = 100) -> Evidence:
    differs = np.array(counts, dtype=np.int64)
    return Evidence(np.full(len(differs), tokens, dtype=np.int64), differs, np.ones(len(differs)))


def upper_bounds(*sources: Evidence) -> tuple[np.ndarray, np.ndarray]:
    return weighed(sources)[:2]


def cap_of(evidence: Evidence, epsilon: float, allowed: tuple | None = None) -> CapChoice:
    return choose_cap(EXITS, weighed([evidence]), epsilon, allowed)


evidences = st.lists(
    st.lists(st.integers(0, 100), min_size=2, max_size=2).map(lambda c: [*sorted(c, reverse=True), 0]), min_size=1
).map(evidence_of)


def test_equal_prompts_have_no_spread_so_the_bound_is_the_share() -> None:
    share, bound = upper_bounds(evidence_of([[7, 3, 0]] * 12))
    assert share == pytest.approx([0.07, 0.03, 0.0])
    assert bound == pytest.approx([0.07, 0.03, 0.0])


def test_the_bound_is_the_normal_quantile_for_many_prompts() -> None:
    """Shares 0 or 0.2 at equal odds, 400 prompts: mean 0.1, standard error 0.1 / 20; the 95 % quantile is 1.645."""
    counts = [[20, 0, 0] if i % 2 else [0, 0, 0] for i in range(400)]
    _, bound = upper_bounds(evidence_of(counts))
    assert bound[0] == pytest.approx(0.1 + 1.6449 * 0.1 / np.sqrt(399), abs=1e-6)  # which has no skew


def test_confident_or_not_the_shallowest_exit_within_the_bound_is_the_cap() -> None:
    evidence = evidence_of([[7, 3, 0]] * 5)
    caps = [cap_of(evidence, e).layers for e in (0.08, 0.07, 0.05, 0.02, 0.0)]
    assert caps == [2, 2, 4, 8, 8]


def test_few_prompts_that_vary_need_a_deeper_cap_than_many() -> None:
    few, many = evidence_of([[0, 0, 0], [16, 0, 0]]), evidence_of([[0, 0, 0], [16, 0, 0]] * 200)
    assert cap_of(many, 0.1).layers == 2
    assert cap_of(few, 0.1).layers == 4


@given(evidence=evidences, low=st.floats(0, 1), high=st.floats(0, 1))
def test_a_looser_floor_never_deepens_the_cap_and_full_depth_is_the_end(evidence, low, high) -> None:
    low, high = sorted((low, high))
    strict = cap_of(evidence, low)
    loose = cap_of(evidence, high)
    assert loose.layers <= strict.layers <= EXITS[-1]
    assert all(share <= bound <= 1.0 for share, bound in zip(strict.share, strict.upper_bound, strict=True))


@given(evidence=evidences, factor=st.floats(0.01, 100))
def test_only_relative_weights_matter(evidence, factor) -> None:
    scaled = replace(evidence, weights=evidence.weights * factor)
    a, b = (upper_bounds(e)[1] for e in (evidence, scaled))
    assert a == pytest.approx(b)


def test_a_barred_exit_is_passed_over_but_full_depth_never() -> None:
    evidence = evidence_of([[0, 0, 0]] * 5)
    assert cap_of(evidence, 0.1, (False, True, True)).layers == 4
    assert cap_of(evidence, 0.1, (False, False, False)).layers == 8


def table(half_life: float = 100.0) -> HistoryTable:
    return HistoryTable({"small": small(), "large": large()}, half_life)


def test_weights_halve_with_age_and_offline_evidence_is_as_old_as_the_run() -> None:
    history = table(half_life=100.0)
    assert history.observed("small") == (None, 1.0)
    history.add(observed("small", {2: 0.1, 4: 0.0}), 100)
    history.add(observed("small", {2: 0.2, 4: 0.0}), 300)
    evidence, offline_weight = history.observed("small")
    assert evidence is not None
    assert evidence.weights == pytest.approx([0.25, 1.0])
    assert offline_weight == pytest.approx(0.125)
    expected = (0.125 * 40 * 4 + 0.25 * 10 + 1.0 * 20) / (0.125 * 4000 + 25 + 100)
    assert history.shares("small").disagreement[0] == pytest.approx(expected)
    assert history.observed("large") == (None, 1.0)


def test_the_cap_pools_both_sources_by_age() -> None:
    """Equal prompts within each source leave no spread: the bound is the pooled share, 0.04 with 1/8 of 4,000 tokens
    and 0.2 of 100 observed ones."""
    assessor = Assessor(situation(), half_life_requests=100.0)
    assessor.history.add(observed("small", {2: 0.2, 4: 0.0}), 300)
    cap = assessor.cap("small")
    pooled = (0.125 * 160 + 20) / (0.125 * 4000 + 100)
    assert cap.upper_bound[0] == pytest.approx(pooled)
    assert cap.share[0] == pytest.approx(pooled)
    assert cap.layers == 4  # above 0.05
    assert assessor.cap("large").layers == 2


def test_two_sources_are_strata_of_one_sum() -> None:
    a, b = evidence_of([[10, 0, 0], [0, 0, 0]] * 30), evidence_of([[40, 0, 0], [0, 0, 0]] * 30)
    share, bound = upper_bounds(a, replace(b, weights=np.full(60, 0.5)))
    assert share[0] == pytest.approx((300 + 0.5 * 1200) / (6000 + 0.5 * 6000))
    spread = np.hypot(np.sqrt(60) * 5, 0.5 * np.sqrt(60) * 20) * np.sqrt(60 / 59)  # 60 prompts, +-5 and +-20 tokens
    assert bound[0] == pytest.approx(0.1 + 1.6449 * spread / 9000, abs=1e-6)


@pytest.mark.slow
def test_the_bound_covers_skewed_shares_at_least_as_often_as_the_bootstrap_over_prompts() -> None:
    """Half of the prompts or more show nothing. A bound that covered always would be too wide to be of use."""
    rng, runs, prompts = np.random.default_rng(0), 400, 60
    tokens = 1 + rng.geometric(1 / 150, (runs, prompts))
    differs = rng.binomial(tokens, rng.beta(0.2, 8.0, (runs, prompts)))
    covers = {"bound": 0, "bootstrap": 0}
    for t, d in zip(tokens, differs, strict=True):
        _, bound = upper_bounds(Evidence(t, d[:, None], np.ones(prompts)))
        drawn = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=500)
        covers["bound"] += bound[0] >= 0.2 / 8.2
        covers["bootstrap"] += np.quantile((drawn @ d) / (drawn @ t), 0.95) >= 0.2 / 8.2
    assert covers["bootstrap"] <= covers["bound"] <= 0.97 * runs


def test_evidence_too_old_to_count_underflows_to_nothing() -> None:
    assessor = Assessor(situation(), half_life_requests=1.0)
    assessor.history.add(observed("small", {2: 0.5, 4: 0.0}), 10_000)
    assert assessor.cap("small").upper_bound == pytest.approx((0.5, 0.0))
    assert assessor.history.shares("small").disagreement == pytest.approx([0.5, 0.0])


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
    evidence, _ = history.observed("small")
    assert evidence is not None
    assert len(evidence.tokens) == OBSERVATIONS_KEPT


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
