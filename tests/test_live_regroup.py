"""Batches that are split at exits, on real models: texts are those of requests alone, and the loop's rules decide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.rule import Confidence, FullDepth, PerToken
from helios_sim.live.engine import LiveEngine
from helios_sim.live.served import LiveModel
from helios_sim.policy.deployment import BatchingRule, Completed, Deployment, KvRule, Placement, Regrouping
from helios_sim.request import RequestBlock
from live_rig import EXITS, LAYERS, Live, live_model, serve_live
from rig import Scripted, Served, serve, workload
from test_live_exits import check_spread, random_heads, rule_of, slow
from tiny_models import write_tiny

LENGTHS = [(12, 20), (40, 9), (1, 30), (30, 12), (25, 1), (33, 24), (17, 18)]
SLOTS, BUDGET, BLOCKS = 5, 64, 64
WAYS = [
    Regrouping(0.0, 2), Regrouping((0.25, 0.5)), Regrouping(0.3, 3),
]  # fmt: skip


def apart(lengths: list[tuple[int, int]] = LENGTHS) -> Iterator[RequestBlock]:
    """All at once, each with a part of the trace of its own."""
    prompt, answer = np.array(lengths, np.int64).T
    n = len(lengths)
    yield RequestBlock(
        request_id=np.arange(n), arrival_ns=np.zeros(n, np.int64), prompt_chars=prompt, output_chars=answer,
        task=np.zeros(n, np.int64), text_start=np.cumsum(answer) - answer,
    )  # fmt: skip


def split(
    rule: PerToken, how: Regrouping, kv_rule: KvRule = KvRule.COPY, batching: BatchingRule = BatchingRule.REBATCH,
    **more: object,
) -> Deployment:  # fmt: skip
    return Deployment(Placement("tiny", LAYERS), rule, kv_rule=kv_rule, batching=batching, regrouping=how, **more)


def served(model: LiveModel, deployment: Deployment | Scripted, **how: object) -> Live:
    how = {"slots": SLOTS, "max_batch_tokens": BUDGET, "kv_blocks": BLOCKS, **how}
    return serve_live({"tiny": model}, deployment, apart(), len(LENGTHS), **how)


def nothing_waits(live: Live) -> None:
    assert all(answer.waits is None for answer in live.engine.answers.values())
    assert live.server.used_blocks == 0


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LiveModel:
    return live_model(write_tiny("llama", tmp_path_factory.mktemp("tiny")))


def check_alone(model: LiveModel, live: Live, rule: PerToken, kv_rule: KvRule) -> list[list[list[float]]]:
    """Texts are those of the slow reference, one by one, with the same exits; no token left before it was sure.

    Returns the confidences of each request's tokens at every exit, where K and V are those that it read.
    """
    reference, found = slow(model, live, rule), []
    for record in live.records:
        prompt, depths = live.prompt(record.request_id), live.depths(record.request_id)
        tokens, sure = reference.forced(prompt, depths, kv_rule is KvRule.COPY)
        assert live.tokens(record.request_id) == tokens
        for depth, values in zip(depths[1:], sure[1:], strict=True):
            before = [value for value, at in zip(values, EXITS, strict=True) if at <= depth and rule.checks_at(at)]
            assert depth == LAYERS or max(before) >= rule.threshold
        found.append(sure)
    return found


@pytest.mark.parametrize("family", ["opt", "qwen2"])  # positions that are learned, and turned
@pytest.mark.parametrize("kv_rule", [KvRule.COPY, KvRule.PROPAGATE])
def test_in_any_grouping_a_text_is_that_of_its_request_alone(family: str, kv_rule: KvRule, tmp_path: Path) -> None:
    tiny = live_model(write_tiny(family, tmp_path))
    rule = rule_of(tiny, Confidence.MAX_PROBABILITY, share=0.4)
    live = served(tiny, split(rule, WAYS[0], kv_rule))
    check_spread(live)
    check_alone(tiny, live, rule, kv_rule)
    assert live.run.stats.splits > 5
    assert live.run.stats.held_token_ns > 0
    nothing_waits(live)


@pytest.mark.parametrize("measure", [Confidence.MARGIN, Confidence.CLASSIFIER])
def test_heads_and_checkpoints_decide_as_in_the_slow_reference(llama: LiveModel, measure: Confidence) -> None:
    model = replace(llama, heads=random_heads())
    rule = rule_of(model, measure)
    check_alone(model, served(model, split(rule, WAYS[1])), rule, KvRule.COPY)
    rule = replace(rule, checkpoints=EXITS[:1])
    live = served(model, split(rule, Regrouping((0.6, 0.1), 2)))  # sure at the first exit, some leave at the second
    check_alone(model, live, rule, KvRule.COPY)
    assert {depth for r in live.records for depth in live.depths(r.request_id)[1:]} == set(EXITS)


def test_recomputed_layers_give_what_full_depth_gives(llama: LiveModel) -> None:
    rule = rule_of(llama, Confidence.MAX_PROBABILITY)
    live = served(llama, split(rule, WAYS[0], KvRule.RECOMPUTE))
    check_spread(live)
    for record in live.records:
        tokens, depths = live.tokens(record.request_id), live.depths(record.request_id)
        given = slow(llama, live, rule).given(live.prompt(record.request_id), tokens)
        for token, depth, (least, choices) in zip(tokens, depths, given, strict=True):
            assert token == choices[depth]
            assert depth >= least
    assert live.run.stats.splits > 5


def test_tokens_that_leave_alone_copy_too(llama: LiveModel) -> None:
    rule = rule_of(llama, Confidence.MAX_PROBABILITY)
    live = served(llama, split(rule, Regrouping(), batching=BatchingRule.EACH_TOKEN))
    sure = check_alone(llama, live, rule, KvRule.COPY)
    for record, values in zip(live.records, sure, strict=True):
        first = np.argmax(np.array(values)[1:, :-1] >= rule.threshold, axis=1)  # 0 where none is sure, too
        deep = np.max(np.array(values)[1:, :-1], axis=1) < rule.threshold
        assert live.depths(record.request_id)[1:] == np.where(deep, LAYERS, np.array(EXITS)[first]).tolist()


def replayed(model: LiveModel, live: Live, sure: list[list[list[float]]], deployment: Deployment) -> Served:
    """The simulation of the same requests, from the confidences of the live run."""
    values = np.array([row for each in sure for row in each], np.float32)
    trace = synthetic_trace("tiny", EXITS, tokens=len(values), chars_per_token=1)
    trace = replace(trace, confidences={Confidence.MAX_PROBABILITY: values})
    profile = model.profile
    kv = profile.kv_bytes_per_token(LAYERS) * 16 * BLOCKS
    return serve(
        workload(len(LENGTHS)), deployment, {"tiny": profile}, {"tiny": trace}, blocks=apart(),
        hbm_bytes=profile.weight_bytes(LAYERS) + kv, utilisation=1.0, max_running_requests=SLOTS,
        max_batch_tokens=BUDGET,
    )  # fmt: skip


@pytest.mark.parametrize("how", WAYS)
def test_who_leaves_and_who_waits_is_what_the_simulation_says(llama: LiveModel, how: Regrouping) -> None:
    """From the live run's own confidences: layers of each request, iterations, batches, splits and waits."""
    rule = rule_of(llama, Confidence.MAX_PROBABILITY)
    live = served(llama, split(rule, how))
    simulated = replayed(llama, live, check_alone(llama, live, rule, KvRule.COPY), split(rule, how))
    found, want = live.run.stats, simulated.run.stats
    assert found.tokens_by_depth == want.tokens_by_depth
    assert [r.layers_run for r in live.records] == [r.layers_run for r in simulated.by_request()]
    for name in ("splits", "held_tokens", "iterations", "decode_iterations"):
        assert getattr(found, name) == getattr(want, name), name
    assert found.splits > 5


