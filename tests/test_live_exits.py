"""Per-token exits of a live server are those of a slow reference, token by token, under every rule for K and V."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from helios_sim.errors import UserError
from helios_sim.exits.rule import MEASURES, Confidence, PerToken
from helios_sim.live.exits import Chunk, ExitReader, Row, Tally
from helios_sim.live.forward import Forward
from helios_sim.live.memory.kv import Packed
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.model.heads import ExitHeads
from helios_sim.live.served import LiveModel
from helios_sim.policy.deployment import BatchingRule, Deployment, KvRule, Placement
from live_rig import EXITS, LAYERS, Live, live_model, requests, serve_live
from slow_exits import SlowModel
from tiny_models import FAMILIES, TEXT, write_tiny

LENGTHS = [(12, 20), (40, 9), (1, 30), (30, 12), (25, 1), (33, 24)]
D_MODEL = 48


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LiveModel:
    return live_model(write_tiny(request.param, tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LiveModel:
    return live_model(write_tiny("llama", tmp_path_factory.mktemp("tiny")))


def random_heads(seed: int = 0) -> ExitHeads:
    """Adapters, checks and temperatures that do something."""
    made = torch.Generator().manual_seed(seed)

    def noise(*shape: int, scale: float = 0.2) -> torch.Tensor:
        return torch.randn(*shape, generator=made) * scale

    tensors = [
        {
            "scale": 1 + noise(D_MODEL), "linear": noise(D_MODEL, D_MODEL, scale=0.05), "bias": noise(D_MODEL),
            "gate": noise(8, D_MODEL), "up": noise(8, D_MODEL), "down": noise(D_MODEL, 8),
            "check_in": noise(8, D_MODEL), "check_bias": noise(8), "check_out": noise(8, scale=2.0),
            "check_offset": torch.zeros(()),
        }
        for _ in EXITS[:-1]
    ]  # fmt: skip
    return ExitHeads(EXITS[:-1], (0.8, 1.2, 0.9), tuple(tensors), (1.0, 1.5))


@torch.no_grad()
def rule_of(model: LiveModel, measure: Confidence, share: float = 0.5) -> PerToken:
    """The threshold that this share of tokens reaches at an early exit."""
    ids = model.encode(TEXT)[:90]
    whole = SegmentedModel.load(model.checkpoint)
    step, exits = Packed(whole.architecture, 1, len(ids)), ExitReader(model.heads, LAYERS)
    hidden, sure = whole.embed(torch.tensor(ids), step.positions), []
    for start, depth in pairwise((0, *EXITS[:-1])):
        hidden = whole.run(hidden, start, depth, step)
        sure += exits.read(whole, depth, hidden, measure).confidence or []
    return PerToken(sorted(sure)[int(len(sure) * (1 - share))], measure)


def deployed(rule: PerToken, kv_rule: KvRule, batching: BatchingRule = BatchingRule.EACH_TOKEN) -> Deployment:
    return Deployment(Placement("tiny", LAYERS), rule, kv_rule=kv_rule, batching=batching)


def slow(model: LiveModel, live: Live, rule: PerToken) -> SlowModel:
    whole = live.engine.residents.running("tiny", LAYERS)
    found = SlowModel(whole, model.heads, rule.confidence.value, rule.threshold)
    found.checks = tuple(depth for depth in EXITS[:-1] if rule.checks_at(depth))
    return found


def test_who_leaves_by_a_check_shares_one_reading_of_the_head(
    llama: LiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An iteration reads it once, whatever depths its tokens left at: it is larger than several layers."""
    model = replace(llama, heads=random_heads())
    rule = rule_of(model, Confidence.CLASSIFIER)
    read, iterations, depths = [0], [], []
    logits, run = SegmentedModel.logits, Forward.run

    def counted(self: SegmentedModel, hidden: torch.Tensor) -> torch.Tensor:
        read[0] += 1
        return logits(self, hidden)

    def watched(self: Forward, rows: list[Row], chunks: list[Chunk]) -> Tally:
        read[0] = 0
        tally = run(self, rows, chunks)
        iterations.append(read[0])
        depths.append({row.layers for row in rows})
        return tally

    monkeypatch.setattr(SegmentedModel, "logits", counted)
    monkeypatch.setattr(Forward, "run", watched)
    serve_live({"tiny": model}, deployed(rule, KvRule.PROPAGATE), requests(LENGTHS), len(LENGTHS))
    assert set(iterations) <= {0, 1}  # none where all there was are pieces of prompts that go on
    assert any(len(at) >= 3 for at in depths)


def check_spread(live: Live) -> None:
    """Otherwise the test would show little: tokens leave early and stay, at more than one exit."""
    depths = [depth for r in live.records for depth in live.depths(r.request_id)[1:]]
    assert sum(depths.count(depth) >= 3 for depth in EXITS) >= 2, depths


@pytest.mark.parametrize("measure", [Confidence.MAX_PROBABILITY, Confidence.MARGIN, Confidence.ENTROPY])
def test_propagated_exits_are_the_slow_ones(tiny: LiveModel, measure: Confidence) -> None:
    rule = rule_of(tiny, measure)
    live = serve_live({"tiny": tiny}, deployed(rule, KvRule.PROPAGATE), requests(LENGTHS), len(LENGTHS), slots=4)
    check_spread(live)
    reference = slow(tiny, live, rule)
    for record in live.records:
        (want,) = reference.lockstep([live.prompt(record.request_id)], record.output_tokens)
        assert live.tokens(record.request_id) == want.tokens
        assert live.depths(record.request_id) == want.depths


