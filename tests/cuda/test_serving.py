"""Live serving on a strict card: the same tokens as on a CPU, all work in order, and nothing left when it is over."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from helios_sim.exits.rule import Confidence, DraftModel, FullDepth, ReleaseEarly, SelfSpeculation
from helios_sim.live.cuda import CudaDevice
from helios_sim.live.engine import LiveEngine
from helios_sim.live.served import LiveModel
from helios_sim.policy.deployment import BatchingRule, Completed, Deployment, KvRule, Placement, Regrouping
from helios_sim.serving.iteration import OutOfMemory
from live_rig import EXITS, LAYERS, Live, live_model, requests, serve_live
from rig import Scripted
from strict_cuda import VERSIONS, StrictCuda
from test_live_exits import deployed, rule_of
from tiny_models import write_tiny

LENGTHS = [(12, 12), (20, 9), (5, 14), (31, 7)]
WHOLE = Deployment(Placement("tiny", LAYERS), FullDepth(), kv_rule=KvRule.NONE)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LiveModel]:
    return {
        family: live_model(write_tiny(family, tmp_path_factory.mktemp(family)), name=family)
        for family in ("llama", "opt")
    }


@pytest.fixture
def tiny(models: dict[str, LiveModel]) -> LiveModel:
    return models["llama"]


@pytest.fixture(params=VERSIONS)
def cuda(request: pytest.FixtureRequest) -> Any:
    strict = StrictCuda(request.param)
    with strict.watched():
        yield strict


def served(cuda: StrictCuda | None, model: LiveModel, deployment: Deployment, **more: Any) -> Live:
    device = "cpu" if cuda is None else CudaDevice(torch.device("cpu"), cuda)
    return serve_live({"tiny": model}, deployment, requests(LENGTHS), len(LENGTHS), slots=3, device=device, **more)


def early(model: LiveModel, kv_rule: KvRule, confidence: Confidence = Confidence.MAX_PROBABILITY) -> Deployment:
    return deployed(rule_of(model, confidence), kv_rule, BatchingRule.EACH_TOKEN)


def tokens(live: Live) -> list[list[int]]:
    return [live.tokens(record.request_id) for record in live.records]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_card_writes_what_a_cpu_writes(cuda: StrictCuda, models: dict[str, LiveModel], family: str) -> None:
    model = models[family]
    assert tokens(served(cuda, model, WHOLE)) == tokens(served(None, model, WHOLE))
    assert cuda.replays > 4
    assert not cuda.pinned_pools


def test_answers_that_leave_at_ramps_are_those_of_a_cpu(tiny: LiveModel) -> None:
    cuda, at = StrictCuda(), rule_of(tiny, Confidence.MAX_PROBABILITY).threshold
    ramps = Deployment(Placement("tiny", LAYERS), ReleaseEarly(EXITS[:-1], (at, at)), kv_rule=KvRule.NONE)
    with cuda.watched():
        on_card = served(cuda, tiny, ramps)
    on_cpu = served(None, tiny, ramps)
    assert tokens(on_card) == tokens(on_cpu)
    assert on_card.run.stats.released_tokens == on_cpu.run.stats.released_tokens > 3
    assert cuda.replays > 4


@pytest.mark.parametrize("kv_rule", [KvRule.PROPAGATE, KvRule.COPY])
def test_a_batch_that_is_split_writes_what_it_writes_on_a_cpu(tiny: LiveModel, kv_rule: KvRule) -> None:
    """Rows that wait at an exit keep their states while other rows run through the same graphs."""
    cuda, rule = StrictCuda(), rule_of(tiny, Confidence.MAX_PROBABILITY)
    split = replace(deployed(rule, kv_rule, BatchingRule.REBATCH), regrouping=Regrouping(0.0, 2))
    with cuda.watched():
        on_card = served(cuda, tiny, split)
    on_cpu = served(None, tiny, split)
    assert tokens(on_card) == tokens(on_cpu)
    assert on_card.run.stats.splits == on_cpu.run.stats.splits > 3
    assert cuda.replays > 4


def test_drafts_of_either_kind_run_beside_captured_steps(cuda: StrictCuda, models: dict[str, LiveModel]) -> None:
    """A pass with drafts is launched step by step; where more than two decode none drafts, and captured steps run."""
    both = {"tiny": models["llama"], "opt": models["opt"]}
    plain = tokens(served(None, models["llama"], WHOLE))
    for rule in (SelfSpeculation(4, 2, 2), DraftModel("opt", 2, 2)):
        standby = (Placement("opt", LAYERS),) if isinstance(rule, DraftModel) else ()
        deployment, before = replace(WHOLE, exit_rule=rule, standby=standby), cuda.replays
        device = CudaDevice(torch.device("cpu"), cuda)
        live = serve_live(both, deployment, requests(LENGTHS), len(LENGTHS), slots=3, device=device, close=True)
        assert tokens(live) == plain
        assert live.run.stats.drafted_tokens
        assert cuda.replays > before


@pytest.mark.parametrize("kv_rule", [KvRule.PROPAGATE, KvRule.RECOMPUTE])
def test_tokens_that_exit_early_are_those_of_a_cpu(tiny: LiveModel, kv_rule: KvRule) -> None:
    """The numbers of one band are not overwritten while the band before it still has to read its own."""
    cuda = StrictCuda()
    with cuda.watched():
        on_card = served(cuda, tiny, early(tiny, kv_rule))
    assert tokens(on_card) == tokens(served(None, tiny, early(tiny, kv_rule)))
    assert cuda.replays > 4


def test_an_iteration_ends_when_the_card_has_done_all_of_it(tiny: LiveModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, busy = StrictCuda(), []
    execute = LiveEngine._outcome

    def watched(engine: LiveEngine, *given: Any) -> Any:
        busy.append(cuda.busy)
        return execute(engine, *given)

    monkeypatch.setattr(LiveEngine, "_outcome", watched)
    with cuda.watched():
        served(cuda, tiny, early(tiny, KvRule.PROPAGATE))
    assert busy
    assert not any(busy)


@pytest.mark.parametrize("at", [1, 3])
def test_out_of_memory_inside_a_capture_is_a_shortage(cuda: StrictCuda, tiny: LiveModel, at: int) -> None:
    """The requests are preempted, and the run goes on."""
    cuda.fails = lambda captures: captures == at
    live = served(cuda, tiny, WHOLE)
    assert live.engine.shortages == 1
    assert tokens(live) == tokens(served(None, tiny, WHOLE))


def ahead(env: Any, engine: LiveEngine, server: Any) -> None:
    engine.capture()


def test_nothing_is_captured_while_time_runs(cuda: StrictCuda, models: dict[str, LiveModel]) -> None:
    """Of no model that a switch may bring, at no length, above no exit."""
    at_start = []

    def act(env: Any, engine: LiveEngine, server: Any) -> None:
        ahead(env, engine, server)
        at_start.append(cuda.captures)
        assert {name for name, graphs in engine.work._captured.items() if graphs._steps} == set(models)

    first, second = (
        replace(early(models[name], KvRule.PROPAGATE), active=Placement(name, LAYERS), triggers=(Completed(2),))
        for name in models
    )
    lower = replace(first, active=Placement("llama", 4))
    policy = Scripted(first, [second, lower, replace(first, triggers=())])
    on = CudaDevice(torch.device("cpu"), cuda)
    count = 2 * len(LENGTHS)
    live = serve_live(models, policy, requests(LENGTHS * 2), count, slots=3, device=on, act=act, close=True)
    assert [record.status.value for record in live.records] == ["completed"] * count
    assert {depth for record in live.records for depth in live.depths(record.request_id)} >= {2, 4}
    assert cuda.captures == at_start[0] > 20


@pytest.mark.parametrize("per_token", [False, True])
def test_a_deployment_that_stays_captures_its_own_steps_alone(
    cuda: StrictCuda, models: dict[str, LiveModel], per_token: bool
) -> None:
    name = "opt"
    whole = replace(WHOLE, active=Placement(name, LAYERS))
    deployment = replace(early(models[name], KvRule.PROPAGATE), active=Placement(name, LAYERS)) if per_token else whole
    at_start = []

    def act(env: Any, engine: LiveEngine, server: Any) -> None:
        at_start.append(engine.capture(server.decisions[0].deployment))

    on = CudaDevice(torch.device("cpu"), cuda)
    serve_live(models, deployment, requests(LENGTHS), len(LENGTHS), slots=3, device=on, act=act, close=True)
    sizes, above_exits = 3, 2 * (len(EXITS) - 1)  # batches of 1, 2 and 3; above an exit in row or gathered
    looks = 2 * len(EXITS) if per_token else 1  # at the logits of each exit, for a token alone or its confidence too
    assert cuda.captures == at_start[0] == sizes * (1 + (above_exits if per_token else 0) + looks)


def test_memory_that_does_not_suffice_for_the_steps_is_known_before_time_starts(tiny: LiveModel) -> None:
    cuda = StrictCuda()
    cuda.fails = lambda captures: captures == 3
    with cuda.watched(), pytest.raises(OutOfMemory, match="CUDA out of memory"):
        served(cuda, tiny, WHOLE, act=ahead)


def test_when_a_run_is_over_its_memory_is_free(cuda: StrictCuda, tiny: LiveModel) -> None:
    """At once: nothing waits for the cyclic collector, which may come after the next run has asked for its memory."""
    memory: list[StorageWeakRef] = []

    def act(env: Any, engine: LiveEngine, server: Any) -> None:
        ahead(env, engine, server)
        weights = engine.residents.running("tiny", LAYERS).layers[0].qkv
        for tensor in (weights, engine.work._block):
            memory.append(StorageWeakRef(tensor.untyped_storage()))

    gc.collect()
    gc.disable()
    try:
        live = served(cuda, tiny, WHOLE, act=act, close=True)
        assert cuda.replays
        assert len(memory) == 2
        assert all(storage.expired() for storage in memory)
        assert not any(pool.used_by for pool in cuda.pools.values())
        assert live.engine.residents.layers == {}
    finally:
        gc.enable()
