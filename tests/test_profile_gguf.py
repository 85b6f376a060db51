"""The shape of a model from the header of a GGUF file: the same as from its config.json, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from faults.gguf_files import joined
from helios_sim.errors import UserError
from helios_sim.profile.gguf_header import KINDS, foreign_keys, stored_bytes
from helios_sim.profile.resolve import find_profile
from helios_sim.profile.shapes import shape_of

U32, TEXT, ARRAY = 4, 8, 9
F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8
QWEN = {  # Qwen2.5-0.5B: the keys of its config.json, by those of its GGUF files
    "embedding_length": ("hidden_size", 896), "block_count": ("num_hidden_layers", 24),
    "feed_forward_length": ("intermediate_size", 4864), "context_length": ("max_position_embeddings", 32_768),
    "attention.head_count": ("num_attention_heads", 14), "attention.head_count_kv": ("num_key_value_heads", 2),
}  # fmt: skip
MATRICES = {
    "attn_q": (896, 896), "attn_k": (128, 896), "attn_v": (128, 896), "attn_output": (896, 896),
    "ffn_gate": (4864, 896), "ffn_up": (4864, 896), "ffn_down": (896, 4864),
}  # fmt: skip


def write(
    path: Path, kinds: dict[str, int] | int = F16, keys: dict[str, tuple[int, Any] | None] | None = None,
    tensors: dict[str, tuple[tuple[int, ...], int]] | None = None, family: str = "qwen2",
) -> Path:  # fmt: skip
    """A header of Qwen2.5-0.5B, followed by a hole as long as its tensors. `keys`: None leaves one out."""
    given: dict[str, Any] = {key: (U32, value) for key, (_, value) in QWEN.items()} | (keys or {})
    known: list[list[Any]] = [["general.architecture", TEXT, family]]
    for key, value in given.items():
        if value is not None:
            known.append([key if key.startswith("general.") else f"{family}.{key}", *value])
    shapes: dict[str, tuple[tuple[int, ...], int]] = {"token_embd.weight": ((151_936, 896), F16)}
    for layer in range(24):
        for name, shape in MATRICES.items():
            shapes[f"blk.{layer}.{name}.weight"] = (shape, kinds if isinstance(kinds, int) else kinds[name])
        shapes[f"blk.{layer}.attn_norm.weight"] = ((896,), F32)
    shapes |= tensors or {}
    listed, at = [], 0
    for name, (shape, kind) in shapes.items():
        listed.append([name, shape[::-1], kind, at])
        at += -(-prod(shape[:-1]) * stored_bytes(shape[-1], kind) // 32) * 32
    content = joined(known, listed, [])
    with path.open("wb") as file:
        file.write(content)
        file.truncate(len(content) + at)
    return path


def of_config(folder: Path, **more: Any) -> Any:
    values = dict(QWEN.values()) | {"model_type": "qwen2", "vocab_size": 151_936, "tie_word_embeddings": True, **more}
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return shape_of(str(path))


def test_the_header_gives_the_shape_of_the_config(tmp_path: Path) -> None:
    found, known = shape_of(str(write(tmp_path / "own.gguf"))), of_config(tmp_path)
    assert replace(found.model, name="one") == replace(known.model, name="one")
    assert (found.model.name, found.windows) == ("own", known.windows)
    assert "F16 count in bf16" in found.source


def test_a_head_of_its_own_is_not_tied(tmp_path: Path) -> None:
    path = write(tmp_path / "own.gguf", tensors={"output.weight": ((151_936, 896), F16)})
    assert not shape_of(str(path)).model.tied_embeddings


def test_bytes_are_those_of_the_kinds(tmp_path: Path) -> None:
    """Q4_1 has 20 bytes for 32 values, Q8_0 34; a file that mixes them is priced by the mean."""
    kinds = {name: Q8_0 if name.startswith("attn") else Q4_1 for name in MATRICES}
    mixed = shape_of(str(write(tmp_path / "own.gguf", kinds)))
    held = sum(prod(shape) * (34 if name.startswith("attn") else 20) / 32 for name, shape in MATRICES.items())
    plain = of_config(tmp_path).model
    others = 2 * (plain.layer_values - plain.matrix_values)
    assert mixed.model.layer_bytes - others == pytest.approx(held, rel=2e-6)
    assert mixed.model.quantization is not None
    assert (mixed.model.quantization.name, mixed.model.quantization.bits) == ("gguf-q4_1", 4)
    assert "Q4_1 and Q8_0" in mixed.source


def test_a_gguf_file_is_priced_and_asks_less_of_memory(tmp_path: Path) -> None:
    quantized = find_profile(str(write(tmp_path / "small.gguf", Q8_0)), "l40s")
    plain = find_profile(str(write(tmp_path / "plain.gguf")), "l40s")
    assert quantized.weight_bytes(24) < plain.weight_bytes(24)
    assert "gguf-q8_0" in quantized.provenance.details["times_from"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"family": "bert"}, "general.architecture"), ({"keys": {"expert_count": (U32, 8)}}, "mixtures of experts"),
        ({"keys": {"block_count": None}}, "block_count"),
        ({"keys": {"block_count": (U32, 12)}}, "weights in the layers"),
        ({"keys": {"attention.head_count": (ARRAY, (U32, [14] * 23 + [7]))}}, "layers that differ"),
        ({"kinds": 39}, "MXFP4.*config.json"), ({"keys": {"general.type": (TEXT, "adapter")}}, "general.type"),
        ({"keys": {"embedding_length": (U32, 1024)}}, "hidden_size|weights in the layers"),
        ({"keys": {"attention.value_length": (U32, 32), "attention.key_length": (U32, 64)}}, "value_length"),
        ({"tensors": {"blk.0.ffn_gate_inp.weight": ((8, 896), F16)}}, "weights in the layers"),
        ({"keys": {"vocab_size": (U32, 1000)}}, "151936, the rows"),
        ({"tensors": {"output.weight": ((1000, 896), F16)}}, "as token_embd.weight"),
        ({"keys": {"attention.causal": (7, False)}}, "what follows"), ({"keys": {"pooling_type": (U32, 1)}}, "embeds"),
        ({"keys": {"attention.kv_lora_rank": (U32, 64)}}, "softmax attention"),
        ({"keys": {"ssm.state_size": (U32, 16)}}, "softmax attention"),
        ({"keys": {"attention.shared_kv_layers": (U32, 4)}}, "other layers"),
        ({"keys": {"nextn_predict_layers": (U32, 1)}}, "drafts"),
    ],
)  # fmt: skip
def test_what_is_not_priced_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        shape_of(str(write(tmp_path / "own.gguf", **change)))


def test_what_nothing_is_made_of_is_named(tmp_path: Path) -> None:
    usual = {
        "vocab_size": (U32, 151_936), "rope.freq_base": (6, 1e6), "rope.scaling.type": (TEXT, "yarn"),
        "attention.layer_norm_rms_epsilon": (6, 1e-6), "attention.sliding_window": (U32, 0),
    }  # fmt: skip
    tensors = {"output_norm.weight": ((896,), F32), "blk.3.attn_q.bias": ((896,), F32)}
    assert shape_of(str(write(tmp_path / "a.gguf", keys=usual, tensors=tensors))).not_read == ""
    others = {"blk.3.attn_sinks.weight": ((14,), F32), "cls.weight": ((2, 896), F16)}
    found = shape_of(str(write(tmp_path / "b.gguf", keys=usual | {"early_exit_layers": (U32, 4)}, tensors=others)))
    assert found.not_read.endswith("not read: qwen2.early_exit_layers, blk.N.attn_sinks.weight, cls.weight")
    off = write(tmp_path / "d.gguf", keys=usual | {"use_gate": (7, False), "expert_used_count": (U32, 0)})
    assert shape_of(str(off)).not_read.endswith("not read: qwen2.use_gate")
    for key in ("activation_sparsity_scale", "attention.gate_scale", "mlp_scale"):
        sparse = write(tmp_path / "c.gguf", keys=usual | {key: (6, 0.5)}, tensors=tensors)
        assert shape_of(str(sparse)).not_read.endswith(f"not read: qwen2.{key}")


def test_heads_of_layers_with_a_window_are_as_wide_as_the_others(tmp_path: Path) -> None:
    assert shape_of(str(write(tmp_path / "a.gguf", keys={"attention.key_length_swa": (U32, 64)}))).not_read == ""
    with pytest.raises(UserError, match=r"key_length_swa.*=32: 64, as the heads"):
        shape_of(str(write(tmp_path / "b.gguf", keys={"attention.key_length_swa": (U32, 32)})))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no model", b"GGUF\x03\0\0\0" + b"\xff" * 16])
def test_a_damaged_file_gets_one_message(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "own.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"own\.gguf"):
        shape_of(str(path))


def test_kinds_are_those_of_the_package_gguf() -> None:
    constants = pytest.importorskip("gguf.constants")
    sizes = {int(kind): (kind.name, *size) for kind, size in constants.GGML_QUANT_SIZES.items()}
    assert sizes == KINDS


def test_keys_of_another_prefix_are_named() -> None:
    keys = ("general.name", "tokenizer.ggml.model", "quantize.imatrix.file", "split.count", "qwen2.block_count")
    assert foreign_keys(dict.fromkeys(keys), "qwen2") == []
    others = ("mistral.attention.sliding_window", "clip.has_vision_encoder", "xet.hash")
    assert foreign_keys(dict.fromkeys((*keys, *others)), "qwen2") == list(others)
