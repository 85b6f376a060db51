"""Profiles of any model on any device: shapes, groups of cards, and where times come from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from helios_sim.api import simulate, study_config
from helios_sim.errors import UserError
from helios_sim.profile.__main__ import checked, main
from helios_sim.profile.catalog import CARDS, HARDWARE, SHAPES, published_model
from helios_sim.profile.composition import Composition, PrefillChunk
from helios_sim.profile.devices import device_of, ring_s, shard, whole_model
from helios_sim.profile.families import FAMILIES
from helios_sim.profile.importers.aiconfigurator import LayerTimes, device_profile
from helios_sim.profile.importers.between import filled
from helios_sim.profile.importers.clock import OF_A100
from helios_sim.profile.importers.kernel_tables import SHIPPED, SHIPPED_SOURCES, AllReduceTimes
from helios_sim.profile.resolve import find_profile
from helios_sim.profile.roofline import Gemm, embedding_elementwise, layer_elementwise, layer_gemms
from helios_sim.profile.shapes import shape_of
from helios_sim.profile.store import PROFILES_FOLDER, load_profile, write_profile
from helios_sim.report.figures.prices import price_drawing
from helios_sim.study.build import build
from helios_sim.vary.settings import with_settings

LLAMA = {
    "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 8,
    "num_key_value_heads": 2, "intermediate_size": 512, "vocab_size": 1000, "max_position_embeddings": 128,
}  # fmt: skip


def config_file(folder: Path, **values: object) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **values}))
    return str(folder)


def tiny_config(kind: str) -> dict[str, object]:
    """Small sizes for a family, in the names of its own config."""
    if kind == "gpt2":
        return {"n_embd": 256, "n_layer": 3, "n_head": 8, "vocab_size": 1000, "n_positions": 128}
    sizes: dict[str, object] = {
        "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8, "vocab_size": 1000,
        "max_position_embeddings": 128, "pad_token_id": None,
    }  # fmt: skip
    if kind == "falcon":
        return sizes
    if kind == "opt":
        return {**sizes, "ffn_dim": 512, "word_embed_proj_dim": 256}
    return {**sizes, "num_key_value_heads": 2, "intermediate_size": 512}


@pytest.mark.live
@pytest.mark.parametrize("kind", sorted(set(FAMILIES) - {"qwen3_vl_text"}))
def test_layers_have_the_weights_of_the_family_in_transformers(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = transformers.AutoConfig.for_model(kind, **tiny_config(kind))
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path / "model")
    ours = shape_of(str(tmp_path / "model")).model
    of_layer = sum(p.numel() for name, p in theirs.named_parameters() if ".0." in name)
    without_weights = 2 * ours.d_model if kind == "olmo" else 0  # its norms have none
    assert ours.layer_values - without_weights == of_layer
    outside = sum(p.numel() for p in theirs.parameters()) - 3 * of_layer
    biases = 2 * ours.d_model + ours.vocab_size  # of the last norm and of the head, which ModelSpec leaves out
    assert abs(ours.embedding_values - outside) <= biases


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("meta-llama/Llama-3.3-70B-Instruct", 70.554), ("Qwen/Qwen2.5-7B-Instruct", 7.616), ("Qwen/Qwen3-8B", 8.191),
        ("google/gemma-2-9b-it", 9.242), ("microsoft/phi-2", 2.780), ("tiiuae/falcon-7b", 6.922),
        ("facebook/opt-13b", 12.853), ("EleutherAI/gpt-neox-20b", 20.555), ("allenai/OLMo-2-1124-7B", 7.299),
        ("ibm-granite/granite-3.1-8b-instruct", 8.171), ("01-ai/Yi-34B", 34.389), ("google/gemma-7b", 8.538),
    ],
)  # fmt: skip
def test_published_models_have_as_many_parameters_as_their_cards_say(name: str, billions: float) -> None:
    model = shape_of(name).model
    assert model.weight_bytes(model.n_layers) / 2e9 == pytest.approx(billions, abs=6e-4)


def test_every_published_shape_is_a_model() -> None:
    for name in SHAPES:
        model = published_model(name)
        assert model.n_heads % model.n_kv_heads == 0
        assert len(shape_of(name).windows) in (0, model.n_layers)


def test_windows_of_gemma_and_of_a_config(tmp_path: Path) -> None:
    assert shape_of("gemma-2-9b").windows[:4] == (4096, 0, 4096, 0)
    assert shape_of("gemma-3-4b").windows[:7] == (1024,) * 5 + (0, 1024)
    kinds = ["sliding_attention", "full_attention"] * 2
    own = config_file(tmp_path / "own", model_type="gemma2", head_dim=32, sliding_window=64, layer_types=kinds)
    assert shape_of(own).windows == (64, 0, 64, 0)
    off = config_file(tmp_path / "off", model_type="qwen2", sliding_window=64, use_sliding_window=False)
    assert shape_of(off).windows == ()


def test_a_window_bounds_attention_and_nothing_else() -> None:
    shape, device = shape_of("gemma-2-9b"), device_of("h100")
    profile = device_profile(shape.model, device, SHIPPED_SOURCES["h100"], "", windows=shape.windows)
    windowed, full = (profile.layer_tables[profile.layer_class[layer]] for layer in (0, 1))
    kv = windowed.decode_attention.second
    assert np.array_equal(windowed.dense.time_s, full.dense.time_s)
    near = kv <= 4096
    decodes = windowed.decode_attention.time_s, full.decode_attention.time_s
    assert np.array_equal(decodes[0][:, near], decodes[1][:, near])
    assert (decodes[0][:, ~near] == decodes[0][:, near][:, -1:]).all()
    assert (windowed.prefill_attention.time_s <= full.prefill_attention.time_s).all()


def test_the_floor_of_a_window_counts_pairs_within_it(tmp_path: Path) -> None:
    """Two layers, of which one looks back over 16 tokens: bytes and operations counted by hand, token by token."""
    values = {"num_hidden_layers": 2, "sliding_window": 16, "model_type": "gemma2", "max_position_embeddings": 4096}
    values["head_dim"] = 32
    shape, device = shape_of(config_file(tmp_path / "model", **values)), device_of("h100")
    profile = device_profile(shape.model, device, SHIPPED_SOURCES["h100"], "", windows=shape.windows)
    model, card = profile.model, profile.hardware

    def floor_s(decodes: int, kv_tokens: int, prompt: int, context: int) -> float:
        rows = np.array([[decodes]])
        chunks = (PrefillChunk(prompt, context, 2),) if prompt else ()
        iteration = Composition((2,), rows, np.array([[kv_tokens]]), rows[:, 0], prefill=chunks)
        return float(profile.iteration_floor_s(iteration)[0])

    def by_hand(decodes: int, kv_tokens: int, prompt: int, context: int) -> float:
        head = model.vocab_size * model.d_model
        n_bytes = 2 * (head + 2 * model.layer_values)
        operations = 2 * head * decodes + 2 * 2 * (decodes + prompt) * model.layer_values
        for window in (16, 10**9):
            kv = min(kv_tokens, decodes * window)
            pairs = sum(min(context + i, window) for i in range(1, prompt + 1))
            n_bytes += (kv + min(context, window)) * model.kv_bytes_per_token_layer
            operations += 4 * model.n_heads * model.head_dim * (kv + pairs)
        return max(n_bytes / card.hbm_bytes_per_s, operations / card.flops_per_s)

    for case in ((4, 2000, 0, 0), (4, 40, 0, 0), (1, 30, 100, 5), (8, 4096, 300, 500)):
        assert floor_s(*case) == pytest.approx(by_hand(*case), rel=1e-12)


def test_windows_are_kept_with_a_profile(tmp_path: Path) -> None:
    profile = find_profile("gemma-2-2b", "h100")
    write_profile(profile, tmp_path / profile.name)
    again = load_profile(profile.name, tmp_path)
    assert [t.window for t in again.layer_tables] == [t.window for t in profile.layer_tables] == [4096, 0]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_local_experts": 8}, "mixtures of experts"), ({"kv_lora_rank": 512}, "latent attention"),
        ({"model_type": None}, "this is another file"), ({"model_type": "mamba"}, "one of llama"),
        ({"quantization_config": {"quant_method": "quip"}}, "quip"),
        ({"num_attention_heads": 7}, "multiple of its 7 heads"), ({"hidden_size": "many"}, "whole number"),
        ({"num_key_value_heads": 3}, "divisor of n_heads"), ({"num_hidden_layers": 10**9}, "whole number from 1"),
        ({"layer_types": ["full_attention"], "sliding_window": 8}, "one for each of 4 layers"),
        ({"layer_types": ["linear_attention"] * 4}, "full_attention, sliding_attention"),
        ({"text_config": {**LLAMA, "quantization_config": {"quant_method": "aqlm"}}}, "aqlm"),
        ({"is_encoder_decoder": True}, "an encoder"), ({"tie_word_embeddings": "false"}, "true or false"),
        ({"model_type": "opt", "word_embed_proj_dim": 128}, "the model's width, 256"),
        ({"max_position_embeddings": 15}, "at least 16 tokens"), ({"max_position_embeddings": None}, "must be there"),
        ({"intermediate_size": None}, "must be there"), ({"model_type": "qwen3"}, "head_dim"),
        ({"model_type": "gemma2", "head_dim": 32}, "sliding_window"),
        ({"n_layer": 3}, "the same as num_hidden_layers, 4"), ({"n_embd": 64}, "the same as hidden_size, 256"),
        ({"layer_types": ["sliding_attention"] * 4}, "there is no sliding_window"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "generates text"),
        ({"architectures": ["LlamaModel"]}, "generates text"), ({"pruned_heads": {"0": [1]}}, "fewer heads"),
        ({"cross_attention_layers": [1]}, "cross attention"), ({"num_kv_shared_layers": 2}, "of other layers"),
        ({"attention_chunk_size": 64}, "chunks"), ({"use_bias": False}, "without biases"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, "factor of"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}}, "the same as rope_type, linear"),
        ({"quantization_config": {"quant_method": "fp8"}, "compression_config": {"quant_method": "awq"}}, "one of the"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_priced_is_refused_by_its_key(
    values: dict[str, object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        shape_of(config_file(tmp_path / "model", **values))


def test_what_a_config_leaves_out_is_what_its_family_means(tmp_path: Path) -> None:
    """Transformers writes no tie_word_embeddings where it is true, and windows of Qwen only count where asked for."""
    assert shape_of(config_file(tmp_path / "tied", model_type="smollm3")).model.tied_embeddings
    assert not shape_of(config_file(tmp_path / "not", model_type="qwen2")).model.tied_embeddings
    assert shape_of(config_file(tmp_path / "unasked", model_type="qwen2", sliding_window=64)).windows == ()
    asked = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}
    assert shape_of(config_file(tmp_path / "asked", model_type="qwen2", **asked)).windows == (0, 0, 0, 64)
    inner = config_file(tmp_path / "sees", text_config=dict(LLAMA), vision_config={"hidden_size": 64})
    assert "text model alone" in shape_of(inner).source
    assert shape_of("mistralai/Mistral-7B-Instruct-v0.2").windows == ()  # v0.1 has them


@pytest.mark.parametrize(
    ("rope", "kind", "context"),
    [
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, "llama", 256),
        ({"rope_type": "yarn", "factor": 4.0}, "llama", 512), ({"type": "linear", "factor": 2}, "llama", 256),
        ({"type": "dynamic", "factor": 1.5}, "llama", 192), (None, "llama", 128),
        ({"rope_type": "linear", "factor": 8.0}, "gemma3_text", 128), ({}, "llama", 128),
        ({"rope_type": "llama3", "factor": 8.0}, "llama", 128), ({"rope_type": "longrope"}, "llama", 128),
    ],
)  # fmt: skip
def test_the_context_is_that_of_the_scaled_rope(rope: object, kind: str, context: int, tmp_path: Path) -> None:
    """As vLLM reckons it (vllm/config/model.py, _get_and_verify_max_len)."""
    given = {"model_type": kind, "sliding_window": 64, "head_dim": 32} if kind != "llama" else {}
    for name in ("rope_scaling", "rope_parameters"):
        found = shape_of(config_file(tmp_path / name, **{name: rope}, **given))
        assert found.model.max_context_tokens == context


@pytest.mark.slow
def test_keys_that_nothing_is_made_of_are_said(tmp_path: Path) -> None:
    plain = {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "bos_token_id": 1, "rope_theta": 1e4,
             "attention_dropout": 0.0, "hidden_act": "silu", "mlp_bias": False}  # fmt: skip
    assert shape_of(config_file(tmp_path / "plain", **plain)).not_read == ""
    others = config_file(tmp_path / "others", **plain, medusa_num_heads=4, early_exit_layers=[1, 2], other=None)
    assert "not read: medusa_num_heads (4), early_exit_layers ([1, 2])" in shape_of(others).not_read
    result = simulate(
        "own", "policy=full_depth",
        settings={"models": [others], "exits.source": "none", "workload.n_requests": 4, "hardware": "l40s"},
    )  # fmt: skip
    assert any("medusa_num_heads (4)" in warning for warning in result.warnings)


@pytest.mark.parametrize(
    ("key", "value"),
    [("auto_map", {"AutoModelForCausalLM": "modeling_yarn.LlamaForCausalLM"}), ("cache_config", {"nbits": 4}),
     ("architectures", ["MiniCPMForCausalLM"]), ("tie_embeddings", True), ("_num_layers_kept", 16),
     ("output_gate", True), ("residual_scale_multiplier", 2.0), ("activation_sparsity", 0.9)],
)  # fmt: skip
def test_a_key_that_is_not_known_is_named(key: str, value: object, tmp_path: Path) -> None:
    assert f"not read: {key} (" in shape_of(config_file(tmp_path / "m", **{key: value})).not_read


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [("sliding_window_size", 1024, "4096, as sliding_window"), ("is_causal", False, "attention to what follows"),
     ("quantization", {"bits": 4}, "as MLX does"), ("mlp_type", "gated", "a gated MLP")],
)  # fmt: skip
def test_a_key_that_asks_for_another_model_is_refused(key: str, value: object, said: str, tmp_path: Path) -> None:
    sized = config_file(tmp_path / "m", model_type="mistral", sliding_window=4096, **{key: value})
    with pytest.raises(UserError, match=said):
        shape_of(sized)


@pytest.mark.parametrize(
    "name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json", "adapter_config.json"]
)
def test_a_file_beside_the_config_may_say_how_weights_are_kept(name: str, tmp_path: Path) -> None:
    folder = Path(config_file(tmp_path / "model"))
    (folder / name).write_text('{"bits": 4}')
    with pytest.raises(UserError, match=name):
        shape_of(str(folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "hardware"),
    [
        (("opt-6.7b", "facebook/opt-6.7b", "OPT-6.7B"), ("h100-80gb", "H100-80GB", " h100-80gb")),
        (("llama-2-7b", "meta-llama/Llama-2-7b-chat-hf"), ("a100-80gb", "A100", "1xNVIDIA A100-SXM4-80GB")),
        (("qwen2.5-7b", "Qwen/Qwen2.5-7B", "QWEN2.5-7b"), ("4xh100", "4XH100", "4 x NVIDIA H100 80GB HBM3", "04xh100")),
    ],
)  # fmt: skip
def test_how_a_name_is_written_changes_nothing(names: tuple[str, ...], hardware: tuple[str, ...]) -> None:
    profiles = [find_profile(model, card) for model in names for card in hardware]
    for profile in profiles:
        assert (profile.name, profile.model, profile.hardware) == (
            profiles[0].name, profiles[0].model, profiles[0].hardware,
        )  # fmt: skip
        assert np.array_equal(profile.layer_tables[0].dense.time_s, profiles[0].layer_tables[0].dense.time_s)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", "mixtures of experts"), ("deepseek-ai/DeepSeek-V3", "mixtures of experts"),
        ("llama-9b", "did you mean llama-"), ("a" * 5000, "published shapes"), ("", "published shapes"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "published shapes"), ("llama-3-8b\0", "published shapes"),
        ("./none.gguf", "no file"), ("/nowhere/config.json", "no file"),
    ],
)  # fmt: skip
def test_an_unknown_model_gets_one_message(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        shape_of(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("h101", "did you mean h100"), ("3xh100", "2, 4, 8 cards"), ("0xh100", "2, 4, 8 cards"),
        ("none.yaml", "no file"), ("4x", "a card of the catalogue"),
    ],
)  # fmt: skip
def test_an_unknown_card_gets_one_message(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        device_of(name)


def test_a_card_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "card.yaml"
    path.write_text("name: mine\nhbm_gib: 24\nhbm_gb_per_s: 700\ntflops: 120\nlink_gb_per_s: 32\nlink_us: 5\n")
    device = device_of(f"2x{path}")
    assert (device.name, device.cards) == ("2xmine", 2)
    assert device.whole.hbm_bytes == 2 * 24 * 2**30
    assert device.whole.flops_per_s == 240e12
    assert (device.link.bytes_per_s, device.link.latency_s) == (32e9, 5e-6)
    assert device.whole.tdp_w is None
    path.write_text(path.read_text().replace("mine", "h100"))
    named = find_profile("llama-3-8b", str(path))
    assert named.provenance.details["times_from"].startswith("its data sheet")  # whatever its name, it is not measured
    path.write_text(path.read_text().replace("tflops: 120", "tflops: 60"))
    rows = [find_profile("llama-3-8b", str(path)).layer_tables[0].dense.time_s, named.layer_tables[0].dense.time_s]
    assert rows[0][-1] > 1.5 * rows[1][-1]  # the file is read again
    path.write_text(path.read_text() + "tflops: 70\n")
    with pytest.raises(UserError, match="twice"):
        device_of(str(path))
    path.write_text("1: 2\nname: mine\nhbm_gib: 24\nhbm_gb_per_s: 700\ntflops: 120\n")
    with pytest.raises(UserError, match="only name, hbm_gib"):
        device_of(str(path))
    path.write_text("name: mine\nhbm_gib: 24\nhbm_gb_per_s: 700\ntflops: 120\ncolor: red\n")
    with pytest.raises(UserError, match="color"):
        device_of(str(path))
    path.write_text("[1, 2]")
    with pytest.raises(UserError, match="mapping"):
        device_of(str(path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hbm_gb_per_s": 3.35}, "operations a byte"), ({"tflops": 0.989}, "operations a byte"),
        ({"tflops": 989_000}, "operations a byte"), ({"hbm_gib": 81_559}, "at most 20 s"),
        ({"fp8_tflops": 100}, "at least tflops"), ({"fp8_tflops": 90_000}, "at most 16 times"),
        ({"int8_tflops": 1.9}, "at least tflops"),
        ({"load_gb_per_s": 5000}, "at most hbm_gb_per_s"), ({"link_gb_per_s": 9000}, "at most hbm_gb_per_s"),
        ({"link_us": 1e-5}, "from 0.01"), ({"tdp_w": 0.7}, "from 10"), ({"name": "4xmine"}, "one card"),
    ],
)  # fmt: skip
def test_a_figure_in_another_unit_is_refused(change: dict[str, object], said: str, tmp_path: Path) -> None:
    card = {"name": "mine", "hbm_gib": 80, "hbm_gb_per_s": 3350, "tflops": 989}
    path = tmp_path / "card.yaml"
    path.write_text(json.dumps(card))
    assert device_of(str(path)).card.hbm_bytes == 80 * 2**30
    path.write_text(json.dumps(card | change))
    with pytest.raises(UserError, match=said):
        device_of(str(path))


def test_it_is_said_which_figures_of_a_link_are_the_file_s(tmp_path: Path) -> None:
    path, card = tmp_path / "card.yaml", {"name": "mine", "hbm_gib": 80, "hbm_gb_per_s": 3350, "tflops": 989}
    said = []
    for more in ({}, {"link_us": 5}, {"link_gb_per_s": 100}, {"link_us": 5, "link_gb_per_s": 100}):
        path.write_text(json.dumps(card | more))
        said.append(device_of(str(path)).link.source.partition("; the other assumed"))
    assert [first for first, *_ in said[1:]] == [
        "link_us of card.yaml", "link_gb_per_s of card.yaml", "link_us and link_gb_per_s of card.yaml"
    ]  # fmt: skip
    assert [bool(rest) for _, rest, _ in said] == [False, True, True, False]


@pytest.mark.slow
def test_a_changed_config_or_card_is_another_input_of_a_study(tmp_path: Path, monkeypatch) -> None:
    """So that a resumed run starts anew: whatever the path begins with, and for a kind's own group of cards."""
    from helios_sim.study.inputs import made_of

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    card = tmp_path / "2 boxes.yaml"
    card.write_text("name: mine\nhbm_gib: 24\nhbm_gb_per_s: 700\ntflops: 120\n")
    configs = [Path(config_file(tmp_path / name)) / "config.json" for name in ("7b next", "other")]
    kind = {"hardware": "~/2 boxes.yaml", "server": {"tensor_parallel": 2}, "models": ["./other"]}
    for changes in (
        {"hardware": "2x~/2 boxes.yaml", "models": ["7b next", "other"]},
        {"hardware": "~/2 boxes.yaml", "server.tensor_parallel": 2, "models": ["7b next", "other/config.json"]},
        {"hardware": "~/2 boxes.yaml", "models": ["7b next", "other"], "cluster.kinds": {"a": {}, "b": kind}},
    ):
        config = with_settings(study_config("own"), {**changes, "exits.source": "none"})
        before = made_of(config)
        for file in (card, *configs):
            kept = file.read_text()
            file.write_text(kept + " ")
            changed = made_of(config)
            assert set(changed) == set(before)
            assert changed != before, file
            file.write_text(kept)
    wide = {"new": {"hardware": "h100-80gb", "server": {"tensor_parallel": 2}}}
    of_a_group = made_of(with_settings(study_config("own"), {"cluster.kinds": wide}))
    assert not any(name.startswith("profile") for name in of_a_group)
    alias = made_of(with_settings(study_config("own"), {"models": ["facebook/opt-1.3b"]}))
    assert "profile facebook/opt-1.3b@a100-40gb" in alias


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ü" * 190, "a" * 5000, "a" * 5000 + ".json", "a\0", "\0.json"])
def test_a_name_that_no_path_can_have_is_one_message(name: str) -> None:
    from helios_sim.study.inputs import made_of

    for changes in ({"models": [name]}, {"hardware": name}, {"hardware": f"{name}.yaml"}):
        config = with_settings(study_config("own"), changes)
        made_of(config)
        with pytest.raises(UserError):
            find_profile(config.models[0], config.hardware)


