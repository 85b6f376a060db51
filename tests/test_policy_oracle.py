"""The oracle's plan against every policy there is, by enumeration on small cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, strategies as st
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.policy.deployment import Completed, Placement
from helios_sim.policy.oracle import (
    OracleParameters,
    OraclePolicy,
    Plan,
    TokenTimes,
    make_plan,
    reference_bits,
    token_times,
)
from helios_sim.policy.telemetry import Candidate
from helios_sim.request import Request
from policy_example import large, layered_profile, situation, small

EPSILONS = (0.0, 0.1, 0.25, 0.5, 1.0)


def tokens(exits, time_s, loss, first) -> TokenTimes:
    """Any request is possible; what they may lose comes with `plan_of`."""
    return TokenTimes(exits, time_s, loss, np.zeros(len(first)), first, np.ones(len(first), dtype=bool))


def plan_of(models, tables: Sequence[TokenTimes], ids, epsilon: float, epoch_requests: int = 1) -> Plan:
    """A share epsilon of each request's tokens may change."""
    return make_plan(models, [replace(t, allowed=epsilon * t.tokens) for t in tables], ids, epoch_requests)


@st.composite
def tables(draw: st.DrawFn) -> list[TokenTimes]:
    """Two models with two exits, three requests of one to three tokens; times need not rise with depth."""
    models = []
    for _ in range(2):
        lengths = draw(st.lists(st.integers(1, 3), min_size=3, max_size=3))
        n = sum(lengths)
        # Whole numbers make ties, which is where a price alone cannot split the budget.
        times = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=n, max_size=n))
        differs = draw(st.lists(st.booleans(), min_size=n, max_size=n))
        first = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
        changed = np.array([[d, False] for d in differs])
        models.append(tokens((1, 2), np.array(times, dtype=float), changed, first))
    return models


def outcomes(table: TokenTimes, request: int) -> list[tuple[float, int, int]]:
    """(time, changed tokens, tokens) of every way to serve one request on one model."""
    start, n = int(table.first[request]), int(table.tokens[request])
    return [
        (
            sum(float(table.time_s[start + j, e]) for j, e in enumerate(exits)),
            sum(bool(table.loss[start + j, e]) for j, e in enumerate(exits)),
            n,
        )
        for exits in product(range(2), repeat=n)
    ]


@pytest.mark.slow
@given(models=tables(), epsilon=st.sampled_from(EPSILONS))
def test_no_policy_within_the_floor_is_faster(models, epsilon) -> None:
    plan = plan_of(("a", "b"), models, (0, 1, 2), epsilon)
    ways = [[way for table in models for way in outcomes(table, r)] for r in range(3)]
    best_s = min(
        sum(time_s for time_s, _, _ in choice)
        for choice in product(*ways)
        if sum(changed for _, changed, _ in choice) <= epsilon * sum(n for _, _, n in choice) + 1e-9
    )
    assert plan.time_s.sum() <= best_s + 1e-9


@pytest.mark.slow
@given(models=tables(), epsilon=st.sampled_from(EPSILONS))
def test_the_budget_is_overspent_by_less_than_one_request(models, epsilon) -> None:
    plan = plan_of(("a", "b"), models, (0, 1, 2), epsilon)
    assert plan.slack.sum() < max(int(t.tokens.max()) for t in models)


@pytest.mark.slow
@given(models=tables(), epsilon=st.sampled_from(EPSILONS))
def test_the_plan_says_what_it_counts(models, epsilon) -> None:
    ids = (7, 3, 5)
    plan = plan_of(("a", "b"), models, ids, epsilon)
    for place, request_id in enumerate(ids):
        table = models["ab".index(plan.model(request_id))]
        rows = int(table.first[place]) + np.arange(int(table.tokens[place]))
        exits = plan.layers(request_id) - 1  # exits are at layers 1 and 2
        assert plan.time_s[place] == pytest.approx(table.time_s[rows, exits].sum())
        assert plan.slack[place] == pytest.approx(table.loss[rows, exits].sum() - epsilon * len(rows))


