"""A histogram of the gaps between tokens.

Inter-token gaps are too many to keep (every token of every request), so they are counted in buckets whose edges grow
by 0.1 %. Counts and sums are integers: adding in any order gives the same bits.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_LONGEST_NS = 10**15  # 11.6 days; anything longer falls into one last bucket


@cache
def bucket_edges_ns() -> NDArray[np.int64]:
    """Upper edges in ns, inclusive: 0, 1, 2, ... then 0.1 % apart. Built from integers alone, hence portable."""
    edges = [0, 1]
    while edges[-1] < _LONGEST_NS:
        edges.append(max(edges[-1] + 1, edges[-1] * 1001 // 1000))
    edges.append(np.iinfo(np.int64).max)
    array = np.array(edges, dtype=np.int64)
    array.flags.writeable = False
    return array


class GapHistogram:
    """Counts of gaps by length, with the exact sum, shortest and longest."""

    __slots__ = ("counts", "longest_ns", "shortest_ns", "total_count", "total_ns")
    counts: NDArray[np.int64]  # by bucket
    total_count: int
    total_ns: int
    shortest_ns: int | None
    longest_ns: int | None

    def __init__(self) -> None:
        self.counts = np.zeros(len(bucket_edges_ns()), dtype=np.int64)
        self.total_count = self.total_ns = 0
        self.shortest_ns = self.longest_ns = None

    def add(self, gaps_ns: ArrayLike, counts: int | ArrayLike = 1) -> None:
        """Count each gap (>= 0 ns) as often as `counts` says (>= 0; one for all, or one of each)."""
        gaps = np.asarray(gaps_ns, dtype=np.int64).ravel()
        times: Any = counts
        if isinstance(counts, int):  # the hot path: no array of equal counts is made
            n, n_least = counts * gaps.size, counts
        else:
            times = np.broadcast_to(np.asarray(counts, dtype=np.int64), np.shape(gaps_ns)).ravel()
            gaps, times = gaps[times != 0], times[times != 0]
            n, n_least = int(times.sum()), int(times.min(initial=1))
        if n == 0:
            return
        shortest, longest = int(gaps.min()), int(gaps.max())
        if shortest < 0 or n_least < 0:
            raise ValueError(f"gap {shortest} ns, count {n_least}: neither may be negative")
        np.add.at(self.counts, bucket_edges_ns().searchsorted(gaps), times)
        self.total_count += n
        self.total_ns += int((gaps * times).sum())
        self._widen(shortest, longest)

    def add_counted(self, n: int, total_ns: int, shortest_ns: int, longest_ns: int) -> None:
        """Take note of n gaps that are in `counts` already."""
        if n:
            self.total_count += n
            self.total_ns += total_ns
            self._widen(shortest_ns, longest_ns)

    def merge(self, other: GapHistogram) -> None:
        """Add all that another histogram has counted."""
        self.counts += other.counts
        self.total_count += other.total_count
        self.total_ns += other.total_ns
        if other.shortest_ns is not None and other.longest_ns is not None:
            self._widen(other.shortest_ns, other.longest_ns)

    def _widen(self, shortest_ns: int, longest_ns: int) -> None:
        self.shortest_ns = shortest_ns if self.shortest_ns is None else min(self.shortest_ns, shortest_ns)
        self.longest_ns = longest_ns if self.longest_ns is None else max(self.longest_ns, longest_ns)

    @property
    def mean_ns(self) -> float | None:
        """Exact mean; None without gaps."""
        return self.total_ns / self.total_count if self.total_count else None

    def percentile_ns(self, q: float) -> int | None:
        """The gap that at least q per cent of the gaps do not exceed (nearest rank); None without gaps.

        The upper edge of its bucket, so at most 0.1 % (or 1 ns) too long, and never beyond the longest gap seen.
        """
        if not 0 <= q <= 100:
            raise ValueError(f"q={q}: a percentile lies between 0 and 100")
        if self.longest_ns is None:
            return None
        rank = max(1, int(np.ceil(q / 100 * self.total_count)))
        bucket = int(np.searchsorted(np.cumsum(self.counts), rank))
        return min(int(bucket_edges_ns()[bucket]), self.longest_ns)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GapHistogram):
            return NotImplemented
        mine = (self.total_count, self.total_ns, self.shortest_ns, self.longest_ns)
        theirs = (other.total_count, other.total_ns, other.shortest_ns, other.longest_ns)
        return mine == theirs and np.array_equal(self.counts, other.counts)

    __hash__ = None  # type: ignore[assignment]  # mutable
