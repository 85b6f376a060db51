"""Percentiles, with and without each stretch of the requests, from values that are sorted once.

Calling `numpy.percentile` for each stretch of each figure would take most of a short run's report. Values that do not
fit into memory are not sorted but sifted (`sieve`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from helios_sim.report.intervals import FloatArray, stretches
from helios_sim.report.sieve import Block, Sieve

FEWEST_BEYOND = 3  # requests beyond a percentile, from which its interval within a run has about the stated coverage

Values = NDArray[np.float64] | NDArray[np.int64]
IntArray = NDArray[np.intp]


class Percentiles(Protocol):
    def percentile_and_without(self, q: int) -> tuple[FloatArray, FloatArray | None]:
        """The q-th percentile as `numpy.percentile` defines it, and the percentiles without each stretch, (stretches,).

        The latter are NaN if no value is left, and None if there are too few values.
        """
        ...


class Ranked:
    """Values that are sorted once for several percentiles. At least one must be `counted`."""

    def __init__(self, values: Values, counted: NDArray[np.bool_]) -> None:
        places = np.flatnonzero(counted)
        self._by_rank = places[np.argsort(values[places], kind="stable")]
        self._ranked, self._ends = values[self._by_rank], stretches(len(values))
        self._below: list[IntArray] | None = None  # for each value in a stretch, the number of other values below it

    def percentile_and_without(self, q: int) -> tuple[FloatArray, FloatArray | None]:
        ranked, n, ends = self._ranked, len(self._ranked), self._ends
        whole = np.array(_percentile(ranked, np.zeros(0, np.intp), q))
        if len(ends) < 3 or _too_few_beyond(n, q):
            return whole, None
        if self._below is None:
            stretch = np.searchsorted(ends, self._by_rank, "right") - 1
            ranks = [np.flatnonzero(stretch == each) for each in range(len(ends) - 1)]
            self._below = [own - np.arange(len(own)) for own in ranks]
        return whole, np.array([_percentile(ranked, own, q) if len(own) < n else np.nan for own in self._below])


class Sifted:
    """Percentiles of values that are made in blocks. `quantiles` are all that will be asked for."""

    def __init__(self, blocks: Callable[[], Iterable[Block]], n: int, quantiles: Sequence[int]) -> None:
        """`n` is the number of values, counted or not, with at least one in each stretch."""
        sieve = Sieve(blocks, stretches(n).tolist())
        self.counted = total = int(sieve.counted.sum())
        without = [*enumerate((sieve.counted.sum() - sieve.counted).tolist())]
        asked = {q: [(None, total)] + ([] if _too_few_beyond(total, q) else without) for q in quantiles}
        wanted = [(group, left, q) for q, groups in asked.items() for group, left in groups if left]
        found = zip(wanted, interpolated(sieve, wanted), strict=True)
        values = {(group, q): value for (group, _, q), value in found}
        self._found = {
            q: [values.get((group, q), np.nan) for group, _ in groups] for q, groups in asked.items()
        }  # fmt: skip

    def percentile_and_without(self, q: int) -> tuple[FloatArray, FloatArray | None]:
        whole, *without = self._found[q]
        return np.array(whole), np.array(without) if without else None


def interpolated(sieve: Sieve, wanted: Sequence[tuple[int | None, int, float]]) -> list[float]:
    """Percentiles as `numpy.percentile` defines them, each given by the group left out, the number of values, and q."""
    places = [_place(left, q) for _, left, q in wanted]
    groups = [group for group, _, _ in wanted]
    values = sieve.at([(group, rank) for group, (ranks, _) in zip(groups, places, strict=True) for rank in ranks])
    ends = zip(values[::2], values[1::2], places, strict=True)
    return [_between(low, high, share) for low, high, (_, share) in ends]


def _too_few_beyond(n: int, q: int) -> bool:
    return n * min(q, 100 - q) < 100 * FEWEST_BEYOND


def _percentile(ranked: Values, left_below: IntArray, q: int) -> float:
    """A percentile without some values: for each value left out, ascending, how many kept ones are below it."""
    places, share = _place(len(ranked) - len(left_below), q)
    ranks = np.array(places)
    low, high = ranked[ranks + left_below.searchsorted(ranks, "right")]
    return _between(low, high, share)


def _place(n: int, q: float) -> tuple[tuple[int, int], float]:
    """The two ranks of n values between which the q-th percentile lies, and its distance from the first."""
    at = (n - 1) * (q / 100)
    return (int(at), min(int(at) + 1, n - 1)), at - int(at)


def _between(low: float, high: float, share: float) -> float:
    return float(high - (high - low) * (1 - share) if share >= 0.5 else low + (high - low) * share)
