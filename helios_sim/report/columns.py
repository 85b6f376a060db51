"""Kinds of columns of records: numbers, numbers of which some are missing, and texts of which few differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

TimeColumn = NDArray[np.int64]  # ns
IntColumn = NDArray[np.int32]
BoolColumn = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Maybe:
    """Whole numbers, shape (n,), of which some are missing: `values` hold only where `present` is true."""

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
        """(n,) true where the text is `name`."""
        if name not in self.names:
            return np.zeros(len(self.codes), np.bool_)
        return np.asarray(self.codes == self.names.index(name))

    def counts(self, rows: BoolColumn | slice = slice(None)) -> dict[str | None, int]:
        """How often each text occurs among `rows`; texts that do not occur are left out."""
        found = np.bincount(self.codes[rows], minlength=len(self.names)).tolist()
        return {name: count for name, count in zip(self.names, found, strict=True) if count}
