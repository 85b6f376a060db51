"""Predictors and schedules of a live server: the tokens of a slow reference, and the depths of a simulated replay."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import live_rig
from calibrate.exits.traces import ExitOutputs, observe
from command_line import CommandLine
from helios_sim.errors import UserError
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.rule import WORDS, Confidence, FixedCap, Near, PerToken, ReleaseEarly
from helios_sim.exits.store import read_trace, write_trace
from helios_sim.live.answers import score
from helios_sim.live.cuda import CudaDevice
from helios_sim.live.engine import LiveEngine
from helios_sim.live.memory.kv import Packed
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.model.predictors import FILE, Predictors, drawn_predictors, features, logit
from helios_sim.live.replaying import ReplayingEngine
from helios_sim.live.served import LiveModel, _predictors
from helios_sim.policy.deployment import Deployment, KvRule, Placement
from helios_sim.profile.composition import Composition
from helios_sim.profile.synthetic import flat_profile
from helios_sim.request import RequestBlock, RequestRecord
from helios_sim.serving.iteration import Outcome
from live_rig import EXITS, LAYERS, Live, live_model, requests, serve_live
from live_study import write_live_study
from priced import line
from rig import serve, workload
from slow_exits import SlowModel, Written
from strict_cuda import StrictCuda
from test_live_exits import LENGTHS, deployed, random_heads, rule_of
from tiny_models import TEXT, write_tiny

PREDICTOR, HEAD, CLASSIFIER = Confidence.PREDICTOR, Confidence.MAX_PROBABILITY, Confidence.CLASSIFIER
SURE = 0.5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LiveModel:
    """Heads that do something, and predictors that are sure of about half of the tokens at each exit."""
    found = replace(live_model(write_tiny("llama", tmp_path_factory.mktemp("tiny"))), heads=random_heads())
    return replace(found, predictors=halving(found))


@torch.no_grad()
def halving(model: LiveModel) -> Predictors:
    """Random predictors, shifted so that each is sure of every other token of a text."""
    drawn = drawn_predictors(EXITS[:-1], "cpu", 3, width=16)
    whole, ids = SegmentedModel.load(model.checkpoint), model.encode(TEXT)[:120]
    states = at_exits(whole, ids)
    words = whole.logits(model.heads.adapt(0, states[0])).topk(WORDS).indices
    shifted = []
    for e, of in enumerate(drawn.tensors):
        seen = features(whole, model.heads, e, states[e], states[e - 1] if e else None, words)
        shifted.append({**of, "offset": -logit(of, seen).median()})
    return Predictors(drawn.exits, tuple(shifted))


def at_exits(whole: SegmentedModel, ids: list[int]) -> list[torch.Tensor]:
    """States (n, d) of a whole text at every exit."""
    step, start, found = Packed(whole.architecture, 1, len(ids)), 0, []
    hidden = whole.embed(torch.tensor(ids), step.positions)
    for depth in EXITS:
        hidden, start = whole.run(hidden, start, depth, step), depth
        found.append(hidden)
    return found


class SlowPredictors(SlowModel):
    """Predictors and schedules by the words of the rule's docstring, one token after the other."""

    def __init__(self, whole: SegmentedModel, model: LiveModel, rule: PerToken) -> None:
        super().__init__(whole, model.heads, rule.confidence.value, rule.threshold)
        self.rule, self.of = rule, model.predictors
        self.looked = self.asked = 0
        self.latest: deque[int] = deque(maxlen=rule.near.tokens if rule.near else 0)

    def logits(self, e: int, state: torch.Tensor) -> torch.Tensor:
        return self.model.logits(self.heads.adapt(e, state))[0]

    def looks(self, e: int) -> bool:
        close = self.rule.near is not None and any(
            abs(self.depths[e] - depth) <= self.rule.near.layers for depth in self.latest)  # fmt: skip
        return self.rule.checks_at(self.depths[e]) or close or (self.rule.confidence is PREDICTOR and e == 0)

    def sure(self, e: int, states: list[torch.Tensor]) -> bool:
        """Whether the token leaves at an exit that looks at it."""
        if self.rule.confidence is not PREDICTOR:
            return self.says(e, states[e])[1] >= self.threshold
        words = self.logits(0, states[0]).sort(descending=True).indices[:WORDS]
        its = self.logits(e, states[e])[words]
        share = its.softmax(0)
        change = share if e == 0 else share - self.logits(e - 1, states[e - 1])[words].softmax(0)
        of = self.of.tensors[e]
        inside = of["weight"] @ ((torch.cat((its, share, change)) - of["mean"]) / of["spread"]) + of["bias"]
        p = 1 / (1 + torch.exp(-(of["out"] @ inside.clamp(min=0) + of["offset"])))
        self.looked += 1
        if p < self.threshold:
            return False
        self.asked += e > 0
        return int(self.logits(e, states[e]).argmax()) in words.tolist()

    def leaves(self, states: list[torch.Tensor]) -> int:
        last = len(states) - 1
        found = next((e for e in range(last) if self.looks(e) and self.sure(e, states)), last)
        self.latest.append(self.depths[found])
        return found


