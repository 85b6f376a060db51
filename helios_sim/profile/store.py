"""Profiles on disk: a folder with profile.json and two or three Parquet tables.

`rows.parquet`: table, layer_class, rows, time_s, iqr_s, samples. `grids.parquet`: table, layer_class, first, second,
time_s, iqr_s, samples. Tables of the whole model (head, embedding, and where measured check, check_classifier,
check_predictor) have layer_class -1. `terms.parquet`, where a profile has optional terms: table (mixed_attention or
unequal_kv), layer_class, axis (a number from 0), place and value; axis -1 holds the table's numbers in row order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from helios_sim import files
from helios_sim.errors import UserError
from helios_sim.profile.formats import WeightFormat
from helios_sim.profile.profile import Profile
from helios_sim.profile.spec import Anchor, Anchors, Basis, CostSource, HardwareSpec, ModelSpec, Runtime, TimeBand
from helios_sim.profile.tables import FloatArray, GridTable, LayerTables, MixedTable, RowsTable, UnequalTable
from helios_sim.provenance import Provenance
from helios_sim.untrusted import Fields, is_there, read_json, read_parquet, reading

SCHEMA_VERSION = 1
PROFILES_FOLDER = Path(__file__).parents[1] / "data" / "profiles"
WHOLE_MODEL = -1
HEADER, TERMS = "profile.json", "terms.parquet"
MOST_CLASSES, MOST_ROWS = 64, 1_000_000  # layer classes of a profile, rows of one table
# Dense work, prompts' attention and decodes' attention together take at least as long as the longest of the three.
_LEAST_FACTOR = 1 / 3
_SCALARS = (
    "activation_reserve_bytes", "load_bytes_per_s", "load_slowdown", "mixed_factor", "unequal_kv_factor", "time_factor",
)  # fmt: skip
_TABLE = {"table": "text", "layer_class": "whole"}
_TIMES = {"time_s": "number", "iqr_s": "maybe", "samples": "maybe"}
_ROWS_COLUMNS = {**_TABLE, "rows": "whole", **_TIMES}
_GRIDS_COLUMNS = {**_TABLE, "first": "whole", "second": "whole", **_TIMES}
_TERMS_COLUMNS = {**_TABLE, "axis": "whole", "place": "whole", "value": "number"}
_OF_VALUES = -1  # the axis number of a term's values
_REBUILD = "write the profile again, or install the package again if it is a shipped one"


def known_profiles(folder: Path = PROFILES_FOLDER) -> tuple[str, ...]:
    return tuple(sorted(p.parent.name for p in folder.glob(f"*/{HEADER}")))


@lru_cache(maxsize=32)
def load_profile(name: str, folder: Path = PROFILES_FOLDER) -> Profile:
    """Read a profile. `name` is <model>@<hardware> under `folder`, or a path (with a slash) to its folder.

    Raises UserError when there is none, or when a file is damaged.
    """
    name = str(name)  # it may be a Path
    path = Path(name) if "/" in name else folder / name
    if not is_there(path / HEADER):
        names = ", ".join(known_profiles(folder)) or f"none in {folder}"
        raise UserError("profile", name, f"known: {names}", "choose one of these, build it, or give its folder's path")
    profile = read_profile(path)
    if "/" not in name and profile.name != name:
        allowed = f"a folder named after what it holds, which is {profile.name}"
        raise UserError("profile", name, allowed, "rename the folder, or correct model.name and hardware.name")
    return profile


def write_profile(profile: Profile, path: Path) -> None:
    """Write the folder `path`, all of its files or none. Raises UserError if it cannot be written."""
    rows = [_row_columns(name, index, table) for name, index, table in _rows_tables(profile)]
    grids = [_grid_columns(name, index, table) for name, index, table in _grid_tables(profile)]
    classes = enumerate(profile.layer_tables)
    terms = [_term_columns(term[0], i, *term[1:]) for i, tables in classes for term in _terms_of(tables)]
    parts = {"rows.parquet": _parquet(rows), "grids.parquet": _parquet(grids), TERMS: _parquet(terms)}
    header = {
        "schema_version": SCHEMA_VERSION,
        "model": _used(profile.model),
        "hardware": _used(profile.hardware),
        "runtime": _used(profile.runtime),
        "layer_class": list(profile.layer_class),
        **{key: getattr(profile, key) for key in _SCALARS},
        "provenance": profile.provenance.to_json(),
        **({"padded_kv": True} if profile.padded_kv else {}),  # this key and those below were added later
        **({"windows": windows} if any(windows := [tables.window for tables in profile.layer_tables]) else {}),
        **({} if profile.anchors is None else {"anchors": asdict(profile.anchors)}),
        **({} if profile.time_band is None else {"time_band": asdict(profile.time_band)}),
        **({} if profile.disk_bytes_per_s is None else {"disk_bytes_per_s": profile.disk_bytes_per_s}),
        **({} if profile.times_within is None else {"times_within": profile.times_within}),
    }
    files.write_together(path, parts, HEADER, f"{files.to_json(header, indent=1)}\n".encode())


def read_profile(path: Path) -> Profile:
    """Read a profile. Raises UserError for a missing or bad file, key, table or value, or another schema version."""
    values = read_json(path / HEADER, _REBUILD)
    if values.get("schema_version") != SCHEMA_VERSION:
        found = values.get("schema_version")
        raise UserError(f"{path / HEADER}: schema_version", found, f"this version reads {SCHEMA_VERSION}", _REBUILD)
    with reading(str(path), None, "a whole profile of this schema version", _REBUILD):
        header = Fields(values, str(path / HEADER), _REBUILD)
        header.ignore(["schema_version"])
        layer_class = header.integers("layer_class", 0, MOST_CLASSES - 1, 10_000)
        windows = header.integers("windows", 0, 1 << 31, MOST_CLASSES, ())
        rows = _Tables(path / "rows.parquet", _ROWS_COLUMNS, layer_class)
        grids = _Tables(path / "grids.parquet", _GRIDS_COLUMNS, layer_class)
        terms = _Tables(path / TERMS, _TERMS_COLUMNS, layer_class) if (path / TERMS).is_file() else None
        provenance = Provenance.from_json(header.inner("provenance").values)
        profile = Profile(
            model=_model(header.inner("model")),
            hardware=header.inner("hardware").filled(HardwareSpec),
            runtime=_runtime(header.inner("runtime")),
            provenance=provenance,
            layer_tables=tuple(
                LayerTables(
                    dense=rows.by_rows("dense", i),
                    kv_projection=rows.by_rows("kv_projection", i),
                    decode_attention=grids.grid("decode_attention", i),
                    prefill_attention=grids.grid("prefill_attention", i),
                    mixed_attention=None if terms is None else terms.mixed(i),
                    unequal_kv=None if terms is None else terms.unequal(i),
                    window=windows[i] if i < len(windows) else 0,
                )
                for i in range(max(layer_class, default=0) + 1)
            ),
            layer_class=layer_class,
            head=rows.by_rows("head", WHOLE_MODEL),
            embedding=rows.by_rows("embedding", WHOLE_MODEL),
            check=rows.by_rows("check", WHOLE_MODEL) if rows.has("check") else None,
            check_classifier=rows.by_rows("check_classifier", WHOLE_MODEL) if rows.has("check_classifier") else None,
            check_predictor=rows.by_rows("check_predictor", WHOLE_MODEL) if rows.has("check_predictor") else None,
            padded_kv=header.flag("padded_kv", False),
            anchors=_anchors(header, provenance),
            time_band=header.inner("time_band").filled(TimeBand) if header.has("time_band") else None,
            activation_reserve_bytes=header.integer("activation_reserve_bytes", 0, 1 << 60),
            load_bytes_per_s=header.number("load_bytes_per_s", 0, 1e300),
            load_slowdown=header.number("load_slowdown", 0, 1e300),
            time_factor=header.number("time_factor", 0, 1e300),
            disk_bytes_per_s=_disk_rate(header, provenance),
            times_within=_times_within(header, provenance),
            mixed_factor=header.maybe("mixed_factor", _LEAST_FACTOR, 1e300),
            unequal_kv_factor=header.maybe("unequal_kv_factor", _LEAST_FACTOR, 1e300),
        )
        header.refuse_rest("no such key is known")
        for tables in (rows, grids, terms):
            if tables is not None:
                tables.refuse_rest()
        return profile


def _used(part: ModelSpec | HardwareSpec | Runtime) -> dict[str, Any]:
    """Fields of a dataclass, without those that have their default, so that older files keep their bytes."""
    values = {f.name: getattr(part, f.name) for f in fields(part) if getattr(part, f.name) != f.default}
    if isinstance(part, ModelSpec) and part.quantization is not None:
        values["quantization"] = asdict(part.quantization)
    if isinstance(part, Runtime):
        values["sources"] = [(source.quantity, source.basis.value, source.why) for source in part.sources]
    return values


def _model(header: Fields) -> ModelSpec:
    form = header.inner("quantization").filled(WeightFormat) if header.has("quantization") else None
    return header.filled(ModelSpec, quantization=form)


def _runtime(header: Fields) -> Runtime:
    sources = header.value("sources")
    for one in sources:
        if not isinstance(one, list) or len(one) not in (2, 3) or not all(isinstance(text, str) for text in one):
            raise header.wrong("sources", one, "a quantity, the kind of evidence and the source")
        if len(one) == 3 and one[1] not in set(Basis):
            raise header.wrong("sources", one[1], f"one of {', '.join(Basis)}")
    sizes = header.integers("graph_batch_sizes", 1, 1 << 20, 10_000) if header.has("graph_batch_sizes") else None
    read = tuple(CostSource(s[0], Basis(s[1]), s[2]) if len(s) == 3 else CostSource.parsed(*s) for s in sources)
    return header.filled(Runtime, graph_batch_sizes=sizes, sources=read)


def _disk_rate(header: Fields, provenance: Provenance) -> float | None:
    """Return the rate of reading files. Older profiles have it in the provenance's details."""
    if header.has("disk_bytes_per_s"):
        return header.number("disk_bytes_per_s", 0, 1e300)
    loads = provenance.details.get("loads")
    rate = loads.get("checkpoint_bytes_per_s") if isinstance(loads, Mapping) else None
    return rate if isinstance(rate, float) and rate > 0 else None


