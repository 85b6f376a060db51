"""The slot KV cache: chunked prompts and decodes of any lengths give what the whole text gives at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helios_sim.live.checkpoint.source import find_checkpoint
from helios_sim.live.memory.kv import DecodeStep, KvCache, PromptStep
from helios_sim.live.model.decoder import SegmentedModel
from live_example import (
    TOLERANCE,
    decode_logits,
    packed_logits,
    prompt_logits,
    reference_logits,
    token_ids,
)  # fmt: skip
from tiny_models import FAMILIES, SLIDING_WINDOW_TOKENS, tiny_model, write_tiny

SLOTS, MAX_TOKENS = 5, 64


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SegmentedModel:
    return SegmentedModel.load(find_checkpoint(str(write_tiny(request.param, tmp_path_factory.mktemp("tiny")))))


@pytest.fixture
def cache(model: SegmentedModel) -> KvCache:
    """With noise in every slot: nothing of it may ever be read."""
    cache = KvCache(model.architecture, model.n_loaded, SLOTS, MAX_TOKENS)
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_(std=3.0, generator=torch.Generator().manual_seed(1))
    return cache


@pytest.mark.parametrize("chunks", [(40,), (20, 13, 7), (1, 1, 37, 1)])
def test_a_prompt_in_chunks_is_the_whole_prompt(model: SegmentedModel, cache: KvCache, chunks: tuple[int, ...]) -> None:
    ids = token_ids(batch=1, tokens=40)
    got = prompt_logits(model, cache, 3, ids[0], chunks)
    torch.testing.assert_close(got, packed_logits(model, ids)[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("span", [None, 48])
@pytest.mark.parametrize(("slots", "lengths"), [
    ([2], [31]), ([1, 2, 3], [25, 25, 25]), ([1, 2, 3], [40, 3, 17]), ([4, 0, 2], [9, 41, 20]),
])  # fmt: skip
def test_decodes_of_any_lengths_continue_their_texts(
    model: SegmentedModel, cache: KvCache, slots: list[int], lengths: list[int], span: int | None
) -> None:
    ids = token_ids(batch=len(slots), tokens=max(lengths) + 3)
    for slot, length, text in zip(slots, lengths, ids, strict=True):
        prompt_logits(model, cache, slot, text[:length], (length,))
    want, rows = packed_logits(model, ids), torch.arange(len(slots))
    for more in range(3):
        at = [length + more for length in lengths]
        got = decode_logits(model, DecodeStep(cache, slots, at, span), ids[rows, at])
        torch.testing.assert_close(got, want[rows, at], atol=TOLERANCE, rtol=0)


def test_propagation_writes_the_k_and_v_that_a_run_would(model: SegmentedModel, cache: KvCache) -> None:
    ids = token_ids(batch=1, tokens=20)[0]
    prompt_logits(model, cache, 2, ids, (20,))
    hidden = torch.randn(1, model.architecture.d_model, generator=torch.Generator().manual_seed(2))
    step = DecodeStep(cache, [2], [20])
    for layer in range(model.n_loaded):
        with torch.no_grad():
            model.run(hidden, layer, layer + 1, step)
            run = cache.keys[layer][2, :, 20].clone(), cache.values[layer][2, :, 20].clone()
            cache.keys[layer][2, :, 20], cache.values[layer][2, :, 20] = 0.0, 0.0
            model.propagate(hidden, layer, layer + 1, step)
        torch.testing.assert_close(cache.keys[layer][2, :, 20], run[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(cache.values[layer][2, :, 20], run[1], atol=1e-5, rtol=0)


def test_greedy_generation_is_that_of_transformers(model: SegmentedModel, cache: KvCache) -> None:
    ids, new = token_ids(batch=1, tokens=12), SLIDING_WINDOW_TOKENS + 8
    reference = tiny_model(model.architecture.family)
    tokens = [int(prompt_logits(model, cache, 1, ids[0], (12,))[-1].argmax())]
    while len(tokens) < new:
        step = DecodeStep(cache, [1], [12 + len(tokens) - 1])
        tokens.append(int(decode_logits(model, step, torch.tensor(tokens[-1:])).argmax()))
    want = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None
    )
    assert tokens == want[0, 12:].tolist()


def test_a_cap_is_raised_and_lowered_in_place(model: SegmentedModel) -> None:
    ids, reference = token_ids(batch=1, tokens=10), tiny_model(model.architecture.family)
    moving = SegmentedModel.load(model.source, layers=2)
    cache = KvCache(model.architecture, 2, 1, 16)
    for cap in (2, 5, 3, 6):
        moving.drop_layers(cap)
        moving.load_layers(cap)
        cache.resize(cap)
        got = prompt_logits(moving, cache, 0, ids[0], (10,))
        torch.testing.assert_close(got, reference_logits(reference, ids, cap)[0], atol=TOLERANCE, rtol=0)
        assert (moving.n_loaded, len(cache.keys)) == (cap, cap)


def test_nothing_is_written_past_a_slot(model: SegmentedModel, cache: KvCache) -> None:
    for wrong in (
        lambda: PromptStep(cache, 0, 10, MAX_TOKENS - 9),
        lambda: DecodeStep(cache, [0], [MAX_TOKENS]),
        lambda: DecodeStep(cache, [SLOTS], [3]),
    ):
        with pytest.raises(ValueError, match="slots of"):
            wrong()


def test_cache_bytes_are_those_of_the_spec(model: SegmentedModel, cache: KvCache) -> None:
    from helios_sim.live.model.architecture import model_spec

    spec: Any = model_spec(model.architecture, "tiny", chars_per_token=3.0)
    assert cache.kv_bytes == spec.kv_bytes_per_token_layer * SLOTS * MAX_TOKENS * model.n_loaded
