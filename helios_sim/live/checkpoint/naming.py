"""The names of a model's parts in a transformers checkpoint and in a GGUF file, by family."""

from __future__ import annotations

from helios_sim.live.model.weights import Change, StoredPiece

_BIAS = "_bias"


_LLAMA: dict[str, tuple[str, ...]] = {
    "attention_norm": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_out": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_out": ("mlp.down_proj",),
}
_HUB_LAYER: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "gemma3": _LLAMA
    | {
        "attention_post_norm": ("post_attention_layernorm",),
        "mlp_norm": ("pre_feedforward_layernorm",),
        "mlp_post_norm": ("post_feedforward_layernorm",),
        "q_norm": ("self_attn.q_norm",),
        "k_norm": ("self_attn.k_norm",),
    },
    "opt": {
        "attention_norm": ("self_attn_layer_norm",),
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention_out": ("self_attn.out_proj",),
        "mlp_norm": ("final_layer_norm",),
        "mlp_in": ("fc1",),
        "mlp_out": ("fc2",),
    },
    "gpt2": {
        "attention_norm": ("ln_1",),
        "qkv": ("attn.c_attn",),
        "attention_out": ("attn.c_proj",),
        "mlp_norm": ("ln_2",),
        "mlp_in": ("mlp.c_fc",),
        "mlp_out": ("mlp.c_proj",),
    },
}
_HUB_OUTER = {"embedding": "embed_tokens", "final_norm": "norm"}
_HUB_OUTER_OF = {
    "opt": {"embedding": "embed_tokens", "positions": "embed_positions", "final_norm": "final_layer_norm"},
    "gpt2": {"embedding": "wte", "positions": "wpe", "final_norm": "ln_f"},
}
_GGUF_LAYER = {
    "attention_norm": ("attn_norm",),
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "attention_out": ("attn_output",),
    "mlp_norm": ("ffn_norm",),
    "mlp_in": ("ffn_gate", "ffn_up"),
    "mlp_out": ("ffn_down",),
    "attention_post_norm": ("post_attention_norm",),
    "mlp_post_norm": ("post_ffw_norm",),
    "q_norm": ("attn_q_norm",),
    "k_norm": ("attn_k_norm",),
}
HUB_HEAD = "lm_head.weight"
_GGUF_OUTER = {"embedding": "token_embd", "final_norm": "output_norm", "head": "output"}


def hub_embedding(family: str) -> str:
    """The end of the embedding's name in a transformers checkpoint. What precedes it is the prefix of all names."""
    return _HUB_OUTER_OF.get(family, _HUB_OUTER)["embedding"] + ".weight"


def hub_pieces(family: str, prefix: str, part: str, layer: int | None) -> tuple[StoredPiece, ...]:
    """The pieces of a part in a transformers checkpoint. `layer` is None for parts outside the layers."""
    stem, kind = _split(part)
    if layer is None:
        if stem == "head":
            return (StoredPiece(HUB_HEAD),)
        name = f"{prefix}{_HUB_OUTER_OF.get(family, _HUB_OUTER)[stem]}.{kind}"
        return (StoredPiece(name, _hub_change(family, stem, part)),)
    stack = "h" if family == "gpt2" else "layers"
    names = _HUB_LAYER[family][stem]
    return tuple(StoredPiece(f"{prefix}{stack}.{layer}.{n}.{kind}", _hub_change(family, stem, part)) for n in names)


def gguf_pieces(family: str, part: str, layer: int | None) -> tuple[StoredPiece, ...]:
    """The pieces of a part in a GGUF file. `layer` is None for parts outside the layers."""
    stem, kind = _split(part)
    if layer is None:
        return (StoredPiece(f"{_GGUF_OUTER[stem]}.{kind}"),)
    turned = {"attn_q", "attn_k"} if family == "llama" else set()
    return tuple(
        StoredPiece(f"blk.{layer}.{n}.{kind}", Change.INTERLEAVED_HEADS if n in turned else Change.NONE)
        for n in _GGUF_LAYER[stem]
    )


def _split(part: str) -> tuple[str, str]:
    return (part.removesuffix(_BIAS), "bias") if part.endswith(_BIAS) else (part, "weight")


def _hub_change(family: str, stem: str, part: str) -> Change:
    if family == "gemma3" and stem.endswith("norm"):
        return Change.PLUS_ONE
    if family == "gpt2" and part in ("qkv", "attention_out", "mlp_in", "mlp_out"):
        return Change.TRANSPOSED
    if family == "opt" and stem == "positions":
        return Change.SKIP_TWO_ROWS
    return Change.NONE
