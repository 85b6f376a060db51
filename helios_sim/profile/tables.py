"""Measured or derived times of one layer and of the head, as plain tables.

Two of a layer's tables are optional. A kernel for prompts and decodes together runs decodes differently from one for
decodes alone (its grid follows the longest chunk, and no sequence is split), so its time is not the sum of the two. And
a batch of unequal lengths takes longer than one of equal lengths with the same sum, since its last sequences do not
fill the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.profile.composition import IntArray

FloatArray = NDArray[np.float64]
MOST_TOKENS = 1 << 22  # rows, batches and lengths of a grid
MOST_S = 1e5  # largest entry of a table


@dataclass(frozen=True, slots=True, eq=False)
class RowsTable:
    """Seconds by number of rows (tokens that are processed together). 0 rows take no time.

    `iqr_s` and `samples` belong to measured figures; None if the source does not give them.
    """

    rows: IntArray  # (G,) ascending, G >= 2, from 1
    time_s: FloatArray  # (G,)
    iqr_s: FloatArray | None = None  # (G,)
    samples: IntArray | None = None  # (G,)

    def check(self, name: str) -> None:
        """Raise UserError unless the grid ascends and every time is finite and not negative."""
        check_axis(f"{name}.rows", self.rows, start=1)
        check_times(f"{name}.time_s", self.time_s, self.rows.shape)


@dataclass(frozen=True, slots=True, eq=False)
class GridTable:
    """Seconds of one layer's attention on a grid of two counts.

    Decode: `first` is the batch, `second` the mean KV tokens per request, the new token included.
    Prefill: `first` is the new tokens of one prompt, `second` the context tokens before them.
    """

    first: IntArray  # (G,) ascending, G >= 2, from 1
    second: IntArray  # (H,) ascending, H >= 2
    time_s: FloatArray  # (G, H)
    iqr_s: FloatArray | None = None  # (G, H)
    samples: IntArray | None = None  # (G, H)

    def check(self, name: str) -> None:
        """Raise UserError unless both axes ascend and every time is finite and not negative."""
        check_axis(f"{name}.first", self.first, start=1)
        check_axis(f"{name}.second", self.second, start=0)
        check_times(f"{name}.time_s", self.time_s, (len(self.first), len(self.second)))


@dataclass(frozen=True, slots=True, eq=False)
class MixedTable:
    """Seconds that B decodes add to one layer's attention beside a prompt chunk, over the chunk alone."""

    chunk: IntArray  # (C,) ascending, C >= 2: new tokens of the chunk
    context: IntArray  # (X,) ascending, X >= 2: tokens before the chunk
    batch: IntArray  # (B,) ascending, B >= 2: decodes
    kv: IntArray  # (V,) ascending, V >= 2: mean KV tokens of the decodes, the new token included
    time_s: FloatArray  # (C, X, B, V)

    def check(self, name: str) -> None:
        """Raise UserError unless all axes ascend and every time is finite and not negative."""
        axes = (("chunk", self.chunk, 1), ("context", self.context, 0), ("batch", self.batch, 1), ("kv", self.kv, 1))
        for axis, values, start in axes:
            check_axis(f"{name}.{axis}", values, start)
        check_times(f"{name}.time_s", self.time_s, tuple(len(values) for _, values, _ in axes))


@dataclass(frozen=True, slots=True, eq=False)
class UnequalTable:
    """The share by which decode attention takes longer than in a batch with equal lengths and the same mean.

    A batch with shortest, mean and longest length L, M and G is looked up as a measured batch of two lengths with the
    same L, M and G: `longest` is G, and the share of the long ones is (M - L) / (G - L).
    """

    chunk: IntArray  # (C,) ascending from 0 (decodes alone): tokens of the longest chunk beside the decodes
    batch: IntArray  # (B,) ascending, B >= 2
    longest: IntArray  # (G,) ascending, G >= 2: KV tokens
    share: FloatArray  # (P,) ascending from 0 to 1
    excess: FloatArray  # (C, B, G, P), may be negative where measurements scatter, above -1

    def check(self, name: str) -> None:
        """Raise UserError unless all axes ascend and every excess is finite and above -1."""
        for axis, values, start in (("batch", self.batch, 1), ("longest", self.longest, 1)):
            check_axis(f"{name}.{axis}", values, start)
        if self.chunk.ndim != 1 or not len(self.chunk) or self.chunk[0] != 0 or np.any(np.diff(self.chunk) <= 0):
            raise UserError(f"{name}.chunk", self.chunk.tolist(), "ascends from 0", "rebuild the profile")
        if self.share[0] != 0.0 or self.share[-1] != 1.0 or np.any(np.diff(self.share) <= 0):
            raise UserError(f"{name}.share", self.share.tolist(), "ascends from 0 to 1", "rebuild the profile")
        shape = (len(self.chunk), len(self.batch), len(self.longest), len(self.share))
        check_times(f"{name}.excess", self.excess + 1.0, shape)

    def part(self, fraction: float) -> UnequalTable:
        """The table with `fraction` of the excess."""
        return replace(self, excess=self.excess * fraction)


@dataclass(frozen=True, slots=True, eq=False)
class LayerTables:
    """Device times of one layer of one class (all layers of a class cost the same)."""

    dense: RowsTable  # everything but attention: projections, MLP, norms, rope, residuals
    kv_projection: RowsTable  # K and V of this layer only, written to the cache
    decode_attention: GridTable
    prefill_attention: GridTable
    mixed_attention: MixedTable | None = None  # decodes beside a chunk; None: priced as decodes alone
    unequal_kv: UnequalTable | None = None  # None: only the mean of KV lengths counts
    window: int = 0  # attention window in tokens, which bounds what must be read; 0 for none

    def check(self, name: str) -> None:
        if not 0 <= self.window <= MOST_TOKENS:
            raise UserError(f"{name}.window", self.window, f"from 0 to {MOST_TOKENS}", "correct it")
        self.dense.check(f"{name}.dense")
        self.kv_projection.check(f"{name}.kv_projection")
        self.decode_attention.check(f"{name}.decode_attention")
        self.prefill_attention.check(f"{name}.prefill_attention")
        if self.mixed_attention is not None:
            self.mixed_attention.check(f"{name}.mixed_attention")
        if self.unequal_kv is not None:
            self.unequal_kv.check(f"{name}.unequal_kv")


def check_axis(key: str, axis: IntArray, start: int) -> None:
    """Raise UserError unless the axis has two or more ascending whole numbers, `start` or more at the beginning."""
    if axis.ndim != 1 or len(axis) < 2:
        raise UserError(key, axis.shape, "a grid has two points or more", "measure or derive more points")
    if axis[0] < start or np.any(np.diff(axis) <= 0) or axis[-1] > MOST_TOKENS:
        allowed = f"a grid ascends from {start} or more to at most {MOST_TOKENS}"
        raise UserError(key, axis[:8].tolist(), allowed, "sort it and drop duplicates")


def check_times(key: str, time_s: FloatArray, shape: tuple[int, ...]) -> None:
    """Raise UserError unless times have the grid's shape and are finite and not negative."""
    if time_s.shape != shape:
        raise UserError(key, time_s.shape, f"one time per grid point, shape {shape}", "rebuild the profile")
    good = (time_s >= 0) & (time_s <= MOST_S)  # false for NaN
    if not np.all(good):
        allowed = f"times are finite and not negative, at most {MOST_S:g} s"
        raise UserError(key, float(time_s[~good].flat[0]), allowed, "rebuild or measure again")
