"""Range checks shared by the workload's specifications. Knows how to refuse a number, not what it means."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.request import NS_PER_S

LONGEST = 2**31 - 1  # of one text: no model reads more; keeps the tail of a wide distribution within int64
LATEST_NS = 2.0**62  # 146 years: later times do not fit int64 with room for a run


def require_positive(key: str, value: float, fix: str) -> None:
    """UserError unless `value` is a finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise UserError(key, value, "must be a finite number above 0", fix)


def require_count(key: str, value: int, fix: str) -> None:
    """UserError unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise UserError(key, value, "must be a whole number of at least 1", fix)


def require_shares(key: str, shares: Sequence[float], n_tasks: int) -> None:
    """UserError unless there is one finite share of at least 0 for each task, and not all are 0."""
    if len(shares) != n_tasks:
        raise UserError(key, tuple(shares), f"must have one share for each of the {n_tasks} tasks", "add or remove")
    if not all(math.isfinite(share) and share >= 0 for share in shares) or not sum(shares) > 0:
        raise UserError(
            key, tuple(shares), "each share must be 0 or more and one above 0", "give shares such as 0.7 and 0.3"
        )


def arrivals_ns(times_s: NDArray[np.float64]) -> NDArray[np.int64]:
    """Ascending seconds, shape (n,), as whole nanoseconds. UserError where they leave the range of int64."""
    times_ns = times_s * NS_PER_S
    if not times_ns[-1] <= LATEST_NS:
        raise UserError(
            "workload.arrivals",
            float(times_s[-1]),
            "the last arrival, in seconds, must lie within 146 years",
            "raise the rate or ask for fewer requests",
        )
    whole: NDArray[np.int64] = np.rint(times_ns).astype(np.int64)
    return whole
