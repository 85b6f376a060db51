"""Families of dense decoder-only models, by Hugging Face's names, and what a family implies for its layers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """Properties that follow from a config's family. Norms and biases count, so bytes are those of the checkpoint."""

    gated_mlp: bool = True
    bias: bool = False  # LayerNorm and biases everywhere
    linear_bias: bool = False  # biases of all products of a layer, without those of norms
    qkv_bias: bool = False
    learned_positions: bool = False
    tied: bool = False  # default if the config does not say
    further_norms: int = 0  # values of a layer's norms beyond 2 d_model, in multiples of d_model
    head_norms: bool = False  # norms of each q and k head
    wide_norms: bool = False  # norms over all q heads and all k heads
    grouped: bool = True  # may have fewer KV heads than heads
    needs: tuple[str, ...] = ()  # keys that a config must have, since defaults differ within the family
    every: int = 1  # with windows: the last of so many layers has none; 1: all layers have one


_PLAIN = Family()
_KV, _HEAD, _WINDOW = "num_key_value_heads", "head_dim", "sliding_window"
_QWEN_3 = Family(head_norms=True, needs=(_KV, _HEAD))
FAMILIES = {
    "llama": _PLAIN, "mistral": Family(needs=(_KV, _WINDOW)), "granite": _PLAIN, "phi3": _PLAIN, "olmo": _PLAIN,
    "smollm3": Family(tied=True, needs=(_KV,)), "olmo2": Family(wide_norms=True),
    "qwen2": Family(qkv_bias=True, needs=(_KV,)), "qwen3": _QWEN_3, "qwen3_vl_text": _QWEN_3,
    "exaone4": Family(head_norms=True, needs=(_KV, _WINDOW)), "gemma": Family(tied=True, needs=(_KV, _HEAD)),
    "gemma2": Family(tied=True, further_norms=2, every=2, needs=(_KV, _HEAD, _WINDOW)),
    "gemma3_text": Family(tied=True, further_norms=2, head_norms=True, every=6, needs=(_KV, _HEAD, _WINDOW)),
    "stablelm": Family(further_norms=2, needs=(_KV,)),
    "phi": Family(gated_mlp=False, linear_bias=True), "falcon": Family(gated_mlp=False, tied=True),
    "opt": Family(False, True, learned_positions=True, tied=True, grouped=False),
    "gpt2": Family(False, True, learned_positions=True, tied=True, grouped=False),
    "gpt_neox": Family(False, True, grouped=False), "starcoder2": Family(False, True, tied=True, needs=(_KV,)),
}  # fmt: skip
WINDOW_IF_ASKED = ("qwen2", "qwen3", "qwen3_vl_text", "smollm3")  # families that need use_sliding_window for windows


def other_values(
    family: Family, d_model: int, d_ff: int, heads: int, kv_heads: int, head_dim: int, *, qkv_bias: bool = False,
    further_norms: int = 0,
) -> int:  # fmt: skip
    """Weights of a layer beyond `ModelSpec.layer_values`. The last two arguments add to the family's properties.

    Only OLMo is not met to the byte: its norms, which have no weights, count 2 d_model values.
    """
    q_width, kv_width = heads * head_dim, kv_heads * head_dim
    qkv_bias = not family.bias and (qkv_bias or family.qkv_bias or family.linear_bias)
    found = q_width + 2 * kv_width if qkv_bias else 0
    found += 2 * d_model + d_ff if family.linear_bias else 0
    found += q_width + kv_width if family.wide_norms else 0
    found += 2 * head_dim if family.head_norms else 0
    return found + (family.further_norms + further_norms) * d_model


def windows_of(window: int, every: int, layers: int) -> tuple[int, ...]:
    """The attention window of each layer: `window` tokens, or 0 (none) for the last of every `every` layers."""
    return tuple(0 if every > 1 and (layer + 1) % every == 0 else window for layer in range(layers))


# Keys that may only be null or have one of these values: any other asks for something that is not priced.
REFUSED = {
    "add_cross_attention": ((False,), "cross attention"), "cross_attention_layers": ((), "cross attention"),
    "use_bidirectional_attention": ((False,), "attention to what follows"),
    "attention_chunk_size": ((), "attention within chunks"), "num_kv_shared_layers": ((0,), "K and V of other layers"),
    **dict.fromkeys(("enable_bias", "use_bias", "layer_norm_elementwise_affine"), ((True,), "a layer without biases")),
    "is_causal": ((True,), "attention to what follows"), "quantization": ((), "weights quantized as MLX does"),
    "mlp_type": (("default",), "a gated MLP"),
    "pruned_heads": ((), "layers with fewer heads"), "block_configs": ((), "layers that differ"),
}