def written(slow: SlowPredictors, live: Live, request_id: int, kv_rule: KvRule) -> Written:
    slow.latest.clear()
    prompt, n = live.prompt(request_id), len(live.tokens(request_id))
    return slow.whole_texts(prompt, n) if kv_rule is KvRule.RECOMPUTE else slow.lockstep([prompt], n)[0]


RULES = [
    PerToken(SURE, PREDICTOR), PerToken(SURE, PREDICTOR, EXITS[:1]), PerToken(SURE, PREDICTOR, None, Near(2, 2)),
    PerToken(SURE, PREDICTOR, EXITS[:1], Near(1, 0)),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kv_rule", [KvRule.PROPAGATE, KvRule.RECOMPUTE])
def test_tokens_and_depths_are_those_of_the_slow_reference(
    model: LiveModel, rule: PerToken, kv_rule: KvRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is counted is what the reference looks at and asks. Under recompute the text's own trace says it, too."""
    ran: list[Composition] = []
    outcome = LiveEngine._outcome

    def watched(engine: LiveEngine, *given: Any) -> Outcome:
        found = outcome(engine, *given)
        ran.append(found.composition)
        return found

    monkeypatch.setattr(LiveEngine, "_outcome", watched)
    live = serve_live({"tiny": model}, deployed(rule, kv_rule), requests(LENGTHS), len(LENGTHS), slots=4)
    slow = SlowPredictors(live.engine.residents.running("tiny", LAYERS), model, rule)
    depths = []
    for record in live.records:
        want = written(slow, live, record.request_id, kv_rule)
        assert live.tokens(record.request_id) == want.tokens
        assert live.depths(record.request_id) == want.depths
        depths += want.depths[1:]
    assert set(depths) == (set(EXITS) if rule.checkpoints is None else {EXITS[0], LAYERS})
    assert counted(ran, "classifier_tokens") == slow.looked
    assert counted(ran, "check_tokens") == slow.asked + len(depths)  # the first exit proposes words for every token
    assert sum(int(c.sampled_tokens.sum()) for c in ran) == len(LENGTHS) + depths.count(LAYERS)
    assert live.server.used_blocks == 0
    if kv_rule is KvRule.RECOMPUTE:
        replayed = simulated(live, model, rule)
        assert [r.layers_run for r in live.records] == [r.layers_run for r in replayed]
        assert [r.early_tokens for r in live.records] == [r.early_tokens for r in replayed]


def counted(ran: list[Composition], name: str) -> int:
    return sum(int(of.sum()) for c in ran if (of := getattr(c, name)) is not None)


def recorded(live: Live, model: LiveModel, request_id: int) -> ExitOutputs:
    """What calibration records of an answer."""
    prompt, tokens = live.prompt(request_id), live.tokens(request_id)
    whole = live.engine.residents.running("tiny", LAYERS)
    with torch.inference_mode():
        hidden = [state[-len(tokens) :] for state in at_exits(whole, [*prompt, *tokens[:-1]])]
    return observe(whole, model.heads, hidden, np.array(tokens), None, model.predictors)


def simulated(live: Live, model: LiveModel, rule: PerToken) -> list[RequestRecord]:
    """The same requests over the trace of what they wrote."""
    seen = [recorded(live, model, record.request_id) for record in live.records]
    lengths = [len(each.choice) for each in seen]
    agree = np.concatenate([each.agree for each in seen])
    trace = replace(
        synthetic_trace("tiny", EXITS, tokens=len(agree), chars_per_token=1), agree=agree, confidences={
            c: np.concatenate([each.confidences[c] for each in seen]) for c in (PREDICTOR, HEAD)
        },
    )  # fmt: skip
    n = len(lengths)
    block = RequestBlock(
        request_id=np.arange(n), arrival_ns=np.zeros(n, np.int64), prompt_chars=np.full(n, 5),
        output_chars=np.array(lengths), task=np.zeros(n, np.int64), text_start=np.cumsum([0, *lengths[:-1]]),
    )  # fmt: skip
    priced = replace(flat_profile(0.001, n_layers=LAYERS, name="tiny"), check_predictor=line(1e-4))
    deployment = deployed(rule, KvRule.RECOMPUTE)
    return serve(workload(n), deployment, {"tiny": priced}, {"tiny": trace}, blocks=iter([block])).by_request()


@pytest.mark.parametrize("measure", [HEAD, CLASSIFIER])
def test_exits_near_those_of_the_latest_tokens_check_by_other_measures(model: LiveModel, measure: Confidence) -> None:
    rule = replace(rule_of(model, measure, share=0.4), checkpoints=EXITS[:1], near=Near(2, 2))
    live = serve_live({"tiny": model}, deployed(rule, KvRule.PROPAGATE), requests(LENGTHS), len(LENGTHS), slots=4)
    slow, depths = SlowPredictors(live.engine.residents.running("tiny", LAYERS), model, rule), []
    for record in live.records:
        want = written(slow, live, record.request_id, KvRule.PROPAGATE)
        assert live.tokens(record.request_id) == want.tokens
        assert live.depths(record.request_id) == want.depths
        depths += want.depths[1:]
    assert set(depths) == set(EXITS)


@pytest.mark.parametrize("kv_rule", [KvRule.PROPAGATE, KvRule.RECOMPUTE])
def test_layers_that_are_captured_give_the_same(model: LiveModel, kv_rule: KvRule) -> None:
    """A strict card runs the layers as graphs; words, predictors and heads between them run as they come."""
    cuda, deployment = StrictCuda(), deployed(PerToken(SURE, PREDICTOR, None, Near(2, 2)), kv_rule)
    few = LENGTHS[:4]
    plain = serve_live({"tiny": model}, deployment, requests(few), len(few), slots=3)
    with cuda.watched():
        card = CudaDevice(torch.device("cpu"), cuda)
        on_card = serve_live({"tiny": model}, deployment, requests(few), len(few), slots=3, device=card)
    assert cuda.replays > 4
    for record in plain.records:
        assert on_card.tokens(record.request_id) == plain.tokens(record.request_id)
        assert on_card.depths(record.request_id) == plain.depths(record.request_id)


def test_what_is_observed_and_probed_is_what_a_trace_records(model: LiveModel) -> None:
    rule = PerToken(SURE, PREDICTOR)
    deployment = replace(deployed(rule, KvRule.RECOMPUTE), observe_tokens=5)
    live = serve_live({"tiny": model}, deployment, requests(LENGTHS[:2]), 2, slots=2)
    for record in live.records:
        answer, want = live.engine.answers[record.request_id], recorded(live, model, record.request_id)
        assert np.array_equal(answer.choices(5), want.choice[:5])
        assert np.allclose(answer.confidences(5), want.confidences[PREDICTOR][:5], atol=1e-4)
        assert answer.depths[:5] == [LAYERS] * 5
        with live.engine.residents.whole("tiny") as whole:
            seen = score(model, whole, live.engine.residents.exits("tiny"), answer, rule, 0)
        assert np.array_equal(seen.confident, want.confidences[PREDICTOR] >= SURE)


def test_preempted_requests_leave_where_they_would(model: LiveModel) -> None:
    """A text that is computed again has its next token from the last layer, as under other measures."""
    rule = PerToken(SURE, PREDICTOR)
    live = serve_live(
        {"tiny": model}, deployed(rule, KvRule.RECOMPUTE), requests(LENGTHS), len(LENGTHS), slots=6, kv_blocks=11,
        block_tokens=8,
    )  # fmt: skip
    assert live.run.stats.preemptions
    slow = SlowPredictors(live.engine.residents.running("tiny", LAYERS), model, rule)
    for record in live.records:
        want = slow.given(live.prompt(record.request_id), live.tokens(record.request_id))
        deeper = 0
        for token, depth, (leaves, choices) in zip(
            live.tokens(record.request_id), live.depths(record.request_id), want, strict=True
        ):
            assert token == choices[depth]
            assert depth in (leaves, LAYERS)
            deeper += depth != leaves
        assert deeper <= 1 + record.preemptions


def test_predictors_that_are_missing_or_of_other_exits_are_refused(model: LiveModel, tmp_path: Path) -> None:
    rule = deployed(PerToken(SURE, PREDICTOR), KvRule.PROPAGATE)
    with pytest.raises(UserError, match=r"exits.confidence='predictor'.*\+task=predictors"):
        serve_live({"tiny": replace(model, predictors=None)}, rule, requests(LENGTHS[:1]), 1)
    for other in (FixedCap(SURE, PREDICTOR), ReleaseEarly((2,), (SURE,), PREDICTOR)):
        cut = Placement("tiny", EXITS[1] if isinstance(other, FixedCap) else LAYERS)
        with pytest.raises(UserError, match=r"exits.confidence='predictor'.*one by one"):
            serve_live({"tiny": model}, Deployment(cut, other, kv_rule=KvRule.NONE), requests(LENGTHS[:1]), 1)
    with pytest.raises(UserError, match=r"exits.confidence='predictor'.*there are none"):
        _predictors(tmp_path, model.heads, EXITS, "cpu")
    drawn_predictors((2, 3), "cpu", 0, width=4).write(tmp_path)
    with pytest.raises(UserError, match=r"heads, 2, 4, and of the trace, 2, 4: .* are of 2, 3"):
        _predictors(tmp_path, model.heads, EXITS, "cpu")


def test_of_random_weights_the_trace_says_who_leaves_and_which_heads_are_asked(
    model: LiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = synthetic_trace("tiny", EXITS, chars_per_token=1)
    values = np.random.default_rng(2).uniform(-1, 1, trace.agree.shape).astype(np.float32)
    values[:, 0], values[:, -1] = abs(values[:, 0]), 1.0
    replaying = replace(model, trace=replace(trace, confidences={PREDICTOR: values, HEAD: abs(values)}).bind(("text",)))
    asked, outcome = [], LiveEngine._outcome

    def watched(engine: LiveEngine, *given: Any) -> Outcome:
        found = outcome(engine, *given)
        asked.append(counted([found.composition], "check_tokens"))
        return found

    monkeypatch.setattr(LiveEngine, "_outcome", watched)
    monkeypatch.setattr(live_rig, "LiveEngine", ReplayingEngine)
    rule, heads = PerToken(SURE, PREDICTOR), 0
    live = serve_live({"tiny": replaying}, deployed(rule, KvRule.PROPAGATE), requests(LENGTHS), len(LENGTHS), slots=4)
    for record in live.records:
        rows = replaying.trace.locate(0, 37 * record.request_id, record.output_tokens).indices()[1:]
        sure = [int(np.flatnonzero(values[row] >= SURE)[0]) for row in rows]
        assert live.depths(record.request_id) == [LAYERS, *(EXITS[e] for e in sure)]
        heads += sum(1 + int((abs(values[row, 1 : min(e, len(EXITS) - 2) + 1]) >= SURE).sum()) for row, e in zip(
            rows, sure, strict=True))  # fmt: skip
    assert sum(asked) == heads


def test_a_command_serves_live_with_both_schedules(command: CommandLine, tmp_path: Path) -> None:
    """Predictors lie beside the trace."""
    words, folder = write_live_study(tmp_path / "study", "arms: {}"), tmp_path / "study" / "traces" / "tiny"
    trace = read_trace(folder)
    write_trace(replace(trace, confidences={**trace.confidences, PREDICTOR: trace.recorded(HEAD)}), folder)
    words = (*words, "mode=live", "policy=early_exit", "policy.model=tiny", "exits.confidence=predictor")
    refused = command(*words)
    assert refused.status == 1
    assert f"{folder} ({FILE}): there are none" in refused.err
    drawn_predictors(EXITS[:-1], "cpu", 3, width=4).write(folder)
    said = command(*words, "policy.most_checks=1", "policy.near_tokens=3", "workload.n_requests=3")
    assert said.status == 0, said.err
    (arm,) = said.summary["arms"].values()
    assert arm["metrics"]["requests_completed"] == 3
