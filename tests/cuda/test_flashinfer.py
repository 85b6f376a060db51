"""Attention of captured decodes by FlashInfer, where it is asked for: the same tokens, and no for what it cannot do."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")  # there is none for macOS and Windows

from test_on_card import said, served

from fake_flashinfer import PAGE, BatchDecodeWithPagedKVCacheWrapper, ExactPaged, installed
from helios_sim.errors import UserError
from helios_sim.exits.rule import Confidence, FullDepth
from helios_sim.live.checkpoint.random_weights import draw
from helios_sim.live.kernels import first_contact
from helios_sim.live.kernels.choice import described, kernels_for
from helios_sim.live.memory import paged, workspace
from helios_sim.live.memory.kv import CacheShape
from helios_sim.live.model.architecture import Architecture
from helios_sim.live.one_pass import OnePass
from helios_sim.live.served import LiveModel
from helios_sim.policy.deployment import BatchingRule, Deployment, KvRule, Placement
from live_rig import LAYERS, live_model
from strict_cuda import StrictCuda
from test_live_exits import deployed, rule_of
from tiny_models import write_tiny

CARD = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LiveModel:
    return live_model(write_tiny("llama", tmp_path_factory.mktemp("llama")))


@pytest.mark.parametrize("kind", ["full depth", "one pass", "bands", "owed tokens"])
def test_it_writes_what_a_cpu_writes(tiny: LiveModel, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of decodes has a plan of its own, made outside of captures, in memory that nothing reads any more."""
    width = tiny.checkpoint.architecture.head_dim
    monkeypatch.setattr(paged, "WIDTHS", (width,))
    monkeypatch.setattr(paged, "DTYPE", torch.float32)
    deployment = Deployment(Placement("tiny", LAYERS), FullDepth(), kv_rule=KvRule.NONE)
    if kind != "full depth":
        rule = rule_of(tiny, Confidence.MAX_PROBABILITY)
        kv = KvRule.RECOMPUTE if kind == "owed tokens" else KvRule.PROPAGATE
        deployment = deployed(rule, kv, BatchingRule.EACH_TOKEN)
    if kind == "bands":
        monkeypatch.setattr(OnePass, "pays", lambda one_pass, rows: False)
    cuda = StrictCuda()
    with installed(cuda, widths=(width,), types=(torch.float32,)) as wrapper:
        on_card = served(cuda, tiny, deployment, ExactPaged(), schedule_ahead=int(kind == "full depth"))
    assert said(on_card) == said(served(None, tiny, deployment))
    assert wrapper.plans > 10


