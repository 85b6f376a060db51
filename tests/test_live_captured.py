"""Steps with fixed tensors, as a card captures them, write the same tokens: padded batches, refilled numbers, moves.

There is no card here: a CPU that claims to capture runs each step anew on the very same tensors.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from clocked_cuda import FakeCuda
from fake_device import VirtualClock
from helios_sim.exits.rule import Confidence, FullDepth
from helios_sim.live.cuda import WARM_UP_CALLS, CudaDevice
from helios_sim.live.device import CpuDevice, Step
from helios_sim.live.served import LiveModel
from helios_sim.policy.deployment import BatchingRule, Completed, Deployment, KvRule, Placement
from live_rig import LAYERS, Live, live_model, requests, serve_live
from rig import Scripted
from test_live_exits import LENGTHS, deployed, rule_of
from tiny_models import write_tiny

MORE = [*LENGTHS, (8, 16), (60, 22), (19, 27), (2, 9)]


class Capturing(CpuDevice):
    captures = True

    def __init__(self) -> None:
        super().__init__()
        self.captured = self.launched = 0

    def prepare(self, step: Step) -> Step:
        self.captured += 1
        step()  # what a capture leaves in the tensors must not matter

        def launch() -> None:
            self.launched += 1
            step()

        return launch


@pytest.fixture(scope="module", params=["llama", "opt", "gemma3"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LiveModel:
    return live_model(write_tiny(request.param, tmp_path_factory.mktemp("tiny")))


def both(models: dict[str, LiveModel], policy, **more) -> tuple[Live, Live, Capturing]:
    def fresh():
        return Scripted(policy.first, list(policy.then)) if isinstance(policy, Scripted) else policy

    device = Capturing()
    plain = serve_live(models, fresh(), requests(MORE), len(MORE), **more)
    captured = serve_live(models, fresh(), requests(MORE), len(MORE), device=device, **more)
    return plain, captured, device


def check_same(plain: Live, captured: Live) -> None:
    for record in plain.records:
        assert captured.tokens(record.request_id) == plain.tokens(record.request_id)
        assert captured.depths(record.request_id) == plain.depths(record.request_id)


@pytest.mark.parametrize("slots", [3, 8])
def test_full_depth(tiny: LiveModel, slots: int) -> None:
    whole = Deployment(Placement("tiny", LAYERS), FullDepth(), kv_rule=KvRule.NONE)
    plain, captured, device = both({"tiny": tiny}, whole, slots=slots)
    check_same(plain, captured)
    assert device.launched > 20
    assert device.captured <= 8  # sizes 1, 2, 4, 8, all within one span


@pytest.mark.parametrize("kv_rule", [KvRule.PROPAGATE, KvRule.RECOMPUTE])
@pytest.mark.parametrize("batching", [BatchingRule.EACH_TOKEN, BatchingRule.LAZY])
def test_per_token_exits(tiny: LiveModel, kv_rule: KvRule, batching: BatchingRule) -> None:
    deployment = deployed(rule_of(tiny, Confidence.MAX_PROBABILITY), kv_rule, batching)
    plain, captured, device = both({"tiny": tiny}, deployment, slots=5)
    if batching is BatchingRule.EACH_TOKEN:  # a lazy batch leaves by who is in it, which the clock decides
        check_same(plain, captured)
    assert device.launched > 20


def test_after_a_raise_and_a_lowered_cap(tiny: LiveModel) -> None:
    def cut(layers: int) -> Deployment:
        return Deployment(Placement("tiny", layers), FullDepth(), kv_rule=KvRule.NONE, triggers=(Completed(2),))

    policy = Scripted(cut(LAYERS), [cut(2), cut(LAYERS), cut(4)])
    live = serve_live({"tiny": tiny}, policy, requests(MORE), len(MORE), slots=3, device=Capturing())
    assert [r.status.value for r in live.records] == ["completed"] * len(MORE)
    assert {2, 4, LAYERS} == {depth for r in live.records for depth in live.depths(r.request_id)}
    for record in live.records:  # whoever ran at one depth only wrote what that depth writes
        depths = set(live.depths(record.request_id))
        if len(depths) == 1:
            (cap,) = depths
            alone = serve_live({"tiny": tiny}, cut(cap), requests(MORE), len(MORE), slots=3)
            assert live.tokens(record.request_id) == alone.tokens(record.request_id)


def test_a_captured_step_keeps_alive_what_it_reads() -> None:
    """A graph knows addresses only: memory that somebody else is given meanwhile would be read in their place."""
    calls: list[int] = []
    cuda = FakeCuda(VirtualClock())

    def prepared() -> tuple[Step, weakref.ref[torch.Tensor]]:
        reads = torch.zeros(3)
        step = CudaDevice(torch.device("cpu"), cuda).prepare(lambda: calls.append(len(reads)))
        return step, weakref.ref(reads)

    step, reads = prepared()
    gc.collect()
    assert reads() is not None
    assert len(calls) == WARM_UP_CALLS + 1  # and once for the capture
    step()
    assert len(calls) == WARM_UP_CALLS + 1
    assert cuda.replays == cuda.captures == 1
    del step
    gc.collect()
    assert reads() is None
