"""Layers that come late, on the device: the text of full depth, copied for the iterations that run them and no others.

Of six layers `stay` are always there; room for two more is where the others come, and where the first two of them lie
between iterations. So what comes is what runs above, unless that lies there already.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from helios_sim.errors import TooLittleMemory
from helios_sim.exits.rule import Confidence, ExitRule, FixedCap, FullDepth, SelfSpeculation
from helios_sim.live import device as device_module
from helios_sim.live.device import CpuDevice, Mark, Pairs, aligned
from helios_sim.live.memory.late import LateLayers
from helios_sim.live.memory.residents import Residents
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.served import LiveModel
from helios_sim.policy.deployment import LATE_ROOM, BatchingRule, Completed, Deployment, KvRule, Placement, Regrouping
from helios_sim.profile.profile import MemoryBudget
from helios_sim.serving.iteration import Outcome, Plan
from helios_sim.serving.transition import Residency
from live_example import packed_logits, token_ids
from live_rig import EXITS, LAYERS, Live, live_model, requests, serve_live
from rig import Scripted
from test_live_exits import deployed, rule_of
from test_live_residency import loaded
from test_live_tokens import check_tokens
from tiny_models import FAMILIES, write_tiny

LENGTHS = [(12, 20), (40, 9), (1, 30), (30, 12), (25, 1), (33, 24)]
N = len(LENGTHS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LiveModel:
    return live_model(write_tiny("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def whole(llama: LiveModel) -> Live:
    return serve_live({"tiny": llama}, placed(None), requests(LENGTHS), N, slots=4)


def placed(stay: int | None, rule: ExitRule | None = None, **more: Any) -> Deployment:
    return Deployment(Placement("tiny", LAYERS, stay), rule or FullDepth(), kv_rule=KvRule.NONE, **more)


def copies(stay: int, end: int) -> int:
    """Of an iteration through `end` layers: a layer comes unless it has its place for itself."""
    return sum(sum(1 for n in range(first, end, LATE_ROOM)) for first in (stay, stay + 1) if first + LATE_ROOM < end)


@dataclass
class Ran:
    """Every iteration of a run: its plan and what became of it."""

    plans: list[Plan] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    def act(self, env: Any, engine: Any, server: Any) -> None:
        execute = engine.execute

        def noting(plan: Plan, now_ns: int) -> Outcome:
            outcome = execute(plan, now_ns)
            self.plans.append(plan)
            self.outcomes.append(outcome)
            return outcome

        engine.execute = noting


def deepest(outcome: Outcome) -> int:
    """Layers that the iteration ran, for whichever token."""
    ran = outcome.composition
    of_rows = ran.decode_tokens if ran.propagated_tokens is None else ran.decode_tokens + ran.propagated_tokens
    depths = [end for end, rows in zip(ran.bounds, of_rows[0].tolist(), strict=True) if rows]
    return max([*depths, *(chunk.layers for chunk in ran.prefill)])


def tokens(live: Live) -> list[list[int]]:
    assert {record.status.value for record in live.records} == {"completed"}
    return [live.tokens(record.request_id) for record in live.records]


# --- the layers by themselves


@given(
    stay=st.integers(1, LAYERS - LATE_ROOM - 1),
    runs=st.lists(st.tuples(st.integers(0, LAYERS - 1), st.integers(1, LAYERS)), max_size=8),
)
def test_each_layer_is_there_when_it_runs_and_the_first_ones_afterwards(
    llama: LiveModel, stay: int, runs: list[tuple[int, int]]
) -> None:
    want = SegmentedModel.load(llama.checkpoint)
    residents = Residents({"a": llama}, CpuDevice())
    residents.hold({"a": stay + LATE_ROOM}, for_good=True)
    for start, size in runs:
        model, end = residents.running("a", LAYERS, late=True), min(start + size, LAYERS)
        for layer, w in enumerate(model.layers[start:end], start):
            assert torch.equal(w.qkv, want.layers[layer].qkv)
        residents.return_first("a")
        came = residents.came("a")
        assert came == copies(stay, end) if start <= stay else came <= end - start + LATE_ROOM
    there = residents.running("a", stay + LATE_ROOM)
    assert there.n_loaded == stay + LATE_ROOM
    assert there.staying is None
    assert all(torch.equal(w.mlp_in, v.mlp_in) for w, v in zip(there.layers, want.layers, strict=False))
    residents.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_in_pieces_is_that_of_all_layers(family: str, tmp_path: Any) -> None:
    model, ids = live_model(write_tiny(family, tmp_path)), token_ids(2, 12)
    want = packed_logits(SegmentedModel.load(model.checkpoint), ids)
    residents = Residents({"a": model}, CpuDevice())
    residents.hold({"a": 1 + LATE_ROOM})
    for cuts in ((), (2, 4), (1, 3, 5)):
        assert torch.equal(packed_logits(residents.running("a", LAYERS, late=True), ids, cuts), want)
    with residents.whole("a") as streamed:
        assert torch.equal(packed_logits(streamed, ids), want)
    for layers in (2, LAYERS, 4):  # dropped and loaded while the first layers may lie elsewhere
        if residents.layers["a"] > LATE_ROOM:
            residents.running("a", LAYERS, late=True)
        residents.hold({"a": layers})
        assert loaded(residents, "a") is None
        cut = packed_logits(SegmentedModel.load(model.checkpoint, layers), ids)
        assert torch.equal(packed_logits(residents.running("a", layers), ids), cut)
    residents.close()


def test_what_is_held_for_good_is_all_that_takes_memory(llama: LiveModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes that the server counts, up to the alignment of a layer's parts; and they suffice."""
    one, all_bytes = llama.profile.weight_bytes(1 + LATE_ROOM), llama.profile.weight_bytes(LAYERS)
    residents = Residents({"a": llama, "b": llama}, CpuDevice())
    residents.hold({"a": 1 + LATE_ROOM}, for_good=True)
    assert residents.free_bytes == 0
    assert one <= residents._slab.total_bytes <= one + 20 * (2 + LATE_ROOM) * device_module.ALIGNMENT < all_bytes
    residents.hold({"a": LAYERS})
    assert isinstance(loaded(residents, "a"), MemoryError)
    residents.close()
    short = Residents({"a": llama}, CpuDevice())
    short._read()
    monkeypatch.setattr(device_module, "available_bytes", lambda device: int(all_bytes * 0.9))
    with pytest.raises(TooLittleMemory):
        short._take_memory()
    short._most = {"a": 1 + LATE_ROOM}
    short._take_memory()


