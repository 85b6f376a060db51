"""A profile from kernel times by layer, as LLMServingSim's profiler writes them.

A folder with `meta.yaml` and, in it or in its `tp<N>/`, tables as .csv or .csv.gz. Times are in us, of one layer, of
one GPU of a tensor-parallel group of N, launched eagerly:
- `dense.csv`: layer, tokens, time_us. Layers are embedding, layernorm (twice in a layer), qkv_proj, qk_norm (where the
  model has it: twice, on Q and K), rotary_emb, o_proj, gate_up_proj, act_fn, down_proj, final_layernorm.
- `per_sequence.csv`: layer, sequences, time_us, with lm_head and sampler.
- `attention.csv`: prefill_chunk, kv_prefill, n_decode, kv_decode, time_us: one prompt chunk with that much context (0:
  none) and that many decodes (0: none), each with that many tokens in the cache.
- `skew.csv`, optional: see `attention`.
`meta.yaml` says model, hardware and measurement_iterations; its `engine_effective` shows the shapes of the last
tensor-parallel degree profiled, so the model's shape comes from elsewhere.

Tensor parallelism adds two all-reduces a layer over a link with a latency and a bandwidth: latency + 2 (N - 1) / N x
bytes / bandwidth, as a ring moves them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from helios_sim.errors import UserError
from helios_sim.profile.catalog import UNLIMITED, Card, Link, activation_reserve_bytes, assumed_tokens, card_spec
from helios_sim.profile.importers.attention import AttentionGrid, repetitions_of, unequal_table
from helios_sim.profile.importers.reading import (
    FloatArray,
    along,
    constants,
    find_table,
    need_table,
    refuse_other_tables,
    times_by,
)
from helios_sim.profile.profile import Profile
from helios_sim.profile.spec import ModelSpec, Runtime
from helios_sim.profile.tables import LayerTables, RowsTable
from helios_sim.provenance import NOT_READ, Assumption, Provenance, ProvenanceClass
from helios_sim.untrusted import parse_yaml, read_text, reading

NEEDED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
IN_A_LAYER = {"layernorm": 2, "qkv_proj": 1, "qk_norm": 2, "rotary_emb": 1, "o_proj": 1, "gate_up_proj": 1, "act_fn": 1,
              "down_proj": 1}  # fmt: skip
ONCE = ("embedding", "final_layernorm")
KNOWN = ("dense", "per_sequence", "attention", "skew", "skew_fit", "workload", "timeseries")
OTHERS = {
    "moe": "a dense model: experts are not modelled",
    "linear_attention": "a model with softmax attention in all layers: linear attention is not modelled",
}
OF_A_SEQUENCE = ("lm_head", "sampler")
READ_OF_META = {
    "profiler_version", "vllm_version", "cuda_version", "gpu", "hardware", "profiled_at", "architecture", "model",
    "architecture_sha256", "variant", "tp_degrees", "engine_effective", "attention_grid", "measurement_iterations",
    "skew_profile", "skew_fit", "block_size", "attention_backend", "quantization",
}  # fmt: skip
_COLUMNS = {  # by table: columns that are read, or that follow from columns that are read
    "dense": ("layer", "tokens", "time_us"), "per_sequence": ("layer", "sequences", "time_us"),
    "attention": ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"),
    "skew": ("regime", "ratio", "alpha", "n", "nb", "pc", "kp", "kvs", "kv_big", "kv_mean", "skew", "t_mean_us",
             "t_skew_us", "t_max_us"),
}  # fmt: skip
_SHARES = (5e-3, 5.0)  # of a card's limits that a product may reach: beyond, times are in another unit
LOAD_BYTES_PER_S = 25e9  # pinned host memory to a card on PCIe 4.0 x16, 0.8 of 31.5 GB/s


@dataclass(frozen=True, slots=True)
class Terms:
    """Which optional terms of the tables are used: all, unless an experiment leaves one out."""

    mixed: bool = True
    unequal_kv: bool = True


def read_meta(folder: Path) -> dict[str, Any]:
    """The contents of `meta.yaml`, {} if there is none. Raises UserError if it cannot be read."""
    path = folder / "meta.yaml"
    if not path.is_file():
        return {}
    content = read_text(path, 256 << 10, "correct the file")
    with reading(str(path), "damaged", "a YAML mapping", "correct the file"):
        meta = parse_yaml(content)
        if not isinstance(meta, dict):
            raise UserError(str(path), type(meta).__name__, "a YAML mapping", "correct the file")
        return meta


def layer_profile(
    folder: Path,
    model: ModelSpec,
    hardware: str,
    card: Card,
    runtime: Runtime,
    tensor_parallel: int = 1,
    link: Link | None = None,
    terms: Terms | None = None,
) -> Profile:
    """The profile of a model on `tensor_parallel` cards as one. Raises UserError if a table is missing or bad."""
    terms, link = terms or Terms(), link or card.link
    folders = (folder / f"tp{tensor_parallel}", folder)
    refuse_other_tables(folders, KNOWN, OTHERS)
    _check_degree(folder, tensor_parallel)
    dense = times_by(need_table(folders, "dense"), "layer", "tokens")
    missing = [name for name in NEEDED if name not in dense]
    if missing:
        raise UserError(f"dense.csv in {folder}", ", ".join(dense), f"layer {missing[0]} among them", "measure it")
    head = times_by(need_table(folders, "per_sequence"), "layer", "sequences")
    if "lm_head" not in head:
        raise UserError(f"per_sequence.csv in {folder}", ", ".join(head), "layer lm_head among them", "measure it")
    for name in OF_A_SEQUENCE:
        if name in dense:
            allowed = "in per_sequence.csv alone: what dense.csv has is counted in every layer"
            raise UserError(f"dense.csv in {folder}", name, allowed, "move its rows")
    up = 2 * model.d_ff if model.gated_mlp else model.d_ff
    _check_unit("dense.csv: gate_up_proj", *dense["gate_up_proj"], up, model, card, tensor_parallel)
    _check_unit("per_sequence.csv: lm_head", *head["lm_head"], model.vocab_size, model, card, tensor_parallel)
    attention = AttentionGrid(need_table(folders, "attention"))

    rows = dense["qkv_proj"][0]
    others = [name for name in dense if name not in IN_A_LAYER and name not in ONCE]
    in_a_layer = {**IN_A_LAYER, **dict.fromkeys(others, 1)}
    layer_s = _sum(dense, in_a_layer, rows) + all_reduces_s(model, rows, tensor_parallel, link)
    q_width = model.n_heads * model.head_dim
    kv_share = 2 * model.kv_width / (q_width + 2 * model.kv_width)
    repetitions, unequal = None, None
    skew = find_table(folders, "skew")
    for key, used, there in (
        ("mixed_term", terms.mixed, attention.mixed_table() is not None), ("unequal_kv_term", terms.unequal_kv, skew),
    ):  # fmt: skip
        if not used and not there:
            allowed = "true: these tables have no such term, so that nothing is left out"
            raise UserError(f"fidelity.{key}", False, allowed, "leave it out")
    skew = skew if terms.unequal_kv else None
    if skew is not None:
        repetitions = repetitions_of(skew, attention, _stated_repetitions(folder))
        unequal = unequal_table(skew, attention, repetitions)
    layer = LayerTables(
        dense=_rows(rows, layer_s),
        kv_projection=_rows(rows, along(*dense["qkv_proj"], rows) * kv_share),
        decode_attention=attention.decode_table(),
        prefill_attention=attention.prefill_table(),
        mixed_attention=attention.mixed_table() if terms.mixed else None,
        unequal_kv=unequal,
    )
    sequences = head["lm_head"][0]
    return Profile(
        model=model,
        hardware=card_spec(hardware, card, tensor_parallel),
        runtime=runtime,
        provenance=_provenance(
            folder, model, hardware, tensor_parallel, link, layer, repetitions, others,
            [name for name in head if name not in OF_A_SEQUENCE],
        ),
        layer_tables=(layer,),
        layer_class=(0,) * model.n_layers,
        head=_rows(sequences, _sum(head, dict.fromkeys(head, 1), sequences)),
        embedding=_rows(rows, _sum(dense, dict.fromkeys(ONCE, 1), rows)),
        check=None,
        activation_reserve_bytes=activation_reserve_bytes(model),
        load_bytes_per_s=LOAD_BYTES_PER_S,
    )


def _check_unit(
    what: str, rows: FloatArray, time_s: FloatArray, width: int, model: ModelSpec, card: Card, degree: int
) -> None:
    """Raise UserError if a product of `width` outputs takes far more or less time than the card's limits allow."""
    if card.bytes_per_s >= UNLIMITED:  # the card is not known
        return
    moved = model.weight_bytes_per_value * (width * model.d_model + rows[-1] * (width + model.d_model)) / degree
    floor_s = max(moved / card.bytes_per_s, 2 * rows[-1] * width * model.d_model / degree / card.flops_per_s)
    if not _SHARES[0] * time_s[-1] <= floor_s <= _SHARES[1] * time_s[-1]:
        told = f"{time_s[-1]:.3g} s for {rows[-1]:.0f} rows"
        raise UserError(what, told, f"times in us: the card could do it in {floor_s:.3g} s", "scale the times")


