"""Keys of a config.json that are not used: those that do not matter, and a sentence on the others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Keys of a config.json, or patterns of them, that do not affect the size, weights or time of a layer.
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
    r"|bad_words_ids|(begin_)?suppress_tokens|.*no_repeat_ngram_size|num_beam.*|num_return_sequences|typical_p"
    r"|(length|diversity)_penalty|exponential_decay_length_penalty|early_stopping|min_length|forced_.*"
    r"|remove_invalid_values|renormalize_logits|attention_softmax_in_fp32|scale_attention_softmax_in_fp32|residual_in_fp32|norm_type|use_norm_bias|multi_query"
)
# Keys that are null, false, 0 or empty by default in every family, so that stating this changes nothing.
OFF_BY_DEFAULT = re.compile(
    r"mlp_bias|attention_(in|out)?_?bias|lm_head_bias|qk_layernorm|use_qk_norm|use_qkv_bias|use_cross_attention"
    r"|cross_attention_.*|bias|torchscript|tf_.*|use_bfloat16|output_.*|moe_.*|num_(local_|shared_)?experts.*|n_(routed|shared)_experts"
    r"|expert_.*|router_.*|decoder_sparse_step|mlp_only_layers|kv_lora_rank|q_lora_rank|is_encoder_decoder|ssm_cfg"
    r"|num_encoder_layers|attn_layer_indices|block_types|mamba_d_state|linear_num_value_heads|auto_map|pruned_heads"
    r"|sep_token|bos_token|eos_token|pad_token|unk_token|vision_.*|audio_.*|image_.*|video_.*|sliding_window_size"
    r"|scale_emb.*|embedding_size|new_decoder_architecture|head_dim|n_inner|adapter_.*|pooler_.*|classifier_.*"
)
# Keys of a rotation that are known; a model's longest context follows from its kind, factor and original context.
_OF_ROPE = re.compile(
    r"(rope_)?type|rope_theta|factor|original_max_position_embeddings|beta_(fast|slow)|mscale(_all_dim)?|attn_factor"
    r"|attention_factor|(low|high)_freq_factor|(short|long)_(factor|mscale)|mrope_(section|interleaved)|truncate"
    r"|partial_rotary_factor|extrapolation_factor|finetuned|llama_4_scaling_beta"
)
_ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "su", "mrope", None)
_OF_OTHERS = re.compile(  # parts of a model that read images or sound, and how they are tied to its text
    r"text_config|.*(vision|visual|image|video|audio|speech|mm_|projector|multimodal|patch|tile|crop|grid|vit|siglip)"
    r".*|quantization_config|compression_config|auto_map|.*_token_(id|index)|spatial_merge_size|downsample_ratio"
)
_OF_LAYERS = ("full_attention", "sliding_attention")


def rest_of_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Unknown keys of a config's rotary embedding, by path, and an unknown kind of scaling."""
    found: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        how = values.get(name)
        parts = {name: how} if isinstance(how, Mapping) else {}
        for of_layers in _OF_LAYERS if parts else ():
            parts[f"{name}.{of_layers}"] = values[name].get(of_layers)
        for path, part in parts.items():
            if isinstance(part, Mapping):
                found |= {f"{path}.{key}": value for key, value in part.items()
                          if not _OF_ROPE.fullmatch(str(key)) and key not in _OF_LAYERS}  # fmt: skip
                kinds = {key: part.get(key) for key in ("rope_type", "type")}
                found |= {f"{path}.{key}": kind for key, kind in kinds.items() if kind not in _ROPE_KINDS}
    return found


def rest_of_outer(whole: Mapping[str, Any], inner: Mapping[str, Any]) -> dict[str, Any]:
    """Unknown keys beside the text model in a config of several models."""
    return {
        name: value for name, value in whole.items()
        if value is not None and name not in inner and not _OF_OTHERS.fullmatch(name)
        and not OF_NO_MATTER.fullmatch(name) and not (not value and OFF_BY_DEFAULT.fullmatch(name))
    }  # fmt: skip


def told_of_rest(path: Path, left: Mapping[str, Any]) -> str:
    """A sentence on keys of a file that are not used; "" if there are none."""
    shown = ", ".join(f"{name} ({str(value)[:40]})" for name, value in list(left.items())[:12])
    more = f" and {len(left) - 12} more" if len(left) > 12 else ""
    return f"{path}: not read: {shown}{more}" if left else ""
