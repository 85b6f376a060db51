"""Every tensor and every key of a checkpoint is used, known not to matter, or refused by name."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from faults import gguf_files, head_folders
from helios_sim.errors import UserError, WeightsError
from helios_sim.live.checkpoint.source import find_checkpoint
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.model.heads import ExitHeads
from live_example import TOLERANCE, packed_logits, reference_logits, token_ids
from tiny_models import tiny_model, tiny_tokenizer, write_gguf, write_tiny

SIZES = {"hidden_size": 64, "intermediate_size": 96}
GEMMA = {**SIZES, "head_dim": 16, "query_pre_attn_scalar": 16}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def same_logits(path: Path, reference: Any) -> None:
    ids = token_ids(batch=1, tokens=60)
    got = packed_logits(SegmentedModel.load(find_checkpoint(str(path))), ids)
    torch.testing.assert_close(got, reference_logits(reference, ids), atol=TOLERANCE, rtol=0)


def linear(factor: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "linear", "factor": factor, "rope_theta": 1e4}}


@pytest.mark.parametrize(
    ("keys", "changes"),
    [
        ({"llama.rope.scaling.factor": ("float32", 4.0)}, linear(4.0)),  # llama.cpp's default type is linear
        ({"llama.rope.scale_linear": ("float32", 4.0)}, linear(4.0)),
        ({"llama.rope.scaling.type": ("string", "linear"), "llama.rope.scaling.factor": ("float32", 4.0)}, linear(4.0)),
        ({"llama.rope.scaling.type": ("string", "none"), "llama.rope.scaling.factor": ("float32", 4.0)}, {}),
        ({"llama.expert_count": ("uint32", 0), "quantize.imatrix.file": ("string", "x")}, {}),
    ],
)
def test_gguf_keys_mean_what_llama_cpp_means(keys: dict[str, Any], changes: dict[str, Any], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", **SIZES), keys=keys)
    same_logits(path, tiny_model("llama", **SIZES, **changes))


@pytest.mark.parametrize("pattern", [("uint32", 3), ("array", [True, True, False] * 2)])
def test_gemma_s_sliding_layers_and_their_base_come_from_the_file(pattern: tuple[str, Any], tmp_path: Path) -> None:
    kinds = ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(6)]
    ropes = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3e3},
    }
    reference = tiny_model("gemma3", **GEMMA, layer_types=kinds, rope_parameters=ropes)
    keys = {"gemma3.attention.sliding_window_pattern": pattern, "gemma3.rope.freq_base_swa": ("float32", 3e3)}
    same_logits(write_gguf(tmp_path / "tiny.gguf", reference, keys=keys), reference)


@pytest.mark.parametrize(
    ("keys", "tensors", "says"),
    [
        ({}, {"blk.0.attn_q.bias": np.ones(64, np.float32)}, r"blk\.0\.attn_q\.bias.*not read"),
        ({}, {"blk.1.ffn_up.bias": np.ones(96, np.float32)}, r"blk\.1\.ffn_up\.bias.*not read"),
        ({}, {"blk.9.attn_q.weight": np.ones((64, 64), np.float32)}, r"block_count.*=2"),
        ({"llama.attention.scale_by_magic": ("float32", 2.0)}, {}, r"scale_by_magic.*could change"),
        ({"llama.expert_count": ("uint32", 8)}, {}, r"expert_count.*=8"),
        ({"llama.rope.scaling.type": ("string", "yarn")}, {}, r"scaling\.type.*'yarn'"),
        ({"llama.rope.dimension_count": ("uint32", 8)}, {}, r"dimension_count.*=8"),
        ({"llama.vocab_size": ("uint32", 999)}, {}, r"vocab_size.*=999.*320"),
        ({"tokenizer.ggml.tokens": ("array", ["a", "b"])}, {}, r"tokens.*2 tokens.*320"),
        ({"general.type": ("string", "adapter")}, {}, r"general\.type.*'adapter'"),
        ({"split.count": ("uint16", 3)}, {}, r"split\.count.*llama-gguf-split"),
        ({"llama.attention.causal": ("bool", False)}, {}, r"attention\.causal"),
    ],
)
def test_what_a_gguf_file_says_besides_is_refused_by_name(
    keys: dict[str, Any], tensors: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", 2, **SIZES), keys=keys, tensors=tensors)
    with pytest.raises(WeightsError, match=says):
        find_checkpoint(str(path))


@pytest.mark.parametrize(("per_layer", "says"), [([4, 4], None), ([4, 2], r"head_count.*layers that differ")])
def test_heads_by_layer_are_read_where_they_are_alike(per_layer: list[int], says: str | None, tmp_path: Path) -> None:
    reference = tiny_model("llama", 2, **SIZES)
    path = write_gguf(tmp_path / "tiny.gguf", reference)
    keys, tensors, data = gguf_files.parsed(path.read_bytes())
    for key in keys:
        if key[0] == "llama.attention.head_count":
            key[1:] = [9, (4, per_layer)]
    path.write_bytes(gguf_files.joined(keys, tensors, data))
    if says is None:
        same_logits(path, reference)
    else:
        with pytest.raises(WeightsError, match=says):
            find_checkpoint(str(path))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c[:4] + struct.pack(">I", 3) + c[8:], "big-endian"),
        (lambda c: c[:4] + struct.pack("<I", 1) + c[8:], r"GGUF version.*=1"),
        (lambda c: b"ggjt" + c[4:], "an older format of ggml"),
        (lambda _: LFS.encode(), "git lfs pull"),
    ],
)
def test_other_formats_are_named(change: Callable[[bytes], bytes], says: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", 1, **SIZES))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(WeightsError, match=says):
        find_checkpoint(str(path))


@pytest.mark.parametrize(("kind", "says"), [(4, "Q4_2"), (36, "IQ4_NL_4_4"), (26, "I32"), (77, "kind 77")])
def test_kinds_of_tensors_that_are_not_read(kind: int, says: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", 1, **SIZES))
    content, name = path.read_bytes(), b"blk.0.attn_q.weight"
    at = content.index(name) + len(name) + 4 + 16
    path.write_bytes(content[:at] + struct.pack("<I", kind) + content[at + 4 :])
    with pytest.raises(WeightsError, match=says):
        find_checkpoint(str(path))


def folder_of(tmp_path: Path, family: str = "llama", **changes: Any) -> Path:
    return write_tiny(family, tmp_path / "model", 2, **changes)


def with_tensors(folder: Path, more: dict[str, torch.Tensor]) -> Path:
    path = folder / "model.safetensors"
    save_file(load_file(path) | more, path)
    return folder


def with_config(folder: Path, **more: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return folder


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({f"{Q}.weight": torch.zeros(48, 48).to(torch.float8_e4m3fn)}, r"q_proj\.weight.*F8_E4M3.*quantized"),
        ({f"{Q}.weight_scale_inv": torch.ones(1)}, r"weight_scale_inv.*quantized"),
        ({f"{Q}.weight_scale": torch.ones(1)}, r"weight_scale.*quantized"),
        ({f"{Q}.qweight": torch.zeros(6, 48, dtype=torch.int32)}, r"qweight.*quantized"),
        ({f"{Q}.weight.absmax": torch.ones(6)}, r"absmax.*quantized"),
        ({f"{Q}.weight": torch.zeros(48, 48, dtype=torch.int8)}, r"q_proj\.weight.*I8.*quantized"),
        ({f"{Q}.bias": torch.ones(48)}, r"q_proj\.bias.*not read"),
        ({"model.layers.2.input_layernorm.weight": torch.ones(48)}, r"layers\.2.*not read"),
    ],
)
def test_tensors_beside_the_model_s_are_refused_by_name(more: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=says):
        find_checkpoint(str(with_tensors(folder_of(tmp_path), more)))


def test_tensors_that_follow_from_the_shape_do_not_matter(tmp_path: Path) -> None:
    more = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(2)}
    same_logits(with_tensors(folder_of(tmp_path), more), tiny_model("llama", 2))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"hidden_size": 50}, "50"),
        ({"num_key_value_heads": 3}, "KV heads that divide"),
        ({"num_hidden_layers": 1 << 31}, r"num_hidden_layers.*1 to 1024"),
        ({"rms_norm_eps": -1}, "norm_eps"),
    ],
)
def test_configs_that_are_not_read_are_named(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=says):
        find_checkpoint(str(with_config(folder_of(tmp_path), **config)))


@pytest.mark.parametrize("name", ["quantize_config.json", "adapter_config.json", "hf_quant_config.json"])
def test_files_that_change_the_weights_are_named(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / name).write_text("{}")
    with pytest.raises(WeightsError, match=name):
        find_checkpoint(str(folder))


def test_a_config_s_code_is_not_run(tmp_path: Path) -> None:
    folder = with_config(folder_of(tmp_path), auto_map={"AutoConfig": "evil.Config", "AutoTokenizer": "evil.T"})
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    find_checkpoint(str(folder)).tokenizer()
    assert not (tmp_path / "ran").exists()


def test_a_tied_head_that_differs_is_the_file_s_own(tmp_path: Path) -> None:
    import transformers

    own = 0.15 * torch.randn(320, 48, generator=torch.Generator().manual_seed(3))
    folder = with_tensors(folder_of(tmp_path, tie_word_embeddings=True), {"lm_head.weight": own})
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    assert not find_checkpoint(str(folder)).architecture.tied_embeddings
    same_logits(folder, reference)


def test_a_head_stored_twice_stays_tied(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, tie_word_embeddings=True)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    with_tensors(folder, {"lm_head.weight": embedding.clone()})
    assert find_checkpoint(str(folder)).architecture.tied_embeddings


def sharded(tmp_path: Path) -> tuple[Path, Path, dict[str, Any]]:
    folder = tmp_path / "model"
    tiny_model("llama", 2).save_pretrained(folder, max_shard_size="60KB")
    index = folder / "model.safetensors.index.json"
    return folder, index, json.loads(index.read_text())


def test_an_index_that_names_the_wrong_shard(tmp_path: Path) -> None:
    folder, index, values = sharded(tmp_path)
    shards = sorted(set(values["weight_map"].values()))
    name, shard = next((n, s) for n, s in values["weight_map"].items() if "layers.1" in n and s != shards[0])
    values["weight_map"][name] = shards[0]
    index.write_text(json.dumps(values))
    with pytest.raises(WeightsError, match=f"{name}.*missing.*{shards[0]}"):
        find_checkpoint(str(folder))
    del values["weight_map"][name]
    index.write_text(json.dumps(values))
    with pytest.raises(WeightsError, match=f"{name} of.*{shard}.*in model.safetensors.index.json too"):
        find_checkpoint(str(folder))


@pytest.mark.parametrize("how", ["../{}", "{folder}/{}", "./{}", "a\\{}", "", ".."])
def test_shards_outside_the_folder_are_refused(how: str, tmp_path: Path) -> None:
    folder, index, values = sharded(tmp_path)
    name, shard = next(iter(values["weight_map"].items()))
    values["weight_map"][name] = how.format(shard, folder=folder)
    index.write_text(json.dumps(values))
    with pytest.raises(WeightsError, match="the name of a file in this folder"):
        find_checkpoint(str(folder))


def test_a_pointer_of_git_lfs_is_not_a_damaged_file(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "model.safetensors").write_text(LFS)
    with pytest.raises(WeightsError, match="git lfs pull"):
        find_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_beside_the_weights_is_none_either(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / name).write_text(LFS)
    with pytest.raises(WeightsError, match=rf"{name}.*git lfs pull"):
        find_checkpoint(str(folder)).tokenizer()


def test_a_folder_with_a_gguf_file_names_it(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", 1, **SIZES))
    with pytest.raises(WeightsError, match=f"give the file: {path}"):
        find_checkpoint(str(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_are_no_numbers_are_named(value: float, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    norm = torch.ones(48)
    norm[7] = value
    with_tensors(folder, {"model.layers.1.input_layernorm.weight": norm})
    with pytest.raises(WeightsError, match=r"layers\.1\.input_layernorm\.weight"):
        SegmentedModel.load(find_checkpoint(str(folder)))


def test_a_damaged_tokenizer_in_the_cache_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIOS_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", 1, **SIZES), tokenizer=tiny_tokenizer())
    text = "The bridge keeper"
    want = find_checkpoint(str(path)).tokenizer()(text)["input_ids"]
    kept = next((tmp_path / "cache" / "tokenizers").glob("*/tokenizer.json"))
    whole = kept.read_bytes()
    other = json.dumps(json.loads(whole) | {"normalizer": {"type": "Lowercase"}}).encode()  # which reads other tokens
    for content in (b"{", b"", b"\xff", other):
        kept.write_bytes(content)
        path.touch()  # a new object, which reads the cache again
        assert find_checkpoint(str(path)).tokenizer()(text)["input_ids"] == want
        assert kept.read_bytes() == whole


def heads_in(folder: Path, change: Callable[[dict[str, Any], dict[int, dict[str, torch.Tensor]]], None]) -> Path:
    from helios_sim.live.model.heads import write_heads

    header, content = head_folders.files()
    values = {k: v for k, v in json.loads(header).items() if k not in ("format", "schema_version", "sha256")}
    (folder / "all.safetensors").write_bytes(content)
    tensors: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in load_file(folder / "all.safetensors").items():
        tensors.setdefault(int(name.partition(".")[0]), {})[name.partition(".")[2]] = value
    change(values, tensors)
    write_heads(folder, values, tensors)
    return folder


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda h, t: t[1].update(gate=torch.ones(8, 31)), r"1\.gate.*\(8, 31\).*\(8, 32\)"),
        (lambda h, t: t[2].update(down=torch.ones(32, 7)), r"2\.down.*\(32, 7\)"),
        (lambda h, t: t[2].update(scale=torch.full((32,), float("nan"))), r"2\.scale.*NaN"),
        (lambda h, t: t.update({3: {n: v.clone() for n, v in t[2].items()}}), r"tensor 3\..*in its header only"),
        (lambda h, t: h.update(exits=[2, 1]), "exits.*ascend"),
        (lambda h, t: h.update(exits=[1, 4]), "exits.*1 to 3"),
        (lambda h, t: h.update(temperature=[1.0]), "temperature.*3 numbers"),
        (lambda h, t: h.update(risk_scale=[1.0, "x"]), "risk_scale"),
        (lambda h, t: h["architecture"].update(layer_shapes=1), "layer_shapes"),
    ],
)
def test_exit_heads_that_do_not_fit_are_named_when_they_are_opened(change: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        ExitHeads.load(heads_in(tmp_path, change), head_folders.architecture())


def test_weights_under_the_name_of_another_model_are_refused(tmp_path: Path) -> None:
    from calibrate.inputs import Inputs
    from calibrate.schema import CalibrateConfig, ModelConfig

    folder = str(folder_of(tmp_path, "opt"))
    with pytest.raises(WeightsError, match=r"the weights of opt-1\.3b.*n_layers is 2, not 24.*model\.name"):
        Inputs(CalibrateConfig(model=ModelConfig("opt-1.3b", folder))).check()
    Inputs(CalibrateConfig(model=ModelConfig("mine", folder))).check()


def test_a_setting_that_names_weights_leaves_the_tensor_named(tmp_path: Path) -> None:
    from calibrate.inputs import Inputs
    from calibrate.schema import CalibrateConfig, ModelConfig

    folder = str(with_tensors(folder_of(tmp_path), {f"{Q}.bias": torch.ones(48)}))
    with pytest.raises(WeightsError, match=r"model\.weights: tensor .*q_proj\.bias"):
        Inputs(CalibrateConfig(model=ModelConfig("mine", folder))).check()
    with pytest.raises(WeightsError, match=r"^model\.weights='nowhere'"):
        Inputs(CalibrateConfig(model=ModelConfig("mine", "nowhere"))).check()
