"""Tiny random checkpoints of every family, written as their users would.

`write_tiny(family, folder)` writes a folder with config.json, model.safetensors and a tokenizer; `tiny_model` gives
the same model in memory, as the oracle. The weights are random but not small, so that a mistake in any part shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FAMILIES = ("llama", "opt", "gpt2", "qwen2", "gemma3")
CONTEXT_TOKENS = 128
SLIDING_WINDOW_TOKENS = 16  # of gemma3: shorter than the tests' texts
TEXT = (
    "The river ran high in March and the bridge keeper kept a book of every cart that crossed it. "
    "def area(width, height): return width * height\n"
    "What did you say? I said that the early bird catches the worm, and you laughed at me.\n"
)


def tiny_config(family: str, layers: int = 6, vocab_size: int = 320, **changes: Any) -> Any:
    """A transformers config: d_model 48, 4 heads with 2 KV heads where the family groups them."""
    import transformers

    size = {"vocab_size": vocab_size, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    grouped = {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": CONTEXT_TOKENS,
    }  # fmt: skip
    if family == "llama":
        return transformers.LlamaConfig(**size | grouped | {"tie_word_embeddings": False} | changes)
    if family == "qwen2":
        return transformers.Qwen2Config(**size | grouped | {"tie_word_embeddings": True} | changes)
    if family == "gemma3":
        kinds = ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(layers)]
        own = {
            "head_dim": 24, "query_pre_attn_scalar": 20, "layer_types": kinds,
            "sliding_window": SLIDING_WINDOW_TOKENS, "tie_word_embeddings": True,
        }  # fmt: skip
        return transformers.Gemma3TextConfig(**size | grouped | own | changes)
    if family == "opt":
        own = {
            "hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 96, "num_hidden_layers": layers,
            "num_attention_heads": 4, "max_position_embeddings": CONTEXT_TOKENS,
        }  # fmt: skip
        return transformers.OPTConfig(**size | own | changes)
    if family == "gpt2":
        own = {"n_embd": 48, "n_inner": 96, "n_layer": layers, "n_head": 4, "n_positions": CONTEXT_TOKENS}
        return transformers.GPT2Config(**size | own | changes)
    raise ValueError(f"no tiny model of family {family}: {', '.join(FAMILIES)}")


def tiny_model(family: str, layers: int = 6, seed: int = 0, **changes: Any) -> Any:
    """The transformers model in float32 with random weights: matrices N(0, 0.15), norms and biases off their start."""
    import torch
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, layers, **changes))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(std=0.15)
                else:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.float().eval()


def tiny_tokenizer(vocab_size: int = 320) -> Any:
    """A byte-level BPE with a few merges: it can encode every text. Ids: 0 padding, 1 begin, 2 end."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def write_tiny(family: str, folder: Path, layers: int = 6, seed: int = 0, **changes: Any) -> Path:
    """The folder, with the model and a tokenizer written by `save_pretrained`. `changes` go to the config."""
    tiny_model(family, layers, seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


_GGUF_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def _gguf_name(name: str, family: str) -> str:
    outer = {
        "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }  # fmt: skip
    if name in outer:
        return outer[name]
    _, _, layer, rest = name.split(".", 3)
    stem, kind = rest.rsplit(".", 1)
    after = "post_attention_norm" if family == "gemma3" else "ffn_norm"
    return f"blk.{layer}.{after if stem == 'post_attention_layernorm' else _GGUF_NAMES[stem]}.{kind}"


def _permuted(weight: Any, heads: int) -> Any:
    """What llama.cpp's converter does to Llama's q and k."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    reference: Any,
    quantized: bool = False,
    rope_freqs: list[float] | None = None,
    keys: Mapping[str, tuple[str, Any]] | None = None,
    tensors: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    kinds: Callable[[str, tuple[int, ...]], tuple[Any, Any] | None] | None = None,
) -> Path:
    """The model by llama.cpp's conventions. `keys`: further ones, with the writer's method for each; `tensors` too.

    `kinds` gives a matrix other values: their kind and their rows of bytes, or None, by the tensor's name and shape.
    """
    import gguf
    import numpy as np

    c, family = reference.config, reference.config.model_type.removesuffix("_text")
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_array("general.tags", [0.5] * 5000)  # a long array is stepped over
    if family == "gemma3":
        writer.add_rope_freq_base(c.rope_parameters["full_attention"]["rope_theta"])
        writer.add_sliding_window(c.sliding_window)
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    else:
        writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    for key, (kind, value) in (keys or {}).items():
        getattr(writer, f"add_{kind}")(key, value)
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data)
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", np.array(rope_freqs, np.float32))
    for name, tensor in reference.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        data = tensor.float().numpy()
        if family == "llama" and "q_proj" in name:
            data = _permuted(data, c.num_attention_heads)
        if family == "llama" and "k_proj" in name:
            data = _permuted(data, c.num_key_value_heads)
        if family == "gemma3" and name.endswith("norm.weight"):
            data = data + 1
        if kinds is not None and data.ndim == 2 and (other := kinds(_gguf_name(name, family), data.shape)) is not None:
            kind, data = other
            writer.add_tensor(_gguf_name(name, family), np.ascontiguousarray(data), raw_dtype=kind)
        elif quantized and data.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(_gguf_name(name, family), gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(_gguf_name(name, family), np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any, tokenizer: Any) -> None:
    """The byte-level BPE of `tiny_tokenizer`, as llama.cpp's converter writes GPT-2's."""
    import json

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<pad>", "<s>", "</s>") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
