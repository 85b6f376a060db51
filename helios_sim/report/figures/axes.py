"""What is drawn in one panel, in units of the data: its series, its two axes, and where their ticks are.

The names are those that matplotlib uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import ceil, floor, isfinite, log10
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from helios_sim.report import format as fmt
from helios_sim.report.figures.canvas import MUTED

WIDTH = 648.0  # of a figure, in points: 9 inches
TITLE_SIZE, LABEL_SIZE, LEGEND_SIZE, NOTE_SIZE = 10.5, 10.0, 9.5, 8.5
DASHES: dict[str, tuple[float, ...]] = {"-": (), "--": (7.4, 3.2), ":": (1.6, 2.6), "-.": (9, 2.5, 1.6, 2.5)}
FINE_DOTS = (0.8, 1.4)
Side = Literal["x", "y"]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Look:
    """How one series looks, in its panel and in the legend."""

    color: str
    width: float = 2.0
    dash: tuple[float, ...] = ()
    marker: str = ""
    size: float = 5.0
    alpha: float = 1.0
    filled: bool = False  # an area
    hollow: bool = False  # a mark without its inside
    hatched: bool = False
    edge: str = ""


@dataclass(slots=True)
class Drawn:
    """One thing in a panel: a line, areas or marks, in data units."""

    kind: Literal["line", "area", "marks", "hline", "vline", "note"]
    look: Look
    x: Floats
    y: Floats
    label: str = ""
    order: float = 2.0
    text: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Axis:
    """One side of a panel."""

    label: str = ""
    low: float | None = None
    high: float | None = None
    log: int = 0  # the base; 0: linear
    margin: float = 0.05
    fixed: Ticks | None = None
    write: Write | None = None
    whole: bool = False
    inverted: bool = False
    grid: bool = True
    ticks_shown: bool = True  # small lines beside their texts
    texts_shown: bool = True
    most: int | None = None
    from_zero: bool = False
    values: list[Floats] = field(default_factory=list)

    def extent(self) -> tuple[float, float]:
        """Smallest and largest value, where there is any."""
        known = [v[np.isfinite(v) & ((v > 0) if self.log else True)] for v in self.values]
        known = [v for v in known if v.size]
        if not known:
            return (1.0, 10.0) if self.log else (0.0, 1.0)
        return min(float(v.min()) for v in known), max(float(v.max()) for v in known)

    def limits(self, extent: tuple[float, float]) -> tuple[float, float]:
        low, high = (np.log10(extent) if self.log else np.array(extent)).tolist()
        room = (high - low) * self.margin or (0.5 if self.log else 0.05 * abs(high) or 0.5)
        ends = [low - (0 if self.from_zero and low == 0 and not self.log else room), high + room]
        found = [10.0**end for end in ends] if self.log else ends
        return (found[0] if self.low is None else self.low), (found[1] if self.high is None else self.high)

    def ticks(self, low: float, high: float, length: float, spacing: float) -> Ticks:
        if self.fixed is not None:
            return self.fixed
        if self.log:
            return logarithmic(low, high, self.write, self.log, max(3, int(length / spacing)))
        most = self.most or max(2, min(9, int(length / spacing)))
        return linear(low, high, most, self.write, self.whole)


class Axes:
    """One panel."""

    def __init__(self) -> None:
        self.x, self.y = Axis(), Axis()
        self.title = ""
        self.visible = True
        self.drawn: list[Drawn] = []
        self.legend_shown = False
        self.cells: Floats | None = None

    def plot(self, x: ArrayLike, y: ArrayLike, *, label: str = "", order: float = 2.0, line: bool = True,
             post: bool = False, **look: Any) -> None:  # fmt: skip
        """A line through the points, with marks where `marker` names one; `post`: level until the next point."""
        xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
        made = Look(**(look if line else {"width": 0.0} | look))
        self._take(xs, ys)
        if post:
            xs, ys = _stepped(xs), np.repeat(ys, 2)[:-1]
        if line:
            self.drawn.append(Drawn("line", made, xs, ys, label, order))
        if made.marker:
            self.drawn.append(Drawn("marks", made, xs, ys, "" if line else label, order + 0.01))

    def scatter(self, x: ArrayLike, y: ArrayLike, **look: Any) -> None:
        """Marks alone."""
        self.plot(x, y, line=False, **({"marker": "o"} | look))

    def fill_between(self, x: ArrayLike, low: ArrayLike, high: ArrayLike, *, label: str = "", post: bool = False,
                     **look: Any) -> None:  # fmt: skip
        xs = np.asarray(x, np.float64)
        ends = [np.broadcast_to(np.asarray(end, np.float64), xs.shape) for end in (low, high)]
        for end in ends:
            self._take(xs, end)
        if post:
            xs, ends = _stepped(xs), [np.repeat(end, 2)[:-1] for end in ends]
        y = np.stack(ends, axis=1)
        self.drawn.append(Drawn("area", Look(filled=True, **look), xs, y, label, 1.0))

    def bar(self, at: ArrayLike, heights: ArrayLike, width: float, *, label: str = "", **look: Any) -> None:
        self._bars("y", at, heights, width, 0.0, label, look)

    def barh(self, at: ArrayLike, widths: ArrayLike, height: float, *, left: ArrayLike = 0.0, label: str = "",
             **look: Any) -> None:  # fmt: skip
        self._bars("x", at, widths, height, left, label, look)

    def axhline(self, y: float, *, color: str, width: float = 1.2, dash: tuple[float, ...] = ()) -> None:
        self.y.values.append(np.array([y]))
        self.drawn.append(Drawn("hline", Look(color, width, dash), np.zeros(1), np.array([y]), order=1.5))

    def axvline(self, x: float, *, color: str, width: float = 1.2, dash: tuple[float, ...] = ()) -> None:
        self.x.values.append(np.array([x]))
        self.drawn.append(Drawn("vline", Look(color, width, dash), np.array([x]), np.zeros(1), order=1.5))

    def annotate(self, text: str, at: tuple[float, float], offset: tuple[float, float] = (0, 0), *,
                 across: bool = False, ha: str = "left", va: str = "baseline", size: float = NOTE_SIZE,
                 color: str = MUTED, boxed: bool = False) -> None:  # fmt: skip
        """A note, `offset` points right of and above `at`; `across`: the x of `at` is a share of the panel's width."""
        options = {"offset": offset, "across": across, "ha": ha, "va": va, "size": size, "boxed": boxed}
        x, y = np.array([at[0]]), np.array([at[1]])
        self.drawn.append(Drawn("note", Look(color), x, y, "", 5.0, text, options))

    def imshow(self, cells: ArrayLike) -> None:
        """A table of numbers (rows, columns) as shades of blue, the first row on top."""
        self.cells = np.asarray(cells, np.float64)
        rows, columns = self.cells.shape
        self.set_xlim(-0.5, columns - 0.5)
        self.set_ylim(rows - 0.5, -0.5)
        self.grid(False)

    def set_title(self, text: str) -> None:
        self.title = text

    def set_xlabel(self, text: str) -> None:
        self.x.label = text

    def set_ylabel(self, text: str) -> None:
        self.y.label = text

    def set_xlim(self, left: float | None = None, right: float | None = None) -> None:
        self._set_limits(self.x, left, right)

    def set_ylim(self, bottom: float | None = None, top: float | None = None) -> None:
        self._set_limits(self.y, bottom, top)

    def set_xticks(self, at: Iterable[float], texts: Iterable[str] | None = None) -> None:
        self._set_ticks(self.x, at, texts)

    def set_yticks(self, at: Iterable[float], texts: Iterable[str] | None = None) -> None:
        self._set_ticks(self.y, at, texts)

    def log(self, side: Side, base: int = 10) -> None:
        self._axis(side).log = base

    def seconds(self, side: Side) -> None:
        """A logarithmic axis of seconds."""
        axis = self._axis(side)
        axis.log, axis.write = 10, in_seconds

    def write(self, side: Side, how: Write) -> None:
        self._axis(side).write = how

    def grid(self, shown: bool, side: Side | None = None) -> None:
        for axis in (self.x, self.y) if side is None else (self._axis(side),):
            axis.grid = shown

    def bare(self, side: Side) -> None:
        """Categories: neither lines across the panel nor small lines beside the texts."""
        axis = self._axis(side)
        axis.grid = axis.ticks_shown = False

    @property
    def is_empty(self) -> bool:
        return not any(it.kind in ("line", "marks", "area") for it in self.drawn)

    @property
    def labelled(self) -> dict[str, Look]:
        """What the legend shows, each label once."""
        found: dict[str, Look] = {}
        for it in self.drawn:
            if it.label:
                found.setdefault(it.label, it.look)
        return found

    def _axis(self, side: Side) -> Axis:
        return self.x if side == "x" else self.y

    def _take(self, xs: Floats, ys: Floats) -> None:
        self.x.values.append(xs)
        self.y.values.append(ys)

    def _set_limits(self, axis: Axis, first: float | None, second: float | None) -> None:
        if first is not None and second is not None and first > second:
            axis.inverted, first, second = True, second, first
        axis.low = axis.low if first is None else first
        axis.high = axis.high if second is None else second

    def _set_ticks(self, axis: Axis, at: Iterable[float], texts: Iterable[str] | None) -> None:
        places = tuple(float(place) for place in at)
        axis.fixed = Ticks(places, tuple(f"{place:g}" for place in places) if texts is None else tuple(texts))
        axis.values.append(np.array(places))

    def _bars(
        self, along: Side, at: ArrayLike, lengths: ArrayLike, width: float, start: ArrayLike, label: str,
        look: Mapping[str, Any],
    ) -> None:  # fmt: skip
        places, far = np.atleast_1d(np.asarray(at, np.float64)), np.atleast_1d(np.asarray(lengths, np.float64))
        near = np.broadcast_to(np.asarray(start, np.float64), far.shape)
        made, axis = Look(filled=True, **look), self._axis(along)
        axis.from_zero = True
        for place, begin, length in zip(places.tolist(), near.tolist(), far.tolist(), strict=True):
            across, away = np.array([place - width / 2, place + width / 2]), np.array([begin, begin + length])
            (x, y) = (across, away) if along == "y" else (away, across)
            self._take(x, y)
            self.drawn.append(Drawn("area", made, x, np.tile(y, (2, 1)), label, 1.0))