def test_two_models_whose_paths_end_alike_are_two_inputs(tmp_path: Path) -> None:
    from helios_sim.study.fleet import build_fleet
    from helios_sim.study.jobs import inputs_of

    models = [config_file(tmp_path / name / "model") for name in ("a", "b")]
    config = with_settings(study_config("own"), {"models": models, "hardware": "l4", "exits.source": "none"})
    assert [f"profile {model}@l4" in inputs_of(build_fleet(config, 0)) for model in models] == [True, True]


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_shards_together_are_the_model(name: str) -> None:
    """Every product of a layer is split without rest; only KV heads and norms are kept more than once."""
    model = published_model(name)
    for cards in (2, 4, 8):
        if model.n_heads % cards or model.d_ff % cards or (model.n_kv_heads % cards and cards % model.n_kv_heads):
            with pytest.raises(UserError, match="cards that divide"):
                shard(model, cards)
            continue
        part = shard(model, cards)
        kept = max(1, cards // model.n_kv_heads)  # copies of each KV head
        copies = (kept - 1) * 2 * model.kv_width * model.d_model
        values = [sum(g.n * g.k for g in layer_gemms(m)) for m in (model, part)]
        assert cards * values[1] == values[0] + copies
        whole, norms = whole_model(model, cards), 2 * model.d_model * (2 if model.bias else 1)
        biases = (kept - 1) * 2 * model.kv_width if model.bias else 0
        assert whole.layer_values == model.layer_values + copies + biases + (cards - 1) * norms
        assert whole.kv_bytes_per_token_layer == kept * model.kv_bytes_per_token_layer


def test_a_group_that_cannot_split_the_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"15.*use 1 cards"):
        find_profile("smollm2-360m", "4xh100")
    with pytest.raises(UserError, match=r"n_heads of qwen2\.5-7b, 28"):
        find_profile("qwen2.5-7b", "8xh100")


