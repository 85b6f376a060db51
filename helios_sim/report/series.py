"""Sums, means and percentiles of numbers of many requests, without all of them in memory.

Numbers that fit into memory are an array, and NumPy computes the results. Others are made again block by block in each
pass. The results are the same to the bit, since floats are added in NumPy's order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim import on_disk
from helios_sim.report.percentiles import interpolated
from helios_sim.report.sieve import Sieve

Values = NDArray[Any]

_BUFFER = 8192  # numbers that NumPy converts to floats and adds up at once
_FLOATS_AT_ONCE = np.lib.NumpyVersion(np.__version__) >= "2.3.0"  # older versions added floats by buffers too


class Series:
    """Numbers (n,) in order. They must not be negative if percentiles are asked for."""

    def __init__(self, blocks: Callable[[], Iterable[Values]]) -> None:
        """`blocks` yields the numbers in order, in at least one block."""
        self._blocks = blocks
        self._all, kind = _if_few(blocks())
        self._whole = kind != "f"
        self._n = None if self._all is None else len(self._all)

    def __iter__(self) -> Iterator[Values]:
        yield from self._blocks() if self._all is None else [self._all]

    def __len__(self) -> int:
        if self._n is None:
            self._n = sum(len(block) for block in self)
        return self._n

    def total(self) -> float:
        """The sum, as of `numpy.sum`; an int for whole numbers and booleans."""
        if self._all is not None:
            return float(self._all.sum()) if not self._whole else int(self._all.sum())
        if self._whole:
            return whole_sum(Ahead(self), len(self))
        return self._float_sum()

    def by_stretch(self, ends: NDArray[np.int64]) -> NDArray[Any]:
        """The sum of each stretch, (stretches,), as of `numpy.add.reduceat`. Each stretch has at least one number.

        `ends` has the begin of each stretch, and the end of the last.
        """
        if self._all is not None:
            return np.add.reduceat(self._all, ends[:-1], dtype=np.int64 if self._whole else None)
        ahead, lengths = Ahead(self), np.diff(ends).tolist()
        if self._whole:
            return np.array([whole_sum(ahead, length) for length in lengths])
        return np.array([float(ahead.take(1)[0]) + pairwise_sum(ahead, length - 1) for length in lengths])

    def mean(self) -> float:
        """The mean, as of `numpy.mean`, of at least one number."""
        if self._all is not None:
            return float(np.mean(self._all))
        return self._float_sum() / len(self)

    def percentiles(self, quantiles: Sequence[float]) -> list[float]:
        """Percentiles, as of `numpy.percentile`, of at least one number."""
        if self._all is not None:
            return [float(value) for value in np.percentile(self._all, list(quantiles))]
        sieve = self._sieve()
        return interpolated(sieve, [(None, len(self), q) for q in quantiles])

    def median(self) -> float:
        """The median, as of `numpy.median`, of at least one number."""
        if self._all is not None:
            return float(np.median(self._all))
        low, high = self.at([(len(self) - 1) // 2, len(self) // 2])
        return (float(low) + float(high)) / 2

    def at(self, ranks: Sequence[int]) -> list[Any]:
        """The numbers at these ranks, from 0, in ascending order."""
        if self._all is not None:
            return list(np.sort(self._all)[np.array(ranks)])
        return self._sieve().at([(None, rank) for rank in ranks])

    def between(self, first: int, end: int) -> Series:
        """The numbers from index `first` to before `end`."""
        return Series(lambda: _between(self, first, end))

    def ascends(self) -> bool:
        """Whether none is smaller than the one before."""
        last = None
        for block in self:
            if len(block):
                if (last is not None and block[0] < last) or (block[1:] < block[:-1]).any():
                    return False
                last = block[-1]
        return True

    def in_order_of(self, keys: Series) -> Series:
        """The numbers sorted by keys, stable for equal keys. All of them will be in memory."""
        values = np.concatenate(list(self))[np.argsort(np.concatenate(list(keys)), kind="stable")]
        return Series(lambda: [values])

    def _float_sum(self) -> float:
        in_order = pairwise_sum if _FLOATS_AT_ONCE and not self._whole else buffered_sum
        return in_order(Ahead(self), len(self))

    def _sieve(self) -> Sieve:
        sieve = Sieve(lambda: ((block, None) for block in self))
        self._n = int(sieve.counted.sum())
        return sieve


def whole_sum(ahead: Ahead, n: int) -> int:
    """The sum of the next n whole numbers."""
    return sum(int(ahead.take(min(left, _BUFFER)).sum()) for left in range(n, 0, -_BUFFER))


def buffered_sum(ahead: Ahead, n: int) -> float:
    """The sum of the next n numbers as floats, buffer by buffer."""
    total = 0.0
    for left in range(n, 0, -_BUFFER):
        total += float(np.add.reduce(ahead.take(min(left, _BUFFER)), dtype=np.float64))
    return total


def pairwise_sum(ahead: Ahead, n: int) -> float:
    """The pairwise sum of the next n floats, split as NumPy splits them."""
    if n <= _BUFFER:
        return float(np.add.reduce(ahead.take(n)))
    half = n // 2
    half -= half % 8
    return pairwise_sum(ahead, half) + pairwise_sum(ahead, n - half)


class Ahead:
    """Takes numbers from the front, across the ends of blocks."""

    def __init__(self, blocks: Iterable[Values]) -> None:
        self._blocks = iter(blocks)
        self._front = next(self._blocks)

    def take(self, n: int) -> Values:
        """The next n numbers. There must be so many."""
        parts, missing = [self._front[:n]], n - len(self._front[:n])
        self._front = self._front[n:]
        while missing:
            block = next(self._blocks)
            parts.append(block[:missing])
            self._front = block[missing:]
            missing -= len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _if_few(blocks: Iterable[Values]) -> tuple[Values | None, str]:
    """All numbers if they are in one block or few, None if there are too many; and their dtype."""
    found, n = [], 0
    iterator = iter(blocks)
    for block in iterator:
        found.append(block)
        n += len(block)
        if n > on_disk.SPAN_ROWS and len(found) > 1:
            return None, block.dtype.kind
    return found[0] if len(found) == 1 else np.concatenate(found), found[0].dtype.kind


def _between(blocks: Iterable[Values], first: int, end: int) -> Iterator[Values]:
    at = 0
    for block in blocks:
        if at + len(block) > first:
            yield block[max(first - at, 0) : end - at]
        at += len(block)
        if at >= end:
            return
