"""What a live server writes at full depth is, token for token, what transformers writes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helios_sim.exits.rule import FixedCap, FullDepth
from helios_sim.live.served import LiveModel
from helios_sim.policy.deployment import Deployment, KvRule, Placement
from live_example import layers_of
from live_rig import LAYERS, Live, RepeatedText, live_model, requests, serve_live
from tiny_models import FAMILIES, tiny_model, write_tiny

# more requests than slots, prompts longer than a chunk and of one token, answers of one token
LENGTHS = [(12, 20), (40, 9), (1, 30), (70, 12), (25, 1), (33, 24), (8, 16), (19, 27), (50, 5), (3, 18), (61, 20)]


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, LiveModel]:
    return request.param, live_model(write_tiny(request.param, tmp_path_factory.mktemp("tiny")))


def generated(family: str, prompt: list[int], tokens: int, layers: int = LAYERS) -> list[int]:
    """transformers' greedy answer, of the model cut after `layers` layers."""
    reference = tiny_model(family)
    owner, name = layers_of(reference)
    setattr(owner, name, getattr(owner, name)[:layers])
    reference.config.num_hidden_layers = layers
    ids = torch.tensor([prompt])
    out = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None
    )
    return out[0, len(prompt) :].tolist()


def check_tokens(family: str, live: Live, layers: int = LAYERS) -> None:
    assert [r.status.value for r in live.records] == ["completed"] * len(live.records)
    for record in live.records:
        prompt = live.prompt(record.request_id)
        assert len(prompt) == record.prompt_tokens
        assert live.tokens(record.request_id) == generated(family, prompt, record.output_tokens, layers)


def full_depth(cap: int = LAYERS) -> Deployment:
    return Deployment(Placement("tiny", cap), FullDepth(), kv_rule=KvRule.NONE)


def test_full_depth_writes_what_transformers_writes(tiny: tuple[str, LiveModel]) -> None:
    family, model = tiny
    live = serve_live({"tiny": model}, full_depth(), requests(LENGTHS), len(LENGTHS), slots=4, max_batch_tokens=24)
    check_tokens(family, live)
    assert live.run.stats.preemptions == 0


def test_preempted_requests_write_the_same(tiny: tuple[str, LiveModel]) -> None:
    family, model = tiny
    live = serve_live(
        {"tiny": model}, full_depth(), requests(LENGTHS), len(LENGTHS), slots=6, max_batch_tokens=40, kv_blocks=14,
        block_tokens=8,
    )  # fmt: skip
    check_tokens(family, live)
    assert live.run.stats.preemptions > 0


def test_a_cap_is_the_truncated_model(tiny: tuple[str, LiveModel]) -> None:
    family, model = tiny
    deployment = Deployment(Placement("tiny", 4), FixedCap(0.5), kv_rule=KvRule.NONE)
    live = serve_live({"tiny": model}, deployment, requests(LENGTHS[:6]), 6)
    check_tokens(family, live, layers=4)
    assert all(set(live.depths(r.request_id)) == {4} for r in live.records)


def test_the_vocabulary_is_looked_through_once_not_for_every_prompt(tiny: tuple[str, LiveModel]) -> None:
    """Making a dictionary of it takes tens of milliseconds for a real model, in the middle of serving."""
    _, served = tiny
    asked: list[bool] = []

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(served.tokenizer, name)

        def __call__(self, *given: object, **settings: object) -> object:
            return served.tokenizer(*given, **settings)

        def get_vocab(self) -> dict[str, int]:
            asked.append(True)
            return served.tokenizer.get_vocab()

    model = replace(served, tokenizer=Counting())
    first = next(requests([(12, 3)])).rows()
    ids = [model.prompt_ids(request, RepeatedText(), n) for request in first for n in (3, 12, 24)]
    assert [len(found) for found in ids] == [3, 12, 24]
    assert len(asked) == 1
