"""Interpolation in the tables of `terms`, linear along every axis. Knows neither models nor compositions.

What leaps use has a scalar and an array form with the same IEEE operations in the same order (see `lookup`).
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from helios_sim.profile.composition import IntArray
from helios_sim.profile.tables import FloatArray
from helios_sim.profile.terms import MixedTable, UnequalTable


class MixedLookup:
    """Seconds that decodes add beside a chunk. Below the grid its edge; above it the last slope, in batch the ratio."""

    def __init__(self, table: MixedTable) -> None:
        self._axes: list[list[int]] = [a.tolist() for a in (table.chunk, table.context, table.batch, table.kv)]
        self._end = table.time_s.shape
        self._at: memoryview[float] = memoryview(table.time_s.astype(np.float64).ravel())  # type: ignore[arg-type]

    def scalar(self, chunk: int, context: int, batch: int, kv_tokens: int) -> float:
        """`kv_tokens` is the sum over the batch."""
        if batch == 0:
            return 0.0
        end = self._axes[2][-1]
        places = [
            _place(axis, value)
            for axis, value in zip(self._axes, (chunk, context, min(batch, end), kv_tokens / batch), strict=True)
        ]
        at, (_, contexts, batches, kvs) = self._at, self._end
        time_s = 0.0
        for i, wi in _ends(places[0]):
            for j, wj in _ends(places[1]):
                for k, wk in _ends(places[2]):
                    row = ((i * contexts + j) * batches + k) * kvs
                    low, weight = places[3]
                    value = at[row + low]
                    if weight:
                        value += weight * (at[row + low + 1] - value)
                    time_s += wi * wj * wk * value
        time_s = max(time_s, 0.0)
        return time_s if batch <= end else time_s * (batch / end)

    def outside(self, chunk: int, context: int, batch: int, kv_tokens: int) -> bool:
        if batch == 0:
            return False
        values = (chunk, context, batch, kv_tokens / batch)
        return any(value > axis[-1] for axis, value in zip(self._axes, values, strict=True))


class UnequalLookup:
    """The share by which decode attention takes longer because lengths differ; edges hold beyond the grid."""

    def __init__(self, table: UnequalTable) -> None:
        self._chunk: list[int] = table.chunk.tolist()
        self._longest: list[int] = table.longest.tolist()
        self._share: list[float] = table.share.tolist()
        self._longest_array, self._share_array = table.longest.astype(np.float64), table.share
        self._end = int(table.batch[-1])
        batches = np.arange(self._end + 1)
        right = np.clip(np.searchsorted(table.batch, batches), 1, len(table.batch) - 1)
        low, high = table.batch[right - 1], table.batch[right]
        weight = np.clip((batches - low) / (high - low), 0.0, 1.0)[None, :, None, None]
        by_batch = table.excess[:, right - 1] * (1.0 - weight) + table.excess[:, right] * weight
        self._size = by_batch.shape  # (C, end + 1, G, P)
        self._values = np.ascontiguousarray(by_batch).ravel()
        self._at: memoryview[float] = memoryview(self._values)  # type: ignore[arg-type]

    def scalar(self, chunk: int, batch: int, kv_tokens: int, least: int, most: int) -> float:
        """`chunk`: tokens of the longest chunk beside the decodes, 0 for none; `kv_tokens` is the batch's sum."""
        if batch < 2 or most <= least:
            return 0.0
        if chunk == 0 or len(self._chunk) == 1:
            return self._plane(0, batch, kv_tokens, least, most)
        i, weight = _place(self._chunk[1:], min(chunk, self._chunk[-1])) if len(self._chunk) > 2 else (0, 0.0)
        here = self._plane(i + 1, batch, kv_tokens, least, most)
        return here if not weight else here + weight * (self._plane(i + 2, batch, kv_tokens, least, most) - here)

    def _plane(self, plane: int, batch: int, kv_tokens: int, least: int, most: int) -> float:
        _, batches, lengths, shares = self._size
        share = min(max((kv_tokens / batch - least) / (most - least), 0.0), 1.0)
        g = min(max(bisect_right(self._longest, most) - 1, 0), lengths - 2)
        p = min(max(bisect_right(self._share, share) - 1, 0), shares - 2)
        low, high = self._longest[g], self._longest[g + 1]
        of_longest = min(max((most - low) / (high - low), 0.0), 1.0)
        of_share = (share - self._share[p]) / (self._share[p + 1] - self._share[p])
        at, row = self._at, ((plane * batches + min(batch, self._end)) * lengths + g) * shares + p
        first = at[row] + (at[row + 1] - at[row]) * of_share
        second = at[row + shares] + (at[row + shares + 1] - at[row + shares]) * of_share
        excess: float = first + (second - first) * of_longest
        return excess

    def array(self, batch: IntArray, kv_tokens: IntArray, least: IntArray, most: IntArray) -> FloatArray:
        """(K,) of decodes alone: `scalar` with chunk 0."""
        _, _, lengths, shares = self._size
        spread = np.maximum(most - least, 1)
        share = np.minimum(np.maximum((kv_tokens / np.maximum(batch, 1) - least) / spread, 0.0), 1.0)
        g = np.clip(np.searchsorted(self._longest_array, most, side="right") - 1, 0, lengths - 2)
        p = np.clip(np.searchsorted(self._share_array, share, side="right") - 1, 0, shares - 2)
        low, high = self._longest_array[g], self._longest_array[g + 1]
        of_longest = np.minimum(np.maximum((most - low) / (high - low), 0.0), 1.0)
        of_share = (share - self._share_array[p]) / (self._share_array[p + 1] - self._share_array[p])
        row = (np.minimum(batch, self._end) * lengths + g) * shares + p
        at = self._values.take
        first = at(row) + (at(row + 1) - at(row)) * of_share
        second = at(row + shares) + (at(row + shares + 1) - at(row + shares)) * of_share
        excess: FloatArray = np.where((batch < 2) | (most <= least), 0.0, first + (second - first) * of_longest)
        return excess


def _place(axis: list[int], value: float) -> tuple[int, float]:
    """Index of the interval's lower end and the weight of the upper one: above 1 beyond the axis, 0 before it."""
    low = min(max(bisect_right(axis, value) - 1, 0), len(axis) - 2)
    return low, max((value - axis[low]) / (axis[low + 1] - axis[low]), 0.0)


def _ends(place: tuple[int, float]) -> tuple[tuple[int, float], ...]:
    low, weight = place
    return ((low, 1.0),) if not weight else ((low, 1.0 - weight), (low + 1, weight))
