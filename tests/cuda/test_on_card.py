"""What an iteration of decodes asks of the host on a strict card: as little as there is, whatever the exit rule."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from exact_torch import exact
from helios_sim.exits.rule import Confidence, DraftModel, FixedCap, FullDepth, ReleaseEarly, SelfSpeculation
from helios_sim.live.ahead import RunAhead
from helios_sim.live.cuda import CudaDevice
from helios_sim.live.engine import LiveEngine
from helios_sim.live.exits import ExitReader, Row, Tally
from helios_sim.live.forward import Forward
from helios_sim.live.graphs import GraphedDecodes
from helios_sim.live.kernels.interface import TORCH, Kernels
from helios_sim.live.memory.kv import KvCache
from helios_sim.live.model import heads
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.one_pass import OnePass, Rule
from helios_sim.live.served import LiveModel
from helios_sim.policy.deployment import BatchingRule, Deployment, KvRule, Placement, Regrouping
from live_rig import EXITS, LAYERS, Live, live_model, requests, serve_live
from strict_cuda import StrictCuda
from test_live_captured import Capturing
from test_live_exits import deployed, random_heads, rule_of
from tiny_models import write_tiny

LENGTHS = [(12, 12), (20, 9), (5, 14), (31, 7)]
STAGED = 1  # waits for the event after the latest numbers went to the card, which was long ago


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LiveModel:
    return live_model(write_tiny("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def checked(tiny: LiveModel) -> LiveModel:
    """With adapters, checks and temperatures that do something."""
    return replace(tiny, heads=random_heads())


@pytest.fixture(params=["torch", "exact"])
def kernels(request: pytest.FixtureRequest) -> Any:
    with exact() as found:
        yield TORCH if request.param == "torch" else found


def served(
    cuda: StrictCuda | None, model: LiveModel, deployment: Deployment, kernels: Kernels = TORCH, **more: Any
) -> Live:
    """On a card with every step captured before time starts, or on a CPU."""

    def act(env: Any, engine: LiveEngine, server: Any) -> None:
        engine.capture(server.decisions[0].deployment)

    given = {"tiny": model}, deployment, requests(LENGTHS), len(LENGTHS)
    if cuda is None:
        return serve_live(*given, slots=3, **more)
    with cuda.watched():
        return serve_live(*given, slots=3, device=CudaDevice(torch.device("cpu"), cuda, kernels), act=act, **more)


def cut(layers: int, model: LiveModel) -> Deployment:
    """Every token runs so many layers, and below the last one it is seen how sure it is."""
    rule = FixedCap(rule_of(model, Confidence.MAX_PROBABILITY).threshold, Confidence.MAX_PROBABILITY)
    return Deployment(Placement("tiny", layers), FullDepth() if layers == LAYERS else rule, kv_rule=KvRule.NONE)


def breaches(live: Live) -> list[int]:
    return [record.breach_tokens for record in live.records]


def said(live: Live) -> list[tuple[list[int], list[int]]]:
    return [(live.tokens(record.request_id), live.depths(record.request_id)) for record in live.records]


def test_ramps_and_split_batches_write_what_a_cpu_writes_where_kernels_go_by_lengths(tiny: LiveModel) -> None:
    """Rows that go on and rows that wait lie in any slots."""
    rule = rule_of(tiny, Confidence.MAX_PROBABILITY)
    split = replace(deployed(rule, KvRule.COPY, BatchingRule.REBATCH), regrouping=Regrouping(0.0, 2))
    ramps = replace(split, exit_rule=ReleaseEarly(EXITS[:-1], (rule.threshold,) * 2), kv_rule=KvRule.NONE)
    for deployment in (split, replace(ramps, batching=BatchingRule.EACH_TOKEN)):
        cuda = StrictCuda()
        with exact() as kernels:
            on_card = served(cuda, tiny, deployment, kernels)
        on_cpu = served(None, tiny, deployment)
        assert said(on_card) == said(on_cpu)
        for name in ("splits", "released_tokens", "iterations"):
            assert getattr(on_card.run.stats, name) == getattr(on_cpu.run.stats, name)
        assert on_card.run.stats.splits + on_card.run.stats.released_tokens > 3


def test_another_model_drafts_where_kernels_go_by_lengths(tiny: LiveModel) -> None:
    """Its first drafts read one token or several, beside chunks of prompts; slots lie anywhere."""
    cuda, both = StrictCuda(), {"tiny": tiny, "other": tiny}
    deployment = Deployment(
        Placement("tiny", LAYERS), DraftModel("other", 3), (Placement("other", LAYERS),), kv_rule=KvRule.NONE
    )
    with exact() as kernels, cuda.watched():
        device = CudaDevice(torch.device("cpu"), cuda, kernels)
        live = serve_live(
            both, deployment, requests(LENGTHS), len(LENGTHS), slots=3, max_batch_tokens=16, device=device, close=True
        )
    plain = served(None, tiny, cut(LAYERS, tiny))
    assert [tokens for tokens, _ in said(live)] == [tokens for tokens, _ in said(plain)]
    assert live.run.stats.accepted_drafts == live.run.stats.drafted_tokens > 0


def test_tokens_that_exited_run_their_layers_in_captured_steps(
    tiny: LiveModel, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside later tokens of their requests, and nothing is captured while time runs."""
    deployment = deployed(rule_of(tiny, Confidence.MAX_PROBABILITY), KvRule.RECOMPUTE, BatchingRule.EACH_TOKEN)
    cuda, issued, late, band, run = StrictCuda(), [], [], Forward._band, SegmentedModel.run
    within: list[bool] = []

    def watched_band(forward: Forward, number: int, start: int, end: int, now: Any, tally: Any) -> None:
        late.extend(token for row in now.rows for token in row.owed if token.depth == start)
        within.append(not now.pieces)
        band(forward, number, start, end, now, tally)
        within.pop()

    def watched_run(model: SegmentedModel, *given: Any) -> Any:
        if within and within[-1]:
            issued.append(given[1:3])
        return run(model, *given)

    monkeypatch.setattr(Forward, "_band", watched_band)
    monkeypatch.setattr(SegmentedModel, "run", watched_run)
    on_card = served(cuda, tiny, deployment, kernels)
    assert late
    assert not issued
    monkeypatch.undo()
    assert said(on_card) == said(served(None, tiny, deployment))


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Of each iteration that began beside no prompt: whether the card is at work when the server gets its tokens, and
    whether all of its requests end there."""
    found: list[tuple[bool, bool]] = []
    outcome = LiveEngine._outcome

    def watched(engine: LiveEngine, plan: Any, answers: Any, rows: Any, chunks: Any, *more: Any) -> Any:
        if not chunks:
            found.append((engine.device._cuda.busy, not any(row.more for row in rows)))  # type: ignore[attr-defined]
        return outcome(engine, plan, answers, rows, chunks, *more)

    monkeypatch.setattr(LiveEngine, "_outcome", watched)
    return found


@pytest.mark.parametrize("layers", [4, LAYERS])
def test_the_next_decodes_run_while_the_server_plans_them(
    tiny: LiveModel, layers: int, followed: list[tuple[bool, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the server gets what it would get: an iteration that was launched in vain changes nothing."""
    cuda, launched, launch = StrictCuda(), [], RunAhead._launched
    monkeypatch.setattr(RunAhead, "_launched", lambda *given: launched.append(given[3]) or launch(*given))
    deployment = cut(layers, tiny)
    with exact() as kernels:
        on_card = served(cuda, tiny, deployment, kernels, schedule_ahead=1)
    n = len(followed)
    assert n > 10
    assert all(busy is not last for busy, last in followed)
    assert len(launched) <= n + len(LENGTHS)  # nothing that was launched is thrown away
    monkeypatch.undo()
    assert said(on_card) == said(served(None, tiny, deployment))
    assert breaches(on_card) == breaches(served(None, tiny, deployment))