def test_without_a_budget_every_token_runs_to_its_first_agreeing_exit() -> None:
    times = np.array([[1.0, 3.0], [1.0, 3.0], [1.0, 3.0]])
    differs = np.array([[False, False], [True, False], [False, False]])
    table = tokens((6, 24), times, differs, np.array([0]))
    assert plan_of(("a",), [table], (0,), 0.0).layers(0).tolist() == [6, 24, 6]
    assert plan_of(("a",), [table], (0,), 0.34).layers(0).tolist() == [6, 6, 6]


def test_an_epoch_shares_a_model() -> None:
    """The first request is quicker on a by 1 s, the second on b by 2 s."""

    def table(first_s: float, second_s: float) -> TokenTimes:
        times = np.array([[first_s], [second_s]])
        return tokens((4,), times, np.zeros((2, 1), dtype=bool), np.array([0, 1]))

    models = [table(1.0, 4.0), table(2.0, 2.0)]
    apart, together = (plan_of(("a", "b"), models, (0, 1), 0.0, epoch) for epoch in (1, 2))
    assert [apart.model(0), apart.model(1)] == ["a", "b"]
    assert [together.model(0), together.model(1)] == ["b", "b"]


def test_a_model_whose_context_is_too_short_is_passed_over() -> None:
    quick, slow = (tokens((4,), np.array([[s]]), np.zeros((1, 1), dtype=bool), np.array([0])) for s in (1.0, 5.0))
    quick = replace(quick, possible=np.array([False]))
    assert plan_of(("a", "b"), [quick, slow], (0,), 0.0).model(0) == "b"


@pytest.mark.slow
@given(
    times=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=8, max_size=8),
    bits=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=8, max_size=8),
    ratio=st.sampled_from([0.5, 1.0, 1.1, 2.0]),
)
def test_no_policy_within_a_floor_in_bits_is_faster(times, bits, ratio) -> None:
    """Two models, two requests of two tokens; the second model at full depth is the reference."""
    first, loss = np.array([0, 2]), np.array(bits, dtype=float).reshape(2, 4, 2)
    allowed = ratio * loss[1, :, 1].reshape(2, 2).sum(axis=1)
    models = [
        replace(tokens((1, 2), t, b, first), allowed=allowed)
        for t, b in zip(np.array(times, dtype=float).reshape(2, 4, 2), loss, strict=True)
    ]
    plan = make_plan(("a", "b"), models, (0, 1))
    ways = [
        [
            (sum(m.time_s[[2 * r, 2 * r + 1], exits]), sum(m.loss[[2 * r, 2 * r + 1], exits]))
            for m in models
            for exits in product(range(2), repeat=2)
        ]
        for r in range(2)
    ]
    within = [a[0] + b[0] for a, b in product(*ways) if a[1] + b[1] <= allowed.sum() + 1e-9]
    least = min(a[1] + b[1] for a, b in product(*ways))
    if within:
        assert plan.time_s.sum() <= min(within) + 1e-9
        assert plan.slack.sum() <= 24  # what one request can lose
    else:  # a floor below all that there is: as good as it gets
        assert plan.slack.sum() + allowed.sum() == pytest.approx(least)


class Known:
    """Three requests; `small` agrees at 2 layers with every token but the first two of request 1, `large` always."""

    def requests(self) -> Sequence[Request]:
        return [Request(i, 0, prompt_chars=10, output_chars=3 + i, task=0, text_start=0) for i in range(3)]

    def agreement(self, model: str, request: Request) -> NDArray[np.bool_]:
        agrees = np.ones((request.output_chars, 2), dtype=bool)
        if model == "small" and request.request_id == 1:
            agrees[:2, 0] = False
        return agrees

    def bits(self, model: str, request: Request) -> NDArray[np.float64]:
        """A token costs 2 bits at the exit of `small`, 1 whole; `large` 3 and 1.5, of request 2 nothing."""
        row = [2.0, 1.0] if model == "small" else [3.0, 1.5] if request.request_id < 2 else [0.0, 0.0]
        return np.tile(row, (request.output_chars, 1))