def test_a_ring_moves_twice_all_but_its_own_part() -> None:
    link = CARDS["h100"].link
    moved = np.array([0.0, 1e9])
    assert ring_s(link, 1, moved).tolist() == [0.0, 0.0]
    expected = [link.latency_s, link.latency_s + 2 * 3 / 4 * 1e9 / link.bytes_per_s]
    assert ring_s(link, 4, moved) == pytest.approx(expected)


def table(card: str, name: str) -> dict[str, np.ndarray]:
    read = pq.read_table(SHIPPED / card / f"{name}.parquet")
    return {column: np.array(read[column].to_pylist()) for column in read.column_names}


@pytest.mark.parametrize(
    ("card", "folder", "cards"), [("h100", "h100_sxm", 4), ("l40s", "l40s", 4), ("l40s", "l40s", 2)]
)
def test_all_reduces_are_the_measured_ones_of_the_kernel_that_vllm_takes(card: str, folder: str, cards: int) -> None:
    """Its own kernel up to 8 MiB between cards that see each other, or two; NCCL's above and elsewhere."""
    device = device_of(f"{cards}x{card}")
    times = AllReduceTimes(SHIPPED_SOURCES[card], device)
    own, nccl = table(folder, "custom_allreduce"), table(folder, "nccl")
    for values in (4096, 1 << 20, 1 << 24):
        takes_own = 2 * values <= 8 << 20 and (card == "h100" or cards == 2)
        of = own if takes_own else nccl
        at = (of["num_gpus"] == cards) & (of["message_size"] == values)
        assert times.time_s(np.array([2.0 * values]))[0] == pytest.approx(of["latency"][at].item() * 1e-3)


