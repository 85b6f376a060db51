"""Another model drafts, live: the text of full depth, the drafts that one pass predicts, and memory for both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from helios_sim.errors import UserError
from helios_sim.exits.rule import DraftModel, FullDepth
from helios_sim.live.answers import agreements
from helios_sim.live.served import LiveModel
from helios_sim.policy.deployment import Completed, Deployment, KvRule, Placement
from helios_sim.policy.registry import make_policy
from live_example import layers_of
from live_rig import LAYERS, Live, live_model, requests, serve_live
from rig import Scripted
from test_live_memory import room_for
from test_live_tokens import LENGTHS, check_tokens
from tiny_models import FAMILIES, tiny_model, tiny_tokenizer, write_tiny

DRAFTS, SHALLOW = 3, 4
MODEL, DRAFTER = "tiny", "drafter"


def write_shallow(family: str, folder: Path, layers: int = SHALLOW) -> Path:
    """The first layers of `write_tiny`'s model, with its norm and head: often right, not always."""
    reference = tiny_model(family)
    owner, name = layers_of(reference)
    setattr(owner, name, getattr(owner, name)[:layers])
    reference.config.num_hidden_layers = layers
    if (kinds := getattr(reference.config, "layer_types", None)) is not None:
        reference.config.layer_types = kinds[:layers]
    reference.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def pair_of(family: str, folder: Path, drafter: Path | None = None, layers: int = SHALLOW) -> dict[str, LiveModel]:
    drafter = drafter or write_shallow(family, folder / DRAFTER, layers)
    exits = tuple(range(2, layers + 1, 2))
    return {
        MODEL: live_model(write_tiny(family, folder / MODEL)),
        DRAFTER: live_model(drafter, exits=exits, name=DRAFTER),
    }


def drafting(drafts: int = DRAFTS, largest_batch: int | None = None, layers: int = SHALLOW, **more: Any) -> Deployment:
    rule = DraftModel(DRAFTER, drafts, largest_batch)
    return Deployment(Placement(MODEL, LAYERS), rule, (Placement(DRAFTER, layers),), kv_rule=KvRule.NONE, **more)


def predicted(live: Live, models: Mapping[str, LiveModel]) -> tuple[int, int]:
    """Drafts that are made and accepted where the drafter says what one pass of it over the whole text says."""
    drafted = accepted = 0
    with live.engine.residents.whole(DRAFTER) as drafter:
        for record in live.records:
            agrees, at = agreements(drafter, live.engine.answers[record.request_id]), 1  # the prompt gives the first
            while at < len(agrees):
                most = min(DRAFTS, len(agrees) - at - 1)
                taken = next((n for n in range(most) if not agrees[at + n]), most)
                drafted, accepted, at = drafted + most, accepted + taken, at + taken + 1
    return drafted, accepted


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_that_of_full_depth(family: str, tmp_path: Path) -> None:
    """Token for token what transformers writes; prompts run in chunks beside, in both; no block is left."""
    models = pair_of(family, tmp_path)
    live = serve_live(models, drafting(), requests(LENGTHS[:8]), 8, slots=4, max_batch_tokens=24)
    check_tokens(family, live)
    stats = live.run.stats
    assert (stats.drafted_tokens, stats.accepted_drafts) == predicted(live, models)
    assert stats.drafted_tokens > stats.accepted_drafts > 0
    assert 0 < stats.draft_ns < stats.busy_ns
    assert all(r.layers_run == LAYERS * r.output_tokens for r in live.records)
    assert live.server.used_blocks == 0


def test_a_drafter_that_is_the_model_is_always_right(tmp_path: Path) -> None:
    """Each pass is accepted as a whole, so that its last draft is read with the next ones."""
    models = pair_of("llama", tmp_path, layers=LAYERS)
    live = serve_live(models, drafting(layers=LAYERS), requests(LENGTHS[:6]), 6, slots=4)
    check_tokens("llama", live)
    assert live.run.stats.accepted_drafts == live.run.stats.drafted_tokens > 0


def test_preempted_requests_and_changes_of_the_drafts_write_the_same(tmp_path: Path) -> None:
    """Memory for some of the requests; drafts begin, change, pause where more than two decode, and end."""
    models, then = pair_of("qwen2", tmp_path), {"triggers": (Completed(2),)}
    plain = Deployment(Placement(MODEL, LAYERS), FullDepth(), kv_rule=KvRule.NONE, **then)
    script = Scripted(plain, [drafting(2, **then), drafting(5, 2, **then), plain, drafting(1, **then), drafting(4)])
    live = serve_live(
        models, script, requests(LENGTHS), len(LENGTHS), slots=8, kv_blocks=22, block_tokens=8, max_batch_tokens=40
    )
    check_tokens("qwen2", live)
    assert live.run.stats.preemptions
    assert live.run.stats.accepted_drafts
    assert live.run.stats.loads == 2
    assert live.server.used_blocks == 0


