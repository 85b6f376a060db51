"""The model in the header of a GGUF file, in the keys of a config.json: its sizes and its weights' precision.

No weight is read. The tensors' own shapes are the check: the matrices of the layers must be as large as the sizes say.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from helios_sim.errors import UserError
from helios_sim.profile.formats import WEIGHTS, WeightFormat
from helios_sim.profile.gguf_header import KINDS, GgufHeader, StoredTensor, foreign_keys, read_header
from helios_sim.profile.spec import ModelSpec
from helios_sim.untrusted import Fields, is_there

_FIX = "give the config.json of the model, as it is on Hugging Face"
# ggml's name of an architecture, and the family's name in a config.json.
FAMILIES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text",
    "phi3": "phi3", "olmo2": "olmo2", "granite": "granite", "smollm3": "smollm3", "starcoder2": "starcoder2",
}  # fmt: skip
_SIZES = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "context_length": "max_position_embeddings",
}  # fmt: skip
_PLAIN = ("F32", "F16", "BF16")
_PRICED = ("Q", "IQ")  # first letters of kinds with counted bytes
_NOT_PRICED = ("Q1_0", "Q8_1", "Q8_K")  # experiments, and kinds of activations
_LARGEST = 1 << 22
# Keys of a family with the only value that is priced, and what another one asks for.
_REFUSED = {
    "attention.causal": (True, "attention to what follows"), "pooling_type": (0, "a model that embeds texts"),
    "attention.shared_kv_layers": (0, "K and V of other layers"), "nextn_predict_layers": (0, "a layer that drafts"),
    "leading_dense_block_count": (0, "a mixture of experts"),
}
_OF_OTHERS = re.compile(r"\.(ssm|wkv|kda|altup|laurel|shortconv)\b|_lora_rank$|\.expert_(feed|shared|used)|\.decoder_")
_OF_NO_MATTER = re.compile(
    r"^rope\.|_epsilon$|softcapping$|^(logit|residual|embedding)_scale$|^attention\.(sliding_window|clamp_kqv|max_alibi"
    r"|layer_norm|scale$|output_scale$|temperature_(scale|length)$)|^use_parallel_residual$|^tensor_data_layout$"
    r"|^vocab_size$|^rope_|^general\."
)
_NUMBER = re.compile(r"^blk\.\d+\.")
_KNOWN_TENSORS = re.compile(
    r"token_embd\.weight|output(_norm)?\.(weight|bias)|rope_(freqs|factors_long|factors_short)\.weight"
    r"|blk\.\d+\.((attn|ffn)_norm(_2)?|attn_(q|k|v|qkv|output)|attn_[qk]_norm|ffn_(gate|up|down)"
    r"|post_(attention|ffw|attn|ffn)_norm|attn_post_norm|ffn_post_norm|layer_output_norm|rope_freqs)\.(weight|bias)"
)


@dataclass(frozen=True, slots=True)
class GgufModel:
    """`values` are those that a config.json would have; `weights` is None for bf16."""

    header: GgufHeader
    values: dict[str, Any]
    weights: WeightFormat | None
    source: str
    not_read: str = ""  # keys and tensors of which nothing is made, in a sentence

    def check(self, path: Path, model: ModelSpec) -> None:
        """Raise UserError if the layers' matrices are not as large as the model that was made of the keys."""
        held = sum(prod(tensor.shape) for tensor in matrices_of_layers(self.header))
        if held != model.n_layers * model.matrix_values:
            allowed = f"{model.n_layers * model.matrix_values} by its keys, as in a dense model of this family"
            raise UserError(f"weights in the layers of {path}", held, allowed, _FIX)


