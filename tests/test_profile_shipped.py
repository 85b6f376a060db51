"""The shipped derived profiles: above the roofline, monotonic, rebuilt to the last bit, true to their tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helios_sim.errors import UserError
from helios_sim.profile.build import main as build
from helios_sim.profile.catalog import HARDWARE, MODELS, hardware_spec, model_spec
from helios_sim.profile.composition import Composition, PrefillChunk
from helios_sim.profile.importers.aiconfigurator import gemm_times
from helios_sim.profile.importers.kernel_tables import A100, H100, DecodeAttentionTimes, rising
from helios_sim.profile.profile import Profile
from helios_sim.profile.roofline import Gemm, head_gemm, layer_gemms
from helios_sim.profile.runtimes import PRESETS, preset
from helios_sim.profile.store import PROFILES_FOLDER, known_profiles, load_profile
from helios_sim.provenance import ProvenanceClass
from helios_sim.shared_data import shared_data_folder

# measured ones are kept as they were measured, noise and all: test_calibrate_shipped.py
NAMES = [name for name in known_profiles() if load_profile(name).provenance.provenance_class is ProvenanceClass.DERIVED]


@pytest.fixture
def kernels(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIOS_SHARED_DATA", str(shared_data))


def decode_leap(profile: Profile, batches: list[int], kv_tokens: int, layers: int | None = None) -> Composition:
    batch = np.array(batches)
    bounds = (layers or profile.model.n_layers,)
    return Composition(bounds, batch[:, None], batch[:, None] * kv_tokens, batch)


def prefill(profile: Profile, tokens: int, context_tokens: int) -> float:
    depth = profile.model.n_layers
    chunk = PrefillChunk(tokens, context_tokens, depth)
    none = np.zeros((1, 1), dtype=np.int64)
    c = Composition((depth,), none, none, np.array([1]), prefill=(chunk,))
    assert profile.iteration_floor_s(c)[0] <= profile.iteration_time_s(c)[0]
    return float(profile.iteration_time_s(c)[0])


@pytest.mark.parametrize("name", NAMES)
def test_no_iteration_beats_the_roofline(name: str) -> None:
    profile = load_profile(name)
    for kv_tokens in (1, 100, 700, profile.model.max_context_tokens):
        for layers in (1, profile.model.n_layers // 4, profile.model.n_layers):
            c = decode_leap(profile, [1, 3, 17, 64, 200, 500, 1000], kv_tokens, layers)
            share = profile.iteration_floor_s(c) / profile.iteration_time_s(c)
            assert np.all((share > 0) & (share < 1))
            assert not profile.outside_grid(c).any()


@pytest.mark.parametrize("name", NAMES)
def test_more_work_never_takes_less_time(name: str) -> None:
    profile = load_profile(name)
    batches = list(range(1, 1025))
    for kv_tokens in (16, 1000):
        assert np.all(np.diff(profile.iteration_time_s(decode_leap(profile, batches, kv_tokens))) >= 0)
    by_kv = [profile.iteration_time_s(decode_leap(profile, [1, 8, 64], kv)) for kv in range(1, 2048, 50)]
    assert np.all(np.diff(by_kv, axis=0) >= 0)
    by_layers = [profile.iteration_time_s(decode_leap(profile, [1, 64], 100, n)) for n in range(1, 25)]
    assert np.all(np.diff(by_layers, axis=0) > 0)
    assert np.all(np.diff([prefill(profile, tokens, 0) for tokens in range(1, 2049, 64)]) >= 0)
    assert np.all(np.diff([prefill(profile, 256, context) for context in range(0, 1700, 64)]) >= 0)


@pytest.mark.parametrize("name", NAMES)
def test_grid_points_read_back_exactly(name: str) -> None:
    profile = load_profile(name)
    layer, host_s = profile.layer_tables[0], profile.runtime.host_overhead_s
    unpadded = profile.with_runtime(PRESETS["eager"])
    launch_s = profile.model.n_layers * unpadded.runtime.launch_s_per_layer
    attention = layer.decode_attention
    for i in (0, 3, 7):
        batch = int(attention.first[i])
        for j, kv in enumerate(attention.second.tolist()):
            c = Composition((1,), np.array([[batch]]), np.array([[batch * kv]]), np.array([0]))
            dense_s = layer.dense.time_s[layer.dense.rows.tolist().index(batch)]
            embedding_s = profile.embedding.time_s[profile.embedding.rows.tolist().index(batch)]
            device_s = embedding_s + (dense_s + attention.time_s[i, j])
            assert profile.iteration_time_s(c)[0] == max(device_s, profile.runtime.launch_s_per_graph) + host_s
    one = Composition((profile.model.n_layers,), np.array([[1]]), np.array([[1]]), np.array([1]))
    assert unpadded.iteration_time_s(one)[0] >= launch_s


def test_weight_bytes_follow_the_published_parameter_counts() -> None:
    published = {"opt-1.3b": 1.316e9, "opt-6.7b": 6.658e9, "llama-2-7b": 6.738e9, "llama-2-13b": 13.016e9,
                 "llama-3-8b": 8.030e9}  # fmt: skip
    for name, values in published.items():
        model = MODELS[name]
        assert model.weight_bytes(model.n_layers) / 2 == pytest.approx(values, rel=5e-4)


def test_batch_1_times_lie_above_weight_bytes_at_an_achieved_bandwidth() -> None:
    """A100-40GB at 1.3 TB/s: 77 us a layer and 158 us for the head of OPT-1.3B, 310 and 317 us for OPT-6.7B."""
    for name, layer_s, head_s in (("opt-1.3b", 77e-6, 158e-6), ("opt-6.7b", 310e-6, 317e-6)):
        profile = load_profile(f"{name}@a100-40gb")
        assert layer_s < profile.layer_tables[0].dense.time_s[0] < 1.6 * layer_s
        assert head_s < profile.head.time_s[0] < 1.2 * head_s


@pytest.mark.parametrize("name", NAMES)
def test_provenance_says_derived_from_what_and_lists_what_is_assumed(name: str) -> None:
    profile = load_profile(name)
    provenance = profile.provenance
    assert provenance.provenance_class is ProvenanceClass.DERIVED
    assert f"model={profile.model.name} hardware={profile.hardware.name}" in provenance.command
    assert any("1555 GB/s" in line for line in provenance.scaled) == (profile.hardware.name == "a100-40gb")
    listed = {a.name for a in provenance.assumptions}
    assert {"load_bytes_per_s", "load_slowdown", "runtime.host_overhead_s", "idle_w", "mixed_factor"} <= listed
    idle_w, tdp_w = profile.hardware.idle_w, profile.hardware.tdp_w
    assert idle_w is not None
    assert tdp_w is not None
    assert 0 < idle_w < tdp_w
    assert "idle: nvidia-smi" in profile.hardware.source


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", ["opt-1.3b@a100-40gb", "llama-2-13b@h100-80gb"])
def test_the_recorded_command_rebuilds_the_shipped_files(name: str, tmp_path: Path) -> None:
    command = load_profile(name).provenance.command
    assert command.startswith("python -m helios_sim.profile.build ")
    assert build([*command.split()[3:], f"folder={tmp_path}"]) == 0
    for file in ("profile.json", "rows.parquet", "grids.parquet"):
        assert (tmp_path / name / file).read_bytes() == (PROFILES_FOLDER / name / file).read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
def test_every_known_shape_can_be_built(tmp_path: Path) -> None:
    assert build(["model=all", "hardware=h100-80gb", f"folder={tmp_path}"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {f"{model}@h100-80gb" for model in MODELS}


@pytest.mark.usefixtures("kernels")
def test_measured_shapes_are_taken_as_they_are_and_missing_ones_from_neighbours() -> None:
    times = gemm_times(A100)
    i, j = list(times._n).index(4096), list(times._k).index(4096)
    np.testing.assert_allclose(times.time_s(Gemm(4096, 4096)), rising(times._time_s[:, i, j]), rtol=1e-12)
    below, between, above = (times.time_s(Gemm(4096, k)) for k in (10_240, 11_008, 12_288))
    assert np.all((below <= between * 1.001) & (between <= above * 1.001))
    assert np.all(np.diff(times.time_s(Gemm(22_016, 4096))) >= 0)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("source", [A100, H100])
def test_fewer_kv_heads_at_a_larger_batch_cost_the_same(source: object) -> None:
    """What lets 8 measured KV heads stand for 32 and 40: 4/4 heads at batch 2b against 8/8 at b, and 2/2 at 4b."""
    eight = DecodeAttentionTimes(source, 8, 8, 128)  # type: ignore[arg-type]
    for heads in (4, 2):
        fewer = DecodeAttentionTimes(source, heads, heads, 128)  # type: ignore[arg-type]
        ratio = np.array(
            [
                fewer.time_s(b * 8 / heads, kv) / eight.time_s(b, kv)
                for b in (1, 2, 4, 8, 16, 32, 64)
                for kv in (128, 512, 1024, 2048, 4096)
            ]
        )
        assert abs(np.median(ratio) - 1) < 0.05
        assert np.quantile(np.abs(ratio - 1), 0.9) < 0.15


def test_unknown_names_and_options_list_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["model=opt-9b", "hardware=a100-40gb"], ["model=opt-1.3b", "hardware=b200"], ["modle=x"], []):
        assert build(arguments) == 1
        message = capsys.readouterr().err
        assert "Fix" in message
        assert "Traceback" not in message
    for wrong in (lambda: model_spec("gpt-5"), lambda: hardware_spec("abacus"), lambda: preset("magic")):
        with pytest.raises(UserError, match="one of"):
            wrong()


def test_without_the_kernel_tables_the_message_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HELIOS_SHARED_DATA", str(tmp_path))
    gemm_times.cache_clear()
    assert build(["model=opt-1.3b", "hardware=a100-40gb", f"folder={tmp_path}"]) == 1
    assert "HELIOS_SHARED_DATA" in capsys.readouterr().err
    assert shared_data_folder() == tmp_path
    assert set(HARDWARE) >= {"a100-40gb", "a100-80gb", "h100-80gb"}


def test_gemm_shapes_hold_the_layers_weights() -> None:
    for model in MODELS.values():
        weights = sum(g.n * g.k for g in layer_gemms(model))
        assert 0 < model.layer_values - weights < 0.001 * model.layer_values  # the rest is norms and biases
        assert head_gemm(model).n == model.vocab_size