@pytest.mark.parametrize("hardware", ["8xa100-80gb", "8xb200", "8xrtxpro6000", "2xh200", "4xl40s"])
def test_an_all_reduce_of_more_bytes_is_not_quicker(hardware: str) -> None:
    """Among the measured ones are a few that took twice as long as those of more bytes."""
    device = device_of(hardware)
    assert device.key is not None
    n_bytes = np.geomspace(1 << 10, 8 << 20, 200)  # one kernel of the two
    assert (np.diff(AllReduceTimes(SHIPPED_SOURCES[device.key], device).time_s(n_bytes)) >= 0).all()


@pytest.mark.parametrize("cards", [1, 4])
def test_a_layer_is_the_sum_of_its_kernels_and_of_two_all_reduces(cards: int) -> None:
    """The embedding takes one more. A layer reduces its hidden states, 2 bytes a value."""
    model, device = published_model("llama-3.1-8b"), device_of(f"{cards}xh100" if cards > 1 else "h100")
    profile = device_profile(model, device, SHIPPED_SOURCES["h100"], "")
    times = LayerTimes(model, device, SHIPPED_SOURCES["h100"])
    once_s = np.zeros(len(times.rows))
    if cards > 1:
        once_s = AllReduceTimes(SHIPPED_SOURCES["h100"], device).time_s(2.0 * times.rows * model.d_model)
    kernels_s = sum(times.gemm_s(gemm) for gemm in layer_gemms(shard(model, cards)))
    kernels_s = kernels_s + times.small_s(layer_elementwise(shard(model, cards)))
    assert profile.layer_tables[0].dense.time_s == pytest.approx(kernels_s + 2 * once_s, rel=1e-12)
    looked_up_s = times.small_s(embedding_elementwise(model))
    assert profile.embedding.time_s == pytest.approx(looked_up_s + once_s, rel=1e-12)


