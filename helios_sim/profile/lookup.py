"""Interpolation in tables, quick for one iteration and for many. Knows neither models nor compositions.

Each lookup has a scalar and an array form that do the same IEEE operations in the same order, so that an iteration
costs the same to the last bit whether it is priced alone or inside a leap.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

from helios_sim.profile.composition import IntArray
from helios_sim.profile.tables import FloatArray, GridTable, RowsTable

Counts = int | IntArray  # of one iteration, or one for each of K
Flags = bool | NDArray[np.bool_]


def columns(counts: IntArray) -> list[int] | list[IntArray]:
    """The S columns of (K, S) counts: plain numbers when K is 1, which are much quicker, else arrays (K,)."""
    return counts[0].tolist() if len(counts) == 1 else list(counts.T)


class RowLookup:
    """Seconds by rows: linear inside the grid, the last slope beyond it, 0 for no rows.

    With `pad_to`, rows are first raised to the next of these sizes; beyond the largest they are not padded.
    """

    def __init__(self, table: RowsTable, pad_to: tuple[int, ...] | None = None) -> None:
        self.first, self.end = int(table.rows[0]), int(table.rows[-1])
        self.slope_s = float((table.time_s[-1] - table.time_s[-2]) / (table.rows[-1] - table.rows[-2]))
        values = np.interp(np.arange(self.end + 1), table.rows, table.time_s)
        values[0] = 0.0
        if sizes := sorted({s for s in pad_to or () if s <= self.end}):
            padded = np.array(sizes)[np.searchsorted(sizes, np.arange(sizes[-1] + 1))]
            values[1 : sizes[-1] + 1] = values[padded[1:]]
        self.values: FloatArray = values
        self._at: memoryview[float] = memoryview(values)  # type: ignore[arg-type]

    def scalar(self, rows: int) -> float:
        if rows <= self.end:
            return self._at[rows]
        return self._at[self.end] + (rows - self.end) * self.slope_s

    def array(self, rows: IntArray) -> FloatArray:
        time_s = self.values.take(rows, mode="clip")
        if rows.max(initial=0) > self.end:
            time_s = np.where(rows > self.end, time_s + (rows - self.end) * self.slope_s, time_s)
        return time_s

    def outside(self, rows: Counts) -> Flags:
        return (rows > self.end) | ((rows < self.first) & (rows > 0))


class DecodeLookup:
    """Seconds of decode attention by (batch, mean KV tokens), bilinear inside the grid.

    Beyond the grid's KV the last slope goes on; beyond its batch time is in proportion to the batch.
    """

    def __init__(self, table: GridTable) -> None:
        self.first_batch, self.end_batch = int(table.first[0]), int(table.first[-1])
        self.first_kv, self.end_kv = int(table.second[0]), int(table.second[-1])
        self.width = len(table.second)
        batches = np.arange(self.end_batch + 1)
        values = np.stack([np.interp(batches, table.first, column) for column in table.time_s.T], axis=1)
        values[0] = 0.0
        slopes = np.diff(values, axis=1) / np.diff(table.second)
        self.values = np.ascontiguousarray(values).ravel()
        self.slopes = np.concatenate([slopes, slopes[:, -1:]], axis=1).ravel()
        self.kv = table.second.astype(np.float64)
        # the interval of every whole number of KV tokens: means fall into the interval of their whole part
        below = np.searchsorted(table.second, np.arange(self.end_kv + 1), side="right") - 1
        self.interval = np.maximum(below, 0).astype(np.int64)
        # memoryviews hand out plain numbers several times faster than arrays do
        self._value_at: memoryview[float] = memoryview(self.values)  # type: ignore[arg-type]
        self._slope_at: memoryview[float] = memoryview(self.slopes)  # type: ignore[arg-type]
        self._kv_at: memoryview[float] = memoryview(self.kv)  # type: ignore[arg-type]
        self._interval_at: memoryview[int] = memoryview(self.interval)  # type: ignore[arg-type]

    def scalar(self, batch: int, kv_tokens: int) -> float:
        """`kv_tokens` is the sum over the batch."""
        if batch == 0:
            return 0.0
        mean = kv_tokens / batch
        j = self._interval_at[min(int(mean), self.end_kv)]
        at = min(batch, self.end_batch) * self.width + j
        time_s = self._value_at[at] + self._slope_at[at] * (mean - self._kv_at[j])
        return time_s if batch <= self.end_batch else time_s * (batch / self.end_batch)

    def array(self, batch: IntArray, kv_tokens: IntArray) -> FloatArray:
        mean = kv_tokens / np.maximum(batch, 1)
        j = self.interval.take(mean.astype(np.int64), mode="clip")
        at = np.minimum(batch, self.end_batch) * self.width + j
        time_s = self.values.take(at) + self.slopes.take(at) * (mean - self.kv.take(j))
        if batch.max(initial=0) > self.end_batch:
            time_s = np.where(batch > self.end_batch, time_s * (batch / self.end_batch), time_s)
        return time_s

    def outside(self, batch: Counts, kv_tokens: Counts) -> Flags:
        too_far = (batch > self.end_batch) | (kv_tokens > self.end_kv * batch)
        return too_far | ((batch > 0) & ((batch < self.first_batch) | (kv_tokens < self.first_kv * batch)))


class PrefillLookup:
    """Seconds of prefill attention by (new tokens, context tokens) of one prompt, bilinear; last slopes go on beyond.

    Chunks of one iteration share a kernel: its fixed part (the least time in the table) is paid once.
    """

    def __init__(self, table: GridTable) -> None:
        self.tokens: list[int] = table.first.tolist()
        self.context: list[int] = table.second.tolist()
        self.time_s: list[list[float]] = table.time_s.tolist()
        self.fixed_s = float(table.time_s.min())

    def scalar(self, tokens: int, context_tokens: int) -> float:
        i = min(max(bisect_right(self.tokens, tokens) - 1, 0), len(self.tokens) - 1)
        other = i + 1 if i + 1 < len(self.tokens) else i - 1
        here_s, there_s = self._at_context(i, context_tokens), self._at_context(other, context_tokens)
        slope_s = (there_s - here_s) / (self.tokens[other] - self.tokens[i])
        return max(self.fixed_s, here_s + slope_s * (tokens - self.tokens[i]))

    def _at_context(self, i: int, context_tokens: int) -> float:
        grid, time_s = self.context, self.time_s[i]
        j = min(max(bisect_right(grid, context_tokens) - 1, 0), len(grid) - 1)
        other = j + 1 if j + 1 < len(grid) else j - 1
        slope_s = (time_s[other] - time_s[j]) / (grid[other] - grid[j])
        return time_s[j] + slope_s * (context_tokens - grid[j])

    def outside(self, tokens: int, context_tokens: int) -> bool:
        inside_tokens = self.tokens[0] <= tokens <= self.tokens[-1]
        return not (inside_tokens and self.context[0] <= context_tokens <= self.context[-1])
