"""Every reader of files from elsewhere beside a second one: the csv, json and decimal modules, or pandas.

The second reader is a few plain lines that share nothing with the first, and every row of real files is compared.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helios_sim.exits.rule import MEASURES
from helios_sim.exits.store import SHIPPED as EXITS, read_trace as read_exits
from helios_sim.profile.catalog import CARDS, published_model
from helios_sim.profile.importers.kernel_tables import SOURCES, DecodeAttentionTimes, GemmTimes, PrefillAttentionTimes
from helios_sim.profile.importers.layers import IN_A_LAYER, ONCE, layer_profile
from helios_sim.profile.importers.vidur import vidur_profile
from helios_sim.profile.roofline import Gemm
from helios_sim.profile.spec import Runtime
from helios_sim.profile.store import PROFILES_FOLDER, known_profiles, load_profile
from helios_sim.profile.tables import GridTable
from helios_sim.validate.logs import read_log
from helios_sim.workload.traces import read_trace

BARE = Runtime(0.0, 0.0, 0.0, 0.0, None)
LOG = "serving_logs/rtxpro6000_llama31_8b_vllm019"


def text_of(path: Path) -> io.StringIO:
    content = path.read_bytes()
    return io.StringIO((gzip.decompress(content) if path.suffix == ".gz" else content).decode())


def nanoseconds(cell: str) -> Decimal:
    """A time of day with up to seven digits after the second, as Azure's traces have them."""
    day, fraction = cell.split(".")
    whole = datetime.fromisoformat(day) - datetime(2000, 1, 1)
    return Decimal(whole.days * 86_400 + whole.seconds) * 10**9 + Decimal(f"0.{fraction}") * 10**9


@pytest.mark.parametrize(
    ("path", "arrival", "unit_ns", "prompt", "output"),
    [
        ("traces/azure2023_conv.csv", "TIMESTAMP", None, "ContextTokens", "GeneratedTokens"),
        ("traces/azure2023_code.csv", "TIMESTAMP", None, "ContextTokens", "GeneratedTokens"),
        ("traces/mooncake_conversation.jsonl.gz", "timestamp", 10**6, "input_length", "output_length"),
        ("traces/vidur_arxiv_summarization.csv", None, None, "num_prefill_tokens", "num_decode_tokens"),
        ("peers/w1_conv_poisson6_1000.csv", "arrival_s", 10**9, "prefill_tokens", "decode_tokens"),
        ("peers/w1_conv_poisson6_16000.csv.gz", "arrival_s", 10**9, "prefill_tokens", "decode_tokens"),
        ("peers/w2_fixed512x128_16000.csv.gz", "arrival_s", 10**9, "prefill_tokens", "decode_tokens"),
        (f"{LOG}/workload.csv", "arrival_ns", 1, "input_toks", "output_toks"),
    ],
)
def test_traces(
    shared_data: Path, path: str, arrival: str | None, unit_ns: int | None, prompt: str, output: str
) -> None:
    file = text_of(shared_data / path)
    rows = [json.loads(line, parse_float=Decimal) for line in file] if ".jsonl" in path else list(csv.DictReader(file))
    times = [0] * len(rows)
    if arrival is not None:
        exact = [nanoseconds(r[arrival]) if unit_ns is None else Decimal(r[arrival]) * unit_ns for r in rows]
        first = min(exact)
        times = [round(time - first) for time in exact]
    order = sorted(range(len(rows)), key=times.__getitem__)
    trace = read_trace(shared_data / path)
    assert (trace.arrival_ns is None) == (arrival is None)
    if trace.arrival_ns is not None:
        assert trace.arrival_ns.tolist() == [times[i] for i in order]
    assert trace.prompt_tokens.tolist() == [max(1, int(rows[i][prompt])) for i in order]
    assert trace.output_tokens.tolist() == [max(1, int(rows[i][output])) for i in order]


