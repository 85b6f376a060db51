"""HELIOS step by step with scripted telemetry: every branch of its rounds, and that nothing depends on chance."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from helios_sim.errors import UserError
from helios_sim.exits.rule import FixedCap
from helios_sim.policy.deployment import (
    AtTime,
    BreachLimit,
    Completed,
    Deployment,
    Drained,
    KvRule,
    Placement,
    Probe,
    Probed,
)
from helios_sim.policy.full_depth import FullDepthParameters, FullDepthPolicy
from helios_sim.policy.helios import HeliosPolicy
from helios_sim.policy.helios_parameters import BreachAction, Evaluation, Standby
from helios_sim.policy.telemetry import Candidate, Goal
from policy_example import helios, large, layered_profile, observed, offline, seen, situation, small

PUBLISHED = (BreachLimit(100, 50), Completed(150))


def serving(policy: HeliosPolicy, here=None) -> Deployment:
    """Through the first round by serving, with nothing new to learn."""
    policy.start(here or situation())
    policy.decide(Drained(), seen(5))
    deployment = policy.decide(Drained(), seen(10))
    assert deployment is not None
    return deployment


def test_the_run_starts_with_a_round_the_best_predicted_last() -> None:
    first = helios().start(situation())
    assert first.active == Placement("large", 8)
    assert first.exit_rule == FixedCap(0.7)
    assert (first.admit_limit, first.observe_tokens, first.run_layers) == (5, 20, 2)
    assert first.triggers == (Drained(),)
    assert first.kv_rule is KvRule.NONE
    assert first.evidence["left_to_evaluate"] == ["small"]


def test_the_round_goes_through_the_shortlist_and_ends_in_a_choice() -> None:
    policy = helios(batch_limit=1)
    policy.start(situation())
    second = policy.decide(Drained(), seen(5))
    assert second is not None
    assert second.active == Placement("small", 4)
    assert (second.admit_limit, second.run_layers, second.batch_limit) == (5, 2, 1)
    chosen = policy.decide(Drained(), seen(10))
    assert chosen is not None
    assert chosen.active == Placement("small", 2)
    assert chosen.triggers == PUBLISHED
    assert (chosen.admit_limit, chosen.observe_tokens, chosen.run_layers, chosen.probe) == (None, None, None, None)
    assert chosen.batch_limit == 1
    assert chosen.standby == ()


def test_only_the_shortlist_is_evaluated() -> None:
    policy = helios(shortlist=1)
    assert policy.start(situation()).active == Placement("small", 4)
    chosen = policy.decide(Drained(), seen(5))
    assert chosen is not None
    assert chosen.active == Placement("small", 2)


def test_evaluation_to_completion_observes_all_that_a_context_can_hold() -> None:
    first = helios(evaluated_tokens=None).start(situation())
    assert first.observe_tokens == large().profile.model.max_context_tokens
    assert first.run_layers is None


def test_what_is_observed_moves_the_cap_and_the_choice() -> None:
    """Fresh evidence that `small` changes 30 % of its tokens at layer 2 makes `large` at 2 layers the faster one."""
    policy = helios(half_life_requests=1.0)
    policy.start(situation())
    policy.decide(Drained(), seen(100))
    bad = [observed("small", {2: 0.3, 4: 0.0}) for _ in range(5)]
    chosen = policy.decide(Drained(), seen(200, bad))
    assert chosen is not None
    assert chosen.evidence["options"]["small@4"]["prediction"]["decode_iteration_s"] == pytest.approx(0.004)
    assert chosen.evidence["history"]["small"]["observed_prompts"] == 5
    # Both take 4 ms a token now; `small` is there already and `large` would have to be loaded.
    assert chosen.active == Placement("small", 4)
    assert chosen.triggers == (Completed(150),)  # at full depth nothing is a breach


def test_a_round_drains_first_then_the_incumbent_then_the_best_last() -> None:
    policy = helios()
    incumbent = serving(policy)
    drain = policy.decide(Completed(150), seen(160, running=3))
    assert drain is not None
    assert drain.active == incumbent.active
    assert drain.admit_limit == 0
    assert drain.triggers == (Drained(),)
    order = [policy.decide(Drained(), seen(160 + 5 * i)) for i in range(3)]
    assert [d.active for d in order if d] == [Placement("small", 4), Placement("large", 8), Placement("small", 2)]


def test_switching_needs_a_gain_above_the_cost_of_the_transition() -> None:
    """After the round `large` is loaded whole. Going back to `small` saves 42 ms a request, 150 times: 6.3 s. Its
    148 bytes take 6 s at one rate, 7 s at another."""
    for seconds, expected in ((6.0, Placement("small", 2)), (7.0, Placement("large", 2))):
        quick = replace(small().profile, load_bytes_per_s=148 / seconds)
        policy = helios()
        serving(policy, situation(Candidate(quick, small().offline), large()))
        policy.decide(Completed(150), seen(160))
        policy.decide(Drained(), seen(160))
        policy.decide(Drained(), seen(165))
        chosen = policy.decide(Drained(), seen(170))
        assert chosen is not None
        assert chosen.active == expected
        assert chosen.evidence["options"]["small@2"]["transition"]["load_s"] == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("goal", "chosen"),
    [(Goal.THROUGHPUT, "small"), (Goal.RESPONSE_TIME, "small"), (Goal.ENERGY, "frugal"), (Goal.BATCH_SIZE, "small")],
)
def test_the_objective_decides(goal: Goal, chosen: str) -> None:
    """`frugal` takes 1.5 times as long at a tenth of the power."""
    frugal = layered_profile("frugal", 0.0015, 6)
    frugal = replace(frugal, hardware=replace(frugal.hardware, tdp_w=10.0))
    other = Candidate(frugal, offline("frugal", (3, 6), (0.01, 0.0), (0.9, 1.0)))
    policy = helios(evaluation=Evaluation.OFF)
    deployment = policy.start(situation(small(), other, goal=goal, capacity_bytes=2000, max_running_requests=99))
    assert deployment.active.model == chosen
    assert deployment.evidence["goal"] == goal.value


def test_without_evaluation_the_first_deployment_is_the_choice_and_rounds_only_look_again() -> None:
    policy = helios(evaluation=Evaluation.OFF, on_breach=BreachAction.LOAD_ONLY)
    first = policy.start(situation())
    assert first.active == Placement("small", 2)
    assert first.triggers == PUBLISHED
    assert policy.decide(Completed(150), seen(150)) is None
    raised = policy.decide(BreachLimit(100, 50), seen(200, running=1))
    assert raised is not None
    assert raised.active == Placement("small", 4)
    back = policy.decide(Completed(100), seen(300))
    assert back is not None
    assert back.active == Placement("small", 2)


def test_one_candidate_without_evaluation_at_all_layers_is_full_depth() -> None:
    here = situation(small())
    ours = helios(evaluation=Evaluation.OFF, cap_layers=4, batch_limit=1)
    baseline = FullDepthPolicy(FullDepthParameters(batch_limit=1)).start(here)
    deployment = ours.start(here)
    plain = replace(deployment, exit_rule=baseline.exit_rule, triggers=(), reason=baseline.reason, evidence={})
    assert plain == baseline
    assert deployment.triggers == (Completed(150),)
    assert ours.decide(Completed(150), seen(150)) is None


def test_probing_scores_served_text_while_serving_goes_on() -> None:
    policy = helios(evaluation=Evaluation.PROBE, prompts_per_candidate=7)
    first = policy.start(situation())
    assert first.active == Placement("small", 2)  # nothing was served yet: offline exits decide
    assert first.triggers == PUBLISHED
    probing = policy.decide(Completed(150), seen(150, running=2))
    assert probing is not None
    assert (probing.active, probing.admit_limit) == (first.active, None)
    assert probing.probe == Probe(("small", "large"), 7)
    assert probing.triggers == (Probed(),)
    news = [observed("large", {2: 0.01, 8: 0.0}) for _ in range(7)]
    chosen = policy.decide(Probed(), seen(151, news, running=2))
    assert chosen is not None
    assert (chosen.active, chosen.probe, chosen.triggers) == (first.active, None, PUBLISHED)
    assert chosen.evidence["history"]["large"]["observed_prompts"] == 7


@pytest.mark.parametrize(
    ("standby", "kept"),
    [(Standby.NONE, ()), (Standby.CAPS, (Placement("large", 2),)), (Standby.WHOLE, (Placement("large", 8),))],
)
def test_standby_keeps_the_other_candidates_weights(standby: Standby, kept: tuple) -> None:
    deployment = helios(evaluation=Evaluation.OFF, standby=standby).start(situation())
    assert deployment.standby == kept


def test_standby_gives_way_where_nothing_else_would_fit() -> None:
    """600 bytes hold a request (248) beside both at 2 layers (148 each), not beside `large` whole (388)."""
    here = situation(capacity_bytes=600)
    assert helios(evaluation=Evaluation.OFF, standby=Standby.WHOLE).start(here).standby == ()
    assert helios(evaluation=Evaluation.OFF, standby=Standby.CAPS).start(here).standby == (Placement("large", 2),)


def test_standby_costs_batch_in_the_prediction() -> None:
    def capacity(standby: Standby) -> int:
        here = situation(small(), large(), capacity_bytes=3000, max_running_requests=99)
        deployment = helios(evaluation=Evaluation.OFF, standby=standby).start(here)
        return deployment.evidence["options"]["small@2"]["prediction"]["batch_capacity"]

    assert capacity(Standby.NONE) == (3000 - 148) // (31 * 8)
    assert capacity(Standby.CAPS) == (3000 - 148 - 148) // (31 * 8)


def test_serving_evaluation_leaves_out_what_does_not_fit_whole_and_probing_does_not() -> None:
    """900 bytes hold a request beside either at 2 layers; whole, `large` takes 388 and a request of 992."""
    here = situation(capacity_bytes=900)
    served = helios(evaluation=Evaluation.SERVE)
    assert served.start(here).evidence["left_to_evaluate"] == []
    probed = helios(evaluation=Evaluation.PROBE)
    assert set(probed.start(here).evidence["options"]) == {"small@2", "large@2"}


def test_a_model_found_above_the_bits_floor_is_left() -> None:
    """Offline `small` has 1.1 bits per character at full depth; new text shows it at 2."""
    policy = helios(evaluation=Evaluation.PROBE, half_life_requests=1.0)
    first = policy.start(situation(max_bits_per_char=1.3))
    assert first.active.model == "small"
    policy.decide(Completed(150), seen(150))
    worse = observed("small", {2: 0.0, 4: 0.0})
    worse = replace(worse, bits=worse.agrees.astype("float32") * 2)
    chosen = policy.decide(Probed(), seen(150, [worse]))
    assert chosen is not None
    assert chosen.active.model == "large"
    assert chosen.evidence["above_quality_floor"] == ["small"]
    policy.decide(Completed(150), seen(300))
    again = policy.decide(Probed(), seen(300))
    assert again is not None
    assert again.active.model == "large"


def test_when_every_candidate_falls_below_the_floor_the_shortlist_stays() -> None:
    policy = helios(evaluation=Evaluation.PROBE, half_life_requests=1.0)
    policy.start(situation(max_bits_per_char=1.3))
    bad = [observed("small", {2: 0.0, 4: 0.0}), observed("large", {2: 0.0, 8: 0.0})]
    bad = [replace(o, bits=o.agrees.astype("float32") * 9) for o in bad]
    policy.decide(Completed(150), seen(150))
    chosen = policy.decide(Probed(), seen(150, bad))
    assert chosen is not None
    assert chosen.evidence["above_quality_floor"] == ["small", "large"]
    assert policy.decide(Completed(150), seen(300)) is not None


def test_no_candidate_at_the_start_is_an_error() -> None:
    with pytest.raises(UserError, match="looser floor"):
        helios().start(situation(max_bits_per_char=0.1))
    with pytest.raises(UserError, match="exits at 2, 4"):
        helios(cap_layers=8).start(situation())


def test_triggers_that_it_did_not_declare_are_ignored() -> None:
    policy = helios()
    policy.start(situation())
    assert policy.decide(AtTime(0), seen(1)) is None


def test_decisions_are_the_same_for_the_same_seed_and_can_be_logged() -> None:
    def run(seed: int) -> list[Deployment | None]:
        policy = helios(half_life_requests=50.0)
        script = [
            (Drained(), seen(5, [observed("large", {2: 0.05, 8: 0.0}, tokens=20)])),
            (Drained(), seen(10, [observed("small", {2: 0.1, 4: 0.0}, tokens=20)])),
            (BreachLimit(100, 50), seen(50, running=4, now_s=9.0)),
            (Completed(110), seen(160)),
            (Drained(), seen(160)),
            (Drained(), seen(165, [observed("small", {2: 0.2, 4: 0.0}, tokens=20)])),
            (Drained(), seen(170)),
        ]
        return [policy.start(situation(seed=seed)), *(policy.decide(c, t) for c, t in script)]

    assert run(3) == run(3)
    for deployment in run(3):
        assert deployment is not None
        assert deployment.reason
        json.dumps(dict(deployment.evidence), allow_nan=False)