def unread_columns(folder: Path, tensor_parallel: int) -> list[str]:
    """Unused columns of the tables that have one value in all rows, with these values."""
    left = []
    for table, columns in _COLUMNS.items():
        path = find_table((folder / f"tp{tensor_parallel}", folder), table)
        found = {} if path is None else constants(path, columns)
        left += [f"{table}.csv: {name} ({str(v)[:40]})" for name, v in found.items() if v not in (None, "", False)]
    return left


def _check_degree(folder: Path, degree: int) -> None:
    """Raise UserError if meta.yaml says that the tables are of another tensor-parallel degree."""
    meta = read_meta(folder)
    degrees, engine = meta.get("tp_degrees"), meta.get("engine_effective")
    if isinstance(degrees, list) and degree not in degrees:
        raise UserError("tensor_parallel", degree, f"one of those in meta.yaml: {degrees}", "choose one of these")
    of_engine = engine.get("tensor_parallel_size") if isinstance(engine, dict) else None
    if not (folder / f"tp{degree}").is_dir() and isinstance(of_engine, int) and of_engine != degree:
        allowed = f"tables in tp{degree}/: those beside meta.yaml are of degree {of_engine}"
        raise UserError("tensor_parallel", degree, allowed, "copy that folder too, or choose that degree")