def test_preempted_requests_end_too_and_nothing_is_left(llama: LiveModel) -> None:
    rule = rule_of(llama, Confidence.MAX_PROBABILITY)
    live = served(llama, split(rule, Regrouping(0.0, 3)), slots=6, kv_blocks=11, block_tokens=8)
    assert live.run.stats.preemptions > 0
    assert live.run.stats.splits > 5
    assert [len(live.tokens(r.request_id)) for r in live.records] == [answer for _, answer in LENGTHS]
    nothing_waits(live)


def test_a_change_of_the_rule_takes_nothing_away(llama: LiveModel) -> None:
    """What waits begins anew where batches are no longer split: tokens are those of the depth that they ran."""
    rule, every = rule_of(llama, Confidence.MAX_PROBABILITY), {"triggers": (Completed(1),)}
    whole = Deployment(Placement("tiny", LAYERS), FullDepth(), kv_rule=KvRule.NONE, **every)
    waiting = split(rule, Regrouping(0.0, 9), **every)
    alone = split(rule, Regrouping(), batching=BatchingRule.EACH_TOKEN)
    script = Scripted(waiting, [whole, waiting, alone])
    live = served(llama, script)
    check_alone(llama, live, rule, KvRule.COPY)
    assert len(live.server.decisions) >= 3
    nothing_waits(live)


def test_who_is_cancelled_while_it_waits_leaves_nothing(llama: LiveModel) -> None:
    rule, gone = rule_of(llama, Confidence.MAX_PROBABILITY), []

    def act(env, engine: LiveEngine, server) -> None:
        execute = engine.execute

        def cancelling(plan, now_ns):
            outcome = execute(plan, now_ns)
            waiting = [number for number, answer in engine.answers.items() if answer.waits is not None]
            if waiting and not gone:
                gone.append(waiting[0])
                server.cancel(waiting[0])
            return outcome

        engine.execute = cancelling

    live = served(llama, split(rule, Regrouping(0.0, 9)), act=act, close=True)
    assert [r.request_id for r in live.records if r.drop_reason == "cancelled"] == gone
    assert len(gone) == 1
    assert sum(r.output_tokens for r in live.records if r.drop_reason is None) > 50
    nothing_waits(live)
