"""Policies that decide once: what they deploy and what they refuse."""

from __future__ import annotations

import pytest

from helios_sim.errors import UserError
from helios_sim.exits.rule import FixedCap, FullDepth, PerToken
from helios_sim.policy.deployment import BatchingRule, Completed, Deployment, KvRule, Placement
from helios_sim.policy.early_exit import EarlyExitParameters, EarlyExitPolicy
from helios_sim.policy.full_depth import FullDepthParameters, FullDepthPolicy
from helios_sim.policy.static_cap import StaticCapParameters, StaticCapPolicy
from helios_sim.policy.telemetry import Candidate, Goal
from policy_example import large, offline, situation, small


def test_full_depth_runs_all_layers_and_asks_for_nothing() -> None:
    policy = FullDepthPolicy(FullDepthParameters("large", batch_limit=1))
    deployment = policy.start(situation())
    assert deployment.active == Placement("large", 8)
    assert deployment.exit_rule == FullDepth()
    assert (deployment.batch_limit, deployment.triggers, deployment.kv_rule) == (1, (), KvRule.NONE)
    assert policy.decide(Completed(1), None) is None


def test_the_only_candidate_needs_no_name_and_several_do() -> None:
    assert FullDepthPolicy(FullDepthParameters()).start(situation(small())).active == Placement("small", 4)
    with pytest.raises(UserError, match=r"one of small, large"):
        FullDepthPolicy(FullDepthParameters()).start(situation())
    with pytest.raises(UserError, match=r"policy.model='medium'"):
        FullDepthPolicy(FullDepthParameters("medium")).start(situation())


def test_early_exit_loads_the_whole_model_and_passes_its_rules_on() -> None:
    parameters = EarlyExitParameters(0.8, "small", batching=BatchingRule.LAZY, batch_limit=4)
    deployment = EarlyExitPolicy(parameters).start(situation())
    assert deployment.active == Placement("small", 4)
    assert deployment.exit_rule == PerToken(0.8)
    assert (deployment.batching, deployment.kv_rule) == (BatchingRule.LAZY, KvRule.PROPAGATE)
    assert deployment.evidence["exits"] == [2, 4]


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"kv_rule": KvRule.NONE}, "policy.kv_rule"),
        ({"batching": BatchingRule.LAZY, "kv_rule": KvRule.RECOMPUTE}, "policy.kv_rule"),
        ({"batch_limit": 0}, "policy.batch_limit"),
        ({"threshold": float("nan")}, "policy.threshold"),
    ],
)
def test_early_exit_refuses_rules_that_lose_kv(settings: dict, key: str) -> None:
    with pytest.raises(UserError) as caught:
        EarlyExitParameters(**{"threshold": 0.8, **settings})
    assert caught.value.key == key


def test_static_cap_takes_what_is_given() -> None:
    deployment = StaticCapPolicy(StaticCapParameters(0.7, "large", cap_layers=2)).start(situation())
    assert deployment.active == Placement("large", 2)
    assert deployment.exit_rule == FixedCap(0.7)
    assert (deployment.kv_rule, deployment.triggers) == (KvRule.NONE, ())
    with pytest.raises(UserError, match=r"exits at 2, 8"):
        StaticCapPolicy(StaticCapParameters(0.7, "large", cap_layers=4)).start(situation())


def test_static_cap_chooses_cap_by_the_floor_and_model_by_the_objective() -> None:
    """At 2 layers `small` takes 2 ms a token and `large` 4 ms; below 4 % disagreement `small` needs its 4 layers."""

    def chosen(epsilon: float, **kwargs: object) -> Placement:
        return StaticCapPolicy(StaticCapParameters(0.7)).start(situation(epsilon=epsilon, **kwargs)).active

    assert chosen(0.05) == Placement("small", 2)
    assert chosen(0.03) in (Placement("small", 4), Placement("large", 2))  # 4 ms both
    assert chosen(0.0) == Placement("small", 4)
    assert chosen(0.05, max_bits_per_char=1.05) == Placement("large", 2)


def test_static_cap_keeps_the_bits_floor_at_the_cap_too() -> None:
    assert StaticCapPolicy(StaticCapParameters(0.7, "small")).start(situation()).active.layers == 2
    tight = situation(max_bits_per_char=1.15)
    assert StaticCapPolicy(StaticCapParameters(0.7, "small")).start(tight).active == Placement("small", 4)


def test_static_cap_says_why_nothing_qualifies() -> None:
    with pytest.raises(UserError, match=r"small is above the floor in bits per character") as caught:
        StaticCapPolicy(StaticCapParameters(0.7)).start(situation(max_bits_per_char=0.5))
    assert "large" in str(caught.value)
    with pytest.raises(UserError, match=r"small leaves no room for one request"):
        StaticCapPolicy(StaticCapParameters(0.7)).start(situation(small(), capacity_bytes=150))


def test_static_cap_may_aim_at_the_batch() -> None:
    """1,500 bytes hold 5 requests of 31 tokens beside `large` at 2 layers, 2 beside `small` at 4."""
    deep = Candidate(small().profile, offline("small", (2, 4), (0.5, 0.0), (0.8, 1.0)))
    here = situation(deep, large(), goal=Goal.BATCH_SIZE, capacity_bytes=1500)
    deployment = StaticCapPolicy(StaticCapParameters(0.7)).start(here)
    assert deployment.active == Placement("large", 2)
    assert deployment.evidence["large"]["prediction"]["batch_capacity"] == (1500 - 68 - 2 * 40) // (31 * 2 * 4)
    assert deployment.evidence["small"]["prediction"]["batch_capacity"] == (1500 - 68 - 4 * 40) // (31 * 4 * 4)


def test_per_token_exits_without_a_kv_rule_are_no_deployment() -> None:
    """A policy from outside could ask for it: deeper tokens would then read K and V that nobody computed."""
    with pytest.raises(UserError, match="read K and V of those that left"):
        Deployment(Placement("small", 4), PerToken(0.7), kv_rule=KvRule.NONE)