def test_without_being_asked_nothing_runs_ahead(tiny: LiveModel, followed: list[tuple[bool, bool]]) -> None:
    with exact() as kernels:
        served(StrictCuda(), tiny, cut(LAYERS, tiny), kernels)
    assert not any(busy for busy, _ in followed)


def test_answers_that_end_before_their_time_leave_the_others_as_they_are(
    tiny: LiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LiveEngine, "ends", lambda engine, answer: answer.tokens[-1] % 5 == 0)
    deployment = cut(LAYERS, tiny)
    with exact() as kernels:
        on_card = served(StrictCuda(), tiny, deployment, kernels, schedule_ahead=1)
    assert any(len(tokens) < wanted for (tokens, _), (_, wanted) in zip(said(on_card), LENGTHS, strict=True))
    assert said(on_card) == said(served(None, tiny, deployment))


def test_a_row_without_a_number_gives_the_next_step_no_token_beyond_the_words(tiny: LiveModel) -> None:
    """A kernel that finds no largest logit names a place that there is not."""
    with exact() as kernels:
        model = SegmentedModel.load(tiny.checkpoint, kernels=kernels)
        cache, device = KvCache(model.architecture, LAYERS, 3, 32, kernels=kernels), Capturing()
        graphs = GraphedDecodes(model, cache, device)
        looks = ExitReader(tiny.heads, LAYERS)
        at = RunAhead(graphs, device)
        nowhere = torch.tensor([[2**31 - 1.0], [float("nan")], [0.0]], dtype=torch.float64)
        graphs.launch = lambda size, end, exits, measure: graphs.said[size].copy_(nowhere)  # type: ignore[method-assign]
        found = at.run(looks, [Row(0, 3, 5, LAYERS, more=True)], LAYERS, None, go_on=True)
    assert found.finite == [False]
    assert int(graphs.numbers[1][0, 0]) == model.architecture.vocab_size - 1