def test_the_policy_plans_from_the_outlook_with_the_profiles_times() -> None:
    """`small` takes 2 ms at its exit and 4 ms whole, `large` 4 ms at its exit: request 1 is served by `small`."""
    here = situation(epsilon=0.0, outlook=Known())
    policy = OraclePolicy(OracleParameters(batch_limit=1))
    deployment = policy.start(here)
    plan = deployment.plan
    assert plan is not None
    assert deployment.instant
    assert deployment.batch_limit == 1
    assert deployment.active == Placement("small", 4)
    assert [plan.model(i) for i in range(3)] == ["small"] * 3
    assert plan.layers(0).tolist() == [2, 2, 2]
    assert plan.layers(1).tolist() == [4, 4, 2, 2]
    assert deployment.evidence["busy_s"] == pytest.approx(0.002 * (3 + (2 + 2 + 1 + 1) + 5))
    assert deployment.evidence["loss"] == deployment.evidence["loss_allowed"] == 0
    assert policy.decide(Completed(1), None) is None


def test_the_budget_may_be_spent_on_one_request() -> None:
    """2 changed tokens of 12 are within 0.2, though they are half of request 1."""
    plan = OraclePolicy(OracleParameters()).start(situation(epsilon=0.2, outlook=Known())).plan
    assert plan is not None
    assert plan.layers(1).tolist() == [2, 2, 2, 2]


def test_a_floor_in_bits_that_follows_a_reference_replaces_the_budget_of_changed_tokens() -> None:
    """The best single model is `large` with 10.5 bits for 12 tokens. `large` at its exit gives request 2 for nothing,
    in 4 ms a token, which leaves 10.5 for 7 tokens of `small`: 4 whole (1 bit, 4 ms) and 3 at its exit (2 bits, 2 ms).
    """
    here = situation(outlook=Known())
    here = replace(here, objective=replace(here.objective, max_bits_ratio=1.0))
    assert reference_bits(here, Known().requests()).tolist() == [4.5, 6.0, 0.0]
    plan = OraclePolicy(OracleParameters()).start(here).plan
    assert plan is not None
    assert [plan.model(i) for i in range(3)] == ["small", "small", "large"]
    assert plan.layers(2).tolist() == [2] * 5
    assert plan.time_s.sum() <= 0.001 * (5 * 4 + 4 * 4 + 3 * 2) + 1e-12
    assert plan.slack.sum() <= 4.0  # what request 1 can lose
    named = replace(here, objective=replace(here.objective, bits_reference="small"))
    assert reference_bits(named, Known().requests()).tolist() == [3.0, 4.0, 5.0]


def test_the_faster_model_for_a_request_is_taken_for_that_request() -> None:
    """`large` at its exit takes 2.2 ms here: slower than `small` at 2 ms, faster than half of the tokens at 4 ms."""
    other = Candidate(layered_profile("large", 0.0011, 8), large().offline)
    here = situation(small(), other, epsilon=0.0, outlook=Known())
    plan = OraclePolicy(OracleParameters()).start(here).plan
    assert plan is not None
    assert [plan.model(i) for i in range(3)] == ["small", "large", "small"]


def test_models_above_the_bits_floor_are_no_choice_and_the_outlook_is_needed() -> None:
    plan = OraclePolicy(OracleParameters()).start(situation(max_bits_per_char=1.0, outlook=Known())).plan
    assert plan is not None
    assert plan.model(0) == "large"
    with pytest.raises(UserError, match="floor in bits"):
        OraclePolicy(OracleParameters()).start(situation(max_bits_per_char=0.1, outlook=Known()))
    with pytest.raises(UserError, match="must be known"):
        OraclePolicy(OracleParameters()).start(situation())


def test_times_follow_prompt_and_context() -> None:
    """Token j reads prompt + j tokens: with a cost per KV token the plan's time is the sum over contexts."""
    candidate = small()
    seen: list[int] = []

    class Counting:
        model = candidate.profile.model

        def iteration_time_s(self, c) -> NDArray[np.float64]:
            return c.decode_kv_tokens[:, 0] * float(c.bounds[-1])

        def prompt_time_s(self, layers, tokens, budget) -> tuple[float, float]:
            seen.append(tokens)
            return 1000.0 + layers, 0.0

    here = situation(candidate, outlook=Known())
    here = replace(here, candidates={"small": Candidate(Counting(), candidate.offline)})
    times = token_times(here, "small", Known().requests()[:1])
    assert times.time_s.tolist() == [[1002.0, 1004.0], [22.0, 44.0], [24.0, 48.0]]
    assert set(seen) == {10}