def test_measured_products_keep_their_times() -> None:
    gemm = table("h100_sxm", "gemm")
    times = LayerTimes(published_model("llama-3.1-8b"), device_of("h100"), SHIPPED_SOURCES["h100"])
    at = (gemm["gemm_dtype"] == "bfloat16") & (gemm["n"] == 16_384) & (gemm["k"] == 16_384)
    order = np.argsort(gemm["m"][at])
    measured_s = gemm["latency"][at][order][: len(times.rows)] * 1e-3
    ours_s = times.gemm_s(Gemm(16_384, 16_384))
    assert np.median(ours_s / measured_s) == pytest.approx(1.0, abs=0.02)
    assert (ours_s <= measured_s * 1.0001).mean() > 0.9  # slower measurements at fewer rows are taken down


def test_no_price_is_quicker_than_memory_where_a_kernel_was_timed_in_a_cache() -> None:
    """An L40S keeps some matrices in its cache: its table shows twice the memory's bandwidth for them."""
    measured, peak = table("l40s", "gemm"), CARDS["l40s"].bytes_per_s
    at = (measured["gemm_dtype"] == "bfloat16") & (measured["m"] == 1)
    n, k = measured["n"][at], measured["k"][at]
    bytes_per_s = 2 * n * k / (measured["latency"][at] * 1e-3)
    best = int(np.argmax(bytes_per_s))
    assert bytes_per_s[best] > 2 * peak
    times = LayerTimes(published_model("llama-2-7b"), device_of("l40s"), SHIPPED_SOURCES["l40s"])
    one_row_s = float(times.gemm_s(Gemm(int(n[best]), int(k[best])))[0])
    assert 2 * n[best] * k[best] / one_row_s <= 0.9 * peak


