"""Tiny random checkpoints of every family, written as their users would. Knows transformers, nothing of helios_sim.

`write_tiny(family, folder)` writes a folder with config.json, model.safetensors and a tokenizer; `tiny_model` gives
the same model in memory, as the oracle. The weights are random but not small, so that a mistake in any part shows.
"""

from __future__ import annotations

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
