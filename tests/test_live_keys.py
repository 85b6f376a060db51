"""Keys of a GGUF file mean what they mean to llama.cpp, and a missing one has its default.

`expected` follows llama.cpp's `load_hparams` (llama-model.cpp and models/{llama,qwen2,gemma3}.cpp), key by key. Files
with random keys are read by both.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from helios_sim.errors import WeightsError
from helios_sim.live.checkpoint.gguf_file import GgufFile
from helios_sim.live.model.architecture import Rope

D, FF, VOCAB, LAYERS = 64, 96, 40, 4
OPTIONAL: dict[str, tuple[str, tuple[Any, ...]]] = {
    "attention.head_count_kv": ("uint32", (1, 2, 4)),
    "attention.key_length": ("uint32", (16, 32)),
    "attention.value_length": ("uint32", (16, 32)),
    "rope.dimension_count": ("uint32", (16, 32, 8)),
    "rope.freq_base": ("float32", (10_000.0, 500_000.0)),
    "rope.scaling.type": ("string", ("none", "linear")),
    "rope.scaling.factor": ("float32", (0.0, 1.0, 4.0)),
    "rope.scale_linear": ("float32", (2.0,)),
    "rope.scaling.attn_factor": ("float32", (0.0, 1.0, 1.0, 1.0)),
    "rope.scaling.finetuned": ("bool", (True, False)),
    "rope.scaling.original_context_length": ("uint32", (32,)),
    "vocab_size": ("uint32", (VOCAB,)),
}
OF_GEMMA: dict[str, tuple[str, tuple[Any, ...]]] = {
    "attention.sliding_window": ("uint32", (0, 16)),
    "attention.sliding_window_pattern": ("uint32", (0, 1, 2, 3)),
    "rope.freq_base_swa": ("float32", (3_000.0,)),
}


def expected(family: str, keys: Mapping[str, Any]) -> dict[str, Any] | None:
    """What llama.cpp takes from the keys; None where it cannot run the file, or this project does not build it."""
    heads = keys["attention.head_count"]
    head_k = keys.get("attention.key_length", D // heads)
    head_v = keys.get("attention.value_length", D // heads)
    if head_v != head_k or keys.get("rope.dimension_count", head_k) != head_k:
        return None
    if keys.get("rope.scaling.attn_factor", 1.0) != 1.0:  # q and k are multiplied by it
        return None
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0.0))
    if factor == 0.0 or keys.get("rope.scaling.type", "linear") == "none":
        factor = 1.0
    window = keys.get("attention.sliding_window", 0) if family == "gemma3" else 0
    period = keys.get("attention.sliding_window_pattern", 6)
    sliding = tuple(period == 0 or layer % period < period - 1 for layer in range(LAYERS)) if window else ()
    base = Rope(keys.get("rope.freq_base", 10_000.0), None if factor == 1.0 else (factor,) * (head_k // 2))
    return {
        "n_heads": heads,
        "n_kv_heads": keys.get("attention.head_count_kv", heads),
        "head_dim": head_k,
        "attention_scale": head_k**-0.5,
        "embedding_scale": D**0.5 if family == "gemma3" else 1.0,
        "rope": base,
        "sliding": sliding if any(sliding) else (),
        "window_tokens": window if any(sliding) else None,
        "sliding_rope": Rope(keys.get("rope.freq_base_swa", 10_000.0)) if any(sliding) else None,
        "activation": "gelu_tanh" if family == "gemma3" else "silu",
        "tied_embeddings": True,
    }


def write(path: Path, family: str, keys: Mapping[str, Any], more: tuple[str, ...] = ()) -> Path:
    """A file with these keys, and tensors of zeros of the shapes that follow from them."""
    writer = gguf.GGUFWriter(path, family)
    kinds = {key: kind for key, (kind, _) in (OPTIONAL | OF_GEMMA).items()}
    for key, value in keys.items():
        getattr(writer, f"add_{kinds.get(key, 'uint32')}")(f"{family}.{key}", value)
    writer.add_layer_norm_rms_eps(1e-6)
    heads = keys["attention.head_count"]
    head = keys.get("attention.key_length", D // heads)
    q, kv = heads * head, keys.get("attention.head_count_kv", heads) * head
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (D,), "attn_q": (q, D), "attn_k": (kv, D), "attn_v": (kv, D), "attn_output": (D, q),
        "ffn_norm": (D,), "ffn_gate": (FF, D), "ffn_up": (FF, D), "ffn_down": (D, FF),
    }  # fmt: skip
    if family == "gemma3":
        layer |= {"post_attention_norm": (D,), "post_ffw_norm": (D,), "attn_q_norm": (head,), "attn_k_norm": (head,)}
    shapes = {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in layer.items()}
    if family == "qwen2":
        shapes |= {f"blk.{i}.attn_{n}.bias": (r,) for i in range(LAYERS) for n, r in (("q", q), ("k", kv), ("v", kv))}
    shapes |= {"token_embd.weight": (VOCAB, D), "output_norm.weight": (D,), **dict.fromkeys(more, (head // 2,))}
    for name, shape in shapes.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def needed(heads: int = 4) -> dict[str, Any]:
    sizes = {"context_length": 128, "embedding_length": D, "block_count": LAYERS, "feed_forward_length": FF}
    return {**sizes, "attention.head_count": heads}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_random_keys_are_read_as_llama_cpp_reads_them(family: str, tmp_path: Path) -> None:
    rng, read = random.Random(family), 0
    optional = OPTIONAL | (OF_GEMMA if family == "gemma3" else {})
    for case in range(60):
        keys = needed(rng.choice((2, 4)))
        share = rng.choice((0.1, 0.4, 0.7))
        keys |= {key: rng.choice(values) for key, (_, values) in optional.items() if rng.random() < share}
        keys["attention.head_count_kv"] = min(keys.get("attention.head_count_kv", 4), keys["attention.head_count"])
        if rng.random() < 0.5:
            del keys["attention.head_count_kv"]
        path, want = write(tmp_path / f"{case}.gguf", family, keys), expected(family, keys)
        if want is None:
            with pytest.raises(WeightsError):
                GgufFile(path)
            continue
        found = GgufFile(path).architecture
        assert {name: getattr(found, name) for name in want} == want, keys
        read += 1
    assert 20 <= read <= 58


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_divisors_of_frequencies_are_of_llama_alone(family: str, tmp_path: Path) -> None:
    """llama.cpp has the tensor for llama and refuses a file of these other families that holds it."""
    path = write(tmp_path / "freqs.gguf", family, needed(), more=("rope_freqs.weight",))
    if family == "llama":
        assert GgufFile(path).architecture.rope == Rope(10_000.0)  # all divisors are 1
    else:
        with pytest.raises(WeightsError, match=r"rope_freqs\.weight.*not read"):
            GgufFile(path)


@pytest.mark.parametrize("key", [*needed(), "attention.layer_norm_rms_epsilon"])
def test_keys_without_a_default_are_needed(key: str, tmp_path: Path) -> None:
    path = write(tmp_path / "whole.gguf", "llama", needed())
    content = path.read_bytes().replace(f"llama.{key}".encode(), f"other.{key}".encode())
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"llama.{key}"):
        GgufFile(path)


def test_heads_that_do_not_divide_the_hidden_size_are_refused_unless_their_size_is_said(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"embedding_length.*=64.*a multiple of 3"):
        GgufFile(write(tmp_path / "three.gguf", "llama", needed(3)))
    sizes = {"attention.key_length": 16, "attention.value_length": 16}
    assert GgufFile(write(tmp_path / "said.gguf", "llama", needed(3) | sizes)).architecture.q_width == 48