def test_a_plan_waits_for_the_one_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrapper writes every plan to the same page-locked memory, from which the card may still be copying."""
    events: list[str] = []

    class Wrapper:
        def __init__(self, *given: object, **named: object) -> None:
            events.append("made")

        def plan(self, *given: object, **named: object) -> None:
            events.append("planned")

    def mark() -> SimpleNamespace:
        number = events.count("marked")
        events.append("marked")
        return SimpleNamespace(synchronize=lambda: events.append(f"waited for {number}"))

    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper))
    monkeypatch.setattr(paged, "WORKSPACE_BYTES", 16)
    shape = SimpleNamespace(n_heads=4, n_kv_heads=2, head_dim=2, attention_scale=0.125)
    cache = SimpleNamespace(
        architecture=shape, kernels=SimpleNamespace(page_tokens=PAGE), max_tokens=4 * PAGE, device=torch.device("cpu"),
        dtype=torch.bfloat16,
    )  # fmt: skip
    plans = paged.Plans(cache, SimpleNamespace(mark=mark), 2)  # type: ignore[arg-type]
    plans.ready(2)
    plans.plan(2, [1, 0], [5, 17])
    first, second = ["waited for 0", "planned", "marked"], ["waited for 1", "planned", "marked"]
    assert events == ["marked", "made", *first, *second]


def of_shape(name: str) -> Architecture:
    return draw(f"random:{name}").architecture


def test_its_workspace_suffices_for_every_batch_that_is_captured() -> None:
    """By the sizes of its plan: 64 heads need more than it recommends, and more than 256 MiB for 512 rows."""
    assert paged.workspace_bytes(of_shape("llama-3-8b"), 64, 132) == 128 << 20
    # 8 queries of a KV head, two requests of them to a tile of 16: 64 heads, 256 + 511 tiles, in float32
    assert paged.workspace_bytes(of_shape("codellama-34b"), 512, 132) == 64 * (256 + 511) * 16 * 129 * 4 + 32
    assert paged.workspace_bytes(of_shape("llama-2-7b"), 512, 132) > 128 << 20
    for name in ("llama-2-7b", "llama-3-8b", "codellama-34b"):
        found = [paged.workspace_bytes(of_shape(name), rows, 132) for rows in range(1, 513)]
        assert found == sorted(found)


def test_what_it_takes_of_the_card_is_left_free_by_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its workspace, 8 MiB of each batch size for a plan, and the pages' numbers."""
    a, page = replace(of_shape("llama-3-8b"), n_layers=1), PAGE
    free, reserve = 40 << 30, 1 << 30
    monkeypatch.setattr(workspace, "room_for_caches", lambda on, kept: rooms.append(kept) or free - kept)
    rooms: list[int] = []
    for kernels in (SimpleNamespace(page_tokens=page), SimpleNamespace(page_tokens=0)):
        device = SimpleNamespace(
            torch_device=torch.device("meta"), kernels=kernels, captures=True, release=lambda: None
        )
        shapes = {"a": CacheShape(a, 1, 2048, torch.bfloat16)}
        work = workspace.Workspace(shapes, 64, device, reserve)  # type: ignore[arg-type]
        monkeypatch.setattr(work, "_cache", lambda *given: None)
        work.reserve()
    sizes = [1, 2, 4, *range(8, 65, 8), 128]
    plans = (128 << 20) + len(sizes) * (8 << 20) + sum(4 * (n * 2048 // page + 2 * n + 1) for n in sizes)
    assert rooms == [reserve + plans, reserve]


def test_pages_are_the_cache_itself() -> None:
    """Page p of head h of slot s is where the slot has these tokens, and the last one ends where the cache does."""
    slots, heads, tokens, width = 3, 2, 4 * PAGE, 8
    cache = torch.arange(slots * heads * tokens * width).view(slots, heads, tokens, width)
    found = paged.pages(cache, PAGE)
    assert found.data_ptr() == cache.data_ptr()
    for slot in range(slots):
        for page in range(tokens // PAGE):
            there = found[slot * heads * (tokens // PAGE) + page]
            assert torch.equal(there, cache[slot, :, page * PAGE : (page + 1) * PAGE])
    assert int(found[-1, -1, -1, -1]) == int(cache[-1, -1, -1, -1])


def test_slots_are_whole_pages_and_what_it_cannot_run_is_refused_by_name(tiny: LiveModel) -> None:
    a = replace(tiny.checkpoint.architecture, head_dim=64, max_context_tokens=128)

    def tokens(a: Architecture, dtype: torch.dtype = torch.bfloat16, at_least: int = 33) -> int:
        return paged.paged_tokens(a, "tiny", dtype, at_least, PAGE)

    assert [tokens(a, at_least=n) for n in (1, 16, 33, 128)] == [16, 16, 48, 128]
    for other, dtype, why in (
        (replace(a, head_dim=96), torch.bfloat16, "64, 128 or 256"),
        (replace(a, window_tokens=8, sliding=(True,) * LAYERS), torch.bfloat16, "sliding windows"),
        (a, torch.float32, "bfloat16"),
    ):
        with pytest.raises(UserError, match=f"live.kernels.*{why}"):
            tokens(other, dtype)
    with pytest.raises(UserError, match="whole pages"):
        tokens(replace(a, max_context_tokens=40))


def test_it_is_never_chosen_and_never_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(first_contact, "fault", lambda device: None)
    with pytest.raises(UserError, match=r"live\.kernels.*CUDA card"):
        kernels_for(torch.device("cpu"), "flashinfer")
    if find_spec("flashinfer") is None:
        with pytest.raises(UserError, match=r"live\.kernels.*flashinfer-python"):
            kernels_for(CARD, "flashinfer")
    with installed(StrictCuda()):
        assert kernels_for(CARD).name == "triton"
        assert kernels_for(CARD, "flashinfer").page_tokens == PAGE
        assert "FlashInfer 0.7.4" in described(kernels_for(CARD, "flashinfer"))


def test_the_stand_in_takes_what_the_real_wrapper_takes() -> None:
    """All arguments by the same names, in the same places."""
    pytest.importorskip("flashinfer")
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper as Real

    # `plan` passes what it is given by name on to another function.
    plan = getattr(Real, "_plan_impl", Real.plan)
    for mine, theirs in (("__init__", Real.__init__), ("plan", plan), ("run", Real.run)):
        given = inspect.signature(getattr(BatchDecodeWithPagedKVCacheWrapper, mine)).parameters
        real = inspect.signature(theirs).parameters
        assert set(given) <= set(real)
        ordered = [name for name, of in given.items() if of.kind is of.POSITIONAL_OR_KEYWORD]
        assert list(real)[: len(ordered)] == ordered
