"""Load or switch: costs of transitions by hand, and where the choice flips."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from helios_sim.exits.rule import FixedCap, PerToken
from helios_sim.policy.deployment import (
    BreachLimit,
    Completed,
    Deployment,
    Drained,
    InFlight,
    KvRule,
    Placement,
    Probed,
)
from helios_sim.policy.helios_parameters import BreachAction, Constants, Evaluation, Raised
from helios_sim.policy.prediction import Load
from helios_sim.policy.telemetry import Candidate
from helios_sim.policy.transition import Underway, transition
from policy_example import helios, large, layered_profile, observed, offline, seen, situation, small

BREACH = BreachLimit(100, 50)
LOAD = Load(10.0, 21.0)  # 10 tokens of prompt, 21 of answer


def rate(candidate: Candidate, bytes_per_s: float, slowdown: float = 1.0) -> Candidate:
    return replace(candidate, profile=replace(candidate.profile, load_bytes_per_s=bytes_per_s, load_slowdown=slowdown))


def test_nothing_running_and_nothing_to_load_costs_nothing() -> None:
    now = Underway(Placement("small", 4), (Placement("large", 8),), 0, 0.004)
    for to in (Placement("small", 2), Placement("small", 4), Placement("large", 8), Placement("large", 2)):
        step = transition(situation(), now, to, LOAD)
        assert (step.load_bytes, step.lost_s) == (0, 0.0)


def test_a_switch_loads_what_is_not_there_while_it_drains() -> None:
    """3 in flight: 20 tokens at 2 ms, T = 40 ms; drained in 30 ms, 10 ms of it lost to empty places."""
    here = situation(small(), rate(large(), 148 / 0.05))
    now = Underway(Placement("small", 2), (), 3, 0.002)
    step = transition(here, now, Placement("large", 2), LOAD)
    assert step.load_bytes == 68 + 2 * 40
    assert step.load_s == pytest.approx(0.05)
    assert step.drain_s == pytest.approx(0.030)
    assert step.lost_s == pytest.approx(0.010 + 0.020)


def test_without_room_for_both_the_load_waits_for_the_drain() -> None:
    here = situation(small(), rate(large(), 148 / 0.05), capacity_bytes=148 + 148 + 100)
    now = Underway(Placement("small", 2), (), 3, 0.002)
    assert transition(here, now, Placement("large", 2), LOAD).lost_s == pytest.approx(0.010 + 0.050)


def test_one_in_flight_loses_nothing_to_empty_places() -> None:
    now = Underway(Placement("small", 2), (), 1, 0.002)
    step = transition(situation(), now, Placement("large", 2), LOAD)
    assert step.drain_s == pytest.approx(0.020)
    assert step.lost_s == 0.0  # the load is done long before


def test_a_raise_loads_beside_serving_and_prefills_what_is_in_flight() -> None:
    """80 bytes take 1 s, in which a slowdown of 1.25 loses 0.2 s; 3 texts are prefilled at 4 layers, 4 ms each."""
    here = situation(rate(small(), 80.0, slowdown=1.25), large())
    now = Underway(Placement("small", 2), (), 3, 0.002)
    step = transition(here, now, Placement("small", 4), LOAD)
    assert step.load_bytes == 80
    assert step.prefill_s == pytest.approx(0.012)
    assert step.lost_s == pytest.approx(0.2 + 0.012)
    idle = transition(here, replace(now, running_requests=0), Placement("small", 4), LOAD)
    assert idle.lost_s == pytest.approx(1.0)  # nothing to serve meanwhile


def test_migration_prefills_on_the_new_model_in_place_of_draining() -> None:
    now = Underway(Placement("small", 2), (), 3, 0.002)
    step = transition(situation(), now, Placement("large", 2), LOAD, InFlight.MIGRATE)
    assert step.drain_s == 0.0
    assert step.lost_s == pytest.approx(3 * 0.004)


CHUNKED = replace(situation(), max_batch_tokens=10)  # 100 tokens of a prompt take ten iterations
FOUND = Load(100.0, 21.0, cached_share=0.8)


@pytest.mark.parametrize(
    ("to", "requests", "lost_s"),
    [
        (Placement("large", 2), None, 5 * 8 * 0.004),  # 500 tokens are five prompts, each of eight chunks more
        (Placement("large", 2), 3, 3 * 8 * 0.004),  # of which three are to come
        (Placement("small", 4), None, 5 * 8 * 0.004),  # a raise: nothing reaches as deep
        (Placement("small", 2), None, 0.0),
    ],
)
def test_a_switch_or_a_raise_loses_what_is_cached(to: Placement, requests: int | None, lost_s: float) -> None:
    now = Underway(Placement("small", 2), (Placement("small", 4), Placement("large", 8)), 0, 0.002, cached_tokens=500)
    step = transition(CHUNKED, now, to, FOUND, requests=requests)
    assert step.cache_s == pytest.approx(lost_s)
    assert step.lost_s == pytest.approx(lost_s)
    assert ("cache_s" in step.to_json()) == (lost_s > 0)
    for without in (replace(FOUND, cached_share=0.0), FOUND):
        empty = replace(now, cached_tokens=500 if without.cached_share == 0.0 else 0)
        assert transition(CHUNKED, empty, to, without).lost_s == 0.0


def test_a_lower_cap_keeps_what_is_cached() -> None:
    now = Underway(Placement("small", 4), (), 0, 0.004, cached_tokens=500)
    assert transition(CHUNKED, now, Placement("small", 2), FOUND).lost_s == 0.0


@pytest.mark.slow
@given(running=st.integers(0, 8), layers=st.sampled_from([2, 4, 8]), model=st.sampled_from(["small", "large"]))
def test_a_transition_never_loses_less_than_nothing(running: int, layers: int, model: str) -> None:
    if (model, layers) in (("small", 8), ("large", 4)):
        return
    here = situation(rate(small(), 1e3, 1.1), rate(large(), 1e3, 1.1))
    now = Underway(Placement("small", 2), (), running, 0.002)
    step = transition(here, now, Placement(model, layers), LOAD)
    assert step.lost_s >= step.prefill_s >= 0.0
    assert step.lost_s <= step.load_s + step.drain_s + step.prefill_s


def answered(action: BreachAction = BreachAction.CHEAPER, *candidates: Candidate, **settings: object) -> Deployment:
    """`small` at 2 layers has breached, 50 requests into the round."""
    policy = helios(evaluation=Evaluation.OFF, on_breach=action, **settings)
    assert policy.start(situation(*candidates)).active == Placement("small", 2)
    decided = policy.decide(BREACH, seen(50, running=1))
    assert decided is not None
    return decided


# At full depth `small` takes 4 ms a token, as `large` does at 2 layers: here `large` takes 3 ms.
def lighter() -> Candidate:
    return Candidate(layered_profile("large", 0.0015, 8), large().offline)


@pytest.mark.parametrize(
    ("load_s", "expected"),
    # 100 requests are left, 21 tokens each: 2.1 s to gain. The raise costs 4 ms of prefill.
    [(2.0, Placement("large", 2)), (2.2, Placement("small", 4))],
)
def test_the_answer_flips_where_the_costs_cross(load_s: float, expected: Placement) -> None:
    decided = answered(BreachAction.CHEAPER, small(), rate(lighter(), 148 / load_s))
    assert decided.active == expected
    costs = decided.evidence["cost_until_next_round"]
    assert costs["small@4"] == pytest.approx(0.004 + 100 * 21 * 0.004)
    assert costs["large@2"] == pytest.approx(load_s - 0.020 + 100 * 21 * 0.003)
    assert decided.evidence["breaches_in_window"] == 51


def test_the_variants_take_one_way_only() -> None:
    slow = rate(lighter(), 1.0)
    assert answered(BreachAction.LOAD_ONLY, small(), lighter()).active == Placement("small", 4)
    assert answered(BreachAction.SWITCH_ONLY, small(), slow).active == Placement("large", 2)


def test_transfer_only_compares_bytes_over_bandwidth_and_nothing_else() -> None:
    """2 layers of `small` are 80 bytes, `large` up to 2 layers 148: loading wins however slow it then is."""
    assert answered(BreachAction.TRANSFER_ONLY, small(), rate(lighter(), 1e9)).active == Placement("small", 4)
    tight = rate(small(), 1e3)
    assert answered(BreachAction.TRANSFER_ONLY, tight, rate(large(), 1e9)).active == Placement("large", 2)


def test_after_a_raise_the_depth_stays_until_the_next_round() -> None:
    decided = answered(BreachAction.LOAD_ONLY)
    assert decided.active == Placement("small", 4)
    assert decided.triggers == (Completed(100),)


@pytest.mark.parametrize("kv_rule", [KvRule.PROPAGATE, KvRule.RECOMPUTE])
def test_a_raised_model_may_let_tokens_leave_early(kv_rule: KvRule) -> None:
    """Not the published reading, but not excluded by it: all layers are loaded, confident tokens still leave."""
    raised = answered(BreachAction.LOAD_ONLY, raised=Raised.EARLY_EXIT, raised_kv_rule=kv_rule)
    assert raised.active == Placement("small", 4)
    assert isinstance(raised.exit_rule, PerToken)
    assert raised.kv_rule is kv_rule
    kept = answered(BreachAction.LOAD_ONLY)
    assert isinstance(kept.exit_rule, FixedCap)


def test_after_a_switch_the_counter_watches_until_the_next_round() -> None:
    decided = answered(BreachAction.CHEAPER, small(), lighter())
    assert decided.active == Placement("large", 2)
    assert decided.triggers == (BREACH, Completed(100))
    assert decided.in_flight is InFlight.DRAIN
    assert answered(BreachAction.CHEAPER, small(), lighter(), in_flight=InFlight.MIGRATE).in_flight is InFlight.MIGRATE


def test_one_that_breached_may_come_round_again_if_it_is_the_cheapest() -> None:
    policy = helios(evaluation=Evaluation.OFF)
    policy.start(situation(small(), lighter()))
    there, back = policy.decide(BREACH, seen(50, running=1)), policy.decide(BREACH, seen(60, running=1))
    assert (there.active, back.active) == (Placement("large", 2), Placement("small", 2))
    assert set(back.evidence["options"]) == {"large@8", "small@2"}
    assert back.triggers == (BREACH, Completed(90))


def test_switch_only_switches_even_where_a_breach_is_expected() -> None:
    unsure = replace(lighter(), offline=offline("large", (2, 8), (0.02, 0.0), (0.4, 1.0)))
    assert answered(BreachAction.SWITCH_ONLY, small(), unsure).active == Placement("large", 2)


def test_switch_only_with_one_candidate_can_do_nothing() -> None:
    policy = helios(evaluation=Evaluation.OFF, on_breach=BreachAction.SWITCH_ONLY)
    policy.start(situation(small()))
    assert policy.decide(BREACH, seen(50)) is None


def test_a_candidate_bound_to_breach_is_no_choice_beside_loading() -> None:
    unsure = replace(lighter(), offline=offline("large", (2, 8), (0.02, 0.0), (0.4, 1.0)))
    assert answered(BreachAction.CHEAPER, small(), unsure).active == Placement("small", 4)


def test_a_raise_that_leaves_no_room_is_no_choice() -> None:
    """400 bytes hold one request (248) beside 2 layers (148), not beside 4."""
    policy = helios(evaluation=Evaluation.OFF)
    policy.start(situation(small(), capacity_bytes=400))
    assert policy.decide(BREACH, seen(50, running=1)) is None


def test_the_cooldown_lets_an_answer_take_effect() -> None:
    policy = helios(evaluation=Evaluation.OFF, on_breach=BreachAction.SWITCH_ONLY, constants=Constants.BATCH_SCALED)
    policy.start(situation())
    assert policy.decide(BREACH, seen(50, now_s=1.0)) is not None
    assert policy.decide(BREACH, seen(60, now_s=5.9)) is None
    assert policy.decide(BREACH, seen(70, now_s=6.0)) is not None


def test_a_breach_uses_the_caps_of_the_latest_round() -> None:
    """The round saw `large` change too much at layer 2, so its partial load is the whole model: no gain."""
    policy = helios(evaluation=Evaluation.PROBE, half_life_requests=1.0)
    policy.start(situation(small(), lighter()))
    policy.decide(Completed(150), seen(150))
    bad = [observed("large", {2: 0.4, 8: 0.0}) for _ in range(3)]
    policy.decide(Probed(), seen(150, bad))
    decided = policy.decide(BREACH, seen(151, running=1))
    assert set(decided.evidence["options"]) == {"small@4", "large@8"}
    assert decided.active == Placement("small", 4)
    assert policy.decide(Drained(), seen(160)) is not None