def _times_within(header: Fields, provenance: Provenance) -> float | None:
    """Return the relative error of all times. Older profiles have it in the provenance's details."""
    if header.has("times_within"):
        return header.number("times_within", 0, 1e3)
    short = provenance.details.get("short")
    within = short.get("within") if isinstance(short, Mapping) else None
    return within if isinstance(within, float) and 0 < within < 1e3 else None


def _anchors(header: Fields, provenance: Provenance) -> Anchors | None:
    """Return the anchors. Older profiles have them in the provenance's details, the oldest have none."""
    old = provenance.details.get("pace")
    found = header.inner("anchors", old if isinstance(old, Mapping) else {})
    known = {name: found.inner(name).filled(Anchor) for name in ("decode", "prompt") if found.has(name)}
    return Anchors(**known) if known else None


def _rows_tables(profile: Profile) -> Iterator[tuple[str, int, RowsTable]]:
    for i, tables in enumerate(profile.layer_tables):
        yield "dense", i, tables.dense
        yield "kv_projection", i, tables.kv_projection
    yield "head", WHOLE_MODEL, profile.head
    yield "embedding", WHOLE_MODEL, profile.embedding
    for name in ("check", "check_classifier", "check_predictor"):
        if (check := getattr(profile, name)) is not None:
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


