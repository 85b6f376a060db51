"""Every family computes what transformers computes: whole, cut at a cap, in segments, in all variants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helios_sim.errors import UserError
from helios_sim.live.checkpoint.source import find_checkpoint
from helios_sim.live.memory.kv import Packed
from helios_sim.live.model.architecture import model_spec
from helios_sim.live.model.decoder import SegmentedModel
from live_example import TOLERANCE, packed_logits, reference_logits, token_ids
from tiny_models import FAMILIES, tiny_model, write_tiny

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied head": ("llama", {"tie_word_embeddings": True}),
    "llama, heads wider than the model": ("llama", {"head_dim": 20}),
    "llama, every head its own K and V": ("llama", {"num_key_value_heads": 4}),
    "llama, linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama 3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "qwen2, own head": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2, sliding from layer 3": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}),
    "opt, gelu": ("opt", {"activation_function": "gelu"}),
    "gpt2, default MLP width": ("gpt2", {"n_inner": None}),
    "gemma3, linear rope in full layers": (
        "gemma3",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[SegmentedModel, Any]:
    """Our model and transformers' own of the same checkpoint."""
    folder = write_tiny(request.param, tmp_path_factory.mktemp(request.param))
    return SegmentedModel.load(find_checkpoint(str(folder))), tiny_model(request.param)


def test_logits_are_those_of_transformers(pair: tuple[SegmentedModel, Any]) -> None:
    model, reference = pair
    ids = token_ids(batch=3, tokens=50)
    torch.testing.assert_close(packed_logits(model, ids), reference_logits(reference, ids), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("cap", [1, 4])
def test_a_cap_gives_the_truncated_model(pair: tuple[SegmentedModel, Any], cap: int) -> None:
    model, reference = pair
    capped = SegmentedModel.load(model.source, layers=cap)
    ids = token_ids(batch=1, tokens=40)
    want = reference_logits(reference, ids, layers=cap)
    torch.testing.assert_close(packed_logits(capped, ids), want, atol=TOLERANCE, rtol=0)
    assert (reference_logits(reference, ids) - want).abs().max() > 0.1  # the cap does change the answer


def test_segments_compose(pair: tuple[SegmentedModel, Any]) -> None:
    model, _ = pair
    ids = token_ids(batch=2, tokens=12)
    assert torch.equal(packed_logits(model, ids, cuts=(1, 2, 5)), packed_logits(model, ids))


def test_padding_at_the_end_changes_nothing_before_it(pair: tuple[SegmentedModel, Any]) -> None:
    model, _ = pair
    ids = token_ids(batch=2, tokens=30)
    padded = ids.clone()
    padded[0, 20:] = 0
    alone = packed_logits(model, ids[:1, :20])
    torch.testing.assert_close(packed_logits(model, padded)[:1, :20], alone, atol=TOLERANCE, rtol=0)


def test_gradients_reach_a_weight_put_in_place(pair: tuple[SegmentedModel, Any]) -> None:
    model, _ = pair
    weights, ids = model.layers[2], token_ids(batch=2, tokens=8)
    frozen, step = weights.mlp_out, Packed(model.architecture, *ids.shape)
    low_rank = torch.zeros(frozen.shape[0], 1, requires_grad=True)
    try:
        weights.mlp_out = frozen + low_rank @ torch.ones(1, frozen.shape[1])
        model.logits(model.run(model.embed(ids.flatten(), step.positions), 0, 4, step)).logsumexp(-1).sum().backward()
    finally:
        weights.mlp_out = frozen
    assert low_rank.grad is not None
    assert low_rank.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_simulator_counts_the_bytes_that_are_resident(pair: tuple[SegmentedModel, Any], dtype: str) -> None:
    model, _ = pair
    spec = model_spec(model.architecture, "tiny", chars_per_token=3.0, dtype=dtype)
    for cap in (1, 6):
        loaded = SegmentedModel.load(model.source, layers=cap, dtype=getattr(torch, dtype))
        assert spec.weight_bytes(cap) == loaded.weight_bytes


def test_bfloat16_stays_close(pair: tuple[SegmentedModel, Any]) -> None:
    """Eight bits of mantissa through six layers: the answer moves by a few hundredths of its spread."""
    model, reference = pair
    ids = token_ids(batch=1, tokens=40)
    rounded = packed_logits(SegmentedModel.load(model.source, dtype=torch.bfloat16), ids).float()
    want = reference_logits(reference, ids)
    assert ((rounded - want).std() / want.std()).item() < 0.05


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_any_precision_are_those_that_transformers_reads(family: str, dtype: str, tmp_path: Path) -> None:
    """Both read the rounded weights into float32."""
    import transformers

    tiny_model(family, 2).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    ids = token_ids(batch=1, tokens=24)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    got = packed_logits(SegmentedModel.load(find_checkpoint(str(tmp_path))), ids)
    torch.testing.assert_close(got, reference_logits(reference, ids), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_a_family(name: str, tmp_path: Path) -> None:
    family, changes = VARIANTS[name]
    model = SegmentedModel.load(find_checkpoint(str(write_tiny(family, tmp_path, layers=4, **changes))))
    reference = tiny_model(family, layers=4, **changes)
    ids = token_ids(batch=1, tokens=100)  # beyond the windows and the original context of llama 3's scaling
    torch.testing.assert_close(packed_logits(model, ids), reference_logits(reference, ids), atol=TOLERANCE, rtol=0)
    spec = model_spec(model.architecture, "tiny", chars_per_token=3.0)
    assert spec.weight_bytes(4) == model.weight_bytes


@pytest.mark.parametrize(
    ("family", "changes", "part"),
    [
        ("opt", {"do_layer_norm_before": False}, "OPT-350m"),
        ("opt", {"word_embed_proj_dim": 24}, "OPT-350m"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ],
)
def test_what_is_not_built_is_refused_by_name(family: str, changes: dict[str, Any], part: str, tmp_path: Path) -> None:
    write_tiny(family, tmp_path, layers=1, **changes)
    with pytest.raises(UserError, match=part):
        find_checkpoint(str(tmp_path))
