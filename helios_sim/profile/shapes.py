"""The shape of a model by what a user calls it: a name of the catalogue, a config.json, or a folder that holds one.

A config is read by its own keys, without transformers. What it asks for and the cost model does not know is refused by
name: experts, other attention than softmax over K and V, layers that differ in size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helios_sim.errors import UserError
from helios_sim.profile.catalog import CHARS_PER_TOKEN, MODELS, published_model, published_windows
from helios_sim.profile.families import FAMILIES, Family, other_values, windows_of
from helios_sim.profile.spec import ModelSpec
from helios_sim.untrusted import Fields, read_json

_FIX = "give the config.json of a dense decoder-only model"
_MOST = {"layers": 1024, "width": 1 << 17, "heads": 4096, "ff": 1 << 20, "words": 1 << 22, "tokens": 1 << 28}


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size", "num_experts_per_tok")
_OTHER_ATTENTION = {
    "kv_lora_rank": "latent attention (MLA)", "linear_num_value_heads": "linear attention",
    "ssm_cfg": "state-space layers", "mamba_d_state": "state-space layers", "block_types": "recurrent layers",
    "attn_layer_indices": "layers without attention", "num_encoder_layers": "an encoder",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's sizes; `windows` says for each layer how many tokens it looks back (0: all), () for no windows."""

    model: ModelSpec
    source: str
    windows: tuple[int, ...] = ()


def shape_of(name: str, key: str = "models") -> Shape:
    """The shape of the model that a setting names. UserError where it is not known or cannot be read."""
    path = Path(name).expanduser()
    if path.name.endswith(".json") or path.is_dir():
        return _of_config(path / "config.json" if path.is_dir() else path)
    if name in MODELS:
        return Shape(MODELS[name], "the catalogue's shape")
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")):
        raise UserError(key, name, "a name of the catalogue, a config.json or a folder that holds one", _FIX)
    model = published_model(name, key)
    return Shape(model, "the shape that its config.json on Hugging Face has", published_windows(name, model))


def _of_config(path: Path) -> Shape:
    values = read_json(path, _FIX)
    how = values.get("quantization_config") or values.get("compression_config")
    if how is not None:
        name = how.get("quant_method") if isinstance(how, dict) else how
        allowed = "weights in bf16: quantized ones are not priced"
        raise UserError(f"quantization_config of {path}", name, allowed, "give the config of the unquantized model")
    if (path.parent / "hf_quant_config.json").exists() and path.name == "config.json":
        allowed = "a folder without hf_quant_config.json: quantized weights are not priced"
        raise UserError("models", str(path.parent), allowed, "give the config of the unquantized model")
    inner = values.get("text_config")
    if isinstance(inner, dict):
        values = {**inner, "tie_word_embeddings": inner.get("tie_word_embeddings", values.get("tie_word_embeddings"))}
    kind = str(values.get("model_type"))
    for experts in _EXPERTS:
        if values.get(experts) not in (None, 0, 1):
            allowed = "a dense model: mixtures of experts are not modelled"
            raise UserError(f"{experts} of {path}", values[experts], allowed, "choose a dense model")
    for name, what in _OTHER_ATTENTION.items():
        if values.get(name) is not None:
            raise UserError(f"{name} of {path}", "set", f"softmax attention in all layers, not {what}", _FIX)
    family = FAMILIES.get(kind)
    if family is None:
        raise UserError(f"model_type of {path}", kind, f"one of {', '.join(FAMILIES)}", _FIX)
    fields = Fields(values, str(path), _FIX)
    sizes = _Sizes(fields)
    d_model, heads = sizes.one("hidden_size", "n_embd", most="width"), sizes.one(
        "num_attention_heads", "n_head", most="heads"
    )
    layers = sizes.one("num_hidden_layers", "n_layer", most="layers")
    kv_heads = _kv_heads(kind, family, fields, heads)
    head_dim = sizes.maybe("head_dim", most="heads") or d_model // heads
    if not fields.has("head_dim") and d_model % heads:
        raise UserError(f"hidden_size of {path}", d_model, f"a multiple of its {heads} heads", _FIX)
    d_ff = sizes.maybe("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", most="ff") or 4 * d_model
    words = sizes.one("vocab_size", most="words")
    context = sizes.maybe("max_position_embeddings", "n_positions", "seq_length", most="tokens") or 2048
    model = ModelSpec(
        name=_name(path), family=kind.removesuffix("_text"), n_layers=layers, d_model=d_model, n_heads=heads,
        n_kv_heads=kv_heads, head_dim=head_dim, d_ff=d_ff, gated_mlp=family.gated_mlp, vocab_size=words,
        tied_embeddings=bool(fields.value("tie_word_embeddings", family.tied)), max_context_tokens=context,
        learned_positions=family.learned_positions, bias=family.bias, weight_bytes_per_value=2, kv_bytes_per_value=2,
        chars_per_token=CHARS_PER_TOKEN["llama-3" if words > 100_000 else "llama-2"],
        other_layer_values=other_values(
            family, d_model, d_ff, heads, kv_heads, head_dim,
            qkv_bias=bool(fields.value("attention_bias", False)),
            further_norms=2 if kind == "falcon" and fields.value("new_decoder_architecture", False) else 0,
        ),
    )  # fmt: skip
    return Shape(model, str(path), _windows(fields, kind, layers))


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Whole numbers that families call by different names."""

    fields: Fields

    def maybe(self, *names: str, most: str) -> int | None:
        for name in names:
            if self.fields.has(name):
                return self.fields.alike(name, 1, _MOST[most])
        return None

    def one(self, *names: str, most: str) -> int:
        found = self.maybe(*names, most=most)
        if found is None:
            raise self.fields.wrong(names[0], None, f"a size: one of {', '.join(names)} must be there")
        return found


def _kv_heads(kind: str, family: Family, fields: Fields, heads: int) -> int:
    if kind == "falcon":  # one for all heads before its new architecture, unless it says otherwise
        if fields.value("new_decoder_architecture", False):
            return fields.integer("num_kv_heads", 1, heads, heads)
        return 1 if fields.value("multi_query", True) else heads
    return fields.integer("num_key_value_heads", 1, heads, heads) if family.grouped else heads


def _windows(fields: Fields, kind: str, layers: int) -> tuple[int, ...]:
    """How far each layer looks back, 0 for all; () where none has a window."""
    if fields.value("sliding_window", None) is None or fields.value("use_sliding_window", True) is False:
        return ()
    window = fields.integer("sliding_window", 1, _MOST["tokens"])
    kinds: Any = fields.value("layer_types", None)
    if isinstance(kinds, list):
        if len(kinds) != layers:
            raise fields.wrong("layer_types", len(kinds), f"one for each of {layers} layers")
        return tuple(window if each == "sliding_attention" else 0 for each in kinds)
    every = fields.integer("sliding_window_pattern", 1, 1 << 10, FAMILIES[kind].every)
    return windows_of(window, every, layers)


def _name(path: Path) -> str:
    """The folder's name, or the file's where it is not config.json."""
    return path.absolute().parent.name if path.name == "config.json" else path.stem
