"""Weights and KV caches in fp8 and in integers: bytes as checkpoints have them, times, floors and mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helios_sim.api import study_config
from helios_sim.errors import UserError
from helios_sim.profile.__main__ import checked, main
from helios_sim.profile.catalog import CARDS, SHAPES, published_model
from helios_sim.profile.composition import Composition, PrefillChunk
from helios_sim.profile.devices import device_of, whole_model
from helios_sim.profile.formats import FORMATS, FP4, FP8, WEIGHTS, named_format
from helios_sim.profile.importers.kernel_tables import SHIPPED_SOURCES
from helios_sim.profile.precision import PLAIN, Precision, in_words, products_on
from helios_sim.profile.profile import MemoryBudget, Profile
from helios_sim.profile.resolve import find_profile
from helios_sim.profile.shapes import shape_of
from helios_sim.profile.store import load_profile, write_profile
from helios_sim.study.build import build, build_profile
from helios_sim.study.inputs import made_of

LLAMA = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 8,
    "num_key_value_heads": 2, "intermediate_size": 512, "vocab_size": 1000, "max_position_embeddings": 128,
}  # fmt: skip
LINEAR = {"targets": ["Linear"], "input_activations": None}
EIGHT_FLOAT = {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": True}


def config_file(folder: Path, how: object = None, **values: object) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    quantized = {} if how is None else {"quantization_config": how}
    (folder / "config.json").write_text(json.dumps({**LLAMA, **values, **quantized}))
    return str(folder)


def compressed(inputs: object = None, **weights: object) -> dict[str, Any]:
    group = {**LINEAR, "input_activations": inputs, "weights": weights}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def decodes_s(profile: Profile, batches: tuple[int, ...] = (1, 8, 32, 128, 256), context: int = 1024) -> np.ndarray:
    rows = np.array(batches)[:, None]
    return profile.iteration_time_s(Composition((profile.model.n_layers,), rows, rows * context, rows[:, 0]))


def prompt_s(profile: Profile, tokens: int) -> float:
    layers, none = profile.model.n_layers, np.zeros((1, 1), np.int64)
    chunk = (PrefillChunk(tokens, 0, layers),)
    return float(profile.iteration_time_s(Composition((layers,), none, none, np.array([1]), prefill=chunk))[0])


def packed(n: int, k: int, method: str, group: int, bits: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Tensors of a matrix of n outputs and k inputs, as AutoAWQ, AutoGPTQ and llm-compressor write them."""
    words, groups = 32 // bits, k // group
    if method == "awq":
        return {
            "qweight": ((k, n // words), "int32"), "qzeros": ((groups, n // words), "int32"),
            "scales": ((groups, n), "float16"),
        }  # fmt: skip
    if method == "gptq":
        return {
            "qweight": ((k // words, n), "int32"), "qzeros": ((groups, n // words), "int32"),
            "scales": ((groups, n), "float16"), "g_idx": ((k,), "int32"),
        }  # fmt: skip
    return {"weight_packed": ((n, k // words), "int32"), "weight_scale": ((n, groups), "bfloat16")}


LAYOUTS = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, "awq", 128, 4),
    "awq of 64": ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, "awq", 64, 4),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}, "gptq", 128, 4),
    "gptq of 8 bits": ({"quant_method": "gptq", "bits": 8, "group_size": 32}, "gptq", 32, 8),
    "w4a16": (compressed(num_bits=4, type="int", strategy="group", group_size=128), "compressed", 128, 4),
}


@pytest.mark.live
@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_bytes_of_integers_are_those_of_the_files(name: str, tmp_path: Path) -> None:
    """A tiny Llama whose matrices are written in the layout of the tool that makes such checkpoints."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    from safetensors.torch import save_file

    how, method, group, bits = LAYOUTS[name]
    config = transformers.AutoConfig.for_model(**LLAMA)
    with torch.device("meta"):
        plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors = {}
    for key, value in plain.named_parameters():
        if ".layers." in key and value.dim() == 2:
            n, k = value.shape
            for part, (shape, kind) in packed(n, k, method, group, bits).items():
                tensors[key.replace("weight", part)] = torch.zeros(shape, dtype=getattr(torch, kind))
        else:
            tensors[key] = torch.zeros(value.shape, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    in_file = (tmp_path / "model.safetensors").stat().st_size - 8 - header
    model = shape_of(config_file(tmp_path / "model", how)).model
    assert model.quantization is not None
    assert model.quantization.products == WEIGHTS
    assert model.weight_bytes(2) == in_file
    assert in_file - model.weight_bytes(1) == model.layer_bytes


@pytest.mark.live
@pytest.mark.parametrize("kind", ["fp8", "fp8 in blocks", "fbgemm_fp8"])
def test_bytes_of_fp8_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    from transformers.integrations.fbgemm_fp8 import FbgemmFp8Linear
    from transformers.integrations.finegrained_fp8 import FP8Linear

    block = (128, 128) if kind == "fp8 in blocks" else None
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**LLAMA), dtype=torch.bfloat16
        )
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, linear in list(part.named_children()):
                    if isinstance(linear, torch.nn.Linear):
                        k, n = linear.in_features, linear.out_features
                        new = FbgemmFp8Linear(k, n, False) if kind == "fbgemm_fp8" else FP8Linear(k, n, block)
                        setattr(part, name, new)
    theirs = sum(t.numel() * t.element_size() for name, t in model.named_parameters() if "bias" not in name)
    how = {"quant_method": kind.split()[0], **({"weight_block_size": [128, 128]} if block else {})}
    ours = shape_of(config_file(tmp_path / "model", how)).model
    assert ours.weight_bytes(2) == theirs
    assert ours.quantization is not None
    assert ours.quantization.products == FP8


@pytest.mark.parametrize("name", [*FORMATS, None])
def test_bytes_in_closed_form(name: str | None) -> None:
    """Embedding, LM head, norms and biases stay in bf16; a layer's matrices take bits, scales, zeros and indices."""
    plain = published_model("qwen2.5-7b")
    model = Precision(name).applied(plain)
    d, ff, kv, group = 3584, 18_944, 512, 128
    shapes = [(d, d), (kv, d), (kv, d), (d, d), (ff, d), (ff, d), (d, ff)]
    values, inputs, outputs = sum(n * k for n, k in shapes), sum(k for _, k in shapes), sum(n for n, _ in shapes)
    matrices = {
        None: 2 * values, "fp8": values + 4 * len(shapes), "int8": values + 2 * outputs,
        "int4": values / 2 + 2 * values / group, "awq": values / 2 + 2.5 * values / group,
        "gptq": values / 2 + 2.5 * values / group + 4 * inputs,
        "nvfp4": values / 2 + values / 16 + 8 * len(shapes),
        "bitsandbytes": values / 2 + (1 + 4 / 256) * values / 64,
        "fp8-block": values + 4 * values / group**2,
    }[name]  # fmt: skip
    others = 2 * (2 * d + d + 2 * kv)  # two norms, biases of Q, K and V
    assert model.layer_bytes == pytest.approx(matrices + others, abs=0.5 if name != "bitsandbytes" else 30)
    assert model.weight_bytes(28) - 28 * model.layer_bytes == 2 * plain.embedding_values
    assert model.layer_values == plain.layer_values


def test_memory_and_loads_follow_the_bytes() -> None:
    budget = MemoryBudget(80 * 2**30, 0.9)
    bf16, fp8 = (find_profile("llama-3.1-8b", "h100", precision=p) for p in (PLAIN, Precision("fp8", "fp8")))
    saved = bf16.weight_bytes(32) - fp8.weight_bytes(32)
    assert saved == 32 * (bf16.model.matrix_values - 4 * 7)
    assert fp8.kv_bytes_per_token(32) == bf16.kv_bytes_per_token(32) / 2 == 32 * 2 * 1024
    pools = [budget.pool_bytes([(profile, 32)]) for profile in (bf16, fp8)]
    assert pools[1] - pools[0] == saved
    assert budget.pool_blocks([(fp8, 32)], (fp8, 32)) == pools[1] // (16 * 32 * 2048)
    assert fp8.load_time_s(fp8.weight_bytes(32)) == fp8.weight_bytes(32) / fp8.load_bytes_per_s


def test_a_group_keeps_scales_with_its_parts() -> None:
    model = Precision("awq").applied(published_model("llama-3.3-70b"))
    assert model.quantization is not None
    whole = whole_model(model, 4)
    norms = (4 - 1) * 2 * 2 * model.d_model  # kept by each card, in bf16
    assert whole.layer_bytes == model.layer_bytes + norms
    of_kv = 2 * model.quantization.matrix_bytes(1024, 8192)
    assert whole_model(replace(model, n_kv_heads=2), 4).layer_bytes == pytest.approx(
        replace(model, n_kv_heads=2).layer_bytes + of_kv / 4 + norms
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "hardware", ["h100", "h200", "b200", "l40s", "rtxpro6000", "4xh100", "l4", "rtx4090", "mi300x"]
)
@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen2.5-14b", "qwen3-32b"])
def test_fp8_decodes_quicker_than_bf16_and_stays_above_its_floor(
    model: str, hardware: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """K and V in fp8 pay once there is much to read; a single short context gains nothing from them.

    Shards of a small model on four cards gain little: kernels with as little to do have their fixed times.
    """
    asked = [PLAIN, Precision("fp8"), Precision("fp8", "fp8")]
    plain, fp8, both = (find_profile(model, hardware, precision=p) for p in asked)
    few, many = (1, 8, 32), (128, 256)
    assert (decodes_s(fp8) < (1.04 if hardware == "4xh100" else 1.0) * decodes_s(plain)).all()
    assert (decodes_s(both, many) < decodes_s(fp8, many)).all()
    assert (decodes_s(both, few) < 1.05 * decodes_s(fp8, few)).all()
    assert prompt_s(fp8, 2048) < prompt_s(plain, 2048)
    for profile in (fp8, both):
        assert checked(profile) == 0, capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "hardware", ["b200", "rtx5090", "a100-80gb", "a100-40gb", "h100", "l40s", "a30", "rtx3090", "rtx4090", "2xa10"]
)
def test_prices_are_above_their_floors_and_rise(
    name: str, hardware: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "int8" and device_of(hardware).card.int8_flops_per_s is None:
        pytest.skip("vLLM has no int8 products for Blackwell")
    for model in ("llama-3.1-8b", "qwen2.5-7b", "mistral-small-24b"):
        profile = find_profile(model, hardware, precision=Precision(name))
        assert checked(profile) == 0, capsys.readouterr().out
        assert (np.diff(decodes_s(profile, tuple(range(1, 300, 7)))) >= -1e-12).all()
        tables = profile.layer_tables[0]
        assert (np.diff(tables.dense.time_s) >= 0).all()
        assert (np.diff(tables.decode_attention.time_s, axis=0) >= 0).all()
        assert (np.diff(tables.decode_attention.time_s, axis=1) >= 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_every_model_has_prices_above_its_floors(name: str) -> None:
    """Each shape on one card of the catalogue, in turn, where its widths and the card allow the format."""
    cards, priced = list(CARDS), 0
    for place, model in enumerate(SHAPES):
        kv = "fp8" if place % 2 else "auto"
        try:
            profile = find_profile(model, cards[place % len(cards)], precision=Precision(name, kv))
        except UserError:
            continue
        priced += 1
        for batch in (1, 32, 256):
            rows = np.array([[batch]])
            decodes = Composition((profile.model.n_layers,), rows, rows * 512, rows[:, 0])
            assert profile.iteration_time_s(decodes)[0] > profile.iteration_floor_s(decodes)[0], profile.name
        assert (np.diff(profile.layer_tables[0].dense.time_s) >= 0).all()
        assert profile.weight_bytes(profile.model.n_layers) < shape_of(model).model.weight_bytes(profile.model.n_layers)
    assert priced > 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hardware", "name"),
    [
        ("h100", None), ("h200", "fp8"), ("2xl40s", "fp8-block"), ("b200", "fp8"), ("4xb200", "nvfp4"),
        ("rtxpro6000", "nvfp4"),
    ],
)
def test_kernels_of_tensorrt_llm_are_above_their_floors(
    hardware: str, name: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Quantized products whose inputs are made in the kernels before take less than as measured, never a roofline."""
    precision = Precision(name, "auto" if name is None else "fp8")
    profile = find_profile("llama-3.1-8b", hardware, precision=precision, kernels="trtllm")
    assert checked(profile) == 0, capsys.readouterr().out
    assert "TensorRT-LLM" in profile.provenance.source
    assert ("the making of their inputs" in " ".join(profile.provenance.scaled)) == (name in ("fp8", "nvfp4"))


def test_cards_without_kernels_of_tensorrt_llm_have_those_of_vllm() -> None:
    for card in ("l4", "a100-80gb"):
        profiles = [find_profile("llama-3.1-8b", card, kernels=kernels) for kernels in ("vllm", "trtllm")]
        assert (profiles[0].layer_tables[0].dense.time_s == profiles[1].layer_tables[0].dense.time_s).all()


def test_a_card_without_units_for_fp8_makes_such_weights_bf16() -> None:
    """vLLM's page "FP8 W8A8": on Ampere as weights alone. Fewer bytes help decodes, prompts take what bf16 takes."""
    model = Precision("fp8").applied(published_model("llama-3.1-8b"))
    for card in ("a100-80gb", "a30", "rtx3090"):
        assert products_on(model, device_of(card).card) == WEIGHTS
        assert any("no units for fp8" in said for said in find_profile("llama-3.1-8b-fp8", card).provenance.scaled)
        plain, fp8 = (find_profile("llama-3.1-8b", card, precision=p) for p in (PLAIN, Precision("fp8")))
        assert decodes_s(fp8, (1,))[0] < 0.8 * decodes_s(plain, (1,))[0]
        assert prompt_s(fp8, 4096) > 0.95 * prompt_s(plain, 4096)
    assert products_on(model, device_of("l40s").card) == FP8


@pytest.mark.parametrize(
    ("name", "plain", "form"),
    [
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "Qwen/Qwen2.5-7B-Instruct", "awq"), ("qwen3-8b-fp8", "qwen3-8b", "fp8-block"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int8", "Qwen/Qwen2.5-7B-Instruct", "gptq-int8"),
        ("RedHatAI/Meta-Llama-3.1-70B-Instruct-FP8-dynamic", "RedHatAI/Meta-Llama-3.1-70B-Instruct", "fp8"),
        ("neuralmagic/Meta-Llama-3.1-8B-Instruct-quantized.w4a16", "neuralmagic/Meta-Llama-3.1-8B-Instruct", "int4"),
        ("opt-1.3b", "opt-1.3b", None),
    ],
)  # fmt: skip
def test_a_name_says_how_the_weights_are_kept(name: str, plain: str, form: str | None) -> None:
    found = named_format(name)
    assert found[0] == plain
    assert (None if found[1] is None else found[1].name) == form
    model = shape_of(name).model
    assert (None if model.quantization is None else model.quantization.name) == form
    assert replace(model, quantization=None, name="any") == replace(shape_of(plain).model, name="any")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (compressed({"num_bits": 8, "type": "float"}, **EIGHT_FLOAT), "fp8"),
        (compressed(**EIGHT_FLOAT), "fp8-w8a16"), (compressed({"num_bits": 8}, num_bits=8), "int8"),
        ({"quant_method": "awq", "modules_to_not_convert": None}, "awq"), ({"quant_method": "gptq"}, "gptq"),
        ({"quant_method": "gptq", "group_size": -1}, "gptq-gall"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]},
         "bitsandbytes-int8"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        (compressed({"num_bits": 4, "type": "float"}, num_bits=4, type="float", strategy="tensor_group"), "nvfp4"),
    ],
)  # fmt: skip
def test_a_config_says_how_the_weights_are_kept(how: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = shape_of(config_file(tmp_path / "model", how)).model
    assert model.quantization is not None
    assert model.quantization.name == said
    assert model.kv_bytes_per_value == 2
    scheme = {"num_bits": 8, "type": "float"}
    assert shape_of(config_file(tmp_path / "kv", {**how, "kv_cache_scheme": scheme})).model.kv_bytes_per_value == 1


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"quant_method": "exl2"}, "one of fp8, fbgemm_fp8, awq"), ("awq", "a mapping"), ({"bits": 4}, "one of fp8"),
        ({"quant_method": "awq", "bits": 3}, "4 bits"), ({"quant_method": "gptq", "bits": 2}, "4 or 8 bits"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "two numbers"),
        ({"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["layers.0.self_attn.q_proj"]}, "all quantized"),
        ({"quant_method": "gptq", "lm_head": True}, "LM head"), ({"quant_method": "bitsandbytes"}, "load_in_4bit"),
        (compressed(num_bits=4, type="float"), "8-bit weights and inputs"),
        (compressed({"num_bits": 8, "type": "int"}, num_bits=4, type="int"), "8-bit weights and inputs"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": LINEAR, "b": LINEAR}}, "one group"),
        ({"quant_method": "fp8", "kv_cache_scheme": {"num_bits": 4, "type": "int"}}, "8-bit floats"),
        ({"quant_method": "awq", "group_size": "many"}, "whole number"),
        ({"quant_method": "gptq", "dynamic": {"-:.*mlp.*": {}}}, "dynamic of"),
        ({"quant_method": "gptq", "modules_in_block_to_quantize": [["self_attn.q_proj"]]}, "modules_in_block"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["model.layers.0*"]}, "all quantized"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, "16: others"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": True}, "load_in_8bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_blocksize": 128}, "64: others"),
        (compressed(num_bits=4) | {"format": "marlin-24"}, "sparse"),
        (compressed(num_bits=4) | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
        (compressed(num_bits=4) | {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
        ({"quant_method": "fp8", "ignored_layers": ["transformer.h.0.self_attention.dense"]}, "outside the layers"),
        ({"quant_method": "fp8", "modules_to_not_convert": ["transformer.h.0.attn.c_attn"]}, "outside the layers"),
        ({"quant_method": "fp8", "modules_to_not_convert": ["model"]}, "outside the layers"),
        (compressed(num_bits=4) | {"ignore": ["Linear"]}, "outside the layers"),
        (compressed(num_bits=4) | {"ignore": ["re:(lm_head|.*down.*)"]}, "outside the layers"),
        (compressed(num_bits=4) | {"ignore": ["re:^(?!lm_head).*"]}, "outside the layers"),
        (compressed(num_bits=4, scale_dtype="torch.float8_e4m3fn"), "scale_dtype of weights"),
        (compressed(num_bits=4, second_scale=True), "second_scale of weights"),
        (compressed({"num_bits": 8, "strategy": "group", "group_size": 128}, num_bits=8), "strategy of input"),
        (compressed({"num_bits": 8, "offset": 3}, num_bits=8), "offset of input"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": LINEAR | {"format": "marlin-24"}}}, "sparse"),
        ({"quant_method": "fp8", "kv_cache_scheme": {"num_bits": 8, "strategy": "attn_head"}}, "strategy of kv"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4",
          "config_groups": {"a": {"weights": {"num_bits": 8}}}}, "4, as quant_algo says"),
    ],
)  # fmt: skip
def test_what_is_not_priced_is_refused_by_name(how: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        shape_of(config_file(tmp_path / "model", how))


@pytest.mark.parametrize(
    "module",
    ["lm_head", "re:.*lm_head", "model.embed_tokens", "llm.model.norm", "re:vision_tower.*", "multi_modal_projector",
     "model.vision_tower.encoder.layers.3.mlp.fc1", "audio_projection_layer", "apm", "re:(lm_head|visual).*"],
)  # fmt: skip
def test_modules_outside_the_layers_may_stay_as_they_are(module: str, tmp_path: Path) -> None:
    how = {"quant_method": "awq", "modules_to_not_convert": [module]}
    shape = shape_of(config_file(tmp_path / "model", how))
    assert shape.model.quantization is not None
    assert shape.not_read == ""


def test_an_index_of_each_input_counts(tmp_path: Path) -> None:
    plain, ordered = (
        shape_of(config_file(tmp_path / str(order), compressed(num_bits=4, strategy="channel", actorder=order))).model
        for order in ("static", "group")
    )
    assert ordered.layer_bytes - plain.layer_bytes == 4 * sum(k for _, k in plain.matrices)


@pytest.mark.parametrize(
    ("model", "hardware", "quantization", "kv_cache_dtype", "said"),
    [
        ("qwen2.5-7b", "l40s", "int3", "auto", "one of fp8"), ("qwen2.5-7b", "l40s", None, "int8", "one of auto"),
        ("qwen2.5-7b", "a100-40gb", None, "fp8", "a card with units for fp8, which a100-40gb has not"),
        ("qwen2.5-7b", "b200", "int8", "auto", "choose fp8 or int4"),
        ("qwen2.5-7b-awq", "l40s", "fp8", "auto", "in awq already"),
        ("smollm2-360m", "h100", "awq", "auto", "divide n_heads x head_dim"),
        ("llama-2-7b", "8xh100", "gptq", "auto", "d_ff of llama-2-7b-gptq, 1376 on each of 8 cards"),
        ("smollm2-135m", "epyc-2core", "fp8", "auto", "the profile smollm2-135m@epyc-2core, which has no other"),
    ],
)  # fmt: skip
def test_each_mistake_gets_one_message(
    model: str, hardware: str, quantization: str | None, kv_cache_dtype: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        find_profile(model, hardware, precision=Precision(quantization, kv_cache_dtype))


@pytest.mark.slow
def test_a_study_asks_by_setting_by_name_and_by_kind(tmp_path: Path) -> None:
    words = ["own", "hardware=h100", "exits.source=none", "workload.n_requests=20"]
    asked = study_config(*words, "models=[llama-3.1-8b]", "server.quantization=fp8", "server.kv_cache_dtype=fp8")
    profile = build(asked, 0).models["llama-3.1-8b"].profile
    assert profile.name == "llama-3.1-8b-fp8-kv-fp8@h100"
    assert "weights in fp8, K and V in fp8" in str(profile.provenance.details["times_from"])
    assert any(item.name == "effect of the precision on answers" for item in profile.provenance.assumptions)
    named = build(study_config(*words, "models=[llama-3.1-8b-fp8,llama-3.1-8b]"), 0).models
    assert [data.profile.model.quantization is None for data in named.values()] == [False, True]
    kind = {"a": {"server": {"quantization": "fp8"}}, "b": {"count": 1}}
    config = study_config(*words, "models=[opt-1.3b]", "hardware=h100-80gb")
    kinds = replace(config, cluster=replace(config.cluster, kinds=kind))
    assert [kinds.precision_of(each) for each in kind.values()] == [Precision("fp8"), PLAIN]
    assert [name for name in made_of(kinds) if name.startswith("profile")] == ["profile opt-1.3b@h100-80gb"]
    assert not [name for name in made_of(study_config(*words, "server.quantization=fp8")) if name.startswith("profile")]


@pytest.mark.slow
def test_a_folder_of_profiles_has_the_precision_that_it_has(tmp_path: Path) -> None:
    profile = find_profile("llama-3.1-8b-awq", "h100", precision=Precision(None, "fp8"))
    write_profile(profile, tmp_path / profile.name)
    again = load_profile(profile.name, tmp_path)
    assert (again.model, again.hardware) == (profile.model, profile.hardware)
    assert in_words(again.model) == "weights in awq, K and V in fp8"
    assert (decodes_s(again) == decodes_s(profile)).all()
    words = [
        "own", "hardware=h100", f"models=[{profile.name.partition('@')[0]}]", "exits.source=none",
        f"profile_folder={tmp_path}",
    ]  # fmt: skip
    assert build_profile(study_config(*words), profile.model.name).model == profile.model
    with pytest.raises(UserError, match=r"server\.quantization='fp8'.*in awq already"):
        build_profile(study_config(*words, "server.quantization=fp8"), profile.model.name)
    with pytest.raises(UserError, match=r"server\.kv_cache_dtype='bfloat16'.*has no other"):
        build_profile(study_config(*words, "server.kv_cache_dtype=bfloat16"), profile.model.name)


@pytest.mark.slow
def test_the_command_shows_and_checks_precisions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "qwen2.5-7b", "l40s", "quantization=int4"]) == 0
    assert "weights in int4, K and V in bf16" in capsys.readouterr().out
    assert main(["check", "qwen2.5-7b", "l40s", "quantization=fp8", "server.kv_cache_dtype=fp8"]) == 0
    assert "weights in fp8, K and V in fp8" in capsys.readouterr().out
    assert main(["list"]) == 0
    assert "0.520 bytes a weight" in " ".join(capsys.readouterr().out.split())
    for words in (["quantization=fp9"], ["dtype=fp8"], ["quantization"], ["quantization=fp8", "quantization=awq"]):
        assert main(["show", "qwen2.5-7b", "l40s", *words]) == 1


@pytest.mark.slow
def test_nvfp4_is_multiplied_on_blackwell_and_made_bf16_elsewhere() -> None:
    names = ("b200", "rtxpro6000", "4xb200")
    for hardware in names:
        bf16, fp4 = (find_profile("llama-3.3-70b", hardware, precision=p) for p in (PLAIN, Precision("nvfp4")))
        assert (decodes_s(fp4) < decodes_s(bf16)).all()
        assert prompt_s(fp4, 2048) < 0.8 * prompt_s(bf16, 2048)
        assert "nvfp4 kernels" in fp4.provenance.source
    model = Precision("nvfp4").applied(published_model("llama-3.3-70b"))
    assert [products_on(model, device_of(card).card) for card in ("b200", "rtx5090", "h100", "a10")] == [
        FP4, FP4, WEIGHTS, WEIGHTS,
    ]  # fmt: skip


def test_every_card_with_kernels_has_them_in_fp8_but_the_a100() -> None:
    for key, source in SHIPPED_SOURCES.items():
        has_units = device_of(key).card.fp8_flops_per_s is not None
        assert has_units == (source.folder != "a100_sxm")
