"""Where to measure so that straight lines between the points are true. Knows numbers on axes, not what they mean.

A grid is a product of axes. An interval of an axis is tried at a point inside it; where the line between its ends
misses by more than the tolerance and by more than noise explains, the point joins the axis, and both halves are tried
in turn. Points that the line met stay out of the grid: they are what its error is reported at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

Place = tuple[int, ...]

NARROW = 1.15  # an interval whose ends are this near each other is not split
SIGNIFICANT = 2.0  # a miss counts from so many standard errors of the measured time on


@dataclass(frozen=True, slots=True)
class Axes:
    """A product grid of one or two axes, each ascending."""

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
        """Between a third and two thirds of the way, by no rule that hardware shares: never just a power of two."""
        share = 1 / 3 + ((self.low * 7919 + self.high * 104_729) % 1000) / 3000
        return min(max(self.low + round((self.high - self.low) * share), self.low + 1), self.high - 1)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A measured place outside the grid, and how far the line missed it."""

    place: Place
    measured_s: float
    interpolated_s: float
    scale_s: float  # the time that the error is a share of

    @property
    def error(self) -> float:
        return (self.interpolated_s - self.measured_s) / self.scale_s


def geometric(low: int, high: int, ratio: float = 2.0) -> tuple[int, ...]:
    """`low` to `high`, each about `ratio` times the one before."""
    steps = max(1, round(np.log(high / low) / np.log(ratio)))
    return tuple(sorted({*(round(v) for v in np.geomspace(low, high, steps + 1))}))


def interpolate(axes: Axes, time_s: Mapping[Place, float], place: Place) -> float:
    """Linear in one axis, bilinear in two, as profiles are read; the ends of the grid hold outside it."""
    if len(place) == 1:
        (rows,) = axes.values
        return float(np.interp(place[0], rows, [time_s[(r,)] for r in rows]))
    first, second = axes.values
    column = [float(np.interp(place[1], second, [time_s[a, b] for b in second])) for a in first]
    return float(np.interp(place[0], first, column))


def intervals(axes: Axes) -> Iterator[Interval]:
    """Those with a whole number inside that are not narrow."""
    for axis, values in enumerate(axes.values):
        for low, high in pairwise(values):
            if high - low >= 2 and high > NARROW * low:
                yield Interval(axis, low, high)


def trials(axes: Axes, interval: Interval) -> list[Place]:
    """Where an interval is tried: at its inner value, and at the other axis' middle and end."""
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
    """The grid that straight lines fit, and the trials that stayed outside it, by place.

    `measure` makes sure that places are measured, and is false when the time is spent: then the grid as it was last
    whole comes back. An error counts as a share of `scale_s`; `noise_s` is the standard error of `time_s`. Intervals
    that a value has split are tried again. Places that do not `fit` are not tried.
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
    """(N,) signed shares."""
    return np.array([h.error for h in found])


def _held_out(
    axes: Axes,
    known: Mapping[Place, float],
    place: Place,
    time_s: Callable[[Place], float],
    scale_s: Callable[[Place], float],
) -> HeldOut:
    return HeldOut(place, time_s(place), interpolate(axes, known, place), scale_s(place))
