"""Profiles on disk: a folder with profile.json and two or three Parquet tables.

`rows.parquet`: table, layer_class, rows, time_s, iqr_s, samples. `grids.parquet`: table, layer_class, first, second,
time_s, iqr_s, samples. Tables of the whole model (head, embedding, and where measured check, check_classifier) have
layer_class -1. `terms.parquet`, where a profile has optional terms: table (mixed_attention or unequal_kv), layer_class,
axis (a number from 0), place and value; axis -1 holds the table's numbers in row order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from helios_sim.errors import UserError
from helios_sim.profile.profile import Profile
from helios_sim.profile.spec import Anchor, Anchors, CostSource, HardwareSpec, ModelSpec, Runtime
from helios_sim.profile.tables import FloatArray, GridTable, LayerTables, MixedTable, RowsTable, UnequalTable
from helios_sim.provenance import Provenance

SCHEMA_VERSION = 1
PROFILES_FOLDER = Path(__file__).parents[1] / "data" / "profiles"
WHOLE_MODEL = -1
_SCALARS = (
    "activation_reserve_bytes", "load_bytes_per_s", "load_slowdown", "mixed_factor", "unequal_kv_factor", "time_factor",
)  # fmt: skip
_ROWS_COLUMNS = ("table", "layer_class", "rows", "time_s", "iqr_s", "samples")
_GRIDS_COLUMNS = ("table", "layer_class", "first", "second", "time_s", "iqr_s", "samples")
_TERMS = "terms.parquet"
_TERMS_COLUMNS = ("table", "layer_class", "axis", "place", "value")
_OF_VALUES = -1  # the axis under which a term's numbers stand
_REBUILD = "write the profile again, or install the package again if it is a shipped one"


def known_profiles(folder: Path = PROFILES_FOLDER) -> tuple[str, ...]:
    return tuple(sorted(p.parent.name for p in folder.glob("*/profile.json")))


@lru_cache(maxsize=32)
def load_profile(name: str, folder: Path = PROFILES_FOLDER) -> Profile:
    """`name` is <model>@<hardware> under `folder`, or a path (anything with a slash) to a profile's own folder.

    Raises UserError when there is none, or when a file is damaged.
    """
    path = Path(name) if "/" in name else folder / name
    if not (path / "profile.json").is_file():
        names = ", ".join(known_profiles(folder)) or f"none in {folder}"
        raise UserError("profile", name, f"known: {names}", "choose one of these, build it, or give its folder's path")
    return read_profile(path)


def write_profile(profile: Profile, path: Path) -> None:
    """Writes the files into the folder `path`; profile.json last, so that an interrupted write is no profile."""
    path.mkdir(parents=True, exist_ok=True)
    rows = [_row_columns(name, index, table) for name, index, table in _rows_tables(profile)]
    grids = [_grid_columns(name, index, table) for name, index, table in _grid_tables(profile)]
    _write_parquet(rows, path / "rows.parquet")
    _write_parquet(grids, path / "grids.parquet")
    _write_terms(profile.layer_tables, path)
    header = {
        "schema_version": SCHEMA_VERSION,
        "model": _used(profile.model),
        "hardware": asdict(profile.hardware),
        "runtime": _used(profile.runtime),
        "layer_class": list(profile.layer_class),
        **{key: getattr(profile, key) for key in _SCALARS},
        "provenance": profile.provenance.to_json(),
        **({"padded_kv": True} if profile.padded_kv else {}),  # this and what follows were added later
        **({} if profile.anchors is None else {"anchors": asdict(profile.anchors)}),
    }
    text = json.dumps(header, indent=1, ensure_ascii=False, allow_nan=False)
    (path / "profile.json").write_text(text + "\n", encoding="utf-8")


def read_profile(path: Path) -> Profile:
    """Raises UserError for a missing file, another schema version, a missing key or table, or a bad grid or time."""
    header = _read_header(path / "profile.json")
    rows = _read_parquet(path / "rows.parquet", _ROWS_COLUMNS)
    grids = _read_parquet(path / "grids.parquet", _GRIDS_COLUMNS)
    try:
        runtime = dict(header["runtime"])
        sizes = runtime.pop("graph_batch_sizes")
        sources = tuple(CostSource.parsed(key, text) for key, text in runtime.pop("sources"))
        terms = [_read_terms(path, i) for i in range(max(header["layer_class"]) + 1)]
        return Profile(
            model=ModelSpec(**header["model"]),
            hardware=HardwareSpec(**header["hardware"]),
            runtime=Runtime(graph_batch_sizes=None if sizes is None else tuple(sizes), sources=sources, **runtime),
            provenance=Provenance.from_json(header["provenance"]),
            layer_tables=tuple(
                LayerTables(
                    dense=_rows_table(rows, "dense", i),
                    kv_projection=_rows_table(rows, "kv_projection", i),
                    decode_attention=_grid_table(grids, "decode_attention", i),
                    prefill_attention=_grid_table(grids, "prefill_attention", i),
                    mixed_attention=terms[i][0],
                    unequal_kv=terms[i][1],
                )
                for i in range(max(header["layer_class"]) + 1)
            ),
            layer_class=tuple(header["layer_class"]),
            head=_rows_table(rows, "head", WHOLE_MODEL),
            embedding=_rows_table(rows, "embedding", WHOLE_MODEL),
            check=_optional_rows_table(rows, "check"),
            check_classifier=_optional_rows_table(rows, "check_classifier"),
            padded_kv=header.get("padded_kv", False),
            anchors=_anchors(header),
            **{key: header[key] for key in _SCALARS},
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(str(path), str(error), "a whole profile of this schema version", _REBUILD) from error


def _used(part: ModelSpec | Runtime) -> dict[str, Any]:
    """Its fields; those with a default only where they differ from it, so that older files stay what they were."""
    values = {f.name: getattr(part, f.name) for f in fields(part) if getattr(part, f.name) != f.default}
    if isinstance(part, Runtime):
        values["sources"] = [(source.quantity, source.text) for source in part.sources]
    return values


def _anchors(header: Mapping[str, Any]) -> Anchors | None:
    """In older files they are among the provenance's details, and in the oldest there are none that can be used."""
    found = header.get("anchors") or header["provenance"].get("details", {}).get("pace") or {}
    known = {name: Anchor(**found[name]) for name in ("decode", "prompt") if isinstance(found.get(name), Mapping)}
    return Anchors(**known) if known else None