@pytest.mark.slow
@pytest.mark.parametrize("hardware", ["h100", "4xh100", "l40s", "8xb200", "mi300x", "2xrtx4090", "2xa100-40gb"])
@pytest.mark.parametrize("model", ["llama-3.1-8b", "gemma-3-27b", "falcon-40b", "opt-66b"])
def test_prices_are_above_their_floors(model: str, hardware: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked(find_profile(model, hardware)) == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(set(CARDS) & set(HARDWARE)))
def test_a_card_that_stands_in_both_tables_is_one_card(name: str) -> None:
    card, spec = CARDS[name], HARDWARE[name]
    assert (card.total_bytes, card.bytes_per_s, card.flops_per_s, card.tdp_w) == (
        spec.hbm_bytes, spec.hbm_bytes_per_s, spec.flops_per_s, spec.tdp_w,
    )  # fmt: skip
    assert card.load_bytes_per_s == device_of(name).load_bytes_per_s


def test_more_cards_are_quicker_but_not_as_many_times() -> None:
    one, four = (find_profile("llama-3.1-8b", name).layer_tables[0].dense for name in ("h100", "4xh100"))
    assert (four.time_s < one.time_s).all()
    assert (4 * four.time_s > one.time_s).all()
    group, card = find_profile("llama-3.1-8b", "4xh100"), find_profile("llama-3.1-8b", "h100")
    assert group.load_time_s(10**9) == pytest.approx(card.load_time_s(10**9) / 4)
    assert group.hardware.hbm_bytes == 4 * card.hardware.hbm_bytes


