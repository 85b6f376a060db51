"""Counts of the prompts observed last, as columns. Knows no weight and no age."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


class ObservedPrompts:
    """Up to `kept` prompts of one model with E exits, oldest first."""

    def __init__(self, exits: int, kept: int) -> None:
        self._kept = kept
        self._n = 0
        rows = 2 * kept  # when all are used, the latest `kept` move to the front
        kinds: dict[str, tuple[Any, tuple[int, ...]]] = {
            "at_request": (np.int64, (rows,)),
            "tokens": (np.int64, (rows,)),
            "chars": (np.int64, (rows,)),
            "has_bits": (np.bool_, (rows,)),
            "differs": (np.int64, (rows, exits)),
            "confident": (np.int64, (rows, exits)),
            "first": (np.int64, (rows, exits)),
            "bits": (np.float64, (rows, exits)),
        }
        self._columns = {name: np.zeros(shape, kind) for name, (kind, shape) in kinds.items()}

    def __len__(self) -> int:
        return min(self._n, self._kept)

    def add(self, *, bits: NDArray[np.float64] | None, **counts: ArrayLike) -> None:
        """One prompt: `at_request`, `tokens`, `chars`, and by exit `differs`, `confident`, `first`."""
        if self._n == 2 * self._kept:
            for column in self._columns.values():
                column[: self._kept] = column[self._kept :]
            self._n = self._kept
        values = {**counts, "has_bits": bits is not None, "bits": 0.0 if bits is None else bits}
        for name, column in self._columns.items():
            column[self._n] = values[name]
        self._n += 1

    @property
    def at_request(self) -> NDArray[np.int64]:
        """(P,) requests completed when it was observed."""
        return self._latest("at_request")

    @property
    def tokens(self) -> NDArray[np.int64]:
        return self._latest("tokens")

    @property
    def chars(self) -> NDArray[np.int64]:
        return self._latest("chars")

    @property
    def has_bits(self) -> NDArray[np.bool_]:
        return self._latest("has_bits")

    @property
    def differs(self) -> NDArray[np.int64]:
        """(P, E) tokens that differ from full depth."""
        return self._latest("differs")

    @property
    def confident(self) -> NDArray[np.int64]:
        """(P, E) tokens that are confident there."""
        return self._latest("confident")

    @property
    def first(self) -> NDArray[np.int64]:
        """(P, E) tokens that are confident there first."""
        return self._latest("first")

    @property
    def bits(self) -> NDArray[np.float64]:
        """(P, E) of the text's own tokens, 0 where `has_bits` is false."""
        return self._latest("bits")

    def _latest(self, name: str) -> NDArray[Any]:
        return self._columns[name][self._n - len(self) : self._n]


def sum_in_order(first: ArrayLike, terms: NDArray[np.float64]) -> NDArray[np.float64]:
    """`first` plus each of the terms (P, ...), one after the other; `np.sum` adds them in an order of its own."""
    return np.asarray(np.add.accumulate(np.concatenate([np.asarray(first)[None], terms]), axis=0)[-1])