def _rows_tables(profile: Profile) -> Iterator[tuple[str, int, RowsTable]]:
    for i, tables in enumerate(profile.layer_tables):
        yield "dense", i, tables.dense
        yield "kv_projection", i, tables.kv_projection
    yield "head", WHOLE_MODEL, profile.head
    yield "embedding", WHOLE_MODEL, profile.embedding
    for name, check in (("check", profile.check), ("check_classifier", profile.check_classifier)):
        if check is not None:
            yield name, WHOLE_MODEL, check


def _grid_tables(profile: Profile) -> Iterator[tuple[str, int, GridTable]]:
    for i, tables in enumerate(profile.layer_tables):
        yield "decode_attention", i, tables.decode_attention
        yield "prefill_attention", i, tables.prefill_attention


def _row_columns(name: str, layer_class: int, table: RowsTable) -> pa.Table:
    return _columns(name, layer_class, {"rows": table.rows}, table)


def _grid_columns(name: str, layer_class: int, table: GridTable) -> pa.Table:
    axes = {"first": np.repeat(table.first, len(table.second)), "second": np.tile(table.second, len(table.first))}
    return _columns(name, layer_class, axes, table)


def _columns(name: str, layer_class: int, axes: dict[str, Any], table: RowsTable | GridTable) -> pa.Table:
    n = table.time_s.size
    columns = {
        "table": pa.array([name] * n),
        "layer_class": pa.array([layer_class] * n, pa.int16()),
        **{key: pa.array(axis, pa.int64()) for key, axis in axes.items()},
        "time_s": pa.array(table.time_s.ravel(), pa.float64()),
        "iqr_s": pa.nulls(n, pa.float64()) if table.iqr_s is None else pa.array(table.iqr_s.ravel(), pa.float64()),
        "samples": pa.nulls(n, pa.int64()) if table.samples is None else pa.array(table.samples.ravel(), pa.int64()),
    }
    return pa.table(columns)