# --- served


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_text_is_that_of_full_depth(family: str, tmp_path: Any) -> None:
    """Token for token what transformers writes, with five of six layers in host memory, and each comes once."""
    model = live_model(write_tiny(family, tmp_path))
    live = serve_live({"tiny": model}, placed(1), requests(LENGTHS), N, slots=4, max_batch_tokens=24)
    check_tokens(family, live)
    stats = live.run.stats
    assert stats.late_layers == 5 * stats.iterations
    assert all(r.layers_run == LAYERS * r.output_tokens for r in live.records)
    assert live.server.used_blocks == 0


@pytest.mark.parametrize("stay", [1, 2, 3])
def test_memory_is_counted_as_in_a_simulation(llama: LiveModel, whole: Live, stay: int) -> None:
    profile = llama.profile
    kv_bytes = 40 * 16 * profile.kv_bytes_per_token(LAYERS)
    budget = MemoryBudget(profile.weight_bytes(LAYERS) + kv_bytes, 1.0, 16)
    pools: list[int] = []

    def act(env: Any, engine: Any, server: Any) -> None:
        pools.append(int(server._replica.state.total_blocks))

    live = serve_live(
        {"tiny": llama}, placed(stay), requests(LENGTHS), N, slots=4, budget_bytes=budget.usable_bytes, act=act
    )
    assert tokens(live) == tokens(whole)
    held = {"tiny": stay + LATE_ROOM}
    counted = Residency({"tiny": profile}, budget, 4).pool_blocks(held, placed(stay).active, FullDepth())
    assert pools == [counted]
    freed = profile.weight_bytes(LAYERS) - profile.weight_bytes(stay + LATE_ROOM)
    assert counted == (kv_bytes + freed) // (16 * profile.kv_bytes_per_token(LAYERS))
    assert live.engine.residents.layers == held
    assert live.run.stats.late_layers == copies(stay, LAYERS) * live.run.stats.iterations