def test_a_measure_of_two_layers_is_refused_live(tiny: LiveModel) -> None:
    rule = PerToken(0.9, Confidence.HIDDEN_SIMILARITY)
    with pytest.raises(UserError, match=r"exits.confidence='hidden_similarity'.*max_probability.*entropy"):
        serve_live({"tiny": tiny}, deployed(rule, KvRule.PROPAGATE), requests(LENGTHS), len(LENGTHS))


def test_recomputed_exits_read_what_full_depth_gives(tiny: LiveModel) -> None:
    rule = rule_of(tiny, Confidence.MAX_PROBABILITY)
    live = serve_live({"tiny": tiny}, deployed(rule, KvRule.RECOMPUTE), requests(LENGTHS), len(LENGTHS), slots=4)
    check_spread(live)
    reference = slow(tiny, live, rule)
    for record in live.records:
        want = reference.whole_texts(live.prompt(record.request_id), record.output_tokens)
        assert live.tokens(record.request_id) == want.tokens
        assert live.depths(record.request_id) == want.depths


@pytest.mark.parametrize("kv_rule", [KvRule.PROPAGATE, KvRule.RECOMPUTE])
def test_a_lazy_batch_leaves_together(tiny: LiveModel, kv_rule: KvRule) -> None:
    """K and V are filled in the same iteration whatever the rule says: nobody is left behind."""
    rule, lengths = rule_of(tiny, Confidence.MAX_PROBABILITY, share=0.8), [(12, 25), (9, 25), (17, 25)]
    live = serve_live({"tiny": tiny}, deployed(rule, kv_rule, BatchingRule.LAZY), requests(lengths), len(lengths))
    want = slow(tiny, live, rule).lockstep([live.prompt(i) for i in range(3)], 25, lazy=True)
    for i in range(3):
        assert live.tokens(i) == want[i].tokens
        assert live.depths(i) == want[i].depths
    assert live.depths(0) == live.depths(1) == live.depths(2)
    assert len(set(live.depths(0))) > 1


@pytest.mark.parametrize("measure", [c for c in Confidence if MEASURES[c].live and not MEASURES[c].proposes])
@pytest.mark.parametrize("kv_rule", [KvRule.PROPAGATE, KvRule.RECOMPUTE])
def test_heads_decide_as_they_do_in_the_slow_reference(llama: LiveModel, measure: Confidence, kv_rule: KvRule) -> None:
    model = replace(llama, heads=random_heads())
    rule = rule_of(model, measure, share=0.1 if measure is Confidence.ENTROPY else 0.5)  # alike at one exit
    live = serve_live({"tiny": model}, deployed(rule, kv_rule), requests(LENGTHS), len(LENGTHS), slots=4)
    check_spread(live)
    reference = slow(model, live, rule)
    for record in live.records:
        prompt, n = live.prompt(record.request_id), record.output_tokens
        want = reference.whole_texts(prompt, n) if kv_rule is KvRule.RECOMPUTE else reference.lockstep([prompt], n)[0]
        assert live.tokens(record.request_id) == want.tokens
        assert live.depths(record.request_id) == want.depths


@pytest.mark.parametrize("measure", [Confidence.MAX_PROBABILITY, Confidence.CLASSIFIER])
def test_only_checkpoints_check(llama: LiveModel, measure: Confidence) -> None:
    model = replace(llama, heads=random_heads())
    rule = replace(rule_of(model, measure, share=0.3), checkpoints=EXITS[1:2])
    live = serve_live({"tiny": model}, deployed(rule, KvRule.PROPAGATE), requests(LENGTHS), len(LENGTHS), slots=4)
    reference, depths = slow(model, live, rule), set()
    for record in live.records:
        (want,) = reference.lockstep([live.prompt(record.request_id)], record.output_tokens)
        assert live.tokens(record.request_id) == want.tokens
        assert live.depths(record.request_id) == want.depths
        depths |= set(want.depths)
    assert depths == {EXITS[1], LAYERS}


def test_preempted_requests_still_recompute_to_full_depth(tiny: LiveModel) -> None:
    """A text that is computed again has K and V of all layers, and its next token comes from the last one."""
    rule = rule_of(tiny, Confidence.MAX_PROBABILITY)
    live = serve_live(
        {"tiny": tiny}, deployed(rule, KvRule.RECOMPUTE), requests(LENGTHS), len(LENGTHS), slots=6, kv_blocks=11,
        block_tokens=8,
    )  # fmt: skip
    assert live.run.stats.preemptions > 0
    reference = slow(tiny, live, rule)
    for record in live.records:
        prompt, tokens = live.prompt(record.request_id), live.tokens(record.request_id)
        want = reference.given(prompt, tokens)
        deeper = 0
        for token, depth, (exit_depth, choices) in zip(tokens, live.depths(record.request_id), want, strict=True):
            assert token == choices[depth]
            deeper += depth != exit_depth
            assert depth in (exit_depth, LAYERS)
        assert deeper <= 1 + record.preemptions
