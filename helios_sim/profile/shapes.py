"""Finds the shape of a model: by a name of the catalogue, a config.json or its folder, or a GGUF file.

A config is read without transformers, and of a GGUF file only the header. Features that the cost model does not know
are refused by name: experts, attention other than softmax over K and V, layers that differ in size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helios_sim.errors import UserError
from helios_sim.profile.catalog import MODELS, chars_per_token, plain_model, published_model, published_windows
from helios_sim.profile.families import FAMILIES, REFUSED, WINDOW_IF_ASKED, Family, other_values, windows_of
from helios_sim.profile.formats import WeightFormat, format_of_config, named_format
from helios_sim.profile.gguf_shape import read_gguf
from helios_sim.profile.spec import ModelSpec
from helios_sim.profile.unread import OF_NO_MATTER, OFF_BY_DEFAULT, rest_of_outer, rest_of_rope, told_of_rest
from helios_sim.untrusted import Fields, is_there, read_json, shortened

_FIX = "give the config.json of a dense decoder-only model"
_UNQUANTIZED = "give the config of the unquantized model, with server.quantization where that is near enough"
_MOST = {"layers": 1024, "width": 1 << 17, "heads": 4096, "ff": 1 << 20, "words": 1 << 22, "tokens": 1 << 22}
_LEAST_CONTEXT = 16  # tokens; no shorter prompt was measured
_QUANTIZED_BY = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")  # files beside a config.json
_GENERATE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # ends of the names of classes
_GENERATES = re.compile(f"({'|'.join(_GENERATE)})$")
_QUANTIZATIONS = ("quantization_config", "compression_config")
_FOUR_TIMES = ("gpt2", "falcon")  # families with an MLP four times as wide as the model by default
_LOOKS_BACK = {"full_attention": False, "sliding_attention": True}  # kinds of layers: whether within a window

_TIED = "tie_word_embeddings"
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size", "num_experts_per_tok")
_OTHER_ATTENTION = {
    "kv_lora_rank": "latent attention (MLA)", "linear_num_value_heads": "linear attention",
    "ssm_cfg": "state-space layers", "mamba_d_state": "state-space layers", "block_types": "recurrent layers",
    "attn_layer_indices": "layers without attention", "num_encoder_layers": "an encoder",
    "is_encoder_decoder": "an encoder",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's sizes. `windows` is the attention window of each layer (0 for none), () if no layer has one."""

    model: ModelSpec
    source: str
    windows: tuple[int, ...] = ()
    not_read: str = ""  # a sentence on keys that are not used; "" if there are none


def config_of(name: str) -> Path | None:
    """The file that a model's name means, if it is the path of a config.json, its folder or a GGUF file; else None."""
    path = Path(name).expanduser()
    if path.name.endswith((".json", ".gguf")):
        return path
    return path / "config.json" if is_there(path, Path.is_dir) else None


def shape_of(name: str, key: str = "models") -> Shape:
    """The shape of the model that a setting names. Raises UserError if it is not known or cannot be read."""
    path = config_of(name) if name else None
    if path is not None:
        return _of_gguf(path) if path.name.endswith(".gguf") else _of_config(path)
    if name.startswith((".", "/", "~")):
        raise UserError(key, name, "a name of the catalogue, a config.json, its folder or a GGUF file", _FIX)
    unquantized, form = named_format(name)
    plain = plain_model(unquantized)
    if plain in MODELS:
        shape = Shape(MODELS[plain], "the catalogue's shape")
    else:
        model = published_model(unquantized, key)
        source = "the shape that its config.json on Hugging Face has"
        shape = Shape(model, source, published_windows(unquantized, model))
    if form is None:
        return shape
    model = replace(shape.model, name=name.rsplit("/", 1)[-1].lower(), quantization=form)
    return replace(shape, model=model, source=f"{shape.source}, its weights in {form.name} as the name says")


def _of_gguf(path: Path) -> Shape:
    found = read_gguf(path)
    shape = _of_values(path, found.values, found.weights, 2, found.source)
    found.check(path, shape.model)
    return replace(shape, not_read=found.not_read)