def _write_parquet(parts: list[pa.Table], path: Path) -> None:
    pq.write_table(pa.concat_tables(parts), path, compression="zstd")


def _read_header(path: Path) -> dict[str, Any]:
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(str(path), "missing", "a profile has this file", _REBUILD) from error
    except ValueError as error:
        raise UserError(str(path), str(error), "a JSON object", _REBUILD) from error
    if not isinstance(header, dict) or header.get("schema_version") != SCHEMA_VERSION:
        found = header.get("schema_version") if isinstance(header, dict) else type(header).__name__
        raise UserError(f"{path}: schema_version", found, f"this version reads {SCHEMA_VERSION}", _REBUILD)
    return header


def _read_parquet(path: Path, columns: tuple[str, ...]) -> dict[str, Any]:
    try:
        with pq.ParquetFile(path) as file:  # read_table would import pandas
            table = file.read(use_threads=False)
    except (FileNotFoundError, pa.ArrowInvalid, OSError) as error:
        raise UserError(str(path), str(error).splitlines()[0], "a Parquet file of a profile", _REBUILD) from error
    missing = [c for c in columns if c not in table.column_names]
    if missing:
        raise UserError(str(path), table.column_names, f"columns {', '.join(columns)}", _REBUILD)
    return {c: _to_numpy(table[c]) for c in columns}


def _to_numpy(column: Any) -> Any:
    """As the column's own to_numpy, which imports pandas: a third of a second for every process."""
    if pa.types.is_string(column.type):
        return np.array(column.to_pylist(), dtype=object)
    if column.null_count:
        return np.array([np.nan if value is None else value for value in column.to_pylist()], dtype=np.float64)
    return np.from_dlpack(column.combine_chunks())


def _rows_table(columns: dict[str, Any], name: str, layer_class: int) -> RowsTable:
    at = _rows_of(columns, name, layer_class)
    return RowsTable(columns["rows"][at], columns["time_s"][at], _known(columns["iqr_s"][at]), _counts(columns, at))


def _optional_rows_table(columns: dict[str, Any], name: str) -> RowsTable | None:
    return _rows_table(columns, name, WHOLE_MODEL) if name in columns["table"] else None


