"""`helios_next` step by step with scripted telemetry, and served where exits are not what was recorded of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from helios_sim.errors import UserError
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.rule import FixedCap, SelfSpeculation
from helios_sim.policy.deployment import Completed, Deployment, KvRule, LoadFailed, Placement, Probe, Probed
from helios_sim.policy.helios_next import HeliosNextParameters, HeliosNextPolicy
from helios_sim.policy.telemetry import ExpectedLoad, Goal, Objective, Situation
from helios_sim.report.metrics import compute_metrics
from helios_sim.report.records import Records
from helios_sim.workload import Poisson
from policy_example import large, layered_profile, observed, offline, seen, situation, small
from rig import EXITS, Served, serve, workload

REVIEW = Completed(50)


def next_policy(**settings: Any) -> HeliosNextPolicy:
    return HeliosNextPolicy(HeliosNextParameters(**{"threshold": 0.7, **settings}))


def started(here: Situation | None = None, **settings: Any) -> tuple[HeliosNextPolicy, Deployment]:
    policy = next_policy(**settings)
    return policy, policy.start(here or situation())


def probes(policy: HeliosNextPolicy, share: float, model: str = "small", now_s: float = 0.0) -> Iterator[Deployment]:
    """What it decides after each probe of five texts of which these shares change."""
    for completed in range(50, 5000, 50):
        found = policy.decide(Probed(), seen(completed, [observed(model, {2: share, 4: 0.0})] * 5, now_s=now_s))
        if found is not None:
            yield found


def test_it_starts_where_the_predicted_cost_is_least_and_is_asked_at_reviews() -> None:
    _, first = started(batch_limit=3)
    assert first.active == Placement("small", 2)
    assert first.exit_rule == FixedCap(0.7)
    assert (first.triggers, first.kv_rule, first.batch_limit) == ((REVIEW,), KvRule.NONE, 3)
    assert "least predicted cost" in first.reason
    assert set(first.evidence["options"]) >= {"small@2", "small@4", "large@2", "large@8"}
    assert first.evidence["allowed"]["small"] == [True, True]
    json.dumps(first.evidence, allow_nan=False)


@pytest.mark.parametrize("goal", list(Goal))
def test_every_goal_has_a_first_choice(goal: Goal) -> None:
    _, first = started(situation(goal=goal))
    assert first.active == (Placement("large", 8) if goal is Goal.QUALITY else Placement("small", 2))


def test_a_probe_waits_until_its_share_of_the_time_pays_for_it() -> None:
    """A text takes 4 ms on the whole of `small`, and streaming its other layers next to nothing: 0.5 % of 10 s pay for
    12 texts. `large` cannot be faster, so it is not asked."""
    policy, _ = started()
    assert policy.decide(REVIEW, seen(50, now_s=0.5)) is None
    probe = policy.decide(REVIEW, seen(100, now_s=10.0))
    assert probe is not None
    assert probe.probe == Probe(("small",), 12)
    assert (probe.active, probe.triggers) == (Placement("small", 2), (Probed(),))
    goes_on = policy.decide(Probed(), seen(110, [observed("small", {2: 0.04, 4: 0.0})] * 12, now_s=10.1))
    assert goes_on is not None
    assert (goes_on.active, goes_on.probe, goes_on.triggers) == (Placement("small", 2), None, (REVIEW,))
    assert policy.decide(REVIEW, seen(120, now_s=10.5)) is None
    again = policy.decide(REVIEW, seen(123, now_s=40.0))
    assert again is not None
    assert again.probe == Probe(("small",), 13)  # no text is scored twice


def test_without_a_share_there_are_no_probes() -> None:
    policy, _ = started(probe_share=0.0)
    assert policy.decide(REVIEW, seen(100, now_s=1e6)) is None


def test_a_cap_that_changes_too_much_is_left_for_drafts_at_its_exit() -> None:
    policy, _ = started(situation(small()))
    decided = next(probes(policy, 0.2))
    assert decided.active == Placement("small", 4)
    assert "changes more than 0.05 at layer 2" in decided.reason
    assert decided.evidence["allowed"]["small"] == [False, True]
    assert isinstance(decided.exit_rule, SelfSpeculation)
    assert decided.exit_rule.exit_layers == 2
    assert decided.next_best is not None


def test_without_drafts_it_is_left_for_full_depth_and_comes_back() -> None:
    policy, _ = started(situation(small()), draft_tokens=0)
    decided = next(probes(policy, 0.2))
    assert (decided.active, decided.exit_rule) == (Placement("small", 4), FixedCap(0.7))
    back = next(probes(policy, 0.0))
    assert back.active == Placement("small", 2)
    assert "saves" in back.reason


def test_a_cap_at_its_limit_stays() -> None:
    policy, _ = started()
    assert [d.active for d in probes(policy, 0.05) if d.active != Placement("small", 2)] == []


def test_a_change_has_to_pay_for_the_way_there() -> None:
    """Once `small` may not be cut, `large` at two layers is as fast as the whole of `small` is, and no faster."""
    policy, _ = started(draft_tokens=0)
    assert next(probes(policy, 0.3)).active == Placement("small", 4)
    quick = replace(large(), profile=layered_profile("large", 0.0015, 8))  # 3 ms in place of 4
    for load_s, expected in ((5.0, "large"), (7.0, "small")):  # 21 ms a request, 300 times: 6.3 s
        slow = replace(quick, profile=replace(quick.profile, load_bytes_per_s=148 / load_s))
        policy, _ = started(situation(small(), slow), draft_tokens=0)
        assert next(probes(policy, 0.3)).active.model == expected


def test_drafts_that_are_refused_are_given_up() -> None:
    policy, first = started(situation(large(), epsilon=0.01))
    assert first.exit_rule == SelfSpeculation(2, 4, 8)
    refused = replace(seen(50, running=1), tested_drafts=5000, accepted_drafts=500)
    decided = policy.decide(REVIEW, refused)
    assert decided is not None
    assert (decided.active, decided.exit_rule) == (Placement("large", 8), FixedCap(0.7))
    assert policy.decide(REVIEW, replace(refused, completed_requests=100)) is None
    later = policy.decide(REVIEW, replace(refused, completed_requests=5000))  # what was heard is long ago
    assert later is not None
    assert later.exit_rule == SelfSpeculation(2, 4, 8)


def test_shared_blocks_are_not_lent_to_drafts() -> None:
    _, first = started(replace(situation(large(), epsilon=0.01), shares=True))
    assert first.exit_rule == FixedCap(0.7)


def test_a_failed_load_leaves_what_was_there() -> None:
    policy, _ = started(draft_tokens=0)
    next(probes(policy, 0.3))
    stays = policy.decide(LoadFailed("small", "no"), seen(5000))
    assert stays is not None
    assert (stays.active, stays.triggers, stays.probe) == (Placement("small", 2), (REVIEW,), None)
    assert "small could not be loaded" in stays.reason


def test_the_floor_in_bits_comes_before_speed() -> None:
    _, first = started(situation(max_bits_per_char=1.05))
    assert first.active == Placement("large", 2)
    with pytest.raises(UserError, match="quality floor"):
        started(situation(max_bits_per_char=0.1))


def test_what_is_promised_bars_other_caps() -> None:
    promised = replace(small(), offline=replace(small().offline, certified_caps=(False, True)))
    _, first = started(situation(promised), draft_tokens=0)
    assert first.active == Placement("small", 4)


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"failure": 0.0}, "failure"), ({"failure": 1.0}, "failure"), ({"probe_share": 1.0}, "probe_share"),
     ({"probe_share": -0.1}, "probe_share"), ({"draft_tokens": 65}, "draft_tokens"),
     ({"least_gain": -1.0}, "least_gain"), ({"review_requests": 0}, "review_requests"),
     ({"threshold": 3.0}, "threshold")],
)  # fmt: skip
def test_wrong_settings_are_told(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as caught:
        next_policy(**settings)
    assert caught.value.key == f"policy.{key}"


# --- served


class Misinformed(HeliosNextPolicy):
    """Told beforehand that the exit changes 3 % of the tokens."""

    def start(self, situation: Situation) -> Deployment:
        (model,) = situation.candidates.values()
        told = replace(model, offline=offline("flat", EXITS, (0.03, 0.0), (0.8, 1.0)))
        return super().start(replace(situation, candidates={"flat": told}))


def served(share: float) -> Served:
    """One model of which the exit changes this share of the tokens."""
    trace = synthetic_trace("flat", EXITS, tokens=20_000, chars_per_token=1)
    agree = np.ones((20_000, 2), np.bool_)
    agree[:, 0] = np.random.default_rng(1).uniform(size=20_000) >= share
    return serve(
        workload(600, 20, 40, Poisson(4.0)), Misinformed(HeliosNextParameters(0.7, probe_share=0.02)),
        {"flat": layered_profile("flat", 0.001, 4)}, {"flat": replace(trace, agree=agree)},
        expected=ExpectedLoad(20.0, 40.0, arrival_rate_per_s=4.0), objective=Objective(Goal.THROUGHPUT, 0.05),
    )  # fmt: skip


def agreement(run: Served) -> float:
    found = compute_metrics(Records.of(run.records), run.run.stats)["agreement"]
    assert isinstance(found, float)
    return found


def test_served_where_exits_are_worse_than_recorded_it_goes_to_drafts() -> None:
    good, bad = served(0.03), served(0.25)
    assert {d.deployment.active.layers for d in good.run.servers[0].decisions} == {2}
    assert agreement(good) == pytest.approx(0.97, abs=0.01)
    turned = [d for d in bad.run.servers[0].decisions if "changes more than" in d.deployment.reason]
    assert len(turned) == 1
    assert bad.run.stats.tested_drafts > 0
    assert agreement(bad) > 0.93