# As their authors publish the columns; the files themselves are not here, so the rows are made up.
LAYOUTS = {
    "BurstGPT, release 1": (
        ["Timestamp", "Model", "Request tokens", "Response tokens", "Total tokens", "Log Type"],
        (2, 3),
        lambda rng, k, at_s: [round(at_s), "ChatGPT", *_lengths(rng), "Conversation log"],
    ),
    "BurstGPT, release 2": (
        ["Timestamp", "Session ID", "Elapsed time", "Model", "Request tokens", "Response tokens", "Total tokens",
         "Log Type"],
        (4, 5),
        lambda rng, k, at_s: [at_s, f"s{k % 7}", "3.25", "GPT-4", *_lengths(rng), "API log"],
    ),
    "Azure 2024": (
        ["TIMESTAMP", "ContextTokens", "GeneratedTokens"],
        (1, 2),
        lambda rng, k, at_s: [
            (datetime(2024, 5, 10) + timedelta(seconds=at_s)).isoformat(" ") + "+00:00", *_lengths(rng)[:2]
        ],
    ),
    "own, with priorities": (
        ["arrival_time_ns", "num_prompt_tokens", "completion_tokens", "priority"],
        (1, 2),
        lambda rng, k, at_s: [round(at_s * 1e9), *_lengths(rng)[:2], int(rng.integers(-2, 3))],
    ),
}  # fmt: skip


def _lengths(rng: np.random.Generator) -> list[int]:
    prompt, output = (int(n) for n in rng.integers(1, 4000, 2))
    return [prompt, output, prompt + output]


def _nanoseconds_of(name: str, cells: pd.Series) -> pd.Series:
    if name == "TIMESTAMP":
        times = pd.to_datetime(cells, utc=True, format="ISO8601")
        return (times - times.min()).dt.total_seconds() * 1e9
    numbers = cells.astype(float) * (1 if name.endswith("_ns") else 1e9)
    return numbers - numbers.min()


