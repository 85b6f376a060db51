"""KV memory of the live engine: one block for all models, as large as there is room for, and never promised twice."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from helios_sim.errors import UserError
from helios_sim.exits.rule import FixedCap, FullDepth
from helios_sim.live.device import ALIGNMENT
from helios_sim.live.engine import LiveEngine
from helios_sim.live.memory import kv, workspace
from helios_sim.live.memory.kv import CacheShape
from helios_sim.live.served import LiveModel
from helios_sim.policy.deployment import Completed, Deployment, KvRule, Placement
from live_rig import LAYERS, SLOT_TOKENS, Live, live_model, requests, serve_live
from rig import Scripted
from tiny_models import write_tiny

LENGTHS = [(12, 20), (40, 9), (5, 30), (70, 12), (25, 14), (33, 24), (8, 16), (19, 27)]
N = len(LENGTHS)
LARGE, SMALL = "gemma3", "llama"  # by their KV
SOME = (Completed(4),)  # more than end while a model drains, so that each serves somebody


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LiveModel]:
    return {
        family: live_model(write_tiny(family, tmp_path_factory.mktemp(family)), name=family)
        for family in (SMALL, LARGE)
    }


def whole(model: str, layers: int = LAYERS, **more: Any) -> Deployment:
    rule = FullDepth() if layers == LAYERS else FixedCap(0.5)
    return Deployment(Placement(model, layers), rule, kv_rule=KvRule.NONE, **more)


def shape_of(model: LiveModel) -> CacheShape:
    return CacheShape(model.checkpoint.architecture, LAYERS, SLOT_TOKENS, model.dtype)


def room_for(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    monkeypatch.setattr(workspace, "room_for_caches", lambda device, reserve_bytes: n_bytes)


def watching(look: Callable[[LiveEngine, Any], None]) -> Callable[..., None]:
    """Calls it after every iteration, with the engine and the server."""

    def act(env: Any, engine: LiveEngine, server: Any) -> None:
        execute = engine.execute

        def watched(plan: Any, now_ns: int) -> Any:
            outcome = execute(plan, now_ns)
            look(engine, server)
            return outcome

        engine.execute = watched  # type: ignore[method-assign]

    return act


def check_completed(live: Live) -> None:
    assert [r.status.value for r in live.records] == ["completed"] * len(live.records)
    assert live.server.used_blocks == 0


@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 12), st.integers(0, 1 << 22))
def test_slots_and_bytes_are_each_others_inverse(slots: int, tokens: int, layers: int, n_bytes: int) -> None:
    from helios_sim.live.model.architecture import Architecture, Rope

    a = Architecture(
        "llama", n_layers=layers, d_model=8, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=16, vocab_size=32,
        max_context_tokens=512, norm_eps=1e-6, activation="silu", tied_embeddings=True, attention_scale=0.5,
        rope=Rope(1e4),
    )  # fmt: skip
    shape = CacheShape(a, layers, tokens, torch.bfloat16)
    assert shape.slots_in(shape.n_bytes(slots)) >= slots  # alignment may leave room for more
    assert shape.n_bytes(shape.slots_in(n_bytes)) <= n_bytes
    assert shape.n_bytes(shape.slots_in(n_bytes) + 1) > n_bytes or not n_bytes
    assert shape.n_bytes(slots) % ALIGNMENT == 0


def test_switches_and_raises_allocate_nothing(two: dict[str, LiveModel], monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[torch.Tensor] = []
    seen: set[tuple[str, int]] = set()
    make = workspace.written_block

    def counted(n_bytes: int, device: torch.device) -> torch.Tensor:
        blocks.append(make(n_bytes, device))
        return blocks[-1]

    def look(engine: LiveEngine, server: Any) -> None:
        cache, (block,) = engine.work.cache, blocks
        seen.add((cache.architecture.family, len(cache.keys)))
        start, end = block.data_ptr(), block.data_ptr() + len(block)
        places = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in (*cache.keys, *cache.values))
        assert start <= places[0][0]
        assert places[-1][1] <= end
        assert all(a[1] <= b[0] for a, b in pairwise(places))

    def act(env: Any, engine: LiveEngine, server: Any) -> None:
        monkeypatch.setattr(kv, "written_block", None)  # from now on nobody makes a cache
        watching(look)(env, engine, server)

    monkeypatch.setattr(workspace, "written_block", counted)
    after = [whole(LARGE, triggers=SOME), whole(SMALL, 4, triggers=SOME), whole(SMALL)]
    policy = Scripted(whole(SMALL, 2, triggers=SOME), list(after))
    live = serve_live(two, policy, requests(LENGTHS * 2), 2 * N, slots=2, act=act)
    check_completed(live)
    assert len(blocks) == 1
    assert {(SMALL, 2), (LARGE, LAYERS), (SMALL, 4), (SMALL, LAYERS)} <= seen
    assert len(blocks[0]) == max(shape_of(model).n_bytes(2) for model in two.values())


@pytest.mark.parametrize("slots", [1, 2])
def test_fewer_run_together_where_memory_is_short(
    two: dict[str, LiveModel], monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    """The server admits no more than the block holds, and everybody writes what they always write."""
    together: list[int] = []
    block_bytes = 16 * two[SMALL].profile.kv_bytes_per_token(LAYERS)

    def look(engine: LiveEngine, server: Any) -> None:
        together.append(len(engine.work.slots))
        assert server.used_blocks * block_bytes <= engine.work.reserved_bytes

    plain = serve_live(two, whole(SMALL), requests(LENGTHS), N, slots=4)
    room_for(monkeypatch, shape_of(two[LARGE]).n_bytes(slots))
    models = {LARGE: two[LARGE], SMALL: two[SMALL]}
    live = serve_live(models, whole(SMALL), requests(LENGTHS), N, slots=8, act=watching(look))
    check_completed(live)
    assert live.engine.places(LARGE).requests == slots  # type: ignore[union-attr]
    here = live.engine.places(SMALL)
    assert here is not None
    assert slots < here.requests < 8  # the same bytes hold more of a smaller model's texts
    assert max(together) == here.requests
    for record in plain.records:
        assert live.tokens(record.request_id) == plain.tokens(record.request_id)


def test_room_for_not_even_one_request_is_one_message(
    two: dict[str, LiveModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for(monkeypatch, shape_of(two[LARGE]).n_bytes(1) - 1)
    with pytest.raises(UserError, match=f"one request of {SLOT_TOKENS} tokens on {LARGE}"):
        serve_live(two, whole(SMALL), requests(LENGTHS), N)


def test_a_text_longer_than_a_slot_is_dropped_with_its_reason(two: dict[str, LiveModel]) -> None:
    lengths = [*LENGTHS, (SLOT_TOKENS - 10, 11)]  # within the model's context
    live = serve_live(two, whole(SMALL), requests(lengths), N + 1, slots=3)
    assert [r.status.value for r in live.records] == ["completed"] * N + ["dropped"]
    assert f"longer than the {SLOT_TOKENS} tokens" in str(live.records[-1].drop_reason)


def test_models_of_different_formats_share_the_block(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The bytes of one format may be no numbers in another: nobody reads what the model before left there."""
    models = {
        name: live_model(write_tiny("llama", tmp_path_factory.mktemp(name), seed=seed), dtype, name=name)
        for seed, (name, dtype) in enumerate((("single", "float32"), ("half", "bfloat16")))
    }
    alone = serve_live(models, whole("single"), requests(LENGTHS * 2), 2 * N, slots=2)
    turns = [whole("half", triggers=SOME), whole("single", triggers=SOME), whole("half")]
    first = whole("single", triggers=SOME)
    live = serve_live(models, Scripted(first, turns), requests(LENGTHS * 2), 2 * N, slots=2)
    check_completed(live)
    assert {r.model for r in live.records} == {"single", "half"}
    for record in live.records:
        if record.model == "single":  # in bfloat16 who runs together may round otherwise
            assert live.tokens(record.request_id) == alone.tokens(record.request_id)