def test_a_profile_in_the_folder_comes_first() -> None:
    assert find_profile("opt-6.7b", "a100-40gb") == load_profile("opt-6.7b@a100-40gb", PROFILES_FOLDER)
    made = find_profile("opt-13b", "a100-40gb")
    assert replace(made.hardware, int8_flops_per_s=None) == HARDWARE["a100-40gb"]
    assert "vLLM 0.14.0" in str(made.provenance.details["times_from"])
    assert "data sheet" in str(find_profile("opt-13b", "a10").provenance.details["times_from"])


@pytest.mark.slow
def test_a_study_takes_groups_by_either_setting() -> None:
    words = ["own", "models=[llama-3.1-8b]", "exits.source=none", "workload.n_requests=20"]
    first = build(study_config(*words, "hardware=4xh100"), 0).models["llama-3.1-8b"].profile
    second = build(study_config(*words, "hardware=h100", "server.tensor_parallel=4"), 0).models["llama-3.1-8b"].profile
    assert first.layer_tables == second.layer_tables
    assert first.hardware == second.hardware
    with pytest.raises(UserError, match="give one of the two"):
        study_config(*words, "hardware=4xh100", "server.tensor_parallel=4")
    with pytest.raises(UserError, match="1, 2, 4 or 8"):
        study_config(*words, "server.tensor_parallel=3")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["list"], 0, "llama-3.3-70b"), (["show", "llama-3.3-70b", "4xh100"], 0, "left for K and V"),
        (["show", "llama-3.3-70b", "h100"], 0, "too little"), (["check", "qwen3-8b", "l4"], 0, "above its floor"),
        (["show", "llama-3.3-70b"], 1, "list | show MODEL HARDWARE"), ([], 1, "list | show MODEL HARDWARE"),
        (["build", "model=opt-1.3b", "hardware=h100-80gb", "tensor_parallel=4"], 1, "needs no profile of its own"),
    ],
)  # fmt: skip
def test_the_command(arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == status
    shown = capsys.readouterr()
    assert said in shown.out + shown.err


@pytest.mark.slow
def test_a_check_is_drawn_where_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prices.png"
    assert main(["check", "llama-2-70b", "2xa100-40gb", f"out={path}"]) == 0  # which does not fit
    assert path.read_bytes().startswith(b"\x89PNG")
    assert str(path) in capsys.readouterr().out.replace("\n    ", "")
    drawing = price_drawing(find_profile("qwen2.5-7b", "l40s"))
    batch_ms = drawing.figure.axes[0]
    price, floor = (batch_ms.lines[place].get_ydata() for place in (0, 1))
    assert (np.asarray(price) > np.asarray(floor)).all()


@pytest.mark.parametrize(
    "words",
    [["check", "out=x.jpg"], ["check", "out="], ["check", "out=x.png", "out=y.png"], ["show", "out=x.png"]],
    ids=" ".join,
)  # fmt: skip
def test_a_picture_that_cannot_be_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command, *rest = words
    assert main([command, "qwen2.5-7b", "l40s", *rest]) == 1
    said = capsys.readouterr()
    assert "out=" in said.err
    assert not said.out


def test_the_command_fits_the_terminal_and_lists_all_models(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in (["list"], ["show", "qwen2.5-7b", "2xl40s"], ["show", "gemma-3-1b", "rtx4090"]):
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= 80
        assert arguments[0] != "list" or "opt-6.7b" in shown


def test_the_smaller_vocabulary_of_a_shard_covers_all_words() -> None:
    model = replace(published_model("llama-3.1-8b"), vocab_size=1001)
    assert 4 * shard(model, 4).vocab_size >= 1001


def test_a_card_of_the_same_chip_with_less_power_is_slower_where_operations_bind() -> None:
    model = published_model("llama-2-7b")
    times = {card: LayerTimes(model, device_of(card), SHIPPED_SOURCES[card]) for card in ("a100-80gb", "a100pcie80gb")}
    on_sxm, on_pcie = (sum(each.gemm_s(gemm) for gemm in layer_gemms(model)) for each in times.values())
    rows = times["a100-80gb"].rows
    by_clock = ((400 - OF_A100.still_w) / (300 - OF_A100.still_w)) ** (1 / 3)
    assert times["a100-80gb"].slower == 1.0
    assert times["a100pcie80gb"].slower == pytest.approx(by_clock)
    ratio = on_pcie / on_sxm
    assert ratio[rows >= 512] == pytest.approx(by_clock, rel=2e-2)
    assert (ratio < by_clock + 0.02).all()
    assert (ratio[rows <= 64] < 2.039 / 1.935 + 0.01).all()
    pair = LayerTimes(model, device_of("2xa100pcie80gb"), SHIPPED_SOURCES["a100pcie80gb"])
    assert not pair.same_links  # all-reduces were measured between cards with direct links
    moved = 2 * pair.rows * model.d_model
    assert pair.all_reduces_s() == pytest.approx(2 * ring_s(pair.device.link, 2, moved.astype(float)))


def test_the_clock_under_a_power_limit_gives_the_rates_that_it_was_made_from() -> None:
    operations = np.array([2.0 * 8192**3])
    for card, rate in (("a100-80gb", 264.5e12), ("a100pcie40gb", 213.5e12)):
        on = device_of(card).card
        assert operations / OF_A100.slowed(on, operations / 294e12, operations) == pytest.approx(rate, rel=1e-9)
        assert OF_A100.slowed(on, 4 * operations / 294e12, operations) == 4 * operations / 294e12  # units that wait
    assert 50 < OF_A100.still_w < 100  # an A100 that does nothing, its memory awake


def test_a_card_whose_kernels_power_was_measured_has_energy(tmp_path: Path) -> None:
    words = ("own", "models=[llama-3.1-8b]", "hardware=2xb200", "exits.source=none", "policy=full_depth")
    profile = build(study_config(*words), 0).models["llama-3.1-8b"].profile
    write_profile(profile, tmp_path / profile.name)
    for card in (profile.hardware, load_profile(profile.name, tmp_path).hardware):
        assert card.idle_w is not None
        assert card.tdp_w is not None
        assert card.busy_w(0.1) == card.busy_w(1.0) == (2 * 349.0, 2 * 979.0)
        assert card.idle_w < 2 * 349.0 < 2 * 979.0 < card.tdp_w
    assert device_of("h200").card.busy_w(0.5) is None


def test_gaps_of_a_table_are_filled_along_its_axes() -> None:
    points = [np.array([0.0, 1.0, 3.0]), np.array([0.0, 2.0, 4.0])]
    plane = points[0][:, None] * 2 + points[1] * 10
    holes = plane.copy()
    holes[1, 1] = np.nan
    along = np.full(plane.shape, -1)
    assert filled(points, holes, along) == pytest.approx(plane)
    curved = holes.copy()
    curved[1, 0] += 100
    along[1, 1] = 0  # the axis without the bump
    assert filled(points, curved, along)[1, 1] == plane[1, 1]
    holes = plane.copy()
    holes[:, 2] = np.nan  # beyond what is known the nearest is kept
    found = filled(points, holes, np.full(plane.shape, -1))
    assert found[:, 2] == pytest.approx(plane[:, 1])
    assert np.isnan(filled(points, holes, along, edges=False)[:, 2]).all()


def test_what_is_off_or_inside_of_a_rotation_and_not_known_is_named(tmp_path: Path) -> None:
    plain = {"mlp_bias": False, "num_beams": 1, "typical_p": 1.0, "bad_words_ids": None, "min_length": 0,
             "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}  # fmt: skip
    assert shape_of(config_file(tmp_path / "plain", **plain)).not_read == ""
    others = {"use_gate": False, "gate_of": None, "rope_scaling": {"rope_type": "ntk", "alpha": 1000.0},
              "rope_parameters": {"full_attention": {"rope_theta": 1e4, "warp": False}},
              "quantization_config": {"quant_method": "gptq", "bits": 4, "rotation": None}}  # fmt: skip
    said = shape_of(config_file(tmp_path / "others", **others)).not_read
    for name in ("use_gate (False)", "gate_of (None)", "rope_scaling.alpha (1000.0)", "rope_scaling.rope_type (ntk)",
                 "rope_parameters.full_attention.warp (False)", "quantization_config.rotation (off)"):  # fmt: skip
        assert name in said
    outer = {"text_config": dict(LLAMA), "vision_config": {"hidden_size": 8}, "image_token_id": 5, "share_kv": 2}
    assert shape_of(config_file(tmp_path / "sees", **outer)).not_read.endswith("not read: share_kv (2)")


def test_local_and_global_layers_by_letters(tmp_path: Path) -> None:
    given = {"model_type": "exaone4", "sliding_window": 64, "sliding_window_pattern": "LLG", "num_hidden_layers": 5}
    assert shape_of(config_file(tmp_path / "m", **given)).windows == (64, 64, 0, 64, 0)  # the last is always global
    with pytest.raises(UserError, match="sliding_window_pattern"):
        shape_of(config_file(tmp_path / "n", **given | {"sliding_window_pattern": "LLX"}))


def test_what_is_valid_and_not_priced_is_not_called_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model_type.*'glm4'.*Fix: take a model of one of these families"):
        shape_of(config_file(tmp_path / "glm", model_type="glm4"))
    left_out = {"text_config": {"model_type": "llama", "vocab_size": 32_064}}
    with pytest.raises(UserError, match=r"hidden_size.*Fix: add it: where it is missing, transformers takes"):
        shape_of(config_file(tmp_path / "llava", **left_out))
