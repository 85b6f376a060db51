"""Exact numbers by rank, out of more numbers than fit into memory, without sorting them all.

A first pass counts the numbers between closely spaced bounds. Further passes keep only the numbers between bounds with
a wanted rank, a limited number at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[Any]
Block = tuple[Values, NDArray[np.bool_] | None]  # numbers in order, and whether each counts; None: all do
Kept = tuple[Values, NDArray[np.int64], NDArray[np.int64]]

_MOST_KEPT = 1 << 18  # most numbers that one pass keeps
_OCTAVES = 62
_ONE = int(np.float64(1.0).view(np.int64))


class Sieve:
    """Numbers of at least 0 in consecutive groups, each of which can be left out."""

    def __init__(self, blocks: Callable[[], Iterable[Block]], ends: Sequence[int] | None = None) -> None:
        """`blocks` yields the numbers in order. `ends` has the begin of each group, and the end; None: one group."""
        self._blocks, self._ends = blocks, ends
        self._fine = 12 if ends is None else 9  # so many bits of bounds lie between a number and its double
        self._counts = np.zeros((1 if ends is None else len(ends) - 1, (_OCTAVES << self._fine) + 1), np.int64)
        for group, values in self._pieces():
            self._counts[group] += np.bincount(self._places(values), minlength=self._counts.shape[1])
        self.counted = self._counts.sum(axis=1)  # numbers in each group

    def at(self, wanted: Sequence[tuple[int | None, int]]) -> list[Any]:
        """The number at each rank, from 0, among all numbers except those of a group; None: among all."""
        whole, upto = self._counts.sum(axis=0), {}
        for left_out in {left_out for left_out, _ in wanted}:
            upto[left_out] = np.cumsum(whole if left_out is None else whole - self._counts[left_out])
        places = [int(np.searchsorted(upto[left_out], rank, "right")) for left_out, rank in wanted]
        needed = np.unique(np.array(places, np.int64))
        passes = (np.cumsum(whole[needed]) // _MOST_KEPT).tolist()
        found: dict[int, Any] = {}
        for _, some in groupby(range(len(needed)), passes.__getitem__):
            kept = self._kept(needed[list(some)])
            for number, (place, (left_out, rank)) in enumerate(zip(places, wanted, strict=True)):
                if place in kept:
                    below = int(upto[left_out][place - 1]) if place else 0
                    found[number] = _at(kept[place], left_out, rank - below)
        return [found[number] for number in range(len(wanted))]

    def _kept(self, places: NDArray[np.int64]) -> dict[int, Kept]:
        """The numbers of each of these places in ascending order, their groups, and how often each occurs."""
        wanted = np.zeros(self._counts.shape[1], np.bool_)
        wanted[places] = True
        parts = []
        for group, values in self._pieces():
            found, counts = np.unique(values[wanted[self._places(values)]], return_counts=True)
            parts.append((found, np.full(len(found), group), counts))
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        order = np.argsort(columns[0], kind="stable")
        values, groups, counts = (column[order] for column in columns)
        bounds = np.searchsorted(self._places(values), np.append(places, len(wanted)))
        return {
            int(place): (values[first:end], groups[first:end], counts[first:end])
            for place, first, end in zip(places, bounds, bounds[1:], strict=False)
        }

    def _pieces(self) -> Iterator[tuple[int, Values]]:
        """Yield the counted numbers of each block, group by group."""
        at = group = 0
        for values, counted in self._blocks():
            first, n = 0, len(values)
            while first < n:
                end = n if self._ends is None else min(n, self._ends[group + 1] - at)
                piece = values[first:end]
                yield group, piece if counted is None else piece[counted[first:end]]
                first = end
                if self._ends is not None and at + first == self._ends[group + 1]:
                    group += 1
            at += n

    def _places(self, values: Values) -> NDArray[np.int64]:
        """The place of each number among the bounds, by the leading bits of floats above 1. Rises with the number."""
        bits = (np.clip(values, 0, 2.0**_OCTAVES) + 1.0).view(np.int64)
        bits -= _ONE
        bits >>= 52 - self._fine
        return bits


def _at(kept: Kept, left_out: int | None, rank: int) -> Any:
    values, groups, counts = kept
    staying = counts if left_out is None else np.where(groups == left_out, 0, counts)
    return values[np.searchsorted(np.cumsum(staying), rank, "right")]
