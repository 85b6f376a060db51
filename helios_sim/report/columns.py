"""Kinds of columns of records: numbers, numbers with missing values, and texts with few distinct values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim import on_disk

TimeColumn = NDArray[np.int64]  # ns
IntColumn = NDArray[np.int32]
BoolColumn = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Maybe:
    """Whole numbers (n,) with missing values: `values` are valid where `present` is true."""

    values: NDArray[np.int64]
    present: BoolColumn

    def __getitem__(self, rows: slice | NDArray[Any]) -> Maybe:
        return Maybe(self.values[rows], self.present[rows])


@dataclass(frozen=True, slots=True)
class Labels:
    """Texts, shape (n,), with few distinct values: each code is an index into `names`."""

    codes: NDArray[np.int16]
    names: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.codes)

    def __iter__(self) -> Iterator[str | None]:
        return (self.names[code] for code in self.codes.tolist())

    def __getitem__(self, rows: slice | NDArray[Any]) -> Labels:
        return Labels(self.codes[rows], self.names)

    def equals(self, name: str | None) -> BoolColumn:
        """(n,) whether the text is `name`."""
        if name not in self.names:
            return np.zeros(len(self.codes), np.bool_)
        return np.asarray(self.codes == self.names.index(name))

    def counts(self, rows: BoolColumn | slice = slice(None)) -> dict[str | None, int]:
        """The number of times that each text occurs among `rows`, without texts that do not occur."""
        found = np.bincount(self.codes[rows], minlength=len(self.names)).tolist()
        return {name: count for name, count in zip(self.names, found, strict=True) if count}


def copied(columns: Sequence[Any]) -> list[Any]:
    """Copies of columns of one length, on disk if they are too long for memory."""
    if len(columns[0]) < on_disk.WORTH_A_FILE:
        return list(columns)
    arrays = iter(on_disk.copies([array for column in columns for array in _arrays(column)]))
    return [_over(column, [next(arrays) for _ in _arrays(column)]) for column in columns]


def _arrays(column: Any) -> list[NDArray[Any]]:
    if isinstance(column, Maybe):
        return [column.values, column.present]
    return [column.codes if isinstance(column, Labels) else column]


def _over(column: Any, arrays: Sequence[NDArray[Any]]) -> Any:
    """A column of the same kind with these arrays."""
    if isinstance(column, Maybe):
        return Maybe(arrays[0], arrays[1])
    return Labels(arrays[0], column.names) if isinstance(column, Labels) else arrays[0]


def numbers_and_none(values: Sequence[int | None]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The numbers, 0 for None, and where they are present."""
    if None not in values:
        return np.array(values, np.int64), np.ones(len(values), np.bool_)
    present = np.array([value is not None for value in values], np.bool_)
    return np.array([0 if value is None else value for value in values], np.int64), present


def narrow(values: NDArray[np.int64], kind: type[np.signedinteger[Any]]) -> NDArray[Any]:
    """Whole numbers of this width. Raises OverflowError if one does not fit."""
    limits = np.iinfo(kind)
    if len(values) and not (limits.min <= values.min() and values.max() <= limits.max):
        raise OverflowError(f"a number from {values.min()} to {values.max()} does not fit {limits.bits} bits")
    return values.astype(kind)