def _stepped(xs: Floats) -> Floats:
    return np.repeat(xs, 2)[1:]


Write = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Ticks:
    at: tuple[float, ...]
    texts: tuple[str, ...]
    minor: tuple[float, ...] = ()


def linear(low: float, high: float, most: int, write: Write | None = None, whole: bool = False) -> Ticks:
    """Return up to `most` + 1 ticks at round values; `whole`: only at whole numbers."""
    step = round_step((high - low) / max(most, 1), whole)
    first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
    at = tuple(number * step for number in range(first, last + 1))
    decimals = next((d for d in range(9) if abs(round(step, d) - step) < 1e-9 * step), 9)
    return Ticks(at, tuple(write(v) if write else f"{v:,.{decimals}f}" for v in at))


def round_step(least: float, whole: bool = False) -> float:
    """The next of 1, 2, 2.5 and 5 times a power of ten."""
    if not (isfinite(least) and least > 0):
        return 1.0
    if whole and least <= 1:
        return 1.0
    power = 10.0 ** floor(log10(least))
    sizes = (1, 2, 5, 10) if whole and power < 10 else (1, 2, 2.5, 5, 10)
    return next(size * power for size in sizes if size * power >= least * (1 - 1e-9))


def logarithmic(low: float, high: float, write: Write | None = None, base: int = 10, most: int = 7) -> Ticks:
    """Return ticks at powers, and between them where there are few; small ticks at the other digits."""
    write = write or fmt_plain
    if base != 10:
        first, last = ceil(_power(low, base) - 1e-9), floor(_power(high, base) + 1e-9)
        at = [float(base) ** power for power in range(first, last + 1)]
        at = at[:: max(1, ceil(len(at) / (most + 4)))]
        return Ticks(tuple(at), tuple(write(v) for v in at))
    decades = log10(high / low)
    if decades < 0.6:
        return linear(low, high, 4, write)
    digits = (1,) if decades > 2 else (1, 3) if decades > 1 else (1, 2, 3, 5)
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    skip = max(1, ceil(decades / most))
    at = [d * 10.0**p for p in powers for d in digits if p % skip == 0 and low <= d * 10.0**p * (1 + 1e-9)
          and d * 10.0**p <= high * (1 + 1e-9)]  # fmt: skip
    minor = [d * 10.0**p for p in powers for d in range(1, 10) if low <= d * 10.0**p <= high]
    return Ticks(tuple(at), tuple(write(v) for v in at), tuple(m for m in minor if m not in at))


def fmt_plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def in_seconds(value: float) -> str:
    return fmt.seconds(value).replace(".00 ", " ").replace(".0 ", " ")


def _power(value: float, base: int) -> float:
    return log10(value) / log10(base)
