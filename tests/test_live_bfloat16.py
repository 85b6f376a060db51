"""In bfloat16 two right programs differ by rounding: tokens are transformers' wherever its first choice is clear."""

from __future__ import annotations

import pytest
import torch

from helios_sim.exits.rule import FullDepth
from helios_sim.live.served import LiveModel
from helios_sim.policy.deployment import Deployment, KvRule, Placement
from live_example import reference_logits
from live_rig import LAYERS, live_model, requests, serve_live
from tiny_models import FAMILIES, tiny_model, write_tiny

LENGTHS = [(12, 20), (40, 9), (1, 30), (70, 12), (25, 10), (33, 24)]


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, LiveModel]:
    folder = write_tiny(request.param, tmp_path_factory.mktemp("tiny"))
    return request.param, live_model(folder, dtype="bfloat16")


def test_tokens_are_the_clear_first_choices(tiny: tuple[str, LiveModel]) -> None:
    """What rounding moves a logit by is measured: transformers in bfloat16 against transformers in float32.

    A chosen token may lie below the first choice by twice that, once for either of the two logits.
    """
    family, model = tiny
    whole = Deployment(Placement("tiny", LAYERS), FullDepth(), kv_rule=KvRule.NONE)
    live = serve_live({"tiny": model}, whole, requests(LENGTHS), len(LENGTHS), slots=4)
    exact, rounded = tiny_model(family), tiny_model(family).to(torch.bfloat16)
    gaps, floor, spread = [], 0.0, 0.0
    for record in live.records:
        prompt, tokens = live.prompt(record.request_id), live.tokens(record.request_id)
        ids = torch.tensor([[*prompt, *tokens]])
        of_answer = slice(len(prompt) - 1, -1)
        want = reference_logits(exact, ids)[0, of_answer]
        floor = max(floor, float((reference_logits(rounded, ids)[0, of_answer].float() - want).abs().max()))
        spread = max(spread, float(want.std()))
        gaps += (want.max(-1).values - want[range(len(tokens)), tokens]).tolist()
    print(f"{family}: rounding moves logits by up to {floor:.3f}, of a spread of {spread:.2f}")
    assert max(gaps) <= 2 * floor
    assert 2 * floor < spread  # a token at random lies two or three spreads below the first
    assert sum(gap == 0.0 for gap in gaps) > 0.9 * len(gaps)


def test_the_engine_keeps_bfloat16(tiny: tuple[str, LiveModel]) -> None:
    _, model = tiny
    whole = Deployment(Placement("tiny", LAYERS), FullDepth(), kv_rule=KvRule.NONE)
    live = serve_live({"tiny": model}, whole, requests(LENGTHS[:1]), 1)
    cache = live.engine.work.cache
    assert {t.dtype for t in (*cache.keys, *cache.values)} == {torch.bfloat16}
    resident = live.engine.residents.running("tiny", LAYERS)
    assert resident.weight_bytes == model.profile.weight_bytes(LAYERS)
