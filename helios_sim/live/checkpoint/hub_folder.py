"""A checkpoint folder as `save_pretrained` writes it: config.json, tokenizer, and safetensors read tensor by tensor.

The config becomes an `Architecture`. What a family's config may ask for and this project does not support is refused
with a UserError that names it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from helios_sim.errors import UserError, WeightsError
from helios_sim.live.checkpoint.naming import hub_embedding, hub_pieces
from helios_sim.live.model.architecture import FAMILIES, Architecture, Rope, Shape
from helios_sim.live.model.weights import StoredPiece

# model_type of config.json -> family. "gemma3" is the multimodal model; its text part is used.
_FAMILY = {
    "llama": "llama", "opt": "opt", "gpt2": "gpt2", "qwen2": "qwen2", "gemma3_text": "gemma3", "gemma3": "gemma3",
}  # fmt: skip
_ACTIVATION = {
    "silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip
_OTHER_MODEL = "choose a checkpoint of this family without it, or another family"
_FETCH_AGAIN = "fetch the checkpoint again"


def read_architecture(folder: Path) -> Architecture:
    """Read config.json in `folder`.

    Raises UserError for a missing or damaged config, another family, or a part that is not supported.
    """
    path = folder / "config.json"
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError:
        raise WeightsError(
            "weights", str(folder), "a folder with config.json", "give the folder that save_pretrained wrote"
        ) from None
    except (ValueError, AttributeError) as error:
        raise UserError(str(path), str(error), "a JSON object", "fetch the checkpoint again") from error
    if kind not in _FAMILY:
        raise wrong_family(str(folder), kind)
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        return architecture_of(config.get_text_config(), str(folder))
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(str(path), str(error), f"a config of family {kind}", "fetch the checkpoint again") from error


def wrong_family(where: str, kind: object) -> UserError:
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
            raise WeightsError("weights", where, f"a checkpoint without {part}: that is not built", _OTHER_MODEL)


def activation(name: str, where: str) -> str:
    if name not in _ACTIVATION:
        raise WeightsError("weights", where, f"an activation of {', '.join(_ACTIVATION)}, not {name!r}", _OTHER_MODEL)
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
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
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


def _rope(parameters: Mapping[str, Any], head_dim: int, where: str) -> Rope:
    kind, theta = parameters.get("rope_type", "default"), float(parameters["rope_theta"])
    refuse(where, {"partial_rotary_factor": parameters.get("partial_rotary_factor", 1.0) != 1.0})
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, (float(parameters["factor"]),) * (head_dim // 2))
    if kind == "llama3":
        return Rope(theta, llama3_divisors(theta, head_dim, parameters))
    raise WeightsError("weights", where, f"rope scaling default, linear or llama3, not {kind!r}", _OTHER_MODEL)


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
    head_dim = config.hidden_size // config.num_attention_heads
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
    head_dim = config.n_embd // config.n_head
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


class SafetensorsFolder:
    """One folder with config.json, a tokenizer, and model.safetensors or its shards with an index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.architecture: Architecture = read_architecture(folder)
        self._file_of = _files_by_tensor(folder)
        self._prefix = self._find_prefix()

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, in order of name."""
        return tuple(sorted(set(self._file_of.values())))

    def pieces(self, part: str, layer: int | None) -> tuple[StoredPiece, ...]:
        return hub_pieces(self.architecture.family, self._prefix, part, layer)

    def shape(self, name: str) -> Shape:
        with self._open(name) as file:
            return tuple(file.get_slice(name).get_shape())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows of one tensor. The file is closed at once, so that none of its pages stay resident."""
        with self._open(name) as file:
            return file.get_slice(name)[start:stop]

    def tokenizer(self) -> Any:
        """Load transformers' tokenizer of the folder. Raises UserError if there is none."""
        if not any((self.folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise WeightsError(
                "weights", str(self.folder), "a folder with a tokenizer", "save the tokenizer into it (save_pretrained)"
            )
        import transformers

        return transformers.AutoTokenizer.from_pretrained(self.folder)

    def _find_prefix(self) -> str:
        """The prefix of all names: "model.", "transformer.", "", ... (older and multimodal files differ)."""
        suffix = hub_embedding(self.architecture.family)
        found = [name for name in self._file_of if name == suffix or name.endswith("." + suffix)]
        if not found:
            raise UserError(f"tensor {suffix}", "missing", f"there in {self.folder}", _FETCH_AGAIN)
        return min(found, key=len).removesuffix(suffix)

    def _open(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        if name not in self._file_of:
            raise UserError(f"tensor {name}", "missing", f"there in {self.folder}", _FETCH_AGAIN)
        try:
            return safe_open(self._file_of[name], framework="pt")
        except (SafetensorError, OSError) as error:
            raise _damaged(self._file_of[name], error) from error


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.exists():
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
        except (SafetensorError, OSError) as error:
            raise _damaged(single, error) from error
    if index.exists():
        try:
            shards = {name: folder / shard for name, shard in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, AttributeError) as error:
            raise _damaged(index, error) from error
        for shard in set(shards.values()):
            if not shard.exists():
                raise WeightsError("weights", str(folder), f"all shards; {shard.name} is missing", _FETCH_AGAIN)
        return shards
    if any(folder.glob("*.bin")):
        raise WeightsError(
            "weights", str(folder), "safetensors or GGUF; this folder has only .bin files (pickles)",
            "load it with transformers and write it with save_pretrained, which gives safetensors",
        )  # fmt: skip
    raise WeightsError("weights", str(folder), "a folder with model.safetensors", "give a folder with weights")


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(str(path), str(error), "a whole file", _FETCH_AGAIN)
