"""Measured or derived times of one layer and of the head, as plain tables. Knows no interpolation and no file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.profile.composition import IntArray

if TYPE_CHECKING:
    from helios_sim.profile.terms import MixedTable, UnequalTable

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class RowsTable:
    """Seconds by number of rows (tokens that go through together). No rows cost nothing.

    `iqr_s` and `samples` stand beside measured figures and are None where the source does not give them.
    """

    rows: IntArray  # (G,) ascending, G >= 2, from 1
    time_s: FloatArray  # (G,)
    iqr_s: FloatArray | None = None  # (G,)
    samples: IntArray | None = None  # (G,)

    def check(self, name: str) -> None:
        """Raises UserError unless the grid ascends and every time is finite and not negative."""
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
        """Raises UserError unless both axes ascend and every time is finite and not negative."""
        check_axis(f"{name}.first", self.first, start=1)
        check_axis(f"{name}.second", self.second, start=0)
        check_times(f"{name}.time_s", self.time_s, (len(self.first), len(self.second)))


@dataclass(frozen=True, slots=True, eq=False)
class LayerTables:
    """Device times of one layer of one class (all layers of a class cost the same)."""

    dense: RowsTable  # projections, MLP, norms, rope, residuals: everything but attention
    kv_projection: RowsTable  # K and V of this layer only, written to the cache
    decode_attention: GridTable
    prefill_attention: GridTable
    mixed_attention: MixedTable | None = None  # decodes beside a chunk; None: as decodes alone
    unequal_kv: UnequalTable | None = None  # None: KV lengths enter by their mean

    def check(self, name: str) -> None:
        self.dense.check(f"{name}.dense")
        self.kv_projection.check(f"{name}.kv_projection")
        self.decode_attention.check(f"{name}.decode_attention")
        self.prefill_attention.check(f"{name}.prefill_attention")
        if self.mixed_attention is not None:
            self.mixed_attention.check(f"{name}.mixed_attention")
        if self.unequal_kv is not None:
            self.unequal_kv.check(f"{name}.unequal_kv")


def check_axis(key: str, axis: IntArray, start: int) -> None:
    """Raises UserError unless the axis has two or more ascending whole numbers, `start` or more at the beginning."""
    if axis.ndim != 1 or len(axis) < 2:
        raise UserError(key, axis.shape, "a grid has two points or more", "measure or derive more points")
    if axis[0] < start or np.any(np.diff(axis) <= 0):
        raise UserError(key, axis[:8].tolist(), f"a grid ascends from {start} or more", "sort it and drop duplicates")


def check_times(key: str, time_s: FloatArray, shape: tuple[int, ...]) -> None:
    """Raises UserError unless times have the grid's shape and are finite and not negative."""
    if time_s.shape != shape:
        raise UserError(key, time_s.shape, f"one time per grid point, shape {shape}", "rebuild the profile")
    if not np.all(np.isfinite(time_s)) or np.any(time_s < 0):
        bad = time_s[~np.isfinite(time_s) | (time_s < 0)]
        raise UserError(key, float(bad.flat[0]), "times are finite and not negative", "rebuild or measure again")
