"""The config.json of a checkpoint folder as an `Architecture`.

Features in a family's config that this project does not support are refused with a WeightsError that names them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helios_sim.errors import WeightsError
from helios_sim.live.model.architecture import FAMILIES, MOST, Architecture, Rope
from helios_sim.profile.unread import OFF_BY_DEFAULT, rest_of_rope, told_of_rest
from helios_sim.untrusted import Fields, read_json, reading, shortened

# model_type of config.json -> family. "gemma3" is the multimodal model; its text part is used.
_FAMILY = {
    "llama": "llama", "opt": "opt", "gpt2": "gpt2", "qwen2": "qwen2", "gemma3_text": "gemma3", "gemma3": "gemma3",
}  # fmt: skip
_ACTIVATION = {
    "silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip
OTHER_MODEL = "choose a checkpoint of this family without it, or another family"
FETCH_AGAIN = "fetch the checkpoint again"
_NOT_QUANTIZED = "choose the unquantized checkpoint (safetensors), or a .gguf file"
_SIZES = {  # names of each size in the configs of the families
    "n_layers": ("num_hidden_layers", "n_layer"), "d_model": ("hidden_size", "n_embd", "word_embed_proj_dim"),
    "n_heads": ("num_attention_heads", "n_head", "num_key_value_heads"), "head_dim": ("head_dim",),
    "d_ff": ("intermediate_size", "n_inner", "ffn_dim"), "vocab_size": ("vocab_size",),
    "max_context_tokens": ("max_position_embeddings", "n_positions", "sliding_window"),
}  # fmt: skip
# Keys that transformers takes from a config of any family, with the only value that is supported.
_OF_ANY = {"is_causal": True, "per_layer_config": None, "kv_sharing_modes": None, "transformers_weights": None}
_GENERATES = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$")
_BESIDE = {  # files that change what the weights mean
    "quantize_config.json": "GPTQ weights are not read",
    "quant_config.json": "AWQ weights are not read",
    "hf_quant_config.json": "weights quantized by ModelOpt are not read",
    "adapter_config.json": "an adapter is not applied; merge it into the weights first",
}


# Keys that make the architecture or are checked, here or in transformers' config of the family.
_READ = {
    "model_type", "text_config", "quantization_config", "compression_config", "rope_scaling", "rope_parameters",
    "rope_theta", "rope_local_base_freq", "partial_rotary_factor", "attention_bias", "mlp_bias",
    "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention", "layer_types",
    "sliding_window", "sliding_window_pattern", "_sliding_window_pattern", "use_sliding_window", "max_window_layers",
    "query_pre_attn_scalar", "hidden_act", "hidden_activation", "activation_function", "tie_word_embeddings",
    "rms_norm_eps", "layer_norm_epsilon", "do_layer_norm_before", "_remove_final_layer_norm", "enable_bias",
    "layer_norm_elementwise_affine", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention",
    *_OF_ANY, *(name for names in _SIZES.values() for name in names),
}  # fmt: skip
# Keys about training, text and interfaces, parts that are not loaded, and the dtype of stored values.
_OF_NO_MATTER = re.compile(
    r"_name_or_path|_commit_hash|_attn_implementation.*|_flash_attn.*|architectures|.*_token_ids?|.*dropout|.*_pdrop"
    r"|layerdrop|init_std|initializer_.*|transformers_version|torch_dtype|dtype|use_cache|return_dict.*|output_attentions"
    r"|output_hidden_states|output_past|id2label|label2id|num_labels|problem_type|summary_.*|tokenizer_class"
    r"|task_specific_params|finetuning_task|prefix|chunk_size_feed_forward|reorder_and_upcast_attn|n_ctx|pretraining_tp"
    r"|gradient_checkpointing|unsloth_.*|attn_implementation|use_flash_attn.*|cache_implementation|is_decoder"
    r"|is_encoder_decoder|tie_encoder_decoder|temperature|top_[kp]|do_sample|max_length|repetition_penalty"
    r"|transformers\.js_config|base_model_name_or_path|languages?|license|tags|vision_config|image_.*|boi_.*|eoi_.*"
    r"|mm_tokens_per_image|is_llama_config|word_embed_proj_dim"
)


def not_read(folder: Path) -> str:
    """A sentence that lists ignored keys of config.json; "" if there are none.

    It includes a class of another name, and the checkpoint's own code, since neither is run.
    """
    path = folder / "config.json"
    values = read_json(path, FETCH_AGAIN, error=WeightsError)
    inner = values.get("text_config")
    left: dict[str, Any] = {}
    for part in (values, inner if isinstance(inner, dict) else {}):
        fields = Fields(part, str(path), FETCH_AGAIN, WeightsError)
        unknown = [name for name in fields.rest if name not in _READ]
        unknown += [name for name in fields.off if name not in _READ and not OFF_BY_DEFAULT.fullmatch(name)]
        left |= {name: part[name] for name in unknown if not _OF_NO_MATTER.fullmatch(name)}
        left |= rest_of_rope(part)
    classes = values.get("architectures")
    own = str(values.get("model_type")).removesuffix("_text").replace("_", "")
    if isinstance(classes, list) and any(_GENERATES.sub("", str(name)).lower() != own for name in classes):
        left["architectures"] = classes
    return told_of_rest(path, left)


def read_architecture(folder: Path) -> Architecture:
    """Read config.json in `folder`.

    Raises WeightsError for a missing or damaged config, another family, or a part that is not supported.
    """
    path = folder / "config.json"
    if not path.exists():
        others = sorted(folder.glob("*.gguf"))
        fix = f"give the file: {others[0]}" if others else "give the folder that save_pretrained wrote"
        raise WeightsError("weights", str(folder), "a folder with config.json", fix)
    values = read_json(path, FETCH_AGAIN, error=WeightsError)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILY:
        raise wrong_family(str(folder), shortened(kind))
    _refuse_quantized(folder, values)
    for part in (values, values.get("text_config")):
        if isinstance(part, dict):
            _check_sizes(part, path)
            _check_rope(part, path)
            refuse(str(path), {key: part.get(key, only) not in (only, {}, []) for key, only in _OF_ANY.items()})
    import transformers

    with reading(str(path), "invalid", f"a config of family {kind}", FETCH_AGAIN, WeightsError):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        found = architecture_of(config.get_text_config(), str(folder))
        found.check(str(path), FETCH_AGAIN)
    return found


def _check_sizes(values: Mapping[str, Any], path: Path) -> None:
    """Raise WeightsError for sizes out of range, before transformers makes a list of such a length."""
    fields = Fields(values, str(path), FETCH_AGAIN, WeightsError)
    for size, names in _SIZES.items():
        for name in names:
            if fields.has(name):
                fields.integer(name, 1, MOST[size])


def _check_rope(values: Mapping[str, Any], path: Path) -> None:
    """Raise WeightsError if a config gives its rotation twice, with different values."""
    said: dict[str, dict[str, Any]] = {"kind": {}, "theta": {}}
    for name in ("rope_scaling", "rope_parameters"):
        how = values.get(name)
        if isinstance(how, Mapping) and not any(isinstance(part, Mapping) for part in how.values()):
            said["kind"] |= {f"{name}.{key}": how[key] for key in ("rope_type", "type") if how.get(key) is not None}
            said["theta"] |= {f"{name}.rope_theta": how["rope_theta"]} if how.get("rope_theta") is not None else {}
    if values.get("rope_theta") is not None:
        said["theta"]["rope_theta"] = values["rope_theta"]
    for found in said.values():
        if len({repr(float(v)) if isinstance(v, int | float) else repr(v) for v in found.values()}) > 1:
            told = ", ".join(f"{key} {shortened(value)}" for key, value in found.items())
            raise WeightsError(f"config {path}", told, "one rotation", "remove the other")


def _refuse_quantized(folder: Path, values: Mapping[str, Any]) -> None:
    """Raise WeightsError for weights that are quantized, or changed by an adapter beside them."""
    how = values.get("quantization_config") or values.get("compression_config")
    if how is not None:
        name = how.get("quant_method", how.get("quant_algo")) if isinstance(how, Mapping) else how
        allowed = f"weights that are not quantized; these are by {name!r}"
        raise WeightsError("weights", str(folder), allowed, _NOT_QUANTIZED)
    for name, why in _BESIDE.items():
        if (folder / name).exists():
            raise WeightsError("weights", str(folder), f"a folder without {name}: {why}", _NOT_QUANTIZED)


def wrong_family(where: str, kind: object) -> WeightsError:
    return WeightsError(
        "weights", where, f"a model of family {', '.join(FAMILIES)}; this one is {kind!r}", "choose another model"
    )


def architecture_of(config: Any, where: str = "config") -> Architecture:
    """Convert a transformers config of one of the families. Raises UserError for a part that is not supported."""
    family = _FAMILY[config.model_type]
    if family == "opt":
        return _opt(config, where)
    if family == "gpt2":
        return _gpt2(config, where)
    return _llama_like(config, family, where)


def refuse(where: str, parts: Mapping[str, bool]) -> None:
    """Raise a UserError that names the first of `parts` that is present: none of them is supported."""
    for part, present in parts.items():
        if present:
            raise WeightsError("weights", where, f"a checkpoint without {part}: that is not built", OTHER_MODEL)


def activation(name: str, where: str) -> str:
    if name not in _ACTIVATION:
        raise WeightsError("weights", where, f"an activation of {', '.join(_ACTIVATION)}, not {name!r}", OTHER_MODEL)
    return _ACTIVATION[name]


def llama3_divisors(theta: float, head_dim: int, scaling: Mapping[str, Any]) -> tuple[float, ...]:
    """The divisor of each pair's frequency in Llama-3.1's scaling: 1 for fast pairs, `factor` for slow ones.

    Between wavelengths original / high_freq_factor and original / low_freq_factor the two are blended linearly in
    original / wavelength (Llama 3.1's published reference code, `apply_scaling`).
    """
    factor, original = float(scaling["factor"]), float(scaling["original_max_position_embeddings"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    divisors = []
    for pair in range(head_dim // 2):
        turns = original / (2 * math.pi * theta ** (2 * pair / head_dim))  # over the original context
        blend = min(1.0, max(0.0, (turns - low) / (high - low)))
        divisors.append(1.0 / ((1.0 - blend) / factor + blend))
    return tuple(divisors)


def _llama_like(config: Any, family: str, where: str) -> Architecture:
    head_dim = getattr(config, "head_dim", None) or _split(config.hidden_size, config.num_attention_heads, where)
    refuse(
        where,
        {
            "attention_bias": bool(getattr(config, "attention_bias", False)),
            "mlp_bias": bool(getattr(config, "mlp_bias", False)),
            "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None) is not None,
            "final_logit_softcapping": getattr(config, "final_logit_softcapping", None) is not None,
            "use_bidirectional_attention": bool(getattr(config, "use_bidirectional_attention", False)),
        },
    )
    kinds = getattr(config, "layer_types", None) or ()
    other = ", ".join(map(str, sorted({*kinds} - {"sliding_attention", "full_attention"})))
    refuse(where, {f"layers of the kind {other}": bool(other)})
    sliding = tuple(kind == "sliding_attention" for kind in kinds)
    ropes = config.rope_parameters
    nested = "full_attention" in ropes
    gemma = family == "gemma3"
    return Architecture(
        family=family,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        d_ff=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_context_tokens=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        activation=activation(config.hidden_activation if gemma else config.hidden_act, where),
        tied_embeddings=bool(config.tie_word_embeddings),
        attention_scale=(config.query_pre_attn_scalar if gemma else head_dim) ** -0.5,
        embedding_scale=config.hidden_size**0.5 if gemma else 1.0,
        rope=_rope(ropes["full_attention"] if nested else ropes, head_dim, where),
        window_tokens=config.sliding_window if any(sliding) else None,
        sliding_rope=_rope(ropes["sliding_attention"] if nested else ropes, head_dim, where) if any(sliding) else None,
        sliding=sliding if any(sliding) else (),
    )


def _split(d_model: int, heads: int, where: str) -> int:
    """The size of a head. Raises WeightsError if the heads do not divide the hidden size."""
    if d_model % heads:
        raise WeightsError("weights", where, f"a hidden size, {d_model}, that its {heads} heads divide", FETCH_AGAIN)
    return d_model // heads


def _rope(parameters: Mapping[str, Any], head_dim: int, where: str) -> Rope:
    kind, theta = parameters.get("rope_type", "default"), float(parameters["rope_theta"])
    refuse(where, {"partial_rotary_factor": parameters.get("partial_rotary_factor", 1.0) != 1.0})
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, (float(parameters["factor"]),) * (head_dim // 2))
    if kind == "llama3":
        return Rope(theta, llama3_divisors(theta, head_dim, parameters))
    raise WeightsError("weights", where, f"rope scaling default, linear or llama3, not {kind!r}", OTHER_MODEL)


def _opt(config: Any, where: str) -> Architecture:
    refuse(
        where,
        {
            "norms after attention and MLP (do_layer_norm_before=false, as OPT-350m)": not config.do_layer_norm_before,
            "project_in and project_out (as OPT-350m)": config.word_embed_proj_dim != config.hidden_size,
            "_remove_final_layer_norm": bool(config._remove_final_layer_norm),
            "enable_bias=false": not config.enable_bias,
            "layer_norm_elementwise_affine=false": not config.layer_norm_elementwise_affine,
        },
    )
    head_dim = _split(config.hidden_size, config.num_attention_heads, where)
    return Architecture(
        family="opt",
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_attention_heads,
        head_dim=head_dim,
        d_ff=config.ffn_dim,
        vocab_size=config.vocab_size,
        max_context_tokens=config.max_position_embeddings,
        norm_eps=1e-5,  # OPT's config does not say it
        activation=activation(config.activation_function, where),
        tied_embeddings=bool(config.tie_word_embeddings),
        attention_scale=head_dim**-0.5,
    )


def _gpt2(config: Any, where: str) -> Architecture:
    refuse(
        where,
        {
            "scale_attn_weights=false": not config.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": bool(config.scale_attn_by_inverse_layer_idx),
            "cross attention": bool(config.add_cross_attention),
        },
    )
    head_dim = _split(config.n_embd, config.n_head, where)
    return Architecture(
        family="gpt2",
        n_layers=config.n_layer,
        d_model=config.n_embd,
        n_heads=config.n_head,
        n_kv_heads=config.n_head,
        head_dim=head_dim,
        d_ff=config.n_inner or 4 * config.n_embd,
        vocab_size=config.vocab_size,
        max_context_tokens=config.n_positions,
        norm_eps=config.layer_norm_epsilon,
        activation=activation(config.activation_function, where),
        tied_embeddings=bool(config.tie_word_embeddings),
        attention_scale=head_dim**-0.5,
    )
