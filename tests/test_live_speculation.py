"""Self-speculation on real models: the text of full depth, and the acceptance that its exits predict."""

from __future__ import annotations

from pathlib import Path

import pytest

from helios_sim.exits.rule import SelfSpeculation
from helios_sim.live.answers import score
from helios_sim.live.served import LiveModel
from helios_sim.policy.deployment import Completed, Deployment, KvRule, Placement
from live_rig import LAYERS, Live, live_model, requests, serve_live
from rig import Scripted
from test_live_tokens import LENGTHS, check_tokens
from tiny_models import FAMILIES, write_tiny

DRAFTS = 3


def speculating(exit_layers: int, drafts: int = DRAFTS, largest_batch: int | None = None, **more: object) -> Deployment:
    rule = SelfSpeculation(exit_layers, drafts, largest_batch)
    return Deployment(Placement("tiny", LAYERS), rule, kv_rule=KvRule.NONE, **more)


def predicted(live: Live, model: LiveModel, exit_layers: int) -> tuple[int, int]:
    """Drafts that are made and accepted where each exit says what one pass over the whole text has it say."""
    drafted = accepted = 0
    with live.engine.residents.whole("tiny") as whole:
        for record in live.records:
            answer = live.engine.answers[record.request_id]
            seen = score(model, whole, live.engine.residents.exits("tiny"), answer, SelfSpeculation(exit_layers, 1), 0)
            agrees = seen.agrees[:, model.exits.index(exit_layers)].tolist()
            at = 1  # the prompt gives the first token
            while at < len(agrees):
                most = min(DRAFTS, len(agrees) - at - 1)
                taken = next((n for n in range(most) if not agrees[at + n]), most)
                drafted, accepted, at = drafted + most, accepted + taken, at + taken + 1
    return drafted, accepted


@pytest.mark.parametrize(("family", "exit_layers"), [*((family, 2) for family in FAMILIES), ("qwen2", 4)])
def test_the_text_is_that_of_full_depth(family: str, exit_layers: int, tmp_path: Path) -> None:
    """Token for token what transformers writes; prompts run in chunks beside; requests draft unlike numbers."""
    model = live_model(write_tiny(family, tmp_path))
    live = serve_live(
        {"tiny": model}, speculating(exit_layers), requests(LENGTHS), len(LENGTHS), slots=4, max_batch_tokens=24
    )
    check_tokens(family, live)
    stats = live.run.stats
    assert (stats.drafted_tokens, stats.accepted_drafts) == predicted(live, model, exit_layers)
    assert stats.accepted_drafts > 0
    assert 0 < stats.draft_ns < stats.busy_ns
    assert {depth for r in live.records for depth in live.depths(r.request_id)} == {LAYERS}
    assert all(r.layers_run == LAYERS * r.output_tokens for r in live.records)
    assert live.server.used_blocks == 0


def test_preempted_requests_and_changes_of_the_drafts_write_the_same(tmp_path: Path) -> None:
    """Memory for some of the requests; the drafts change while they run, and stop where more than two decode."""
    model = live_model(write_tiny("qwen2", tmp_path))
    script = Scripted(
        speculating(4, triggers=(Completed(2),)),
        [speculating(4, 1, triggers=(Completed(2),)), speculating(2, 5, 2, triggers=(Completed(2),)), speculating(4)],
    )
    live = serve_live(
        {"tiny": model}, script, requests(LENGTHS), len(LENGTHS), slots=8, kv_blocks=11, block_tokens=8,
        max_batch_tokens=40,
    )  # fmt: skip
    check_tokens("qwen2", live)
    assert live.run.stats.preemptions
    assert live.run.stats.accepted_drafts


def test_a_number_that_is_none_is_a_failure_of_its_request(tmp_path: Path) -> None:
    """With a layer of NaN the verification has no token to give."""
    folder = write_tiny("llama", tmp_path)
    model = live_model(folder)

    def spoil(env, engine, server) -> None:
        engine.residents.running("tiny", LAYERS).layers[LAYERS - 1].mlp_out.fill_(float("nan"))

    live = serve_live({"tiny": model}, speculating(2), requests(LENGTHS[:2]), 2, slots=2, act=spoil)
    assert {r.status.value for r in live.records} == {"dropped"}
    assert all("computed no number" in (r.drop_reason or "") for r in live.records)
