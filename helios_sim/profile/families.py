"""Families of dense decoder-only models: what the family's name alone says of a layer, as Hugging Face names them."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """What follows from a config's family alone. Norms and biases count, so that bytes are those of the checkpoint."""

    gated_mlp: bool = True
    bias: bool = False  # LayerNorm and biases everywhere
    linear_bias: bool = False  # biases of all products of a layer, without those of norms
    qkv_bias: bool = False
    learned_positions: bool = False
    tied: bool = False  # where the config does not say
    further_norms: int = 0  # values of a layer's norms beyond 2 d_model, in multiples of d_model
    head_norms: bool = False  # of each q and k head
    wide_norms: bool = False  # of all q and all k heads
    grouped: bool = True  # may have fewer KV heads than heads
    needs: tuple[str, ...] = ()  # keys that a config must have: without them it means the family's own figures
    every: int = 1  # where layers have a window: of how many layers the last has none; 1: none is without


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
    """Weights of a layer beyond `ModelSpec.layer_values`; the last two add to what the family says.

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
    """How far each layer looks back: `window` tokens, but the last of `every` layers over all, which is 0."""
    return tuple(0 if every > 1 and (layer + 1) % every == 0 else window for layer in range(layers))


# Keys of a config.json, or patterns of them, of which no size, no weight and no time of a layer follows.
OF_NO_MATTER = re.compile(
    r"_name_or_path|_commit_hash|_from_.*|_attn_implementation.*|_flash_attn.*|_sliding_window_pattern|_vocab_size"
    r"|architectures|.*_token_ids?|.*dropout|.*_pdrop|layerdrop|.*_eps|.*epsilon|init_std|initializer_.*|.*rope.*"
    r"|rotary_.*|partial_rotary_factor|alibi|.*softcapping|query_pre_attn_scalar|embedding_multiplier"
    r"|attention_multiplier|residual_multiplier|logits_scaling|hidden_act|hidden_activation|activation_function"
    r"|model_type|transformers_version|torch_dtype|dtype|use_cache|return_dict.*|output_attentions|id2label"
    r"|output_hidden_states|output_router_logits|output_scores|output_past|label2id|num_labels|problem_type|summary_.*"
    r"|tokenizer_class|task_specific_params|finetuning_task|prefix"
    r"|chunk_size_feed_forward|reorder_and_upcast_attn|scale_attn_.*|pretraining_tp|gradient_checkpointing|unsloth_.*"
    r"|attn_implementation|use_flash_attn.*|use_parallel_residual|parallel_attn|parallel_residual|original_max_.*|n_ctx"
    r"|do_layer_norm_before|num_ln_in_parallel_attn|apply_residual_.*|temperature|top_[kp]|do_sample|max_length"
    r"|repetition_penalty|languages?|license|tags|seq_length|max_sequence_length|model_max_length|max_window_layers"
    r"|use_sliding_window|sliding_window|sliding_window_pattern|is_decoder|tie_encoder_decoder|transformers\.js_config"
    r"|base_model_name_or_path|framework|tf_legacy_loss|bias_dropout_fusion|masked_softmax_fusion|cache_implementation"
    r"|attention_softmax_in_fp32|scale_attention_softmax_in_fp32|residual_in_fp32|norm_type|use_norm_bias|multi_query"
)
# Keys that a config may have only without a value, or with one of these: others ask for what is not priced.
REFUSED = {
    "add_cross_attention": ((False,), "cross attention"), "cross_attention_layers": ((), "cross attention"),
    "use_bidirectional_attention": ((False,), "attention to what follows"),
    "attention_chunk_size": ((), "attention within chunks"), "num_kv_shared_layers": ((0,), "K and V of other layers"),
    **dict.fromkeys(("enable_bias", "use_bias", "layer_norm_elementwise_affine"), ((True,), "a layer without biases")),
    "is_causal": ((True,), "attention to what follows"), "quantization": ((), "weights quantized as MLX does"),
    "mlp_type": (("default",), "a gated MLP"),
    "pruned_heads": ((), "layers with fewer heads"), "block_configs": ((), "layers that differ"),
}
