"""Finds measured tables (.csv, .csv.gz), reads their columns as numbers, and refuses tables and columns it cannot use.

A column that an importer does not read may hold one value throughout. If its rows differ, they were measured under
conditions that the importer does not distinguish. An unknown table would add or change times. Both are refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.profile.composition import IntArray
from helios_sim.profile.tables import MOST_S, MOST_TOKENS
from helios_sim.untrusted import MIB, check_quotes, read_text, reading, shortened

if TYPE_CHECKING:
    import pyarrow as pa

FloatArray = NDArray[np.float64]
US = 1e-6
MS = 1e-3
MOST_BYTES, MOST_COLUMNS = 256 * MIB, 1_000  # largest size of a table
_FIX = "correct the file"
_SPREAD = re.compile(r"(^|[._])(min|max|mean|std|iqr|var|count|samples|p\d+)(_us|_ms)?$|^$|^unnamed", re.IGNORECASE)


def find_table(folders: Sequence[Path], name: str) -> Path | None:
    """`name`.csv or `name`.csv.gz in the first of the folders that has it."""
    for folder in folders:
        for suffix in (".csv", ".csv.gz"):
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    return None


def need_table(folders: Sequence[Path], name: str) -> Path:
    """Find a table as `find_table` does. Raises UserError if none of the folders has it."""
    found = find_table(folders, name)
    if found is None:
        where = " or ".join(str(folder) for folder in folders)
        raise UserError(f"{name}.csv", where, f"a table {name}.csv or {name}.csv.gz there", "copy the file there")
    return found


def refuse_other_tables(folders: Sequence[Path], known: Collection[str], reasons: dict[str, str]) -> None:
    """Raise UserError for an unknown table in one of the folders; `reasons`: what some tables hold."""
    for folder in folders:
        for path in sorted(folder.glob("*.csv*")) if folder.is_dir() else ():
            name = path.name.removesuffix(".gz").removesuffix(".csv")
            if name not in known:
                allowed = reasons.get(name, f"tables {', '.join(known)}: another one could change the times")
                raise UserError(path.name, str(folder), allowed, "use another folder, or move the table out of it")


def column_names(path: Path) -> tuple[str, ...]:
    """The names in a table's header. Raises UserError if it cannot be read."""
    header = read_text(path, MOST_BYTES, _FIX).split(b"\n", 1)[0].decode().strip()
    return tuple(name.strip().strip('"') for name in header.split(","))


def read_columns(
    path: Path, numbers: Sequence[str], words: Sequence[str] = (), may_differ: Collection[str] | None = None
) -> dict[str, NDArray[Any]]:
    """The named columns: numbers as float64, NaN where a cell is empty, words as objects.

    Raises UserError for a missing column or value, and if rows differ in a column that is neither read nor listed in
    `may_differ`.
    """
    import pyarrow as pa
    from pyarrow import csv

    content = read_text(path, MOST_BYTES, _FIX)
    check_quotes(path.name, content, _FIX)
    with reading(str(path), "damaged", "a table of comma-separated values", _FIX):
        if not content.strip():
            raise UserError(str(path), "no rows", "at least one measurement", "measure again")
        if content.split(b"\n", 1)[0].count(b",") >= MOST_COLUMNS:
            raise UserError(str(path), "more columns", f"at most {MOST_COLUMNS} columns", "correct the header")
        table = csv.read_csv(pa.BufferReader(content))
        names = table.column_names
        for name in (*numbers, *words):
            if names.count(name) != 1:
                raise UserError(str(path), shortened(", ".join(names)), f"one column {name}", "correct the header")
        if not table.num_rows:
            raise UserError(str(path), "no rows", "at least one measurement", "measure again")
        if may_differ is not None:
            _refuse_unread(path, table, {*numbers, *words, *may_differ})
        found = {}
        for name in numbers:
            with reading(f"{path}: {name}", "damaged", "a column of numbers", "correct the value"):
                found[name] = table[name].cast(pa.float64()).to_numpy()
        for name in words:
            found[name] = np.array([str(value) for value in table[name].to_pylist()], dtype=object)
        return found


def _refuse_unread(path: Path, table: pa.Table, read: Collection[str]) -> None:
    for name in table.column_names:
        if name in read or _SPREAD.search(name):
            continue
        values = table[name].unique().slice(0, 5).to_pylist()
        if len(values) > 1:
            allowed = "the same in every row: rows that differ in it are not told apart"
            raise UserError(f"{path}: {name}", values, allowed, "keep the rows of one of them, or leave the column out")


def whole(path: Path, name: str, values: FloatArray, least: int = 0) -> IntArray:
    """A column as whole numbers from `least`. Raises UserError for any other cell."""
    good = (values >= least) & (values <= MOST_TOKENS) & (values == np.floor(values))  # false for NaN
    if not good.all():
        allowed = f"a whole number from {least} to {MOST_TOKENS}"
        raise UserError(f"{path}: {name}", float(values[~good][0]), allowed, "correct the value")
    return values.astype(np.int64)


def times(path: Path, name: str, values: FloatArray, unit_s: float) -> FloatArray:
    """A column's times in seconds. Raises UserError if one is missing, negative or not finite."""
    good = (values >= 0) & (values * unit_s <= MOST_S)  # false for NaN
    if not good.all():
        allowed = f"a time of 0 or more, at most {MOST_S:g} s"
        raise UserError(f"{path}: {name}", float(values[~good][0]), allowed, "measure again")
    return values * unit_s


def times_by(path: Path, layer: str, by: str) -> dict[str, tuple[FloatArray, FloatArray]]:
    """(points, seconds) of each layer of a table in us with columns `layer`, `by` and time_us; repeats averaged."""
    columns = read_columns(path, (by, "time_us"), (layer,), may_differ=())
    points_of, seconds_of = whole(path, by, columns[by], 1), times(path, "time_us", columns["time_us"], US)
    found = {}
    for name in sorted(set(columns[layer])):
        own = columns[layer] == name
        points, place = np.unique(points_of[own].astype(np.float64), return_inverse=True)
        if len(points) < 2:
            raise UserError(f"{path}: {name}", len(points), "two points or more", "measure more points")
        found[str(name)] = points, np.bincount(place, seconds_of[own]) / np.bincount(place)
    return found


def along(points: FloatArray, values: FloatArray, at: FloatArray) -> FloatArray:
    """Interpolate linearly between ascending points, with the first value before and the last slope beyond them."""
    if len(points) == 1:
        return np.full(len(at), values[0])
    inside = np.interp(at, points, values)
    slope = (values[-1] - values[-2]) / (points[-1] - points[-2])
    return np.asarray(np.where(at > points[-1], np.maximum(values[-1] + slope * (at - points[-1]), 0.0), inside))


def constants(path: Path, read: Collection[str]) -> dict[str, Any]:
    """The value of every unread column that is the same in all rows, except statistics other than medians."""
    import pyarrow as pa
    from pyarrow import csv

    with reading(str(path), "damaged", "a table of comma-separated values", "correct the file"):
        table = csv.read_csv(pa.BufferReader(read_text(path, MOST_BYTES, "correct the file")))
        left = [name for name in table.column_names if name not in read and not _SPREAD.search(name)]
        return {name: table[name][0].as_py() for name in left if len(table[name].unique()) == 1}