def test_memory_is_counted_for_both_and_lies_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many blocks as the simulation counts; where memory is short, as many requests as both caches hold."""
    models = pair_of("llama", tmp_path)
    profiles = {name: model.profile for name, model in models.items()}
    token_bytes = {name: p.kv_bytes_per_token(p.model.n_layers) for name, p in profiles.items()}
    live = serve_live(models, drafting(), requests(LENGTHS[:4]), 4, kv_blocks=30, slots=3)
    blocks = 30 * token_bytes[MODEL] // sum(token_bytes.values())
    assert live.server._replica.state.total_blocks == blocks
    work = live.engine.work
    assert work.reserved_bytes == sum(work._shapes[name].n_bytes(3) for name in models)
    assert work.beside is not None
    assert work.cache.kv_bytes + work.beside.kv_bytes == 3 * 96 * sum(token_bytes.values())
    room_for(monkeypatch, work.reserved_bytes - 1)
    short = serve_live(models, drafting(), requests(LENGTHS[:4]), 4, kv_blocks=30, slots=3)
    assert short.engine.places(MODEL).requests == 2  # type: ignore[union-attr]
    assert [short.tokens(n) for n in range(4)] == [live.tokens(n) for n in range(4)]
    room_for(monkeypatch, work.reserved_bytes // 3 - 1)
    with pytest.raises(UserError, match=f"one request on {MODEL} and {DRAFTER}"):
        serve_live(models, drafting(), requests(LENGTHS[:4]), 4, kv_blocks=30, slots=3)


def test_a_drafter_that_is_no_help_costs_no_token(tmp_path: Path) -> None:
    """Of another family, with a shorter context than the longest texts, and of another format."""
    folder = write_tiny("gpt2", tmp_path / "other", layers=2, seed=5, max_position_embeddings=40)
    models = pair_of("llama", tmp_path, folder, 2)
    models[DRAFTER] = live_model(folder, "bfloat16", (2,), DRAFTER)
    live = serve_live(models, drafting(layers=2), requests(LENGTHS[:7]), 7, slots=4, max_batch_tokens=24)
    check_tokens("llama", live)
    assert live.run.stats.drafted_tokens > 0


def test_numbers_that_are_none_in_the_drafter_fail_nobody(tmp_path: Path) -> None:
    models = pair_of("llama", tmp_path)

    def spoil(env: Any, engine: Any, server: Any) -> None:
        engine.residents.running(DRAFTER, SHALLOW).layers[1].mlp_out.fill_(float("nan"))

    lengths = [each for each in LENGTHS[:7] if each[1] > 2]  # so that each drafts
    live = serve_live(models, drafting(), requests(lengths), len(lengths), slots=4, act=spoil)
    check_tokens("llama", live)
    assert not any(torch.isnan(t[s]).any() for t in live.engine.work._tensors() for s in range(4))


def test_the_policy_decides_live(tmp_path: Path) -> None:
    """The number of drafts follows what is accepted; the drafter of other tokens is refused by name."""
    models = pair_of("llama", tmp_path)
    settings = {"draft_tokens": 3, "review_requests": 3}
    live = serve_live(models, make_policy("draft_model", settings), requests(LENGTHS[:8]), 8, slots=4)
    check_tokens("llama", live)
    assert {d.deployment.exit_rule.drafter for d in live.server.decisions} == {DRAFTER}
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path / DRAFTER)
    other = models | {DRAFTER: live_model(tmp_path / DRAFTER, exits=(2, 4), name=DRAFTER)}
    with pytest.raises(UserError, match=r"policy\.drafter.*tokenizer of tiny"):
        serve_live(other, make_policy("draft_model"), requests(LENGTHS[:1]), 1)


def test_who_leaves_and_the_end_leave_nothing_of_either(tmp_path: Path) -> None:
    """A request is cancelled in the middle of its answer; when the engine closes, all memory is given back."""
    models, gone = pair_of("llama", tmp_path), 3

    def act(env: Any, engine: Any, server: Any) -> None:
        execute, seen = engine.execute, []

        def counted(plan: Any, now_ns: int) -> Any:
            answer = engine.answers.get(gone)
            if not seen and answer is not None and len(answer.tokens) >= 2:
                assert answer.read
                seen.append(env.call(lambda: server.cancel(gone)))
            return execute(plan, now_ns)

        engine.execute = counted

    live = serve_live(models, drafting(), requests(LENGTHS[:6]), 6, slots=3, act=act)
    assert {r.request_id: r.drop_reason for r in live.records if r.status.value == "dropped"} == {gone: "cancelled"}
    engine = live.engine
    assert gone not in engine.work.slots
    assert live.server.used_blocks == 0
    engine.close()
    assert (engine.work.beside, engine.work._beside, engine.work._block) == (None, None, None)
    assert not engine.residents.layers
