"""Adaptive grids: where to measure so that linear interpolation between the points is accurate.

A grid is a product of axes. Every interval of an axis is tried at a point inside it. If the line between its ends
misses by more than the tolerance and by more than noise explains, the point joins the axis, and both halves are tried
in turn. Points that the line met stay out of the grid: the grid's error is reported at them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

Place = tuple[int, ...]

NARROW = 1.15  # an interval is not split if the ratio of its ends is smaller
SIGNIFICANT = 2.0  # a miss counts if it exceeds this many standard errors of the measured time


@dataclass(frozen=True, slots=True)
class Axes:
    """A product grid of one or two ascending axes."""

    values: tuple[tuple[int, ...], ...]

    def places(self) -> list[Place]:
        return list(product(*self.values))

    def with_value(self, axis: int, value: int) -> Axes:
        changed = tuple(sorted({*self.values[axis], value}))
        return Axes(tuple(changed if i == axis else v for i, v in enumerate(self.values)))


@dataclass(frozen=True, slots=True)
class Interval:
    axis: int
    low: int
    high: int

    @property
    def inner(self) -> int:
        """A value between a third and two thirds of the way, irregular so as not to favour powers of two."""
        share = 1 / 3 + ((self.low * 7919 + self.high * 104_729) % 1000) / 3000
        return min(max(self.low + round((self.high - self.low) * share), self.low + 1), self.high - 1)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A measured place outside the grid, and by how much interpolation misses it."""

    place: Place
    measured_s: float
    interpolated_s: float
    scale_s: float  # the error is a share of this time

    @property
    def error(self) -> float:
        return (self.interpolated_s - self.measured_s) / self.scale_s


def geometric(low: int, high: int, ratio: float = 2.0) -> tuple[int, ...]:
    """Values from `low` to `high`, each about `ratio` times the one before."""
    steps = max(1, round(np.log(high / low) / np.log(ratio)))
    return tuple(sorted({*(round(v) for v in np.geomspace(low, high, steps + 1))}))


def interpolate(axes: Axes, time_s: Mapping[Place, float], place: Place) -> float:
    """Interpolate as profiles do: linear in one axis, bilinear in two, constant outside the grid."""
    if len(place) == 1:
        (rows,) = axes.values
        return float(np.interp(place[0], rows, [time_s[(r,)] for r in rows]))
    first, second = axes.values
    column = [float(np.interp(place[1], second, [time_s[a, b] for b in second])) for a in first]
    return float(np.interp(place[0], first, column))


def intervals(axes: Axes) -> Iterator[Interval]:
    """The intervals that have a whole number inside and are not narrow."""
    for axis, values in enumerate(axes.values):
        for low, high in pairwise(values):
            if high - low >= 2 and high > NARROW * low:
                yield Interval(axis, low, high)


def trials(axes: Axes, interval: Interval) -> list[Place]:
    """The places where an interval is tried: its inner value, at the middle and the end of the other axis."""
    if len(axes.values) == 1:
        return [(interval.inner,)]
    other = axes.values[1 - interval.axis]
    along = {other[len(other) // 2], other[-1]}
    return [(interval.inner, o) if interval.axis == 0 else (o, interval.inner) for o in sorted(along)]


def refine(
    axes: Axes,
    measure: Callable[[Sequence[Place]], bool],
    time_s: Callable[[Place], float],
    scale_s: Callable[[Place], float],
    noise_s: Callable[[Place], float],
    tolerance: float,
    fits: Callable[[Place], bool] = lambda place: True,
    most_places: int = 150,
) -> tuple[Axes, list[HeldOut]]:
    """Refine the axes until interpolation is accurate. Returns the axes and the held-out places.

    `measure` ensures that places are measured and returns False when the time is spent; then the last complete grid is
    returned. An error counts as a share of `scale_s`; `noise_s` is the standard error of `time_s`. Intervals that a
    value has split are tried again. Places that do not `fit` are not tried.
    """
    if not measure(axes.places()):
        return axes, []
    held_out: dict[Place, HeldOut] = {}
    tried: set[Interval] = set()
    while True:
        untried = [i for i in intervals(axes) if i not in tried]
        if not untried or len(axes.places()) > most_places:
            break
        places = {i: [place for place in trials(axes, i) if fits(place)] for i in untried}
        if not measure([place for tried_at in places.values() for place in tried_at]):
            break
        known = {place: time_s(place) for place in axes.places()}
        grown = axes
        for interval in untried:
            tried.add(interval)
            misses = [_held_out(axes, known, place, time_s, scale_s) for place in places[interval]]
            if any(abs(m.error) > tolerance + SIGNIFICANT * noise_s(m.place) / m.scale_s for m in misses):
                grown = grown.with_value(interval.axis, interval.inner)
            else:
                held_out.update((m.place, m) for m in misses)
        if grown == axes:
            continue
        if not measure(grown.places()):
            break
        axes = grown
    known = {place: time_s(place) for place in axes.places()}
    on_grid = set(axes.places())
    outside = [p for p in sorted(held_out) if p not in on_grid]
    return axes, [_held_out(axes, known, p, time_s, scale_s) for p in outside]


def errors(found: Sequence[HeldOut]) -> NDArray[np.float64]:
    """Signed relative errors (N,)."""
    return np.array([h.error for h in found])


def _held_out(
    axes: Axes,
    known: Mapping[Place, float],
    place: Place,
    time_s: Callable[[Place], float],
    scale_s: Callable[[Place], float],
) -> HeldOut:
    return HeldOut(place, time_s(place), interpolate(axes, known, place), scale_s(place))
