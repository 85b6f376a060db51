"""GGUF files: written here from tiny models by llama.cpp's conventions, and the known files where they are at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from helios_sim.errors import UserError
from helios_sim.live.checkpoint.known import KNOWN
from helios_sim.live.checkpoint.source import find_checkpoint
from helios_sim.live.model.architecture import model_spec
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.shared_data import cache_folder
from live_example import TOLERANCE, packed_logits, reference_logits, token_ids
from tiny_models import tiny_model, write_gguf

_SIZES = {"hidden_size": 64, "intermediate_size": 96}  # multiples of 32, the block of Q8_0


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}), ("llama", {"tie_word_embeddings": True}), ("qwen2", {"tie_word_embeddings": False}),
        ("qwen2", {}), ("gemma3", {"head_dim": 16, "query_pre_attn_scalar": 16, "layer_types": None}),
    ],
)  # fmt: skip
def test_a_gguf_file_is_the_model_it_was_written_from(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    layers = 7  # past Gemma-3's first layer that sees everything
    reference = tiny_model(family, layers, **_SIZES | changes)
    model = SegmentedModel.load(find_checkpoint(str(write_gguf(tmp_path / "tiny.gguf", reference))))
    ids = token_ids(batch=2, tokens=40)
    torch.testing.assert_close(packed_logits(model, ids), reference_logits(reference, ids), atol=TOLERANCE, rtol=0)
    assert model_spec(model.architecture, "tiny", 3.0).weight_bytes(layers) == model.weight_bytes


def test_quantized_tensors_are_what_the_gguf_package_says(tmp_path: Path) -> None:
    reference = tiny_model("llama", **_SIZES)
    checkpoint = find_checkpoint(str(write_gguf(tmp_path / "tiny.gguf", reference, quantized=True)))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    for name in ("token_embd.weight", "blk.3.ffn_down.weight", "blk.3.attn_norm.weight"):
        want = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type)
        np.testing.assert_array_equal(checkpoint.tensor(name).numpy(), want)
        np.testing.assert_array_equal(checkpoint.rows(name, 5, 9).numpy(), want[5:9])
    ids = token_ids(batch=1, tokens=30)
    got, want = packed_logits(SegmentedModel.load(checkpoint), ids), reference_logits(reference, ids)
    assert ((got - want).std() / want.std()).item() < 0.05  # eight bits


def test_llama3_scaling_comes_from_its_tensor(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    reference = tiny_model("llama", **_SIZES, rope_parameters=scaling)
    plain = 1e4 ** -(np.arange(0, 16, 2) / 16)
    divisors = plain / reference.model.rotary_emb.inv_freq.numpy()
    path = write_gguf(tmp_path / "tiny.gguf", reference, rope_freqs=divisors.tolist())
    ids = token_ids(batch=1, tokens=100)
    got = packed_logits(SegmentedModel.load(find_checkpoint(str(path))), ids)
    torch.testing.assert_close(got, reference_logits(reference, ids), atol=TOLERANCE, rtol=0)


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", 1, **_SIZES)).read_bytes()
    for content, says in ((whole[:-1], "bytes by its header"), (whole[:300], "ends in the middle"), (b"no", "GGUF")):
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(UserError, match=says):
            find_checkpoint(str(tmp_path / "bad.gguf"))
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"family llama.*'mamba'"):
        find_checkpoint(str(tmp_path / "other.gguf"))


def test_a_file_without_tokenizer_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIOS_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", 1, **_SIZES))
    with pytest.raises(UserError, match="with a tokenizer"):
        find_checkpoint(str(path)).tokenizer()


# transformers 5.23 (from_pretrained with gguf_file, float32, cut after 6 layers) on token_ids(1, 24, vocab_size=1000):
# the last position's most likely token, and the logits of that one and of tokens 0, 100, 10,000 and the last.
_RECORDED = {
    "smollm2-135m": (15442, (18.9039, 6.7607, 2.7432, -10.646, -14.8693)),
    "gemma3-270m": (29572, (17.113, -0.3898, -2.2315, -7.692, -0.3568)),
    "qwen2.5-coder-0.5b": (28571, (19.3946, 2.2112, 8.7972, -1.1897, 1.4724)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_model_computes_what_transformers_computed(name: str) -> None:
    """Recorded, since transformers needs a minute to read these files."""
    if not (cache_folder() / KNOWN[name].file).exists():
        pytest.skip(f"the weights of {name} are not in {cache_folder()}: {KNOWN[name].get_it}")
    top, want = _RECORDED[name]
    logits = packed_logits(SegmentedModel.load(find_checkpoint(name), layers=6), token_ids(1, 24, vocab_size=1000))
    last = logits[0, -1]
    assert int(last.argmax()) == top
    torch.testing.assert_close(last[[top, 0, 100, 10_000, -1]], torch.tensor(want), atol=1e-3, rtol=0)
