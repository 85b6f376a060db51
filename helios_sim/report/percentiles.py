"""A percentile, and the same without each stretch of the requests, from values that are sorted once.

`numpy.percentile` would be asked ten times for each figure, and for short runs that is most of a report's time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from helios_sim.report.intervals import FloatArray, stretches

FEWEST_BEYOND = 3  # requests beyond a percentile, from which its interval within a run covers about what it says

Values = NDArray[np.float64] | NDArray[np.int64]
IntArray = NDArray[np.intp]


class Ranked:
    """Values in ascending order, for several percentiles of them; those that are `counted`, at least one."""

    def __init__(self, values: Values, counted: NDArray[np.bool_]) -> None:
        places = np.flatnonzero(counted)
        self._by_rank = places[np.argsort(values[places], kind="stable")]
        self._ranked, self._ends = values[self._by_rank], stretches(len(values))
        self._ranks: list[IntArray] | None = None  # of the values in each stretch

    def percentile_and_without(self, q: int) -> tuple[FloatArray, FloatArray | None]:
        """The q-th percentile as `numpy.percentile` defines it.

        And (stretches,) the same without the values in each stretch of all, NaN where none is left; None: too few of
        them for that.
        """
        ranked, n, ends = self._ranked, len(self._ranked), self._ends
        whole = np.array(_percentile(ranked, np.zeros(0, np.intp), q))
        if len(ends) < 3 or n * min(q, 100 - q) < 100 * FEWEST_BEYOND:
            return whole, None
        if self._ranks is None:
            stretch = np.searchsorted(ends, self._by_rank, "right") - 1
            self._ranks = [np.flatnonzero(stretch == each) for each in range(len(ends) - 1)]
        return whole, np.array([_percentile(ranked, own, q) if len(own) < n else np.nan for own in self._ranks])


def _percentile(ranked: Values, out: IntArray, q: int) -> float:
    """Of the values without those at the ranks `out`, ascending, which leave at least one."""
    last = len(ranked) - len(out) - 1
    at = last * (q / 100)
    ranks = np.array([int(at), min(int(at) + 1, last)])
    left_below = out - np.arange(len(out))  # of each that is out, how many that stay are below it
    low, high = ranked[ranks + np.searchsorted(left_below, ranks, "right")]
    share = at - int(at)
    return float(high - (high - low) * (1 - share) if share >= 0.5 else low + (high - low) * share)