def _sum(times: Mapping[str, tuple[FloatArray, FloatArray]], number: Mapping[str, int], at: FloatArray) -> FloatArray:
    total = np.zeros(len(at))
    for name, often in number.items():
        if name in times:
            total += often * along(*times[name], at)
    return total


def _rows(points: FloatArray, seconds: FloatArray) -> RowsTable:
    return RowsTable(points.astype(np.int64), np.maximum(seconds, 0.0))


def all_reduces_s(model: ModelSpec, rows: FloatArray, tensor_parallel: int, link: Link) -> FloatArray:
    """Seconds of the two all-reduces of one layer, by rows."""
    if tensor_parallel == 1:
        return np.zeros(len(rows))
    moved = 2 * (tensor_parallel - 1) / tensor_parallel * rows * model.d_model * model.weight_bytes_per_value
    return 2 * (link.latency_s + moved / link.bytes_per_s)


def _stated_repetitions(folder: Path) -> int | None:
    value = read_meta(folder).get("measurement_iterations")
    if value is not None and (not isinstance(value, int) or value < 1):
        raise UserError(f"{folder}/meta.yaml: measurement_iterations", value, "a whole number from 1", "correct it")
    return value


def _provenance(
    folder: Path, model: ModelSpec, hardware: str, tensor_parallel: int, link: Link, layer: LayerTables,
    repetitions: int | None, others: list[str], of_sequences: list[str],
) -> Provenance:  # fmt: skip
    meta = read_meta(folder)
    left = unread_columns(folder, tensor_parallel)
    left += [f"meta.yaml: {name} ({str(value)[:40]})" for name, value in meta.items() if name not in READ_OF_META]
    scaled = [
        "a layer is the sum of its kernels, launched eagerly where measured; an engine fuses some of the small ones",
        "points missing from the attention grid: on the line through their neighbours",
        "K and V alone (after an early exit): the share of their columns in qkv_proj",
    ]
    if others:
        scaled.append(f"layers without a known place were counted once: {', '.join(others)}")
    if of_sequences:
        scaled.append(f"of per_sequence.csv, counted once an iteration: {', '.join(of_sequences)}")
    if layer.unequal_kv is not None:
        scaled.append(f"times of unequal KV lengths: sums over {repetitions} repetitions, divided by that number")
    assumptions = [
        Assumption("load_bytes_per_s", LOAD_BYTES_PER_S, "0.8 of PCIe 4.0 x16; no copy was measured", "rebuild"),
        *assumed_tokens(model),
    ]
    if layer.mixed_attention is None:
        assumptions.append(
            Assumption("mixed_attention", None, "decodes beside a chunk cost what they cost alone", "rebuild")
        )
    if layer.unequal_kv is None:
        assumptions.append(Assumption("unequal_kv", None, "KV lengths enter by their mean", "rebuild"))
    if tensor_parallel > 1:
        text = f"{link.latency_s * 1e6:g} us, {link.bytes_per_s / 1e9:g} GB/s"
        assumptions.append(Assumption("all-reduce link", text, link.source, "fidelity.link"))
    versions = ", ".join(f"{key} {meta[key]}" for key in ("vllm_version", "cuda_version", "profiled_at") if key in meta)
    return Provenance(
        provenance_class=ProvenanceClass.DERIVED,
        source=f"kernel times by layer measured on {meta.get('gpu', hardware)} ({versions or 'versions not stated'})",
        command=(
            f"python -m helios_sim.profile.build importer=layers tables={folder} model={model.name} "
            f"hardware={hardware} tensor_parallel={tensor_parallel}"
        ),
        scaled=tuple(scaled),
        assumptions=tuple(assumptions),
        details={NOT_READ: f"not read: {', '.join(left[:12])}"} if left else {},
    )