@pytest.mark.parametrize("layers", [4, LAYERS])
def test_an_iteration_of_decodes_is_two_launches(
    tiny: LiveModel, kernels: Kernels, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers, and the look at the logits, below the last layer with the confidence."""
    cuda, launched, run = StrictCuda(), [], Forward.run

    def watched(forward: Forward, rows: Any, chunks: Any) -> Any:
        before = cuda.replays
        found = run(forward, rows, chunks)
        if not chunks:
            launched.append(cuda.replays - before)
        return found

    monkeypatch.setattr(Forward, "run", watched)
    served(cuda, tiny, cut(layers, tiny), kernels)
    assert set(launched) == {2}


def banded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnePass, "pays", lambda one_pass, rows: False)


@pytest.mark.parametrize("batching", [BatchingRule.EACH_TOKEN, BatchingRule.LAZY])
@pytest.mark.parametrize("confidence", [Confidence.MAX_PROBABILITY, Confidence.CLASSIFIER])
@pytest.mark.parametrize("layers", [4, LAYERS])
def test_with_exits_the_host_asks_once_an_iteration(
    checked: LiveModel, batching: BatchingRule, confidence: Confidence, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check, comparison and who stays are the card's; what comes out is what the host would have decided."""
    cuda, asked, outcomes = StrictCuda(), [], []
    rule = rule_of(checked, confidence)
    deployment = replace(deployed(rule, KvRule.PROPAGATE, batching), active=Placement("tiny", layers))
    run, outcome = Forward.run, LiveEngine._outcome

    def watched(forward: Forward, rows: Any, chunks: Any) -> Any:
        before = cuda.waits, cuda.replays
        found = run(forward, rows, chunks)
        if not chunks:
            asked.append((cuda.waits - before[0], cuda.replays - before[1]))
        return found

    def noted(engine: LiveEngine, plan: Any, answers: Any, rows: Any, chunks: Any, tally: Any, now_ns: int) -> Any:
        of = tally.composition(plan, chunks)
        outcomes.append((tuple(answer.request.request_id for answer in answers), of.bounds, *(
            None if part is None else part.tolist()
            for part in (of.decode_tokens, of.decode_kv_tokens, of.check_tokens, of.classifier_tokens,
                         of.propagated_tokens, of.sampled_tokens)
        )))  # fmt: skip
        return outcome(engine, plan, answers, rows, chunks, tally, now_ns)

    monkeypatch.setattr(heads, "FEW_ROWS", 0)  # few rows of a CPU are checked by machine code, which no graph holds
    monkeypatch.setattr(Forward, "run", watched)
    monkeypatch.setattr(LiveEngine, "_outcome", noted)
    with exact() as kernels:
        at_once = served(cuda, checked, deployment, kernels)
        counts, asks = list(outcomes), list(asked)
        outcomes.clear()
        banded(monkeypatch)
        by_band = served(cuda, checked, deployment, kernels)
    assert len(asks) > 10
    assert set(asks) == {(STAGED + 1, 1)}
    assert {depth for _, depths in said(at_once) for depth in depths} >= {2, layers}
    assert (said(at_once), breaches(at_once)) == (said(by_band), breaches(by_band))
    assert counts == outcomes


def test_exits_of_a_trace_are_the_card_s_to_follow(tiny: LiveModel) -> None:
    """Models with random weights compute their checks, and leave where the trace says."""
    with exact() as kernels:
        model = SegmentedModel.load(tiny.checkpoint, kernels=kernels)
        cache = KvCache(model.architecture, LAYERS, 4, 32, kernels=kernels)
        at = OnePass(GraphedDecodes(model, cache, Capturing()), Capturing())
        rule = Rule(EXITS, (True, True), Confidence.MAX_PROBABILITY, lazy=False, watched=False)
        rows = [
            Row(slot, 4, 9, LAYERS, asks=True, recorded=dict(zip(EXITS, sure, strict=True)))
            for slot, sure in enumerate([(True, True, True), (False, True, True), (False, False, True)])
        ]
        at.run(ExitReader(tiny.heads, LAYERS), rule, 0.5, rows, Tally(EXITS))
    assert [row.layers for row in rows] == [2, 4, LAYERS]


def test_a_large_batch_that_leaves_early_as_a_whole_is_looked_at_between_bands(tiny: LiveModel) -> None:
    """It would read the weights of all layers for nothing; few rows would not."""
    with exact() as kernels:
        model = SegmentedModel.load(tiny.checkpoint, kernels=kernels)
        cache = KvCache(model.architecture, LAYERS, 8, 32, kernels=kernels)
        at = OnePass(GraphedDecodes(model, cache, Capturing()), Capturing())
    rows = [Row(slot, 4, 9, LAYERS, layers=2) for slot in range(8)]
    assert at.pays(8)
    at.note(rows, LAYERS)
    assert not at.pays(8)
    assert at.pays(4)
    rows[3].layers = LAYERS
    at.note(rows, LAYERS)
    assert at.pays(8)


def test_what_a_final_rule_needs_is_captured_before_time_starts(tiny: LiveModel) -> None:
    cuda = StrictCuda()
    deployment = deployed(rule_of(tiny, Confidence.MAX_PROBABILITY), KvRule.PROPAGATE, BatchingRule.EACH_TOKEN)
    at_start: list[int] = []
    begun = LiveEngine.capture

    def noted(engine: LiveEngine, deployment: Deployment | None = None) -> int:
        at_start.append(begun(engine, deployment))
        return at_start[-1]

    with exact() as kernels, pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveEngine, "capture", noted)
        served(cuda, tiny, deployment, kernels)
    assert cuda.captures == at_start[0]