def read_gguf(path: Path) -> GgufModel:
    """Read a model. Raises UserError if the file is damaged, or what it holds is not priced."""
    if not is_there(path):
        raise UserError("models", str(path), "no file there", "correct the path")
    header = read_header(path)
    whole = Fields(header.metadata, str(path), _FIX)
    name = whole.text("general.architecture", FAMILIES)
    whole.text("general.type", ("model",), "model")  # not an adapter or a projector of images
    keys = Fields(header.metadata, str(path), _FIX, prefix=f"{name}.")
    if keys.has("expert_count") and keys.value("expert_count") != 0:
        allowed = "a dense model: mixtures of experts are not modelled"
        raise UserError(f"{name}.expert_count of {path}", keys.value("expert_count"), allowed, "choose a dense model")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"tensor token_embd.weight of {path}", "missing", "there, as a matrix", _FIX)
    found: dict[str, Any] = {"model_type": FAMILIES[name], "vocab_size": embedding.shape[0]}
    for key, of_config in _SIZES.items():
        found[of_config] = keys.alike(key, 1, _LARGEST)
    found["num_key_value_heads"] = keys.alike("attention.head_count_kv", 1, _LARGEST, found["num_attention_heads"])
    if keys.has("attention.key_length"):
        found["head_dim"] = keys.integer("attention.key_length", 1, _LARGEST)
        if keys.integer("attention.value_length", 1, _LARGEST, found["head_dim"]) != found["head_dim"]:
            allowed = f"{found['head_dim']}, as the keys of a head"
            raise keys.wrong("attention.value_length", keys.value("attention.value_length"), allowed)
    elif FAMILIES[name] in ("qwen3", "gemma", "gemma2", "gemma3_text"):  # families with configs that must say it
        found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
    width = found.get("head_dim", found["hidden_size"] // found["num_attention_heads"])
    for of_windows in ("attention.key_length_swa", "attention.value_length_swa"):
        if keys.integer(of_windows, 1, _LARGEST, width) != width:
            raise keys.wrong(of_windows, keys.value(of_windows), f"{width}, as the heads of other layers")
    found["tie_word_embeddings"] = "output.weight" not in header.tensors
    found["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    found |= _windows(keys, found["num_hidden_layers"])
    _check_vocabulary(path, header, keys, embedding)
    _refuse_others(header, keys)
    weights, how = _weights(path, header)
    return GgufModel(header, found, weights, f"the header of {path}, {how}", _not_read(path, header, keys))


def _check_vocabulary(path: Path, header: GgufHeader, keys: Fields, embedding: StoredTensor) -> None:
    """Raise UserError if the words are of another number than the embedding has rows."""
    words = keys.integer("vocab_size", 1, _LARGEST, embedding.shape[0])
    if words != embedding.shape[0]:
        raise keys.wrong("vocab_size", words, f"{embedding.shape[0]}, the rows of token_embd.weight")
    head = header.tensors.get("output.weight")
    if head is not None and head.shape != embedding.shape:
        raise UserError(f"tensor output.weight of {path}", head.shape, f"{embedding.shape}, as token_embd.weight", _FIX)


def _refuse_others(header: GgufHeader, keys: Fields) -> None:
    """Raise UserError for keys that ask for another model than one of dense layers that generates text."""
    for name, (off, what) in _REFUSED.items():
        if keys.value(name, off) != off:
            raise keys.wrong(name, keys.value(name), f"{off!r}, or not there: {what} is not priced")
    for name, value in header.metadata.items():
        if _OF_OTHERS.search(str(name)) and value:
            raise keys.wrong(str(name).partition(".")[2], value, "a dense model with softmax attention in all layers")


def _not_read(path: Path, header: GgufHeader, keys: Fields) -> str:
    """A sentence about the keys and the tensors of which nothing is made; "" where there are none."""
    off = [name for name in keys.off if not _OF_OTHERS.search(name) and "expert_" not in name]
    left = [name for name in (*keys.rest, *off) if not _OF_NO_MATTER.search(name.partition(".")[2])]
    left += foreign_keys(header.metadata, str(header.metadata["general.architecture"]))
    left += sorted({
        _NUMBER.sub("blk.N.", name) for name, tensor in header.tensors.items()
        if not _KNOWN_TENSORS.fullmatch(name) and not (name.startswith("blk.") and len(tensor.shape) > 1)
    })  # fmt: skip
    more = f" and {len(left) - 12} more" if len(left) > 12 else ""
    return f"{path}: not read: {', '.join(left[:12])}{more}" if left else ""


def _windows(keys: Fields, layers: int) -> dict[str, Any]:
    """Sliding windows, and which layers have one where the file says it."""
    window = keys.integer("attention.sliding_window", 0, _LARGEST, 0)
    if not window:
        return {}
    pattern = keys.value("attention.sliding_window_pattern", None)
    if isinstance(pattern, tuple):
        if len(pattern) != layers or not all(isinstance(slides, bool) for slides in pattern):
            raise keys.wrong("attention.sliding_window_pattern", pattern, f"a period, or {layers} yes or no")
        kinds = ["sliding_attention" if slides else "full_attention" for slides in pattern]
        return {"sliding_window": window, "layer_types": kinds}
    return {"sliding_window": window} | ({} if pattern is None else {"sliding_window_pattern": pattern})


def matrices_of_layers(header: GgufHeader) -> list[StoredTensor]:
    """The layers' matrices, without norms and biases."""
    return [t for name, t in header.tensors.items() if name.startswith("blk.") and len(t.shape) > 1]


def _weights(path: Path, header: GgufHeader) -> tuple[WeightFormat | None, str]:
    """The format of the layers' matrices, None for bf16, and its name. Raises UserError for kinds without a price.

    Files mix kinds, so that bytes are the mean over all layers. The embedding and the LM head count in bf16.
    """
    values: Counter[str] = Counter()
    matrices = matrices_of_layers(header)
    for tensor in matrices:
        values[KINDS[tensor.kind][0]] += prod(tensor.shape)
    for kind in values:
        if kind not in _PLAIN and (not kind.startswith(_PRICED) or kind in _NOT_PRICED):
            allowed = f"{', '.join(_PLAIN)}, Q2_K to Q8_0 or IQ kinds: others are not priced"
            raise UserError(f"weights of {path}", kind, allowed, _FIX)
    kinds = " and ".join(kind for kind, _ in values.most_common())
    if not values or set(values) <= set(_PLAIN):
        return None, f"whose weights in {kinds} count in bf16" if kinds != "BF16" else "whose weights are in bf16"
    total = sum(values.values())
    each = sum(tensor.n_bytes for tensor in matrices) / total
    name = "gguf-" + values.most_common(1)[0][0].lower()
    form = WeightFormat(name, 4 if each < 0.75 else 8, WEIGHTS, bytes_of_a_million=round(1e6 * each))
    return form, f"whose layers are in {kinds}, {8 * each:.2f} bits a weight; embedding and LM head count in bf16"
