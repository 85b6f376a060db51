"""Answers that leave at a ramp while the model goes on, on real models: texts, verdicts, and what comes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.rule import Confidence, ReleaseEarly
from helios_sim.live.served import LiveModel
from helios_sim.policy.deployment import Completed, Deployment, KvRule, Placement
from helios_sim.policy.registry import make_policy
from live_rig import EXITS, LAYERS, Live, live_model, requests, serve_live
from rig import Scripted, serve, workload
from slow_exits import SlowModel
from test_live_exits import random_heads, rule_of
from test_live_policies import Overheard
from test_live_regroup import apart
from tiny_models import write_tiny

LENGTHS = [(12, 20), (40, 9), (1, 30), (30, 12), (25, 1), (33, 24)]
RAMPS = EXITS[:-1]


def releasing(rule: ReleaseEarly, **more: object) -> Deployment:
    return Deployment(Placement("tiny", LAYERS), rule, kv_rule=KvRule.NONE, **more)


def half(model: LiveModel, measure: Confidence = Confidence.MAX_PROBABILITY, tells_all: bool = False) -> ReleaseEarly:
    """Thresholds that about half of the tokens reach, the second ramp's a little higher."""
    at = rule_of(model, measure).threshold
    return ReleaseEarly(RAMPS, (at, 1.05 * at), measure, tells_all)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LiveModel:
    return live_model(write_tiny("llama", tmp_path_factory.mktemp("tiny")))


def check_released(model: LiveModel, live: Live, measure: Confidence = Confidence.MAX_PROBABILITY) -> int:
    """Every token is the slow reference's, under the thresholds in force then. Returns how many ramps delivered."""
    reference = SlowModel(live.engine.residents.running("tiny", LAYERS), model.heads, measure.value, 0.0)
    released = 0
    for record in live.records:
        passed = live.engine.answers[record.request_id].ramped
        assert len(passed) == record.output_tokens - 1  # the prompt's token passes no ramp
        thresholds = [{}, *(dict(zip(each.rule.ramps, each.rule.thresholds, strict=True)) for each in passed)]
        want, verdicts = reference.released(live.prompt(record.request_id), thresholds)
        assert live.tokens(record.request_id) == want.tokens
        assert [each.ramp or LAYERS for each in passed] == want.depths[1:]
        assert [each.verdict for each in passed] == verdicts[1:]
        assert record.agreed_tokens == sum(map(int.__eq__, want.tokens, verdicts))
        assert record.layers_run == LAYERS * record.output_tokens
        released += sum(depth < LAYERS for depth in want.depths)
    assert live.run.stats.released_tokens == released > 0
    assert 0 < live.run.stats.released_ns < live.run.stats.busy_ns * len(LENGTHS)
    assert live.server.used_blocks == 0
    return released


@pytest.mark.parametrize("family", ["opt", "gemma3"])
def test_the_text_goes_on_with_what_was_delivered(family: str, tmp_path: Path) -> None:
    model = live_model(write_tiny(family, tmp_path))
    live = serve_live(
        {"tiny": model}, releasing(half(model)), requests(LENGTHS), len(LENGTHS), slots=4, max_batch_tokens=24
    )
    check_released(model, live)


@pytest.mark.parametrize("tells_all", [False, True])
def test_a_check_on_the_hidden_state_asks_the_head_of_those_that_leave_or_of_all(
    llama: LiveModel, tells_all: bool
) -> None:
    model = replace(llama, heads=random_heads())
    rule = half(model, Confidence.CLASSIFIER, tells_all)
    live = serve_live({"tiny": model}, releasing(rule), requests(LENGTHS), len(LENGTHS), slots=4)
    check_released(model, live, Confidence.CLASSIFIER)
    words = [len(each.choices) for answer in live.engine.answers.values() for each in answer.ramped]
    assert set(words) == {2 if tells_all else 0}


def test_closed_ramps_write_what_full_depth_writes(llama: LiveModel) -> None:
    live = serve_live({"tiny": llama}, releasing(ReleaseEarly(RAMPS, (1.01, 1.01))), requests(LENGTHS), len(LENGTHS))
    assert live.run.stats.released_tokens == live.run.stats.released_ns == 0
    assert all(record.agreed_tokens == record.output_tokens for record in live.records)


def test_ramps_change_while_requests_run_and_some_are_preempted(llama: LiveModel) -> None:
    """Of tokens before a change the policy is told nothing, since they did not pass these ramps."""
    at = half(llama, tells_all=True)
    first = replace(at, ramps=RAMPS[:1], thresholds=at.thresholds[:1])
    every = {"triggers": (Completed(2),)}
    heard = Overheard(Scripted(releasing(first, **every), [releasing(at, **every)]))
    live = serve_live({"tiny": llama}, heard, requests(LENGTHS), len(LENGTHS), slots=6, kv_blocks=11, block_tokens=8)
    assert live.run.stats.preemptions > 0
    assert [len(live.tokens(r.request_id)) for r in live.records] == [answer for _, answer in LENGTHS]
    assert {seen.confidences.shape[1] for seen in heard.observations} == {1, 2}
    told = sum(len(seen.agrees) for seen in heard.observations)
    assert 0 < told < sum(answer - 1 for _, answer in LENGTHS)


LONGER = [(3 + 5 * n % 31, 14 + 7 * n % 17) for n in range(24)]


def test_the_policy_tunes_as_in_the_simulation_of_the_same_verdicts(llama: LiveModel) -> None:
    """The live run's own confidences and verdicts, replayed: the same thresholds after the same requests."""
    settings = {"model": "tiny", "review_requests": 3, "max_disagreement": 0.2}
    live = serve_live({"tiny": llama}, make_policy("release_early", settings), apart(LONGER), len(LONGER), slots=5)
    check_released(llama, live)
    rows, agrees = [], []
    for record in live.records:
        for confidences, agree in [
            ([0.0, 0.0], [True, True]),  # of the prompt's token
            *((each.confidences, each.agrees()) for each in live.engine.answers[record.request_id].ramped),
        ]:
            rows.append([*confidences, 1.0])
            agrees.append([*agree, True])
    trace = synthetic_trace("tiny", EXITS, tokens=len(rows), chars_per_token=1)
    values = {Confidence.MAX_PROBABILITY: np.array(rows, np.float32)}
    trace = replace(trace, confidences=values, agree=np.array(agrees))
    profile = llama.profile
    simulated = serve(
        workload(len(LONGER)), make_policy("release_early", settings), {"tiny": profile}, {"tiny": trace},
        blocks=apart(LONGER), max_running_requests=5, max_batch_tokens=64,
    )  # fmt: skip
    rules, wanted = (
        [decision.deployment.exit_rule for decision in server.decisions]
        for server in (live.server, simulated.run.servers[0])
    )
    assert rules == wanted
    assert len(rules) > 2
    found, want = live.run.stats, simulated.run.stats
    for name in ("released_tokens", "iterations", "decode_iterations"):
        assert getattr(found, name) == getattr(want, name), name
    assert [r.agreed_tokens for r in live.records] == [r.agreed_tokens for r in simulated.by_request()]
