"""Every policy against real models: rounds that observe, probes, caps, raises and switches, and what is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from helios_sim.errors import UserError
from helios_sim.exits.rule import Confidence, FixedCap, FullDepth, PerToken
from helios_sim.live.served import LiveModel
from helios_sim.policy.deployment import Cause, Completed, Deployment, InFlight, KvRule, Placement
from helios_sim.policy.registry import make_policy
from helios_sim.policy.telemetry import (
    ExpectedLoad,
    Goal,
    Objective,
    Observation,
    Policy,
    Situation,
    Telemetry,
)
from live_rig import LAYERS, Live, live_model, requests, serve_live
from rig import Scripted
from slow_exits import SlowModel
from test_live_tokens import generated
from tiny_models import write_tiny

LENGTHS = [(12, 20), (40, 9), (5, 30), (30, 12), (25, 14), (33, 24), (8, 16), (19, 27), (22, 11), (14, 18)] * 2
N = len(LENGTHS)
THRESHOLD = 0.15
LOAD = ExpectedLoad(prompt_chars=20.0, output_chars=18.0, closed_loop_users=3)
ROUNDS = {
    "threshold": THRESHOLD, "prompts_per_candidate": 2, "evaluated_tokens": 5, "round_requests": 5,
    "window_tokens": 12, "limit": 5,
}  # fmt: skip


@dataclass
class Overheard:
    """A policy with what it was told."""

    policy: Policy
    observations: list[Observation] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)

    def start(self, situation: Situation) -> Deployment:
        return self.policy.start(situation)

    def decide(self, cause: Cause, telemetry: Telemetry) -> Deployment | None:
        self.causes.append(cause)
        self.observations += telemetry.observations
        return self.policy.decide(cause, telemetry)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LiveModel]:
    return {
        family: live_model(write_tiny(family, tmp_path_factory.mktemp(family)), name=family)
        for family in ("llama", "qwen2")
    }


def serve(two: dict[str, LiveModel], policy: Policy, **more: Any) -> Live:
    return serve_live(two, policy, requests(LENGTHS), N, users=3, slots=4, expected=LOAD, threshold=THRESHOLD, **more)


def check_completed(live: Live) -> None:
    assert [r.status.value for r in live.records] == ["completed"] * N
    assert [r.output_tokens for r in live.records] == [answer for _, answer in LENGTHS]
    assert live.server.used_blocks == 0


def check_text(live: Live) -> None:
    """Every token is what its model, cut where that token left, chooses after the text before it."""
    for record in live.records:
        answer = live.engine.answers[record.request_id]
        if len(set(answer.depths)) == 1 and not answer.before:
            assert answer.tokens == generated(answer.model, answer.prompt, len(answer.tokens), answer.depths[0])


def check_observations(two: dict[str, LiveModel], live: Live, found: list[Observation], served: bool) -> None:
    """What a whole text pass says of the same tokens. `served`: of the answer written while observed."""
    for seen in found:
        data, answer = two[seen.model], live.engine.answers[seen.request_id]
        whole = live.engine.residents
        with whole.whole(seen.model) as model:
            slow = SlowModel(model, data.heads, "max_probability", THRESHOLD)
            if served:
                assert answer.model == seen.model
                prompt, tokens = answer.prompt, answer.tokens[: len(seen.agrees)]
            else:
                text = live.engine._as_text_of(seen.model, data, answer.request)
                prompt, tokens = text.prompt, text.tokens
            choices, sure = [], []
            for n in range(len(tokens)):
                says = [slow.says(i, state) for i, state in enumerate(slow.whole_text([*prompt, *tokens[:n]]))]
                choices.append([token for token, _ in says])
                sure.append([confidence >= THRESHOLD for _, confidence in says])
        assert np.array_equal(seen.agrees, np.array(choices) == np.array(choices)[:, -1:])
        assert np.array_equal(seen.confident, sure)
        assert seen.bits is None
        assert seen.chars == len(data.decode(list(tokens)))


@pytest.mark.parametrize("name", ["full_depth", "early_exit", "static_cap"])
def test_policies_that_decide_once(two: dict[str, LiveModel], name: str) -> None:
    settings = {
        "full_depth": {"model": "qwen2"},
        "early_exit": {"model": "llama", "threshold": THRESHOLD},
        "static_cap": {"model": "qwen2", "threshold": THRESHOLD, "cap_layers": 4},
    }
    live = serve(two, make_policy(name, settings[name]))
    check_completed(live)
    check_text(live)
    depths = {depth for r in live.records for depth in live.depths(r.request_id)}
    assert depths == {"full_depth": {6}, "early_exit": {2, 4, 6}, "static_cap": {4}}[name]


def test_helios_evaluates_caps_and_answers_breaches(two: dict[str, LiveModel]) -> None:
    policy = Overheard(make_policy("helios", ROUNDS | {"cap_layers": 2}))
    live = serve(two, policy)
    check_completed(live)
    check_text(live)
    evaluated = {o.model for o in policy.observations}
    assert evaluated == {"llama", "qwen2"}
    assert all(len(o.agrees) == 5 for o in policy.observations)
    check_observations(two, live, policy.observations, served=True)
    causes = {type(cause).__name__ for cause in policy.causes}
    assert {"Drained", "Completed", "BreachLimit"} <= causes
    assert live.run.stats.loads > 0
    assert live.run.stats.switches > 0


def test_helios_probe_scores_what_was_served(two: dict[str, LiveModel]) -> None:
    policy = Overheard(make_policy("helios_probe", ROUNDS))
    live = serve(two, policy)
    check_completed(live)
    assert {o.model for o in policy.observations} == {"llama", "qwen2"}
    check_observations(two, live, policy.observations, served=False)


def test_helios_next_hears_full_depth_of_its_own_answers(two: dict[str, LiveModel]) -> None:
    """The same code as simulated: a cap, probes of what was served, and an exit barred or not by what they say."""
    settings = {"threshold": THRESHOLD, "review_requests": 2, "probe_share": 0.9, "draft_tokens": 0}
    policy = Overheard(make_policy("helios_next", settings))
    live = serve(two, policy, objective=Objective(Goal.THROUGHPUT, 0.99))
    check_completed(live)
    check_text(live)
    assert policy.observations
    check_observations(two, live, policy.observations, served=False)
    assert {"Completed", "Probed"} <= {type(cause).__name__ for cause in policy.causes}


@pytest.mark.parametrize("in_flight", list(InFlight))
def test_after_a_switch_the_new_model_writes(two: dict[str, LiveModel], in_flight: InFlight) -> None:
    def on(model: str, **more: Any) -> Deployment:
        return Deployment(Placement(model, LAYERS), FullDepth(), kv_rule=KvRule.NONE, in_flight=in_flight, **more)

    policy = Scripted(on("llama", triggers=(Completed(4),)), [on("qwen2", triggers=(Completed(6),)), on("llama")])
    live = serve(two, policy)
    assert [r.status.value for r in live.records] == ["completed"] * N
    check_text(live)
    models = {live.engine.answers[i].model for i in range(N)}
    assert models == {"llama", "qwen2"}
    assert live.run.stats.switches == 2
    moved = [answer for answer in live.engine.answers.values() if answer.before]
    assert bool(moved) is (in_flight is InFlight.MIGRATE)
    for answer in moved:  # it goes on from its own text, in the new model's tokens
        data = two[answer.model]
        prompt = data.decode(answer.prompt)
        fits = max(1, min(len(answer.before), len(prompt) - 1, 10))  # a short prompt holds only its end
        assert prompt[-fits:] == answer.before[-fits:]
        assert answer.tokens == generated(answer.model, answer.prompt, len(answer.tokens))


def test_a_raise_computes_texts_in_flight_again(two: dict[str, LiveModel]) -> None:
    """From then on every token is full depth's for its text, though a part of that was written at the cap."""
    capped = Deployment(Placement("llama", 2), FixedCap(THRESHOLD), kv_rule=KvRule.NONE, triggers=(Completed(3),))
    raised = Deployment(Placement("llama", LAYERS), FullDepth(), kv_rule=KvRule.NONE)
    live = serve(two, Scripted(capped, [raised]))
    check_completed(live)
    check_text(live)
    mixed = [a for a in live.engine.answers.values() if len(set(a.depths)) == 2]
    assert mixed
    for answer in mixed:
        at = answer.depths.index(LAYERS)
        assert answer.depths == [2] * at + [LAYERS] * (len(answer.depths) - at)
        assert answer.tokens[:at] == generated("llama", answer.prompt, at, 2)
        text = answer.prompt + answer.tokens[:at]
        assert answer.tokens[at:] == generated("llama", text, len(answer.tokens) - at)


