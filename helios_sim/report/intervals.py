"""The one definition of an interval: how far a figure moves when one group of its data is left out (jackknife).

With several seeds, each seed is left out in turn. A seed draws arrivals, texts and exits anew, so the interval covers
the variation between seeds and between the requests of a seed. Arms share their seeds, so for a ratio a seed is left
out in both arms at once. With one seed, each of STRETCHES consecutive stretches of its requests is left out in turn:
neighbours wait in the same queues, and stretches keep neighbours together. Such an interval covers the variation along
one run, not between seeds.

The bounds are those of Student's t with one degree of freedom less than there are groups (the delete-a-group jackknife:
Quenouille 1956, Miller 1974), on the logarithm of a figure that cannot be negative and on the logit of a share, so that
no bound lies where the figure cannot. Neighbouring stretches that still resemble each other widen the interval as in
Skart (Tafazzoli, Wilson, Lada and Steiger 2011).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

LEVEL = 0.95
STRETCHES = 10  # of one run; Schmeiser 1982: 10 to 30 batches, since more gain little and correlate more


class Method(StrEnum):
    """The method of an interval, or the reason for having none."""

    OVER_SEEDS = "over_seeds"  # covers the variation between seeds
    WITHIN_RUN = "within_run"  # one seed: covers the variation along the run, not between seeds
    BAND = "band"  # the figure at both ends of a known band, without sampling error
    EXACT = "exact"  # a count, or bytes, of one run
    NONE = "none"  # an estimate without an interval


@dataclass(frozen=True, slots=True)
class Interval:
    """Bounds at the 95 % level; both None where the method gives none."""

    low: float | None
    high: float | None
    method: Method
    n: int  # number of seeds or requests


def ratio_bounds(ours: FloatArray, theirs: FloatArray, level: float = LEVEL) -> tuple[FloatArray, FloatArray]:
    """Bounds of the ratio of two means over seeds, paired by seed: arrays (..., seeds) to two arrays (...).

    Nothing may be negative. NaN where the ratio is not defined without one of the seeds, or there are fewer than two.
    """
    return _of_quotient(ours, theirs, level, in_order=False)


def mean_bounds(values: FloatArray, share: bool = False) -> tuple[FloatArray, FloatArray]:
    """Bounds of the mean over seeds: an array (..., seeds) to two arrays (...)."""
    total, without = left_out(values)
    seeds = values.shape[-1]
    return bounds(total / seeds, without / max(seeds - 1, 1), share=share)


def run_ratio_bounds(ours: FloatArray, theirs: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Bounds of the ratio of two sums along one run: arrays (..., stretches) of each stretch's sums to two (...)."""
    return _of_quotient(ours, theirs, LEVEL, in_order=True)


def _of_quotient(
    ours: FloatArray, theirs: FloatArray, level: float, in_order: bool
) -> tuple[FloatArray, FloatArray]:
    (above, above_without), (below, below_without) = left_out(ours), left_out(theirs)
    with np.errstate(divide="ignore", invalid="ignore"):
        return bounds(above / below, above_without / below_without, in_order=in_order, level=level)


def student(degrees: int, level: float) -> float:
    """The two-sided quantile of Student's t with so many degrees of freedom, at this level."""
    if (degrees, level) == (STRETCHES - 1, LEVEL):  # needed for every run, and importing SciPy takes 0.15 s
        return 2.262157162798205
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.5 + level / 2))


def bounds(
    whole: FloatArray, without: FloatArray, *, share: bool = False, in_order: bool = False, level: float = LEVEL
) -> tuple[FloatArray, FloatArray]:
    """Bounds of figures, shape (...), from the same figures without each of the groups, shape (..., groups).

    `share`: they are at most 1. `in_order`: the groups follow each other in one run. NaN where any is not defined, or
    there are fewer than two groups.
    """
    whole, without = np.asarray(whole, np.float64), np.asarray(without, np.float64)
    groups = without.shape[-1]
    if groups < 2:
        nothing = np.full(whole.shape, np.nan)
        return nothing, nothing.copy()
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        at_end = (without == 0).any(axis=-1) | (whole == 0)
        if share:
            at_end |= (without >= 1).any(axis=-1) | (whole >= 1)
        signed = (without < 0).any(axis=-1) | (whole < 0)
        scales = (
            (~at_end & ~signed, _logit if share else np.log, _expit if share else np.exp),
            (at_end & ~signed, _arcsine if share else np.sqrt, _sine if share else _square),
            (signed, _same, _same),
        )
        low, high = np.full(whole.shape, np.nan), np.full(whole.shape, np.nan)
        for rows, there, back in scales:
            if not rows.any():
                continue
            middle, found = there(whole[rows]), there(without[rows])
            half = student(groups - 1, level) * _standard_error(found, in_order)
            low[rows], high[rows] = back(middle - half), back(middle + half)
    known = np.isfinite(whole) & np.isfinite(without).all(axis=-1) & np.isfinite(high)
    # rounding of the transform must not leave the figure outside its interval
    return np.where(known, np.minimum(low, whole), np.nan), np.where(known, np.maximum(high, whole), np.nan)


def _standard_error(without: FloatArray, in_order: bool) -> FloatArray:
    groups = without.shape[-1]
    off = without - without.mean(axis=-1, keepdims=True)
    off[np.ptp(without, axis=-1) <= 1e-12 * np.abs(without).max(axis=-1)] = 0.0  # differences by rounding alone
    squares = (off**2).sum(axis=-1)
    variance = squares * (groups - 1) / groups
    if in_order and groups > 2:
        along = (off[..., 1:] * off[..., :-1]).sum(axis=-1)
        alike = np.divide(along, squares, out=np.zeros_like(squares), where=squares > 0)
        alike = np.clip(alike + 1 / groups, 0.0, 0.9)  # independent groups show -1 / groups on average
        variance = variance * (1 + alike) / (1 - alike)
    return np.asarray(np.sqrt(variance))


def left_out(sums: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Totals (...) of sums by group (..., groups), and totals without each group (..., groups)."""
    sums = np.asarray(sums, np.float64)
    total = sums.sum(axis=-1)
    return total, total[..., None] - sums


def stretches(n: int) -> NDArray[np.int64]:
    """(groups + 1,) the begin of each stretch of n requests in order, and the end; fewer stretches for few requests."""
    return np.linspace(0, n, min(STRETCHES, n // 2) + 1).astype(np.int64)


def _logit(x: FloatArray) -> FloatArray:
    return np.asarray(np.log(x) - np.log1p(-x))


def _expit(x: FloatArray) -> FloatArray:
    return np.asarray(1 / (1 + np.exp(-x)))


def _arcsine(x: FloatArray) -> FloatArray:
    return np.asarray(np.arcsin(np.sqrt(np.minimum(x, 1.0))))


def _sine(x: FloatArray) -> FloatArray:
    return np.asarray(np.sin(np.clip(x, 0.0, np.pi / 2)) ** 2)


def _square(x: FloatArray) -> FloatArray:
    return np.asarray(np.maximum(x, 0.0) ** 2)


def _same(x: FloatArray) -> Any:
    return x
