"""Profiles from tables that others measured: what comes out is what the tables say, and what does not fit is named."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helios_sim.core.price import unequal_share
from helios_sim.errors import UserError
from helios_sim.profile.build import main
from helios_sim.profile.catalog import CARDS, MODELS, PCIE_LINK, Link, published_card, published_model
from helios_sim.profile.composition import Composition, PrefillChunk
from helios_sim.profile.importers.attention import AttentionGrid, repetitions_of, unequal_table
from helios_sim.profile.importers.kernel_tables import SHIPPED_SOURCES, read_kernels
from helios_sim.profile.importers.layers import Terms, layer_profile
from helios_sim.profile.importers.vidur import vidur_profile
from helios_sim.profile.price_tables import unequal_lengths
from helios_sim.profile.profile import Profile
from helios_sim.profile.runtimes import preset
from helios_sim.profile.spec import Runtime
from helios_sim.profile.store import read_profile, write_profile
from helios_sim.provenance import NOT_READ, ProvenanceClass
from vllm_log import BATCHES, KVS, LAYER_US, REPETITIONS, attention_us, write_profile as write_tables

MODEL = "Qwen/Qwen2.5-0.5B"
BARE = Runtime(0.0, 0.0, 0.0, 0.0, None)


def imported(folder: Path, degree: int = 1, link: Link | None = None, terms: Terms | None = None) -> Profile:
    return layer_profile(folder, published_model(MODEL), "RTX4090", CARDS["rtx4090"], BARE, degree, link, terms)


@pytest.fixture(params=[".csv", ".csv.gz"])
def tables(tmp_path: Path, request) -> Path:
    write_tables(tmp_path / "tables", MODEL, "RTX4090", request.param)
    return tmp_path / "tables"


def test_an_iteration_is_the_sum_of_its_kernels(tables: Path) -> None:
    profile = imported(tables)
    assert profile.provenance.provenance_class is ProvenanceClass.DERIVED
    layers = profile.model.n_layers
    per_layer = sum(us * (2 if name == "layernorm" else 1) for name, us in LAYER_US.items())
    dense_us = per_layer * (1 + 0.05)  # at 8 rows
    once_us = 2 * (3 + 0.001 * 8) + 200 + 20 + 2 * 8
    attention = 8 * (1 + 0.01 * 127)
    step = Composition((layers,), np.array([[8]]), np.array([[8 * 128]]), np.array([8]))
    assert profile.iteration_time_s(step)[0] * 1e6 == pytest.approx(layers * (dense_us + attention) + once_us, rel=1e-6)


def test_decodes_beside_a_chunk_cost_what_was_measured_with_it(tables: Path) -> None:
    profile = imported(tables)
    layers = profile.model.n_layers

    def time_us(decodes: int) -> float:
        c = Composition(
            (layers,), np.array([[decodes]]), np.array([[decodes * 129]]), np.array([decodes]),
            prefill=(PrefillChunk(64, 64, layers),),
        )  # fmt: skip
        return float(profile.iteration_time_s(c)[0]) * 1e6

    dense = sum(us * (2 if n == "layernorm" else 1) for n, us in LAYER_US.items()) * 0.05 / 8 * 4
    head = 4 * 2 - 0.0  # lm_head and sampler by row
    added = time_us(4) - time_us(0) - head - 0.001 * 4 * 2 - 200 - 20  # without sampled rows nothing passes the head
    assert added == pytest.approx(layers * (dense + 1.5 * 4 * (1 + 0.01 * 128)), rel=1e-6)


def test_holes_of_the_attention_grid_are_filled(tables: Path) -> None:
    suffix = next(tables.glob("attention*")).name
    grid = AttentionGrid(tables / suffix)
    mixed = grid.mixed_table()
    assert mixed is not None
    assert mixed.time_s.shape == (3, 3, 3, 3)
    # 16 decodes beside 256 tokens were not measured: in proportion to 4
    assert mixed.time_s[2, :, 2] == pytest.approx(4 * mixed.time_s[2, :, 1])
    assert grid.decodes_s[1, 1] == pytest.approx(attention_us(0, 0, BATCHES[1], KVS[1]) * 1e-6)
    assert grid.kvs.tolist() == [kv + 1 for kv in KVS]  # the file leaves the new token out


def test_unequal_lengths_are_sums_over_repetitions(tables: Path) -> None:
    grid = AttentionGrid(next(tables.glob("attention*")))
    skew = next(tables.glob("skew*"))
    assert repetitions_of(skew, grid, None) == REPETITIONS
    table = unequal_table(skew, grid, REPETITIONS)
    lengths = unequal_lengths([table])
    # the test's tables: a fifth longer, whatever the lengths; half of them long
    assert unequal_share(lengths, 0, 0, 16, 16 * 320, 128, 512) == pytest.approx(0.2, rel=1e-3)
    assert unequal_share(lengths, 0, 0, 16, 16 * 320, 320, 320) == 0.0
    with pytest.raises(UserError, match="measurement_iterations"):
        repetitions_of(skew, grid, 5)


def test_tensor_parallelism_adds_two_all_reduces_a_layer(tables: Path) -> None:
    one, two = imported(tables), imported(tables, 2, Link(1e-3, 1e9, "test"))
    width = 2 * one.model.d_model
    added = two.layer_tables[0].dense.time_s - one.layer_tables[0].dense.time_s
    assert added == pytest.approx(2 * (1e-3 + one.layer_tables[0].dense.rows * width / 1e9))
    assert two.hardware.hbm_bytes == 2 * one.hardware.hbm_bytes
    assert PCIE_LINK.source in " ".join(a.why for a in imported(tables, 2).provenance.assumptions)


def test_a_folder_for_each_degree_comes_first(tables: Path) -> None:
    (tables / "tp2").mkdir()
    for table in tables.glob("*.csv*"):
        table.rename(tables / "tp2" / table.name)
    assert imported(tables, 2).hardware.name == "2xRTX4090"
    with pytest.raises(UserError, match=r"dense\.csv"):
        imported(tables, 1)


def test_terms_survive_the_disk(tables: Path, tmp_path: Path) -> None:
    profile = imported(tables)
    write_profile(profile, tmp_path / "profile")
    back = read_profile(tmp_path / "profile")
    for name in ("mixed_attention", "unequal_kv"):
        wrote, read = (getattr(p.layer_tables[0], name) for p in (profile, back))
        for field in wrote.__slots__:
            assert np.array_equal(getattr(wrote, field), getattr(read, field)), (name, field)
    write_profile(imported(tables, terms=Terms(False, False)), tmp_path / "profile")
    assert read_profile(tmp_path / "profile").layer_tables[0].mixed_attention is None


def test_experts_are_refused(tables: Path) -> None:
    (tables / "moe.csv").write_text("tokens,activated_experts,time_us\n")
    with pytest.raises(UserError, match="dense model"):
        imported(tables)


def test_the_command_builds_from_a_folder(tables: Path, tmp_path: Path, capsys) -> None:
    arguments = ["importer=layers", f"tables={tables}", f"folder={tmp_path / 'made'}"]
    assert main(arguments) == 0
    assert read_profile(tmp_path / "made" / "qwen2.5-0.5b@RTX4090").model.n_layers == 24
    assert main([*arguments, "hardware=abacus"]) == 1
    assert main([*arguments, "tensor_parallel=x"]) == 1
    assert main(["importer=hearsay"]) == 1
    assert main(["importer=layers"]) == 1
    assert capsys.readouterr().err.count("Fix:") == 4


def write_vidur(folder: Path, heads: int = 14) -> Path:
    folder.mkdir()
    layer = ("input_layernorm", "attn_pre_proj", "attn_rope", "attn_post_proj", "post_attention_layernorm",
             "mlp_up_proj", "mlp_act", "mlp_down_proj", "add", "emb")  # fmt: skip
    shape = {"n_head": heads, "n_kv_head": 2, "n_embd": 896, "n_expanded_embd": 4864, "vocab_size": 151936}
    mlp = [
        {f"time_stats.{name}.median": 0.01 + 1e-4 * n for name in layer} | shape
        | {"num_tokens": n, "num_tensor_parallel_workers": 1} for n in (1, 64, 512)
    ]  # fmt: skip
    own = {"n_q_head": heads, "n_kv_head": 2, "n_embd": 896, "num_tensor_parallel_workers": 1}
    attention = []
    for prompt, batches, chunks in ((False, (1, 8), (0,)), (True, (1,), (16, 128))):
        for batch in batches:
            for chunk in chunks:
                for kv in (0, 256) if prompt else (32, 256):
                    case = {"batch_size": batch, "prefill_chunk_size": chunk, "kv_cache_size": kv, "is_prefill": prompt}
                    times = {
                        "input_reshape": 0.0, "output_reshape": 0.001, "prefill": 0.02 * chunk if prompt else "",
                        "decode": "" if prompt else 0.001 * batch * kv,
                    }  # fmt: skip
                    stats = {f"time_stats.attn_{name}.median": value for name, value in times.items()}
                    attention.append(own | case | stats)
    for name, rows in (("mlp", mlp), ("attention", attention)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return folder


def test_vidur_tables(tmp_path: Path) -> None:
    folder = write_vidur(tmp_path / "vidur")
    profile = vidur_profile(folder, published_model(MODEL), "A100", CARDS["a100-80gb"], preset("captured_graphs"))
    tables = profile.layer_tables[0]
    assert tables.dense.time_s[1] == pytest.approx(10 * (0.01 + 64e-4) * 1e-3)
    assert tables.decode_attention.time_s[1, 1] == pytest.approx((0.001 + 0.001 * 8 * 256) * 1e-3)
    assert tables.prefill_attention.time_s[1, 0] == pytest.approx((0.001 + 0.02 * 128) * 1e-3)
    assert profile.head.time_s[0] > tables.dense.time_s[0] / 10
    with pytest.raises(UserError, match="n_head"):
        vidur_profile(write_vidur(tmp_path / "other", heads=16), profile.model, "A100", CARDS["a100-80gb"], BARE)


def rewritten(path: Path, change: Callable[[list[dict[str, str]]], None]) -> None:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    change(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def vidur(folder: Path) -> Profile:
    return vidur_profile(folder, published_model(MODEL), "A100", CARDS["a100-80gb"], preset("captured_graphs"))


def test_writing_the_cache_is_part_of_attention(tmp_path: Path) -> None:
    folder = write_vidur(tmp_path / "vidur")
    before = vidur(folder).layer_tables[0]
    rewritten(folder / "attention.csv", lambda rows: [r.update({"time_stats.attn_kv_cache_save.median": "0.5"})
                                                      for r in rows])  # fmt: skip
    after = vidur(folder).layer_tables[0]
    for name in ("decode_attention", "prefill_attention"):
        assert getattr(after, name).time_s == pytest.approx(getattr(before, name).time_s + 0.5e-3)
    assert before.decode_attention.time_s[1, 1] == pytest.approx(2_049e-6)
    assert after.decode_attention.time_s[1, 1] == pytest.approx(2_549e-6)


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("block_size", ("16", "32"), r"block_size=\[.*the same in every row"),
        ("block_size", ("16", "16"), None),
        ("attention_backend", ("FLASH", "FLASHINFER"), "attention_backend"),
        ("time_stats.attn_all_reduce.median", ("0.1", "0.1"), "attn_all_reduce.*left out"),
        ("time_stats.attn_all_reduce.mean", ("0.1", "0.1"), "attn_all_reduce.*left out"),
        ("time_stats.attn_decode.max", ("0.1", "0.3"), None), ("time_stats.attn_decode.count", ("3", "4"), None),
        ("n_embd", ("896", "1024"), "n_embd=1024"),
        ("time_stats.attn_output_reshape.median", ("0.001", ""), "output_reshape.*=nan: a time"),
        ("batch_size", ("1", "1.5"), "batch_size=1.5"),
        ("is_prefill", ("False", "maybe"), "is_prefill.*True or False"),
    ],
)
def test_rows_that_differ_in_what_is_not_read_are_refused(
    tmp_path: Path, column: str, values: tuple[str, str], said: str | None
) -> None:
    folder = write_vidur(tmp_path / "vidur")
    change = [lambda rows: [row.update({column: values[i % 2]}) for i, row in enumerate(rows)]]
    if column in ("n_embd", "batch_size", "is_prefill", "time_stats.attn_output_reshape.median"):
        change = [lambda rows: rows[1].update({column: values[1]})]
    rewritten(folder / "attention.csv", change[0])
    if said is None:
        assert vidur(folder).layer_tables
    else:
        with pytest.raises(UserError, match=said):
            vidur(folder)


def with_column(path: Path, name: str, value: object) -> None:
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([f"{header},{name}", *(f"{row},{value}" for row in rows)]) + "\n")


@pytest.mark.parametrize(
    ("table", "name", "value", "said"),
    [
        ("mlp", "dtype", "fp8", "bf16 or fp16"), ("attention", "precision", "int8", "bf16 or fp16"),
        ("mlp", "device", "h100", "A100, which is asked for"), ("attention", "gpu_name", "L40S", "which is asked for"),
        ("mlp", "use_gated_mlp", False, "True, as qwen2.5-0.5b has"), ("mlp", "dtype", "bfloat16", None),
        ("mlp", "device", "a100", None), ("mlp", "use_gated_mlp", True, None), ("mlp", "clocks", 1410, None),
    ],
)  # fmt: skip
def test_what_a_column_says_of_all_rows_is_compared_or_named(
    tmp_path: Path, table: str, name: str, value: object, said: str | None
) -> None:
    folder = write_vidur(tmp_path / "vidur")
    with_column(folder / f"{table}.csv", name, value)
    if said is None:
        named = {NOT_READ: "not read: mlp.csv: clocks (1410)"} if name == "clocks" else {}
        assert vidur(folder).provenance.details == named
        return
    with pytest.raises(UserError, match=said):
        vidur(folder)


@pytest.mark.parametrize("scale", [1000.0, 0.001])
def test_times_in_another_unit_are_refused(tmp_path: Path, scale: float) -> None:
    folder = write_vidur(tmp_path / "vidur")
    def scaled(rows: list[dict[str, str]]) -> None:
        for row in rows:
            row |= {name: str(float(value) * scale) for name, value in row.items() if "time_stats" in name}

    rewritten(folder / "mlp.csv", scaled)
    with pytest.raises(UserError, match="times in ms: the card could do it in"):
        vidur_profile(folder, published_model(MODEL), "A100", CARDS["a100-80gb"], BARE)


def changed_times(path: Path, factor: float) -> None:
    header, *rows = path.read_text().splitlines()
    cells = [row.rpartition(",") for row in rows]
    path.write_text("\n".join([header, *(f"{a},{float(time) * factor}" for a, _, time in cells)]) + "\n")


@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.parametrize("table", ["dense", "per_sequence"])
def test_times_by_layer_in_another_unit_are_refused(tmp_path: Path, table: str, factor: float) -> None:
    write_tables(tmp_path / "tables", MODEL, "RTX4090")
    changed_times(tmp_path / "tables" / f"{table}.csv", factor)
    with pytest.raises(UserError, match=rf"{table}\.csv.*times in us: the card could do it in"):
        imported(tmp_path / "tables")


def test_a_layer_of_the_head_is_not_counted_in_every_layer(tmp_path: Path) -> None:
    write_tables(tmp_path / "tables", MODEL, "RTX4090")
    path = tmp_path / "tables" / "dense.csv"
    text = path.read_text()
    path.write_text(f"{text}lm_head,1,500\nlm_head,64,500\n")
    with pytest.raises(UserError, match=r"lm_head.*in per_sequence\.csv alone"):
        imported(tmp_path / "tables")
    path.write_text(text)
    other = tmp_path / "tables" / "per_sequence.csv"
    other.write_text(f"{other.read_text()}draft,1,5\ndraft,64,5\n")
    assert "counted once an iteration: draft" in " ".join(imported(tmp_path / "tables").provenance.scaled)


def test_what_tables_by_layer_hold_and_nothing_is_made_of_is_named(tmp_path: Path) -> None:
    write_tables(tmp_path / "tables", MODEL, "RTX4090")
    assert imported(tmp_path / "tables").provenance.details == {}
    with_column(tmp_path / "tables" / "dense.csv", "dtype", "fp8")
    with (tmp_path / "tables" / "meta.yaml").open("a") as file:
        file.write("clocks: locked\n")
    said = {NOT_READ: "not read: dense.csv: dtype (fp8), meta.yaml: clocks (locked)"}
    assert imported(tmp_path / "tables").provenance.details == said


@pytest.mark.parametrize(("words", "said"), [(50_257, "151936, as qwen2.5-0.5b has"), (152_064, None)])
def test_the_words_of_a_table_are_those_of_the_model(tmp_path: Path, words: int, said: str | None) -> None:
    folder = write_vidur(tmp_path / "vidur")
    rewritten(folder / "mlp.csv", lambda rows: [row.update({"vocab_size": str(words)}) for row in rows])
    if said is None:
        assert vidur(folder).provenance.details == {}
    else:
        with pytest.raises(UserError, match=said):
            vidur(folder)


@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_times_of_attention_in_another_unit_are_refused(tmp_path: Path, scale: float) -> None:
    def scaled(rows: list[dict[str, str]]) -> None:
        for row in rows:
            name = "time_stats.attn_decode.median"
            row["kv_cache_size"] = str(1000 * int(row["kv_cache_size"]))
            row[name] = str(float(row[name]) * scale) if row[name] else ""

    folder = write_vidur(tmp_path / "vidur")
    rewritten(folder / "attention.csv", scaled)
    with pytest.raises(UserError, match=r"attention\.csv.*times in ms: the card could do it in"):
        vidur(folder)


@pytest.mark.parametrize("name", ["linear_attention.csv", "mamba.csv.gz"])
def test_a_table_that_is_not_read_is_refused(tables: Path, tmp_path: Path, name: str) -> None:
    for folder, build in ((tables, imported), (write_vidur(tmp_path / "vidur"), vidur)):
        (folder / name).write_text("layer,tokens,time_us\n")
        with pytest.raises(UserError, match=name):
            build(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        ("hardware: RTX4090", {"hardware": "A100"}, "hardware='A100': RTX4090, on which"),
        ("hardware: NVIDIA GeForce RTX 4090", {"hardware": "RTX4090"}, None),
        (f"model: {MODEL}", {"model": "Qwen/Qwen2.5-7B"}, "of the shape of Qwen/Qwen2.5-0.5B"),
        (f"model: {MODEL}", {"model": "Qwen/Qwen2.5-0.5B-Instruct"}, None),
        ("tp_degrees: [2, 4]", {}, "tensor_parallel=1: one of those in meta.yaml"),
        ("variant: fp8", {}, "meta.yaml: variant='fp8': bf16 or fp16"),
        ("engine_effective: {quantization: awq}", {}, "meta.yaml: quantization='awq'"),
        ("engine_effective: {tensor_parallel_size: 2}", {}, "tables in tp1/"),
        ("a: &a [x, x]\nb: [*a, *a", {}, "a YAML mapping"),
        ("[" * 5000, {}, "a YAML mapping"),
    ],
)
def test_what_meta_says_is_compared(tables: Path, tmp_path: Path, capsys, text: str, arguments: dict[str, str], said):
    meta = f"{text}\nmeasurement_iterations: {REPETITIONS}\n"
    meta += "" if "model:" in text else f"model: {MODEL}\n"
    meta += "" if "hardware:" in text else "hardware: RTX4090\n"
    (tables / "meta.yaml").write_text(text if "[" * 9 in text else meta)
    given = [f"{key}={value}" for key, value in arguments.items()]
    status = main(["importer=layers", f"tables={tables}", f"folder={tmp_path / 'made'}", *given])
    told = capsys.readouterr().err
    assert status == (0 if said is None else 1), told
    assert said is None or said in told


def test_a_default_workload_is_as_long_on_an_imported_profile(tables: Path) -> None:
    model = imported(tables).model
    assert model.chars_per_token == 4.4
    assert any(a.change == "model.chars_per_token" for a in imported(tables).provenance.assumptions)


@pytest.mark.parametrize(
    ("name", "context"),
    [
        ("Qwen/Qwen3-4B", 40_960), ("Qwen/Qwen3-4B-Instruct-2507", 262_144), ("Qwen/Qwen3-4B-Thinking-2507", 262_144),
        ("Qwen/Qwen3-4B-Base", 32_768), ("Qwen/Qwen2.5-7B", 131_072), ("Qwen/Qwen2.5-7B-Instruct", 32_768),
        ("Qwen/Qwen2.5-Math-7B", 4_096), ("Qwen/Qwen2.5-7B-Instruct-1M", 1_010_000), ("Qwen/Qwen2.5-Coder-7B", 32_768),
        ("mistralai/Mistral-Nemo-Instruct-2407", 131_072), ("meta-llama/Llama-3.1-8B-Instruct", 131_072),
    ],
)  # fmt: skip
def test_contexts_are_those_of_the_model_named(name: str, context: int) -> None:
    assert published_model(name).max_context_tokens == context


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b-instruct"), ("Qwen/Qwen3-32B", "qwen3-32b"),
        ("mistralai/Mistral-7B-Instruct-v0.2", "mistral-7b-instruct-v0.2"), ("google/gemma-2-9b-it", "gemma-2-9b-it"),
    ],
)  # fmt: skip
def test_models_by_the_names_of_logs(name: str, known: str) -> None:
    assert published_model(name).name == known


def test_models_with_a_shipped_profile_are_published_ones() -> None:
    for name, model in MODELS.items():
        found = published_model(f"someone/{name}")
        assert asdict(found) == asdict(model) | {"chars_per_token": found.chars_per_token}


def test_weights_of_published_models() -> None:
    """Parameters that the makers state, in billions."""
    stated = {"Llama-3.1-8B": 8.03, "Llama-3.1-70B": 70.55, "Llama-3.2-1B": 1.24, "Qwen2.5-7B": 7.62, "Qwen3-8B": 8.19,
              "Qwen3-32B": 32.76, "Mistral-7B-v0.1": 7.24, "phi-4": 14.66, "gemma-2-9b": 9.24, "Llama-2-13b": 13.02,
              "Qwen2.5-32B": 32.76, "gemma-3-4b": 3.88, "Phi-3-mini-4k": 3.82}  # fmt: skip
    for name, billions in stated.items():
        model = published_model(name)
        assert model.weight_bytes(model.n_layers) / 2e9 == pytest.approx(billions, rel=0.005), name


@pytest.mark.parametrize("name", ["RTXPRO6000", "NVIDIA GeForce RTX 4090", "A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"])
def test_cards_by_the_names_of_logs(name: str) -> None:
    assert published_card(name) is not None
    assert published_card("an abacus") is None


def test_rows_of_measured_kernels_that_differ_in_what_is_not_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(**more: list[Any]) -> None:
        table = {"gemm_dtype": ["bfloat16", "bfloat16", "fp8"], "m": [1, 2, 1], "n": [64] * 3, "k": [64] * 3,
                 "latency": [0.1, 0.2, 0.3]}  # fmt: skip
        pq.write_table(pa.table(table | more), tmp_path / "gemm.parquet")

    source = SHIPPED_SOURCES["l40s"]
    monkeypatch.setattr(type(source), "path", lambda *_: tmp_path / "gemm.parquet")
    written(kernel_source=["cutlass", "cutlass", "triton"])
    assert len(read_kernels(source, "gemm", "gemm", gemm_dtype="bfloat16")["latency"]) == 2
    written(kernel_source=["cutlass", "triton", "triton"])
    with pytest.raises(UserError, match="kernel_source='cutlass and triton among the 2 rows that are used'"):
        read_kernels(source, "gemm", "gemm", gemm_dtype="bfloat16")
    assert len(read_kernels(source, "gemm", "gemm", lambda c: c["m"] == 1, gemm_dtype="bfloat16")["latency"]) == 1
