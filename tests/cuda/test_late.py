"""Layers that come late on a strict card: in order with what runs, beside captured steps, and nothing left after it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from exact_torch import exact
from helios_sim.exits.rule import Confidence, FullDepth, SelfSpeculation
from helios_sim.live.cuda import CudaDevice
from helios_sim.live.device import Mark, Pairs
from helios_sim.live.engine import LiveEngine
from helios_sim.live.kernels.interface import TORCH
from helios_sim.live.served import LiveModel
from helios_sim.policy.deployment import BatchingRule, Completed, Deployment, KvRule, Placement
from live_rig import LAYERS, Live, live_model, requests, serve_live
from rig import Scripted
from strict_cuda import VERSIONS, StrictCuda, Unordered
from test_live_exits import deployed, rule_of
from tiny_models import write_tiny

LENGTHS = [(12, 12), (20, 9), (5, 14), (31, 7)]
N = len(LENGTHS)
WHOLE = Deployment(Placement("tiny", LAYERS), FullDepth(), kv_rule=KvRule.NONE)
LATE = replace(WHOLE, active=Placement("tiny", LAYERS, 1))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LiveModel:
    return live_model(write_tiny("llama", tmp_path_factory.mktemp("tiny")))


def capturing(env: Any, engine: LiveEngine, server: Any) -> None:
    engine.capture(server.decisions[0].deployment)


def served(on: Any, model: LiveModel, deployment: Deployment | Scripted, **more: Any) -> Live:
    return serve_live({"tiny": model}, deployment, requests(LENGTHS), N, slots=3, device=on, act=capturing, **more)


def card(cuda: StrictCuda, of: type[CudaDevice] = CudaDevice, kernels: Any = TORCH) -> CudaDevice:
    return of(torch.device("cpu"), cuda, kernels)


def tokens(live: Live) -> list[list[int]]:
    return [live.tokens(record.request_id) for record in live.records]


@pytest.mark.parametrize(("family", "stay"), [("llama", 3), ("gemma3", 1)])
def test_a_card_writes_what_a_cpu_writes_with_all_layers(family: str, stay: int, tmp_path: Path) -> None:
    """What stays runs as captured steps, of which none is captured while time runs."""
    tiny = live_model(write_tiny(family, tmp_path))
    cuda, at_start = StrictCuda(VERSIONS[stay % 2]), []

    def act(env: Any, engine: LiveEngine, server: Any) -> None:
        capturing(env, engine, server)
        at_start.append(cuda.captures)

    late = replace(LATE, active=Placement("tiny", LAYERS, stay))
    with cuda.watched():
        live = serve_live({"tiny": tiny}, late, requests(LENGTHS), N, slots=3, device=card(cuda), act=act)
    assert tokens(live) == tokens(served("cpu", tiny, WHOLE))
    assert live.run.stats.late_layers == (5 if stay == 1 else 2) * live.run.stats.iterations
    assert cuda.captures == at_start[0] == 3  # a step for each batch size
    assert cuda.replays > 4


@pytest.mark.parametrize(
    ("kernels", "kv_rule"),
    [("torch", KvRule.PROPAGATE), ("exact", KvRule.PROPAGATE), ("exact", KvRule.RECOMPUTE)],
)
def test_exits_and_drafts_are_those_of_a_cpu(tiny: LiveModel, kernels: str, kv_rule: KvRule) -> None:
    """Also where the project's kernels run, which otherwise run ahead, or all exits at once."""
    rule = rule_of(tiny, Confidence.MAX_PROBABILITY)
    for plain in (deployed(rule, kv_rule, BatchingRule.EACH_TOKEN), replace(WHOLE, exit_rule=SelfSpeculation(4, 2, 2))):
        late, cuda = replace(plain, active=Placement("tiny", LAYERS, 3)), StrictCuda()
        with exact() as found, cuda.watched():
            live = served(card(cuda, kernels=TORCH if kernels == "torch" else found), tiny, late)
        assert tokens(live) == tokens(served("cpu", tiny, plain))
        assert live.run.stats.late_layers > 0
        assert cuda.replays > 4


def test_changes_between_late_and_resident_are_in_order(tiny: LiveModel) -> None:
    """Weights load, or leave, while layers come to the places beside them."""
    one, cuda = (Completed(1),), StrictCuda()
    steps = [replace(WHOLE, triggers=one), replace(LATE, active=Placement("tiny", LAYERS, 3), triggers=one), WHOLE]
    with cuda.watched():
        live = served(card(cuda), tiny, Scripted(replace(LATE, triggers=one), steps), close=True)
    assert tokens(live) == tokens(served("cpu", tiny, WHOLE))
    assert live.run.stats.late_layers > 0


class NoWaitBefore(CudaDevice):
    """Copies at once, whatever still runs."""

    def prefetch(self, pairs: Pairs, after: Mark | None = None) -> Callable[[], None]:
        return super().prefetch(pairs, None)


class NoWaitAfter(CudaDevice):
    """Lets layers run before they have come."""

    def prefetch(self, pairs: Pairs, after: Mark | None = None) -> Callable[[], None]:
        super().prefetch(pairs, after)
        return lambda: None


@pytest.mark.parametrize("wrong", [NoWaitBefore, NoWaitAfter])
def test_the_card_notices_copies_without_an_order(tiny: LiveModel, wrong: type[CudaDevice]) -> None:
    cuda = StrictCuda()
    with cuda.watched(), pytest.raises(Unordered):
        served(card(cuda, wrong), tiny, LATE)


def test_the_host_waits_for_no_layer(tiny: LiveModel) -> None:
    """As often as with all layers there: once for the tokens, and the end, of an iteration."""
    waits = []
    for deployment in (WHOLE, LATE):
        cuda = StrictCuda()
        with cuda.watched():
            live = served(card(cuda), tiny, deployment)
        waits.append(cuda.waits / live.run.stats.iterations)
    assert waits[1] <= waits[0] + 1  # the logits are looked at with a launch of their own


def test_when_it_is_over_its_memory_is_free(tiny: LiveModel) -> None:
    memory: list[StorageWeakRef] = []
    cuda = StrictCuda()

    def act(env: Any, engine: LiveEngine, server: Any) -> None:
        capturing(env, engine, server)
        weights = engine.residents.running("tiny", 3).layers[2].qkv
        for tensor in (weights, engine.work._block):
            memory.append(StorageWeakRef(tensor.untyped_storage()))

    gc.collect()
    gc.disable()
    try:
        with cuda.watched():
            live = serve_live(
                {"tiny": tiny}, LATE, requests(LENGTHS), N, slots=3, device=card(cuda), act=act, close=True
            )
        assert live.run.stats.late_layers
        assert all(storage.expired() for storage in memory)
        assert not cuda.busy
        assert not any(pool.used_by for pool in cuda.pools.values())
    finally:
        gc.enable()