def test_several_models_stay_resident(two: dict[str, LiveModel]) -> None:
    whole = Deployment(
        Placement("llama", LAYERS), FullDepth(), kv_rule=KvRule.NONE, standby=(Placement("qwen2", 4),),
        triggers=(Completed(3),),
    )  # fmt: skip
    back = Deployment(
        Placement("qwen2", 4), FixedCap(THRESHOLD), kv_rule=KvRule.NONE, standby=(Placement("llama", LAYERS),)
    )
    live = serve(two, Scripted(whole, [back]))
    check_completed(live)
    check_text(live)
    assert live.run.stats.loads == 0
    assert live.engine.residents.layers == {"llama": LAYERS, "qwen2": 4}


def test_debts_are_paid_when_the_rule_changes(two: dict[str, LiveModel]) -> None:
    """Tokens that left early under recompute are computed before full depth reads them."""
    early = Deployment(
        Placement("llama", LAYERS), PerToken(THRESHOLD, Confidence.MAX_PROBABILITY), kv_rule=KvRule.RECOMPUTE,
        triggers=(Completed(3),),
    )  # fmt: skip
    deep = Deployment(Placement("llama", LAYERS), FullDepth(), kv_rule=KvRule.NONE)
    live = serve(two, Scripted(early, [deep]))
    check_completed(live)
    mixed = [a for a in live.engine.answers.values() if set(a.depths[1:-4]) > {LAYERS} and a.depths[-1] == LAYERS]
    assert mixed
    for answer in mixed:  # whatever was written before, the last token is full depth's of the text
        assert answer.tokens[-1] == generated("llama", answer.prompt + answer.tokens[:-1], 1)[0]


def test_nobody_but_a_simulation_knows_what_the_oracle_knows(two: dict[str, LiveModel]) -> None:
    from helios_sim.exits.rule import Clairvoyant

    with pytest.raises(UserError, match="oracle"):
        serve(two, Scripted(Deployment(Placement("llama", LAYERS), Clairvoyant())))