def _of_config(path: Path) -> Shape:
    whole = read_json(path, _FIX)
    inner = whole.get("text_config")
    has_more = isinstance(inner, dict)
    values = {**inner, _TIED: inner.get(_TIED, whole.get(_TIED))} if isinstance(inner, dict) else whole
    form, kv_bytes, left = _format(path, whole, values)
    _refuse_others(path, whole, values, form is None)
    source = f"{path}, its text model alone, without what reads images or sound" if has_more else str(path)
    shape = _of_values(path, values, form, kv_bytes, source)
    left |= rest_of_outer(whole, values) if has_more else {}
    return replace(shape, not_read="; ".join(filter(None, (shape.not_read, told_of_rest(path, left)))))


def _of_values(
    path: Path, values: Mapping[str, Any], form: WeightFormat | None, kv_bytes: int, source: str
) -> Shape:
    """The shape from the keys of a config.json."""
    kind = str(values.get("model_type"))
    if not values.get("model_type"):
        allowed = "a name, as transformers writes it into config.json: this is another file, or incomplete"
        raise UserError(f"model_type of {path}", None, allowed, "give the model's config.json")
    family = FAMILIES.get(kind)
    if family is None:
        fix = "take a model of one of these families: others are not priced"
        raise UserError(f"model_type of {path}", kind, f"one of {', '.join(FAMILIES)}", fix)
    fields = Fields(values, str(path), _FIX)
    for name in family.needs:
        if name not in values:
            fix = "add it: where it is missing, transformers takes the default of the family's own class"
            raise UserError(f"{name} of {path}", None, f"a value: models of {kind} differ in it", fix)
    sizes = _Sizes(fields)
    d_model = sizes.one("hidden_size", "n_embd", most="width")
    heads = sizes.one("num_attention_heads", "n_head", most="heads")
    layers = sizes.one("num_hidden_layers", "n_layer", most="layers")
    kv_heads = _kv_heads(kind, family, fields, heads)
    head_dim = sizes.maybe("head_dim", most="heads") or d_model // heads
    if not fields.has("head_dim") and d_model % heads:
        raise UserError(f"hidden_size of {path}", d_model, f"a multiple of its {heads} heads", _FIX)
    if fields.integer("word_embed_proj_dim", 1, _MOST["width"], d_model) != d_model:
        raise fields.wrong("word_embed_proj_dim", values["word_embed_proj_dim"], f"the model's width, {d_model}")
    widths = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
    d_ff = sizes.maybe(*widths, most="ff") if kind in _FOUR_TIMES else sizes.one(*widths, most="ff")
    words = sizes.one("vocab_size", most="words")
    contexts = ("max_position_embeddings", "n_positions", "seq_length")
    context = 2048 if kind == "falcon" and not any(map(fields.has, contexts)) else sizes.one(*contexts, most="tokens")
    context = _scaled_context(fields, kind, context)
    if context < _LEAST_CONTEXT:
        raise UserError(f"context of {path}", context, f"at least {_LEAST_CONTEXT} tokens", _FIX)
    model = ModelSpec(
        name=_name(path), family=kind.removesuffix("_text"), n_layers=layers, d_model=d_model, n_heads=heads,
        n_kv_heads=kv_heads, head_dim=head_dim, d_ff=d_ff or 4 * d_model, gated_mlp=family.gated_mlp,
        vocab_size=words, tied_embeddings=fields.flag(_TIED, family.tied), max_context_tokens=context,
        learned_positions=family.learned_positions, bias=family.bias, weight_bytes_per_value=2,
        kv_bytes_per_value=kv_bytes, quantization=form,
        chars_per_token=chars_per_token(kind, words),
        other_layer_values=other_values(
            family, d_model, d_ff or 4 * d_model, heads, kv_heads, head_dim,
            qkv_bias=fields.flag("attention_bias", False) or fields.flag("use_qkv_bias", False),
            further_norms=2 if kind == "falcon" and fields.flag("new_decoder_architecture", False) else 0,
        ),
    )  # fmt: skip
    windows = _windows(fields, kind, layers)
    fields.ignore([*_QUANTIZATIONS, *REFUSED])  # looked at before
    return Shape(model, source, windows, _not_read(path, kind, fields))