@pytest.mark.parametrize("written", ["csv", "csv.gz", "jsonl", "json"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_of_traces(layout: str, written: str, tmp_path: Path) -> None:
    names, columns, row = LAYOUTS[layout]
    rng = np.random.default_rng(5)
    at_s = np.round(rng.permutation(np.cumsum(rng.exponential(0.7, 200))), 6)
    frame = pd.DataFrame([row(rng, k, float(at)) for k, at in enumerate(at_s)], columns=names)
    path = tmp_path / f"trace.{written}"
    if written.startswith("csv"):
        frame.to_csv(path, index=False)
        again = pd.read_csv(path)
    else:
        frame.to_json(path, orient="records", lines=written == "jsonl", double_precision=15)
        text = path.read_text()
        again = pd.DataFrame(json.loads(text) if written == "json" else map(json.loads, text.splitlines()))
    again["at_ns"] = _nanoseconds_of(names[0], again[names[0]])
    again = again.sort_values("at_ns", kind="stable")
    trace = read_trace(path)
    assert np.abs(trace.arrival_ns - again["at_ns"].to_numpy()).max() <= 1000  # microseconds as float64
    assert trace.prompt_tokens.tolist() == again[names[columns[0]]].tolist()
    assert trace.output_tokens.tolist() == again[names[columns[1]]].tolist()
    assert (trace.priority is None) == ("priority" not in names)
    if trace.priority is not None:
        assert trace.priority.tolist() == again["priority"].tolist()


def test_samples_of_a_serving_log(shared_data: Path) -> None:
    rows = list(csv.DictReader(text_of(shared_data / LOG / "timeseries.csv")))
    series = read_log(shared_data / LOG).series
    assert series is not None
    for key, found in (("running", series.running), ("waiting", series.waiting)):
        assert found.tolist() == [float(row[key]) for row in rows]
    since = series.time_s - [float(row["t"]) for row in rows]
    assert np.ptp(since) < 1e-9  # the log counts from its start, and the reader from the first request
    assert -1 < since[0] <= 0


def test_serving_logs(shared_data: Path) -> None:
    log = read_log(shared_data / LOG)
    lines = (shared_data / LOG / "requests.jsonl").read_text().splitlines()
    rows = sorted((json.loads(line, parse_float=Decimal) for line in lines), key=lambda row: row["arrival_time"])
    assert log.prompt_tokens.tolist() == [row["input_toks"] for row in rows]
    assert log.output_tokens.tolist() == [row["output_toks"] for row in rows]
    first = min(row["arrival_time"] for row in rows)
    # Seconds since 1970 are kept as float64, of which one step is 240 ns.
    assert np.abs(log.arrival_ns - [float((row["arrival_time"] - first) * 10**9) for row in rows]).max() < 500
    start = min(row["queued_ts"] for row in rows)
    for key, found in (("queued_ts", log.measured.queued_ns), ("first_token_ts", log.measured.first_ns),
                       ("last_token_ts", log.measured.last_ns)):  # fmt: skip
        assert np.abs(found - [float((row[key] - start) * 10**9) for row in rows]).max() < 2


@pytest.mark.parametrize("hardware", ["a100-40gb", "h100-80gb"])
def test_aiconfigurator_s_kernel_tables(shared_data: Path, hardware: str) -> None:
    source = SOURCES[hardware]
    folder = shared_data / "kernels/aiconfigurator" / source.folder

    def table(kind: str, name: str) -> pd.DataFrame:
        found = pd.read_parquet(folder / kind / "vllm" / source.version / f"{name}_perf.parquet")
        return found[found["window_size"] == 0] if "window_size" in found else found

    def falling_never(values: pd.Series) -> np.ndarray:
        """Seconds, each taken down to the least of those at more rows."""
        return np.minimum.accumulate(values.to_numpy()[::-1])[::-1] / 1e3

    gemm, ours = table("gemm", "gemm").query("gemm_dtype == 'bfloat16'").sort_values("m"), GemmTimes(source)
    shapes = list(gemm.groupby(["n", "k"]))
    for (n, k), rows in shapes[:: max(1, len(shapes) // 40)]:
        want = falling_never(rows["latency"])
        np.testing.assert_allclose(ours.time_s(Gemm(int(n), int(k))), want, rtol=1e-9, atol=1.01e-9)

    heads = {"num_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "kv_cache_dtype": "bfloat16"}
    chosen = " and ".join(f"{key} == {value!r}" for key, value in heads.items())
    prompts = table("attention", "context_attention").query(f"{chosen} and batch_size == 1").sort_values("isl")
    prefill = PrefillAttentionTimes(source, 32, 8, 128)
    assert prefill.tokens.tolist() == prompts["isl"].tolist()
    np.testing.assert_allclose(prefill.time_s, falling_never(prompts["latency"]), rtol=1e-12)

    decodes = table("attention", "generation_attention").query(chosen)
    decode = DecodeAttentionTimes(source, 32, 8, 128)
    grid = decodes.pivot(index="batch_size", columns="step", values="latency") / 1e3
    assert (decode.batch.tolist(), decode.kv_tokens.tolist()) == (list(grid.index), [s + 1 for s in grid.columns])
    rising = grid.to_numpy()
    rising = np.fmin.accumulate(np.fmin.accumulate(rising[::-1, ::-1], axis=1), axis=0)[::-1, ::-1]
    for i, batch in enumerate(grid.index):
        for j, step in enumerate(grid.columns):
            if not np.isnan(grid.to_numpy()[i, j]):
                assert decode.time_s(batch, step + 1) <= grid.to_numpy()[i, j] * (1 + 1e-9)
                assert decode.time_s(batch, step + 1) >= rising[i, j] * (1 - 1e-9)


@pytest.mark.slow
def test_vllm_s_layer_tables(shared_data: Path) -> None:
    folder = shared_data / LOG / "profile"
    model = published_model("meta-llama/Llama-3.1-8B")
    profile = layer_profile(folder, model, "RTXPRO6000", CARDS["rtxpro6000"], BARE)
    dense = pd.read_csv(folder / "dense.csv").groupby(["layer", "tokens"])["time_us"].mean().unstack("layer") / 1e6
    often = {name: IN_A_LAYER.get(name, 1) for name in dense if name not in ONCE}
    layer = profile.layer_tables[0]
    assert layer.dense.rows.tolist() == dense.index.tolist()
    np.testing.assert_allclose(layer.dense.time_s, sum(dense[name] * n for name, n in often.items()), rtol=1e-9)
    np.testing.assert_allclose(profile.embedding.time_s, sum(dense[name] for name in ONCE), rtol=1e-9)
    head = pd.read_csv(folder / "per_sequence.csv").pivot(index="sequences", columns="layer", values="time_us") / 1e6
    np.testing.assert_allclose(profile.head.time_s, head.sum(axis=1), rtol=1e-9)
    columns = ["prefill_chunk", "kv_prefill", "n_decode", "kv_decode"]
    measured = pd.read_csv(folder / "attention.csv").groupby(columns)["time_us"].mean() / 1e6
    mixed = layer.mixed_attention
    assert mixed is not None
    compared = [0, 0, 0]
    for (chunk, context, batch, kv), seconds in measured.items():
        if chunk == 0:
            found = at(layer.decode_attention, batch, kv + 1)
        elif batch == 0:
            found = at(layer.prefill_attention, chunk, context)
        else:
            place = (*_places(mixed.chunk, chunk), *_places(mixed.context, context))
            added = mixed.time_s[(*place, *_places(mixed.batch, batch), *_places(mixed.kv, kv + 1))]
            found, seconds = added, max(seconds - measured[chunk, context, 0, 0], 0.0)
        assert found == pytest.approx(seconds, rel=1e-9, abs=1e-15)
        compared[0 if chunk == 0 else 1 if batch == 0 else 2] += 1
    assert min(compared) > 20


def at(grid: GridTable, first: int, second: int) -> float:
    return float(grid.time_s[(*_places(grid.first, first), *_places(grid.second, second))])


def _places(axis: np.ndarray, value: int) -> list[int]:
    return [axis.tolist().index(value)]


def test_vllm_s_decodes_of_unequal_lengths(shared_data: Path) -> None:
    """Of decodes alone: how much longer they take than the same number of the same mean length."""
    folder = shared_data / LOG / "profile"
    profile = layer_profile(folder, published_model("meta-llama/Llama-3.1-8B"), "RTXPRO6000", CARDS["rtxpro6000"], BARE)
    table = profile.layer_tables[0].unequal_kv
    assert table is not None
    rows = pd.read_csv(folder / "skew.csv.gz").query("pc == 0")
    rows = rows[(rows["skew"] - rows["skew"].round(3).mode()[0]).abs() < 2e-3]
    rows = rows.assign(share=rows["nb"] / rows["n"], excess=rows["t_skew_us"] / rows["t_mean_us"] - 1)
    medians = rows.groupby(["n", "kv_big", "share"])["excess"].median()
    compared = 0
    for (n, kv_big), group in medians.groupby(level=[0, 1]):
        for (*_, share), excess in group.items():
            if len(group) > 1 and share in table.share:
                place = (0, *_places(table.batch, n), *_places(table.longest, kv_big), *_places(table.share, share))
                assert table.excess[place] == pytest.approx(excess, rel=1e-6, abs=1e-9)
                compared += 1
    assert compared > 20


@pytest.mark.slow
def test_vidur_s_tables(shared_data: Path, tmp_path: Path) -> None:
    """The attention of another model under the name of this one: the numbers are read, not judged."""
    mlp = pd.read_csv(shared_data / "kernels/vidur/a100/llama2-7b_mlp.csv")
    mlp.to_csv(tmp_path / "mlp.csv", index=False)
    attention = pd.read_csv(shared_data / "kernels/vidur/a100/attention_llama2-70b_tp2.csv.gz")
    attention = attention.assign(n_embd=4096, n_q_head=32, n_kv_head=32, num_tensor_parallel_workers=1)
    attention.to_csv(tmp_path / "attention.csv", index=False)
    profile = vidur_profile(tmp_path, published_model("meta-llama/Llama-2-7b-hf"), "A100", CARDS["a100-80gb"], BARE)
    own = mlp[mlp["num_tensor_parallel_workers"] == 1].groupby("num_tokens").median(numeric_only=True)
    names = [c.split(".")[1] for c in own if c.endswith(".median") and ".emb." not in c]
    layer_ms = sum(own[f"time_stats.{name}.median"] * (2 if name == "add" else 1) for name in names)
    layer = profile.layer_tables[0]
    assert layer.dense.rows.tolist() == own.index.tolist()
    np.testing.assert_allclose(layer.dense.time_s, layer_ms / 1e3, rtol=1e-9)
    np.testing.assert_allclose(profile.embedding.time_s, own["time_stats.emb.median"] / 1e3, rtol=1e-9)

    parts = [c for c in attention if c.startswith("time_stats.attn_") and c.endswith(".median")]
    attention["total_s"] = attention[parts].fillna(0).sum(axis=1) / 1e3
    decodes = attention[~attention["is_prefill"]].groupby(["batch_size", "kv_cache_size"])["total_s"].mean()
    prompts = attention[attention["is_prefill"] & (attention["batch_size"] == 1)]
    prompts = prompts.groupby(["prefill_chunk_size", "kv_cache_size"])["total_s"].mean()
    for table, measured, more in ((layer.decode_attention, decodes, 1), (layer.prefill_attention, prompts, 0)):
        first, second = table.first.tolist(), table.second.tolist()
        for (a, b), seconds in measured.items():
            assert table.time_s[first.index(a), second.index(b + more)] == pytest.approx(seconds, rel=1e-9)


@pytest.mark.parametrize("folder", sorted(path.name for path in EXITS.iterdir()))
def test_exit_traces(folder: str) -> None:
    trace, header = read_exits(EXITS / folder), json.loads((EXITS / folder / "trace.json").read_text())
    table = pd.read_parquet(EXITS / folder / "tokens.parquet")
    assert len(table) == header["n_tokens"] == len(trace.chars)
    np.testing.assert_array_equal(trace.chars, table["chars"])
    np.testing.assert_array_equal(trace.agree, table[[f"agree_{depth}" for depth in header["exits"]]])
    np.testing.assert_array_equal(trace.bits, table[[f"bits_{depth}" for depth in header["exits"]]])
    for confidence, measure in MEASURES.items():
        if measure.column in header["columns"]:
            found = trace.confidences[confidence]
            np.testing.assert_array_equal(found, table[[f"{measure.column}_{depth}" for depth in header["exits"]]])


@pytest.mark.parametrize("name", known_profiles())
def test_profiles(name: str) -> None:
    profile = load_profile(name)
    rows = pd.read_parquet(PROFILES_FOLDER / name / "rows.parquet").set_index(["table", "layer_class"]).sort_index()
    grids = pd.read_parquet(PROFILES_FOLDER / name / "grids.parquet").set_index(["table", "layer_class"]).sort_index()
    for table, found in (("head", profile.head), ("embedding", profile.embedding)):
        assert dict(zip(found.rows, found.time_s, strict=True)) == dict(
            zip(rows.loc[(table, -1)]["rows"], rows.loc[(table, -1)]["time_s"], strict=True)
        )
    for at, layer in enumerate(profile.layer_tables):
        own = rows.loc[("dense", at)]
        assert dict(zip(layer.dense.rows, layer.dense.time_s, strict=True)) == dict(
            zip(own["rows"], own["time_s"], strict=True)
        )
        for table in ("decode_attention", "prefill_attention"):
            grid = getattr(layer, table)
            whole = grids.loc[(table, at)].pivot(index="first", columns="second", values="time_s")
            assert (grid.first.tolist(), grid.second.tolist()) == (list(whole.index), list(whole.columns))
            np.testing.assert_array_equal(grid.time_s, whole)