def _grid_table(columns: dict[str, Any], name: str, layer_class: int) -> GridTable:
    at = _rows_of(columns, name, layer_class)
    first, second = columns["first"][at], columns["second"][at]
    width = int(np.count_nonzero(first == first[0]))
    shape = (len(first) // width, width)
    grid = (np.repeat(first[::width], width), np.tile(second[:width], shape[0]))
    if shape[0] * width != len(first) or not (np.array_equal(first, grid[0]) and np.array_equal(second, grid[1])):
        raise UserError(name, f"{len(first)} rows", "every pair of the two axes once, in order", _REBUILD)
    iqr_s, samples = _known(columns["iqr_s"][at]), _counts(columns, at)
    return GridTable(
        first[::width].copy(), second[:width].copy(), columns["time_s"][at].reshape(shape),
        None if iqr_s is None else iqr_s.reshape(shape), None if samples is None else samples.reshape(shape),
    )  # fmt: skip


def _rows_of(columns: dict[str, Any], name: str, layer_class: int) -> Any:
    at = np.flatnonzero((columns["table"] == name) & (columns["layer_class"] == layer_class))
    if len(at) == 0:
        raise UserError("table", name, f"a profile has it for layer class {layer_class}", _REBUILD)
    return at


def _known(values: Any) -> Any:
    return None if np.all(np.isnan(values.astype(np.float64))) else values


def _counts(columns: dict[str, Any], at: Any) -> Any:
    known = _known(columns["samples"][at])
    return None if known is None else known.astype(np.int64)


def _write_terms(classes: Sequence[LayerTables], path: Path) -> None:
    """Writes the file into the folder `path`, or removes an older one where there is nothing to write."""
    parts = [_term_columns(term[0], i, *term[1:]) for i, tables in enumerate(classes) for term in _terms_of(tables)]
    if parts:
        _write_parquet(parts, path / _TERMS)
    else:
        (path / _TERMS).unlink(missing_ok=True)


def _read_terms(path: Path, layer_class: int) -> tuple[MixedTable | None, UnequalTable | None]:
    """Of the folder `path`. Raises UserError where the file is damaged."""
    if not (path / _TERMS).is_file():
        return None, None
    try:
        with pq.ParquetFile(path / _TERMS) as file:
            table = file.read(use_threads=False)
        columns = {name: np.array(table[name].to_pylist()) for name in _TERMS_COLUMNS}
    except (KeyError, OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise UserError(str(path / _TERMS), reason, "a Parquet file of a profile", "write the profile again") from error
    mixed = _term_table(columns, "mixed_attention", layer_class, 4)
    unequal = _term_table(columns, "unequal_kv", layer_class, 4)
    return (
        None if mixed is None else MixedTable(*map(_whole, mixed[:4]), *mixed[4:]),
        None if unequal is None else UnequalTable(*map(_whole, unequal[:3]), *unequal[3:]),
    )


def _terms_of(tables: LayerTables) -> list[tuple[str, tuple[Any, ...], FloatArray]]:
    found: list[tuple[str, tuple[Any, ...], FloatArray]] = []
    if (mixed := tables.mixed_attention) is not None:
        found.append(("mixed_attention", (mixed.chunk, mixed.context, mixed.batch, mixed.kv), mixed.time_s))
    if (unequal := tables.unequal_kv) is not None:
        found.append(("unequal_kv", (unequal.chunk, unequal.batch, unequal.longest, unequal.share), unequal.excess))
    return found


def _term_columns(name: str, layer_class: int, axes: tuple[Any, ...], values: FloatArray) -> pa.Table:
    numbers = [*axes, values.ravel()]
    places = [*range(len(axes)), _OF_VALUES]
    n = sum(len(column) for column in numbers)
    return pa.table(
        {
            "table": pa.array([name] * n).dictionary_encode(),
            "layer_class": pa.array([layer_class] * n, pa.int16()),
            "axis": pa.array(np.concatenate([np.full(len(v), a) for a, v in zip(places, numbers, strict=True)])),
            "place": pa.array(np.concatenate([np.arange(len(column)) for column in numbers])),
            "value": pa.array(np.concatenate([np.asarray(column, np.float64) for column in numbers])),
        }
    )


def _term_table(columns: dict[str, Any], name: str, layer_class: int, axes: int) -> list[Any] | None:
    """The axes, then the numbers on their product."""
    own = (columns["table"] == name) & (columns["layer_class"] == layer_class)
    if not own.any():
        return None
    found = [columns["value"][own & (columns["axis"] == axis)] for axis in range(axes)]
    values = columns["value"][own & (columns["axis"] == _OF_VALUES)]
    shape = tuple(len(axis) for axis in found)
    if values.size != int(np.prod(shape)):
        raise UserError(name, f"{values.size} numbers", f"one for each point of {shape}", "write the profile again")
    return [*found, values.reshape(shape)]


def _whole(axis: FloatArray) -> Any:
    return axis.astype(np.int64)
