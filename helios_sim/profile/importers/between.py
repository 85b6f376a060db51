"""Times between measured ones, and beyond them, for profiles that are made for a run.

The ratio of a kernel's time to its baseline is interpolated; the baseline is the fixed part of its table plus the
roofline. The ratio is near 1 everywhere, while times change by orders of magnitude. So its logarithm, the excess, is
interpolated linearly in the logarithm of a size. Beyond the table the edge's excess is kept.

More work never takes less time: a slower measurement of less work is lowered to the time of more work. For memory-bound
kernels this makes unmeasured rows 2 % too quick, but it fits measured layers and served models better than the bumps.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from helios_sim.profile.composition import IntArray
from helios_sim.profile.importers.kernel_tables import (
    DecodeAttentionTimes,
    GemmTimes,
    PrefillAttentionTimes,
    neighbours,
    rising,
)
from helios_sim.profile.roofline import Gemm
from helios_sim.profile.tables import FloatArray

ROWS, WIDTH, DEPTH = range(3)  # axes of a table of matrix products: rows x depth times depth x width
ANY = -1


def filled(points: Sequence[FloatArray], values: FloatArray, along: IntArray, edges: bool = True) -> FloatArray:
    """The values, with each NaN replaced by linear interpolation along an axis, in the axis's `points`.

    `along`: for each cell, the axis to use if it has values on both sides of the cell; ANY for the median over all such
    axes. If no axis has, the cell gets the median of the nearest values on each axis, or NaN without `edges`.
    """
    found = values.copy()
    for cell in np.argwhere(np.isnan(values)).tolist():
        between, beyond = {}, []
        for axis, at in enumerate(points):
            through: tuple[Any, ...] = *cell[:axis], slice(None), *cell[axis + 1 :]
            line = values[through]
            known, place = np.flatnonzero(~np.isnan(line)), cell[axis]
            if len(known):
                value = float(np.interp(at[place], at[known], line[known]))
                if known[0] < place < known[-1]:
                    between[axis] = value
                beyond.append(value)
        wanted = int(along[tuple(cell)])
        if wanted in between:
            found[tuple(cell)] = between[wanted]
        elif between or (beyond and edges):
            found[tuple(cell)] = median(list(between.values()) or beyond)
    if edges and np.isnan(found).any():  # cells without any data; the cells beside them are known now
        return filled(points, found, along)
    return found


class ProductTimes(GemmTimes):
    """Matrix products. If compute-bound, a longer sum (k) has the same tiles, so gaps are filled along k first."""

    def _fill(self) -> None:
        products = [[Gemm(int(n), int(k)) for k in self._k] for n in self._n]
        of_each = np.array([[self.roofline_s(each, self.card) for each in row] for row in products])
        bound = np.array([[self.operations_bind(each, self.card) for each in row] for row in products])
        roofline_s, bind = np.moveaxis(of_each, 2, 0), np.moveaxis(bound, 2, 0)
        baseline_s = self.fixed_s + roofline_s
        axes = [np.log(axis) for axis in (self.rows, self._n, self._k)]
        excess = filled(axes, np.log(self._time_s / baseline_s), np.where(bind, DEPTH, ANY))
        self._time_s = rising(np.exp(excess) * baseline_s)
        self._excess = np.log(self._time_s / baseline_s)

    def time_s(self, gemm: Gemm, weights: int | None = None) -> FloatArray:
        """Seconds (rows,) as measured for a measured shape, else between its neighbours in (log n, log k)."""
        excess = np.zeros(len(self.rows))
        for i, n_weight in neighbours(self._n, gemm.n):
            for j, k_weight in neighbours(self._k, gemm.k):
                excess += n_weight * k_weight * self._excess[:, i, j]
        return np.exp(excess) * (self.fixed_s + self.roofline_s(gemm, self.card, weights))


class DecodeTimes(DecodeAttentionTimes):
    """Decode attention. Seconds are linear in requests and KV between measured cases; beyond, the excess is kept."""

    def _filled(self, time_s: FloatArray, roofline_s: FloatArray) -> FloatArray:
        axes, any_axis = (self.batch.astype(np.float64), self.kv_tokens.astype(np.float64)), np.full(time_s.shape, ANY)
        known_s = filled(axes, time_s, any_axis, edges=False)
        baseline_s = self.fixed_s + roofline_s
        whole_s = np.exp(filled(axes, np.log(known_s / baseline_s), any_axis)) * baseline_s
        return rising(rising(whole_s, axis=1), axis=0)


class PrefillTimes(PrefillAttentionTimes):
    """Attention over whole prompts. Its operations rise with the square of the tokens."""

    def alone_s(self, tokens: float) -> float:
        excess = np.log(self.time_s / self._baseline_s(self.tokens.astype(np.float64)))
        found = np.interp(np.log(tokens), np.log(self.tokens), excess)
        return float(np.exp(found) * self._baseline_s(np.array(float(tokens))))

    def _baseline_s(self, tokens: FloatArray) -> FloatArray:
        return self.fixed_s + self.operations * tokens * (tokens + 1) / 2 / self.card.flops_per_s
