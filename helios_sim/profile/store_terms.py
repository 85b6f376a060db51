"""The optional terms of a profile on disk: `terms.parquet`, absent where a profile has none. Knows the format only.

Columns: table (mixed_attention or unequal_kv), layer_class, axis (a number from 0), place, at (the axis' values), and
for axis -1 place and value, the table's numbers in row order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from helios_sim.errors import UserError
from helios_sim.profile.tables import FloatArray, LayerTables
from helios_sim.profile.terms import MixedTable, UnequalTable

FILE = "terms.parquet"
_COLUMNS = ("table", "layer_class", "axis", "place", "value")
_VALUES = -1


def write_terms(classes: Sequence[LayerTables], path: Path) -> None:
    """Writes the file into the folder `path`, or removes an older one where there is nothing to write."""
    parts = [_columns(name, i, axes, values) for i, tables in enumerate(classes) for name, axes, values in _of(tables)]
    if parts:
        pq.write_table(pa.concat_tables(parts), path / FILE, compression="zstd")
    else:
        (path / FILE).unlink(missing_ok=True)


def read_terms(path: Path, layer_class: int) -> tuple[MixedTable | None, UnequalTable | None]:
    """Of the folder `path`. Raises UserError where the file is damaged."""
    if not (path / FILE).is_file():
        return None, None
    try:
        with pq.ParquetFile(path / FILE) as file:
            table = file.read(use_threads=False)
        columns = {name: np.array(table[name].to_pylist()) for name in _COLUMNS}
    except (KeyError, OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise UserError(str(path / FILE), reason, "a Parquet file of a profile", "write the profile again") from error
    mixed = _table(columns, "mixed_attention", layer_class, 4)
    unequal = _table(columns, "unequal_kv", layer_class, 4)
    return (
        None if mixed is None else MixedTable(*[_whole(axis) for axis in mixed[:4]], mixed[4]),  # type: ignore[call-arg]
        None if unequal is None else UnequalTable(*map(_whole, unequal[:3]), *unequal[3:]),
    )


def _of(tables: LayerTables) -> list[tuple[str, tuple[Any, ...], FloatArray]]:
    found: list[tuple[str, tuple[Any, ...], FloatArray]] = []
    if (mixed := tables.mixed_attention) is not None:
        found.append(("mixed_attention", (mixed.chunk, mixed.context, mixed.batch, mixed.kv), mixed.time_s))
    if (unequal := tables.unequal_kv) is not None:
        found.append(("unequal_kv", (unequal.chunk, unequal.batch, unequal.longest, unequal.share), unequal.excess))
    return found


def _columns(name: str, layer_class: int, axes: tuple[Any, ...], values: FloatArray) -> pa.Table:
    numbers = [*axes, values.ravel()]
    places = [*range(len(axes)), _VALUES]
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


def _table(columns: dict[str, Any], name: str, layer_class: int, axes: int) -> list[Any] | None:
    """The axes, then the numbers on their product."""
    own = (columns["table"] == name) & (columns["layer_class"] == layer_class)
    if not own.any():
        return None
    found = [columns["value"][own & (columns["axis"] == axis)] for axis in range(axes)]
    values = columns["value"][own & (columns["axis"] == _VALUES)]
    shape = tuple(len(axis) for axis in found)
    if values.size != int(np.prod(shape)):
        raise UserError(name, f"{values.size} numbers", f"one for each point of {shape}", "write the profile again")
    return [*found, values.reshape(shape)]


def _whole(axis: FloatArray) -> Any:
    return axis.astype(np.int64)
