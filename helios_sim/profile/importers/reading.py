"""Reads measured tables from .csv and .csv.gz. Knows columns and numbers, not what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import csv

from helios_sim.errors import UserError

FloatArray = NDArray[np.float64]
US = 1e-6
MS = 1e-3


def find_table(folders: Sequence[Path], name: str) -> Path | None:
    """`name`.csv or `name`.csv.gz in the first of the folders that has it."""
    for folder in folders:
        for suffix in (".csv", ".csv.gz"):
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    return None


def need_table(folders: Sequence[Path], name: str) -> Path:
    """As `find_table`; UserError where none has it."""
    found = find_table(folders, name)
    if found is None:
        where = " or ".join(str(folder) for folder in folders)
        raise UserError(f"{name}.csv", where, f"a table {name}.csv or {name}.csv.gz there", "copy the file there")
    return found


def read_columns(path: Path, numbers: Sequence[str], words: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
    """The named columns: numbers as float64, words as objects. UserError for a column or a value that is not there."""
    try:
        table = csv.read_csv(path)
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise UserError(str(path), reason, "a table of comma-separated values", "correct the file") from error
    missing = [name for name in (*numbers, *words) if name not in table.column_names]
    if missing:
        raise UserError(str(path), ", ".join(table.column_names), f"a column {missing[0]}", "correct the header")
    if not table.num_rows:
        raise UserError(str(path), "no rows", "at least one measurement", "measure again")
    found = {}
    for name in numbers:
        try:
            found[name] = pc.cast(table[name], pa.float64()).to_numpy()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UserError(f"{path}: {name}", str(error), "a column of numbers", "correct the value") from error
    for name in words:
        found[name] = np.array([str(value) for value in table[name].to_pylist()], dtype=object)
    return found


def times_by(path: Path, layer: str, by: str) -> dict[str, tuple[FloatArray, FloatArray]]:
    """(points, seconds) of each layer of a table in us with columns `layer`, `by` and time_us; repeats averaged."""
    columns = read_columns(path, (by, "time_us"), (layer,))
    found = {}
    for name in sorted(set(columns[layer])):
        own = columns[layer] == name
        points, place = np.unique(columns[by][own].astype(np.float64), return_inverse=True)
        seconds = np.bincount(place, columns["time_us"][own].astype(np.float64)) / np.bincount(place) * US
        if not np.all(np.isfinite(seconds)) or np.any(seconds < 0) or len(points) < 2:
            raise UserError(f"{path}: {name}", len(points), "two points or more, times of 0 or more", "measure again")
        found[str(name)] = points, seconds
    return found


def along(points: FloatArray, values: FloatArray, at: FloatArray) -> FloatArray:
    """Linear between the points (ascending), the last slope beyond them, the first value before them."""
    if len(points) == 1:
        return np.full(len(at), values[0])
    inside = np.interp(at, points, values)
    slope = (values[-1] - values[-2]) / (points[-1] - points[-2])
    return np.asarray(np.where(at > points[-1], np.maximum(values[-1] + slope * (at - points[-1]), 0.0), inside))