def _not_read(path: Path, kind: str, fields: Fields) -> str:
    """A sentence on keys that are not used, those with a value first; "" if there are none."""
    left: dict[str, Any] = {}
    classes = fields.values.get("architectures")
    own = kind.removesuffix("_text").replace("_", "")
    if isinstance(classes, list) and any(_GENERATES.sub("", str(name)).lower() != own for name in classes):
        left["architectures"] = classes
    left |= {name: fields.values[name] for name in fields.rest if not OF_NO_MATTER.fullmatch(name)}
    left |= rest_of_rope(fields.values)
    left |= {
        name: fields.values[name] for name in fields.off
        if name in fields.values and not OF_NO_MATTER.fullmatch(name) and not OFF_BY_DEFAULT.fullmatch(name)
    }  # fmt: skip
    return told_of_rest(path, left)


def _scaled_context(fields: Fields, kind: str, context: int) -> int:
    """Tokens that a model takes with its scaled RoPE, as vLLM reckons them."""
    name = next((name for name in ("rope_scaling", "rope_parameters") if fields.has(name)), None)
    how = None if name is None else fields.value(name)
    if name is None or not isinstance(how, Mapping) or kind.startswith("gemma3"):  # the context is scaled already
        return context
    inner = fields.inner(name)
    scaling = str(inner.value("rope_type", inner.value("type", "default")))
    if inner.value("type", scaling) != scaling:
        raise inner.wrong("type", inner.value("type"), f"the same as rope_type, {scaling}")
    if scaling not in ("yarn", "linear", "dynamic"):
        return context
    if scaling == "yarn":
        context = inner.integer("original_max_position_embeddings", 1, _MOST["tokens"], context)
    return round(context * inner.number("factor", 1, _MOST["tokens"] / context))


def _format(
    path: Path, whole: Mapping[str, Any], values: Mapping[str, Any]
) -> tuple[WeightFormat | None, int, dict[str, Any]]:
    """The format of the weights (None for bf16), bytes of a value of K and V, and keys of these that are not used.

    `values` are the keys of the text model within the `whole` config. Raises UserError for formats without a price.
    """
    found = {name: part[name] for part in (whole, values) for name in _QUANTIZATIONS if part.get(name)}
    if len({repr(how) for how in found.values()}) > 1:
        raise UserError(f"quantization of {path}", " and ".join(found), "one of the two", "remove the other")
    for how in found.values():
        form, kv_bytes, off = format_of_config(how, str(path), _UNQUANTIZED)
        left: dict[str, Any] = dict.fromkeys((f"{next(iter(found))}.{name}" for name in off), "off")
        return form, 2 if kv_bytes is None else kv_bytes, left
    return None, 2, {}