def _parquet(parts: list[pa.Table]) -> bytes | None:
    return files.parquet(pa.concat_tables(parts)) if parts else None


class _Tables:
    """The tables of one Parquet file, by name and layer class. Each is taken once."""

    def __init__(self, path: Path, columns: Mapping[str, str], layer_class: Sequence[int]) -> None:
        self._path, self._columns = path, read_parquet(path, columns, _REBUILD, MOST_ROWS)
        classes = self._columns["layer_class"]
        self._left = {*zip(self._columns["table"].tolist(), classes.tolist(), strict=True)}
        unknown = sorted(set(classes.tolist()) - {WHOLE_MODEL, *layer_class})
        if unknown:
            raise UserError(f"{path}: layer_class", unknown[:8], "classes of profile.json", _REBUILD)

    def has(self, name: str, layer_class: int = WHOLE_MODEL) -> bool:
        return (name, layer_class) in self._left

    def refuse_rest(self) -> None:
        """Raise UserError if the file has a table that was not taken."""
        if self._left:
            name, layer_class = sorted(self._left)[0]
            raise UserError(f"{self._path}: table", name, f"none of that name for class {layer_class}", _REBUILD)

    def by_rows(self, name: str, layer_class: int) -> RowsTable:
        of = self._rows(name, layer_class)
        return RowsTable(of["rows"], of["time_s"], _known(of["iqr_s"]), _counts(of["samples"]))

    def grid(self, name: str, layer_class: int) -> GridTable:
        of = self._rows(name, layer_class)
        first, second = of["first"], of["second"]
        width = int(np.count_nonzero(first == first[0]))
        shape = (len(first) // width, width)
        grid = (np.repeat(first[::width], width), np.tile(second[:width], shape[0]))
        if shape[0] * width != len(first) or not (np.array_equal(first, grid[0]) and np.array_equal(second, grid[1])):
            raise UserError(name, f"{len(first)} rows", "every pair of the two axes once, in order", _REBUILD)
        iqr_s, samples = _known(of["iqr_s"]), _counts(of["samples"])
        return GridTable(
            first[::width].copy(), second[:width].copy(), of["time_s"].reshape(shape),
            None if iqr_s is None else iqr_s.reshape(shape), None if samples is None else samples.reshape(shape),
        )  # fmt: skip

    def mixed(self, layer_class: int) -> MixedTable | None:
        if not self.has("mixed_attention", layer_class):
            return None
        chunk, context, batch, kv, values = self._term("mixed_attention", layer_class)
        return MixedTable(_whole(chunk), _whole(context), _whole(batch), _whole(kv), values)

    def unequal(self, layer_class: int) -> UnequalTable | None:
        if not self.has("unequal_kv", layer_class):
            return None
        chunk, batch, longest, share, values = self._term("unequal_kv", layer_class)
        return UnequalTable(_whole(chunk), _whole(batch), _whole(longest), share, values)

    def _rows(self, name: str, layer_class: int) -> dict[str, Any]:
        """The columns of a table by rows."""
        at = np.flatnonzero((self._columns["table"] == name) & (self._columns["layer_class"] == layer_class))
        if len(at) == 0:
            raise UserError(f"{self._path}: table", name, f"a profile has it for class {layer_class}", _REBUILD)
        self._left.discard((name, layer_class))
        return {column: values[at] for column, values in self._columns.items()}

    def _term(self, name: str, layer_class: int) -> list[Any]:
        """The columns of a term: four axes, then the values on their product."""
        of = self._rows(name, layer_class)
        if not np.isin(of["axis"], (_OF_VALUES, 0, 1, 2, 3)).all():
            allowed = f"from 0 to 3, or {_OF_VALUES} for the numbers"
            raise UserError(f"{self._path}: axis", int(of["axis"].max()), allowed, _REBUILD)
        found = [of["value"][of["axis"] == axis] for axis in range(4)]
        values = of["value"][of["axis"] == _OF_VALUES]
        shape = tuple(len(axis) for axis in found)
        if values.size != math.prod(shape):
            raise UserError(name, f"{values.size} numbers", f"one for each point of {shape}", _REBUILD)
        return [*found, values.reshape(shape)]


def _known(values: Any) -> Any:
    return None if np.all(np.isnan(values)) else values


def _counts(values: Any) -> Any:
    known = _known(values)
    return None if known is None else known.astype(np.int64)


def _whole(axis: FloatArray) -> Any:
    if not np.array_equal(axis, np.floor(axis)) or (len(axis) and np.abs(axis).max() > 1 << 40):
        raise UserError(TERMS, axis[:8].tolist(), "axes in whole numbers", _REBUILD)
    return axis.astype(np.int64)


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