@pytest.mark.parametrize(
    ("stay", "kv_rule", "batching"),
    [
        (1, KvRule.PROPAGATE, BatchingRule.EACH_TOKEN), (3, KvRule.PROPAGATE, BatchingRule.EACH_TOKEN),
        (1, KvRule.RECOMPUTE, BatchingRule.EACH_TOKEN), (2, KvRule.COPY, BatchingRule.EACH_TOKEN),
        (1, KvRule.PROPAGATE, BatchingRule.LAZY), (1, KvRule.PROPAGATE, BatchingRule.REBATCH),
        (2, KvRule.COPY, BatchingRule.REBATCH),
    ],
)  # fmt: skip
def test_exits_are_those_without_and_only_what_runs_comes(
    llama: LiveModel, stay: int, kv_rule: KvRule, batching: BatchingRule
) -> None:
    plain = deployed(rule_of(llama, Confidence.MAX_PROBABILITY), kv_rule, batching)
    plain = replace(plain, regrouping=Regrouping(0.0, 2)) if batching is BatchingRule.REBATCH else plain
    ran = Ran()
    want = serve_live({"tiny": llama}, plain, requests(LENGTHS), N, slots=4)
    late = replace(plain, active=Placement("tiny", LAYERS, stay))
    live = serve_live({"tiny": llama}, late, requests(LENGTHS), N, slots=4, act=ran.act)
    assert tokens(live) == tokens(want)
    assert [live.depths(i) for i in range(N)] == [want.depths(i) for i in range(N)]
    depths = [deepest(outcome) for outcome in ran.outcomes]
    starts = [EXITS[plan.first_band - 1] if plan.first_band else 0 for plan in ran.plans]
    came = [outcome.late_layers for outcome in ran.outcomes]
    for start, depth, n in zip(starts, depths, came, strict=True):
        assert n == copies(stay, depth) if start <= stay else n <= depth - stay + LATE_ROOM
    if kv_rule is not KvRule.PROPAGATE and batching is BatchingRule.EACH_TOKEN:
        assert {2, LAYERS} <= set(depths)
        assert came[depths.index(2)] == 0
    assert live.run.stats.late_layers == sum(came) > 0


