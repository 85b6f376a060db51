"""A profile from Vidur's tables of a model's layer operations and of attention.

Two tables (.csv or .csv.gz), times in ms, medians used:
- `mlp.csv`: time_stats.<op>.median by num_tokens and num_tensor_parallel_workers, with n_head, n_kv_head, n_embd,
  n_expanded_embd, vocab_size. Operations of one layer: input_layernorm, attn_pre_proj (QKV), attn_rope,
  attn_post_proj, post_attention_layernorm, mlp_up_proj, mlp_act, mlp_down_proj, add (twice); emb once.
- `attention.csv`: time_stats.{attn_input_reshape, attn_output_reshape, attn_prefill, attn_decode}.median, and
  optionally that of attn_kv_cache_save, by batch_size, prefill_chunk_size, kv_cache_size and is_prefill, with n_embd,
  n_q_head, n_kv_head (of the whole model) and num_tensor_parallel_workers. A prefill row is one chunk after
  kv_cache_size tokens; in a decode row each request of the batch has kv_cache_size tokens.
Neither has the LM head: its time is its bytes over the card's bandwidth or its operations over the card's peak, at the
share of them that the MLP reaches. Another operation, or rows that differ in a column that is not read (such as
block_size), are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.profile.catalog import (
    Card,
    Link,
    activation_reserve_bytes,
    assumed_tokens,
    card_spec,
    published_card,
)
from helios_sim.profile.composition import IntArray
from helios_sim.profile.importers.layers import LOAD_BYTES_PER_S, all_reduces_s
from helios_sim.profile.importers.reading import (
    MOST_BYTES,
    MS,
    FloatArray,
    along,
    constants,
    need_table,
    read_columns,
    refuse_other_tables,
    times,
    whole,
)
from helios_sim.profile.profile import Profile
from helios_sim.profile.spec import ModelSpec, Runtime
from helios_sim.profile.tables import GridTable, LayerTables, RowsTable
from helios_sim.provenance import NOT_READ, Assumption, Provenance, ProvenanceClass
from helios_sim.untrusted import read_text

_LAYER = {
    "input_layernorm": 1, "attn_pre_proj": 1, "attn_rope": 1, "attn_post_proj": 1, "post_attention_layernorm": 1,
    "mlp_up_proj": 1, "mlp_act": 1, "mlp_down_proj": 1, "add": 2,
}  # fmt: skip
_SHAPE = {"n_head": "n_heads", "n_kv_head": "n_kv_heads", "n_embd": "d_model", "n_expanded_embd": "d_ff"}
_READ = {
    *(f"time_stats.{name}.median" for name in (*_LAYER, "emb")), *_SHAPE, "num_tokens", "n_q_head",
    "num_tensor_parallel_workers", "batch_size", "prefill_chunk_size", "kv_cache_size", "is_prefill", "n_embd",
    *(f"time_stats.attn_{name}.median" for name in
      ("input_reshape", "output_reshape", "prefill", "decode", "kv_cache_save")),
}  # fmt: skip
OTHER_TYPES = re.compile(r"fp8|float8|e4m3|e5m2|int8|int4|fp4|fp32|float32|awq|gptq")
_COMPARED = ("dtype", "precision", "device", "gpu", "gpu_name", "hardware", "vocab_size")
_PADDED = 1.1  # largest vocabulary of a table, in multiples of the model's
_SHARES = (1e-3, 5.0)  # of a card's limits that the largest product may reach: beyond, times are in another unit
_OF_ATTENTION = (2e-3, 50.0)  # bounds as `_SHARES` for the largest decode, wider for kernels of other shapes
_LAUNCHED_S = 20e-6  # kernels hardly ever take less
_ATTENTION_SHAPE = {"n_q_head": "n_heads", "n_kv_head": "n_kv_heads", "n_embd": "d_model"}


def vidur_profile(
    folder: Path, model: ModelSpec, hardware: str, card: Card, runtime: Runtime, tensor_parallel: int = 1,
    link: Link | None = None,
) -> Profile:  # fmt: skip
    """The profile of a model on `tensor_parallel` cards as one device. Raises UserError if a table does not fit it."""
    link = link or card.link
    refuse_other_tables([folder], ("mlp", "attention"), {})
    rows, layer_s, ops = _layer(need_table([folder], "mlp"), model, tensor_parallel)
    decode, prefill = _attention(need_table([folder], "attention"), model, tensor_parallel)
    _check_units(decode, model, card, tensor_parallel)
    not_read = _of_constants(folder, model, card, hardware)
    kv_share = 2 * model.kv_width / (model.n_heads * model.head_dim + 2 * model.kv_width)
    head_s = _head_s(model, card, tensor_parallel, rows, ops["mlp_up_proj"])
    counts = rows.astype(np.int64)
    layer = LayerTables(
        dense=RowsTable(counts, layer_s + all_reduces_s(model, rows, tensor_parallel, link)),
        kv_projection=RowsTable(counts, ops["attn_pre_proj"] * kv_share),
        decode_attention=decode,
        prefill_attention=prefill,
    )
    return Profile(
        model=model,
        hardware=card_spec(hardware, card, tensor_parallel),
        runtime=runtime,
        provenance=Provenance(
            ProvenanceClass.DERIVED,
            f"Vidur's measured operations in {folder}",
            f"python -m helios_sim.profile.build importer=vidur tables={folder} model={model.name} hardware={hardware} "
            f"tensor_parallel={tensor_parallel}",
            scaled=("decode and prefill in one iteration: sum of their kernels", "missing grid points: along one axis"),
            assumptions=(
                Assumption(
                    "head", None, "no LM head in these tables: at the MLP's share of the card's limits", "rebuild"
                ),
                Assumption(
                    "load_bytes_per_s", LOAD_BYTES_PER_S, "0.8 of PCIe 4.0 x16; no copy was measured", "rebuild"
                ),
                *assumed_tokens(model),
            ),
            details={NOT_READ: not_read} if not_read else {},
        ),
        layer_tables=(layer,),
        layer_class=(0,) * model.n_layers,
        head=RowsTable(counts, head_s),
        embedding=RowsTable(counts, ops["emb"]),
        check=None,
        activation_reserve_bytes=activation_reserve_bytes(model),
        load_bytes_per_s=LOAD_BYTES_PER_S,
    )


def _of_constants(folder: Path, model: ModelSpec, card: Card, hardware: str) -> str:
    """A sentence about unread columns with one value in all rows; "" if there are none.

    Raises UserError if the columns name another card, another precision, or another MLP.
    """
    said = []
    for table in ("mlp", "attention"):
        path = need_table([folder], table)
        for name, value in constants(path, _READ).items():
            plain, text = name.lower(), str(value)
            other = published_card(text) if plain in ("device", "gpu", "gpu_name", "hardware") else None
            if other is not None and other != card:
                raise UserError(f"{path}: {name}", text, f"{hardware}, which is asked for", "name the card measured")
            if plain in ("dtype", "precision", "quantization") and OTHER_TYPES.search(text.lower()):
                allowed = "bf16 or fp16: operations of other types are not told apart"
                raise UserError(f"{path}: {name}", text, allowed, "take the tables of bf16")
            gated = {"true": True, "false": False}.get(text.lower()) if plain == "use_gated_mlp" else None
            if gated not in (None, model.gated_mlp):
                allowed = f"{model.gated_mlp}, as {model.name} has"
                raise UserError(f"{path.name}: {name}", text, allowed, "choose the model measured")
            words = float(text) if plain == "vocab_size" and text.isdigit() else model.vocab_size
            if not model.vocab_size <= words <= _PADDED * model.vocab_size:
                allowed = f"{model.vocab_size}, as {model.name} has, or somewhat more where it is padded"
                raise UserError(f"{path.name}: {name}", text, allowed, "choose the model measured")
            if value not in (None, "", False) and gated is None and plain not in _COMPARED:
                said.append(f"{path.name}: {name} ({text[:40]})")
    return f"not read: {', '.join(said[:12])}" if said else ""


def _layer(path: Path, model: ModelSpec, degree: int) -> tuple[FloatArray, FloatArray, dict[str, FloatArray]]:
    names = {name: f"time_stats.{name}.median" for name in (*_LAYER, "emb")}
    _check_operations(path, names.values())
    keys = ("num_tokens", "num_tensor_parallel_workers")
    columns = read_columns(path, (*names.values(), *_SHAPE, *keys), may_differ=())
    own = whole(path, keys[1], columns[keys[1]], 1) == degree
    _check_shape(path, columns, _SHAPE, model)
    if not own.any():
        known = sorted({int(d) for d in columns["num_tensor_parallel_workers"]})
        raise UserError("tensor_parallel", degree, f"one of those in {path.name}: {known}", "choose one of these")
    rows, place = np.unique(whole(path, keys[0], columns[keys[0]][own], 1).astype(np.float64), return_inverse=True)
    ops = {}
    for name, column in names.items():
        values = times(path, column, columns[column][own], MS)
        ops[name] = np.array([np.median(values[place == k]) for k in range(len(rows))])
    return rows, np.sum([often * ops[name] for name, often in _LAYER.items()], axis=0), ops


def _attention(path: Path, model: ModelSpec, degree: int) -> tuple[GridTable, GridTable]:
    needed = {n: f"time_stats.attn_{n}.median" for n in ("input_reshape", "output_reshape", "prefill", "decode")}
    saved = "time_stats.attn_kv_cache_save.median"
    saves = [saved] if _check_operations(path, (*needed.values(), saved)) else []
    keys = ("batch_size", "prefill_chunk_size", "kv_cache_size", "num_tensor_parallel_workers")
    columns = read_columns(path, (*needed.values(), *saves, *keys, *_ATTENTION_SHAPE), ("is_prefill",), may_differ=())
    _check_shape(path, columns, _ATTENTION_SHAPE, model)
    batch, chunk, kv, degrees = (whole(path, k, columns[k]) for k in keys)
    said = {str(word).lower() for word in columns["is_prefill"]}
    if not said <= {"true", "false"}:
        raise UserError(f"{path}: is_prefill", sorted(said)[:5], "True or False", "correct the value")
    prompts = np.array([str(word).lower() == "true" for word in columns["is_prefill"]])
    # A row may have an empty cell for the kernel that it does not run.
    value = {n: np.where(prompts == (n == "decode"), 0.0, columns[c]) if n in ("prefill", "decode") else columns[c]
             for n, c in needed.items()}  # fmt: skip
    total = np.sum([times(path, needed[n], v, MS) for n, v in value.items()], axis=0)
    total += sum(times(path, name, columns[name], MS) for name in saves)
    decode = _grid(path, batch, kv + 1, total, ~prompts & (degrees == degree))
    single = prompts & (batch == 1) & (degrees == degree) & (chunk > 0)
    return decode, _grid(path, chunk, kv, total, single)


def _check_units(decode: GridTable, model: ModelSpec, card: Card, degree: int) -> None:
    """Raise UserError if the largest decode takes far more or less than its KV cache takes to be read once."""
    batch, kv, time_s = int(decode.first[-1]), int(decode.second[-1]), float(decode.time_s[-1, -1])
    floor_s = batch * kv * model.kv_bytes_per_token_layer / degree / card.bytes_per_s
    if not _OF_ATTENTION[0] * time_s <= max(floor_s, _LAUNCHED_S) or floor_s > _OF_ATTENTION[1] * time_s:
        told = f"{time_s:.3g} s for {batch} decodes of {kv} tokens"
        allowed = f"times in ms: the card could do it in {floor_s:.3g} s"
        raise UserError("attention.csv: time_stats.attn_decode.median", told, allowed, "scale the times")


def _grid(path: Path, first: IntArray, second: IntArray, time_s: FloatArray, own: NDArray[np.bool_]) -> GridTable:
    firsts, seconds = np.unique(first[own]), np.unique(second[own])
    if len(firsts) < 2 or len(seconds) < 2:
        raise UserError(
            str(path), len(firsts), "two points or more of either axis for this degree", "measure more points"
        )
    rows = []
    for value in firsts:
        at = own & (first == value)
        points, place = np.unique(second[at].astype(np.float64), return_inverse=True)
        means = np.bincount(place, time_s[at]) / np.bincount(place)
        rows.append(along(points, means, seconds.astype(np.float64)))
    return GridTable(firsts.astype(np.int64), seconds.astype(np.int64), np.stack(rows))


def _check_shape(path: Path, columns: dict[str, NDArray[Any]], shape: dict[str, str], model: ModelSpec) -> None:
    for column, name in shape.items():
        wanted = getattr(model, name)
        others = columns[column][columns[column] != wanted]
        if len(others):
            allowed = f"{wanted}, as {model.name} has"
            raise UserError(f"{path.name}: {column}", float(others[0]), allowed, "choose the model measured")


def _check_operations(path: Path, known: Iterable[str]) -> bool:
    """Whether all known operations are there. Raises UserError for an unknown one: its time would be left out."""
    header = read_text(path, MOST_BYTES, "correct the file").split(b"\n", 1)[0].decode()
    found = [name.strip().strip('"') for name in header.split(",")]
    known = tuple(known)
    operations = {name.rpartition(".")[0] for name in known}
    for name in found:
        if name.startswith("time_stats.") and name.rpartition(".")[0] not in operations:
            allowed = f"operations {', '.join(known)}: the time of another one would be left out"
            raise UserError(f"{path}: {name}", "unknown", allowed, "add its time to one of these")
        if name.startswith("time_stats.") and (median := f"{name.rpartition('.')[0]}.median") not in found:
            raise UserError(f"{path}: {median}", None, "the median of each operation: medians are used", "add it")
    return set(known) <= set(found)


def _head_s(model: ModelSpec, card: Card, degree: int, rows: FloatArray, up_s: FloatArray) -> FloatArray:
    def limit_s(width: int) -> FloatArray:
        moved = model.weight_bytes_per_value * (width * model.d_model + rows * (width + model.d_model)) / degree
        operations = 2 * rows * width * model.d_model / degree
        return np.maximum(moved / card.bytes_per_s, operations / card.flops_per_s)

    share = limit_s((2 if model.gated_mlp else 1) * model.d_ff) / up_s
    if not _SHARES[0] <= share[-1] <= _SHARES[1]:
        told = f"{up_s[-1]:.3g} s for {rows[-1]:.0f} tokens"
        allowed = f"times in ms: the card could do it in {share[-1] * up_s[-1]:.3g} s"
        raise UserError("mlp.csv: time_stats.mlp_up_proj.median", told, allowed, "scale the times, or name the card")
    return limit_s(model.vocab_size) / np.minimum(share, 1.0)
