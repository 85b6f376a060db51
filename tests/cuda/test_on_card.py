"""What an iteration of decodes asks of the host on a strict card: as little as there is, whatever the exit rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from exact_torch import exact
from helios_sim.exits.rule import Confidence, FixedCap, FullDepth
from helios_sim.live.ahead import RunAhead
from helios_sim.live.cuda import CudaDevice
from helios_sim.live.engine import LiveEngine
from helios_sim.live.exits import ExitReader, Row
from helios_sim.live.forward import Forward
from helios_sim.live.graphs import GraphedDecodes
from helios_sim.live.kernels.interface import TORCH, Kernels
from helios_sim.live.memory.kv import KvCache
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.served import LiveModel
from helios_sim.policy.deployment import BatchingRule, Deployment, KvRule, Placement
from live_rig import LAYERS, Live, live_model, requests, serve_live
from strict_cuda import StrictCuda
from test_live_captured import Capturing
from test_live_exits import deployed, rule_of
from tiny_models import write_tiny

LENGTHS = [(12, 12), (20, 9), (5, 14), (31, 7)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LiveModel:
    return live_model(write_tiny("llama", tmp_path_factory.mktemp("llama")))


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