def test_iterations_within_what_stays_copy_nothing(llama: LiveModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token of each request is observed through all layers, the others run two."""
    rule, ran, started = FixedCap(0.5), Ran(), []
    prefetch = CpuDevice.prefetch

    def counted(self: CpuDevice, pairs: Pairs, after: Mark | None = None) -> Any:
        started.append(len(ran.outcomes))
        return prefetch(self, pairs, after)

    monkeypatch.setattr(CpuDevice, "prefetch", counted)
    deployment = placed(2, rule, observe_tokens=1, run_layers=2)
    live = serve_live({"tiny": llama}, deployment, requests(LENGTHS), N, slots=4, act=ran.act)
    assert {record.status.value for record in live.records} == {"completed"}
    deep = {i for i, outcome in enumerate(ran.outcomes) if deepest(outcome) > 2}
    assert 0 < len(deep) < len(ran.outcomes)
    assert set(started) == deep
    assert len(started) == copies(2, LAYERS) * len(deep)


@pytest.mark.parametrize(("stay", "exit_layers"), [(1, 4), (2, 2), (3, 2)])
def test_drafts_wait_only_for_what_they_run(llama: LiveModel, whole: Live, stay: int, exit_layers: int) -> None:
    ran = Ran()
    rule = SelfSpeculation(exit_layers, 3)
    live = serve_live({"tiny": llama}, placed(stay, rule), requests(LENGTHS), N, slots=4, act=ran.act)
    assert tokens(live) == tokens(whole)
    assert live.run.stats.accepted_drafts > 0
    for outcome in ran.outcomes:
        passes = len(outcome.drafted) * max(0, exit_layers - stay)
        least = copies(stay, LAYERS)
        assert least <= outcome.late_layers <= max(least, passes + LAYERS - stay)
        assert exit_layers > stay or outcome.late_layers == least


def test_deployments_change_between_late_and_resident_while_requests_run(llama: LiveModel, whole: Live) -> None:
    """Fewer stay, all of them, more: what is there is as many as were asked for, and the text is the same."""
    one = (Completed(1),)
    steps = [placed(None, triggers=one), placed(2, triggers=one), placed(3, triggers=one), placed(None)]
    policy, ran, held = Scripted(placed(1, triggers=one), steps), Ran(), set()

    def act(env: Any, engine: Any, server: Any) -> None:
        ran.act(env, engine, server)
        noting = engine.execute

        def execute(plan: Plan, now_ns: int) -> Outcome:
            outcome = noting(plan, now_ns)
            held.add((plan.resident_layers, engine.residents.layers["tiny"], outcome.late_layers))
            return outcome

        engine.execute = execute

    live = serve_live({"tiny": llama}, policy, requests(LENGTHS), N, slots=4, kv_blocks=8, act=act)
    assert tokens(live) == tokens(whole)
    assert {(1, 3, 5), (None, 6, 0), (2, 4, 4), (3, 5, 2)} <= held
    assert live.engine.residents.layers == {"tiny": LAYERS}
    assert live.server.used_blocks == 0


def test_preempted_and_cancelled_requests_leave_nothing(llama: LiveModel, whole: Live) -> None:
    def act(env: Any, engine: Any, server: Any) -> None:
        execute, seen = engine.execute, []

        def cancelling(plan: Plan, now_ns: int) -> Outcome:
            if not seen and 3 in engine.answers and len(engine.answers[3].tokens) > 2:
                seen.append(env.call(lambda: server.cancel(3)))
            return execute(plan, now_ns)

        engine.execute = cancelling

    memory = llama.profile.weight_bytes(1 + LATE_ROOM) + 100 * llama.profile.kv_bytes_per_token(LAYERS)
    live = serve_live({"tiny": llama}, placed(1), requests(LENGTHS), N, slots=4, budget_bytes=memory, act=act)
    assert live.run.stats.preemptions > 0
    assert [r.request_id for r in live.records if r.status.value != "completed"] == [3]
    assert all(live.tokens(i) == whole.tokens(i) for i in range(N) if i != 3)
    assert (live.server.used_blocks, live.server.requests_in_system) == (0, 0)


def test_an_iteration_that_fails_half_way_leaves_the_next_one_whole(
    llama: LiveModel, whole: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that has come is not taken for another, whether it has been run or not."""
    fetch, calls = LateLayers._fetch, []

    def failing(self: LateLayers, layer: int) -> None:
        calls.append(layer)
        if len(calls) in (23, 31, 38):
            raise MemoryError("out of memory")
        fetch(self, layer)

    monkeypatch.setattr(LateLayers, "_fetch", failing)
    live = serve_live({"tiny": llama}, placed(1), requests(LENGTHS), N, slots=4)
    assert live.engine.shortages == 3
    assert tokens(live) == tokens(whole)
    monkeypatch.undo()
    live.engine.close()
    assert live.engine.residents.layers == {}
    assert live.engine.residents._slab.total_bytes == aligned(0)