def _refuse_others(path: Path, whole: Mapping[str, Any], values: Mapping[str, Any], says_nothing: bool) -> None:
    """Raise UserError for features that the cost model does not know. `says_nothing`: no format of weights is given."""
    for name in _QUANTIZED_BY if says_nothing and path.name == "config.json" else ():
        if is_there(path.parent / name):
            allowed = f"a config.json with a quantization_config beside {name}, which is not read"
            raise UserError("models", str(path.parent), allowed, "give the config of the unquantized model")
    if path.name == "config.json" and is_there(path.parent / "adapter_config.json"):
        allowed = "a folder without adapter_config.json: an adapter is not priced"
        raise UserError("models", str(path.parent), allowed, "merge it into the weights, or give the base model")
    classes = whole.get("architectures")
    if isinstance(classes, list) and classes and not any(str(name).endswith(_GENERATE) for name in classes):
        allowed = "a class that generates text, such as LlamaForCausalLM"
        raise UserError(f"architectures of {path}", shortened(classes), allowed, _FIX)
    if str(values.get("model_type")) in ("gpt2", "gpt_neox") and values.get("attention_bias") is False:
        allowed = "true: a layer without biases is not priced"
        raise UserError(f"attention_bias of {path}", False, allowed, _FIX)
    for name, (off, what) in REFUSED.items():
        if values.get(name) not in (None, *off) and values[name] not in ([], {}):
            allowed = f"not there: {what}, which is not priced"
            raise UserError(f"{name} of {path}", shortened(values[name]), allowed, _FIX)
    for experts in _EXPERTS:
        if values.get(experts) not in (None, 0, 1):
            allowed = "a dense model: mixtures of experts are not modelled"
            raise UserError(f"{experts} of {path}", values[experts], allowed, "choose a dense model")
    for name, what in _OTHER_ATTENTION.items():
        if values.get(name) not in (None, False):
            raise UserError(f"{name} of {path}", "set", f"softmax attention in all layers, not {what}", _FIX)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Whole numbers of a config that have different names in different families."""

    fields: Fields

    def maybe(self, *names: str, most: str) -> int | None:
        """The number, or None if it is not given. Raises UserError if it is given twice with different values."""
        found = {name: self.fields.alike(name, 1, _MOST[most]) for name in names if self.fields.has(name)}
        if len(set(found.values())) > 1:
            first, second = list(found)[:2]
            raise self.fields.wrong(second, found[second], f"the same as {first}, {found[first]}")
        return next(iter(found.values()), None)

    def one(self, *names: str, most: str) -> int:
        found = self.maybe(*names, most=most)
        if found is None:
            wrong = self.fields.wrong(names[0], None, f"a size: one of {', '.join(names)} must be there")
            fix = "add it: where it is missing, transformers takes the default of the family's own class"
            raise UserError(wrong.key, None, wrong.allowed, fix)
        return found


def _kv_heads(kind: str, family: Family, fields: Fields, heads: int) -> int:
    if kind == "falcon":  # one for all heads before its new architecture, unless it says otherwise
        fields.ignore(["num_kv_heads"])
        if fields.flag("new_decoder_architecture", False):
            return fields.integer("num_kv_heads", 1, heads, heads)
        return 1 if fields.flag("multi_query", True) else heads
    return fields.integer("num_key_value_heads", 1, heads, heads) if family.grouped else heads


def _windows(fields: Fields, kind: str, layers: int) -> tuple[int, ...]:
    """The attention window of each layer, 0 for none; () if no layer has one."""
    kinds: Any = fields.value("layer_types", None)
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise fields.wrong("layer_types", kinds, f"a list with one for each of {layers} layers")
        for each in kinds:
            if each not in _LOOKS_BACK:
                raise fields.wrong("layer_types", each, f"one of {', '.join(_LOOKS_BACK)}")
    asked = fields.flag("use_sliding_window", kind not in WINDOW_IF_ASKED)
    if not asked or not fields.has("sliding_window"):
        if kinds is not None and any(_LOOKS_BACK[each] for each in kinds):
            told = "use_sliding_window is false" if not asked else "there is no sliding_window"
            raise fields.wrong("layer_types", "sliding_attention", f"full_attention in all layers, since {told}")
        return ()
    window = fields.integer("sliding_window", 1, _MOST["tokens"])
    if fields.integer("sliding_window_size", 1, _MOST["tokens"], window) != window:
        raise fields.wrong("sliding_window_size", fields.value("sliding_window_size"), f"{window}, as sliding_window")
    if kinds is not None:
        return tuple(window if _LOOKS_BACK[each] else 0 for each in kinds)
    if kind in WINDOW_IF_ASKED:
        first = fields.integer("max_window_layers", 0, _MOST["layers"])
        return tuple(0 if layer < first else window for layer in range(layers))
    pattern: Any = fields.value("sliding_window_pattern", FAMILIES[kind].every)
    if isinstance(pattern, str) and re.fullmatch("[LG]{1,64}", pattern):  # EXAONE: local and global, in turns
        looks = tuple(0 if pattern[layer % len(pattern)] == "G" else window for layer in range(layers))
        return (*looks[:-1], 0)  # of which the last layer is always global
    every = fields.integer("sliding_window_pattern", 1, 1 << 10, FAMILIES[kind].every)
    return windows_of(window, every, layers)


def _name(path: Path) -> str:
    """The folder's name, or the file's if it is not config.json."""
    return path.absolute().parent.name if path.name == "config.json" else path.stem