def test_what_was_launched_ahead_and_forgotten_is_waited_for_before_its_memory_goes() -> None:
    waited = []
    mark = SimpleNamespace(synchronize=lambda: waited.append(True))
    device = SimpleNamespace(host_empty=lambda n: torch.empty(n, dtype=torch.uint8), mark=lambda: mark)
    model = SimpleNamespace(layers=[], outer=None)
    graphs = SimpleNamespace(most_rows=1, model=model, said={1: torch.zeros(3, 1)}, launch=lambda *given: None)
    ahead = RunAhead(graphs, device)  # type: ignore[arg-type]
    ahead._launched(1, [(0, 0)], 0, None, None)  # type: ignore[arg-type]
    ahead.forget()
    assert not waited  # what runs next is ordered after it
    ahead.close()
    assert waited


@pytest.mark.parametrize("kind", ["one pass", "split", "ramps", "drafts"])
def test_after_a_run_with_exits_its_memory_is_free(kernels: Kernels, tiny: LiveModel, kind: str) -> None:
    """At once, passes through all exits included: nothing waits for the cyclic collector."""
    memory: list[StorageWeakRef] = []
    cuda = StrictCuda()
    rule, whole = rule_of(tiny, Confidence.MAX_PROBABILITY), Placement("tiny", LAYERS)
    deployments = {
        "one pass": deployed(rule, KvRule.PROPAGATE, BatchingRule.EACH_TOKEN),
        "split": replace(deployed(rule, KvRule.COPY, BatchingRule.REBATCH), regrouping=Regrouping(0.0, 2)),
        "ramps": Deployment(whole, ReleaseEarly(EXITS[:-1], (rule.threshold,) * 2), kv_rule=KvRule.NONE),
        "drafts": Deployment(whole, SelfSpeculation(EXITS[0], 2), kv_rule=KvRule.NONE),
    }

    def act(env: Any, engine: LiveEngine, server: Any) -> None:
        engine.capture(server.decisions[0].deployment)
        weights = engine.residents.running("tiny", LAYERS).layers[0].qkv
        memory.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in (weights, engine.work._block))

    gc.collect()
    gc.disable()
    try:
        with cuda.watched():
            device = CudaDevice(torch.device("cpu"), cuda, kernels)
            given = {"tiny": tiny}, deployments[kind], requests(LENGTHS), 3
            serve_live(*given, slots=3, device=device, act=act, close=True)
        assert bool(cuda.replays) == (kind != "drafts")  # which run as they come
        assert [storage.expired() for storage in memory] == [True, True]
        assert not any(pool.used_by for pool in cuda.pools.values())
    finally:
        gc.enable()
