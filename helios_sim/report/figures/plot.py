"""Figures of panels with axes: what is drawn in them, where everything lies, and drawing it on a canvas.

A panel takes data in their own units; `draw` lays out all panels of a figure and turns data into points. The names are
those that matplotlib uses. What a long line has between two points that lie less than half a point apart is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from helios_sim.report.figures.canvas import INK, MUTED, PAPER, RULE, Box, Canvas, Points, mark_points, text_width
from helios_sim.report.figures.ticks import Ticks, Write, in_seconds, linear, logarithmic

WIDTH = 648.0  # of a figure, in points: 9 inches
TITLE_SIZE, LABEL_SIZE, LEGEND_SIZE, NOTE_SIZE = 10.5, 10.0, 9.5, 8.5
DASHES: dict[str, tuple[float, ...]] = {"-": (), "--": (7.4, 3.2), ":": (1.6, 2.6), "-.": (9, 2.5, 1.6, 2.5)}
FINE_DOTS = (0.8, 1.4)
_GAP, _MARGIN = 16.0, 6.0  # between panels, and around a figure
_LEADING = 1.22
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


@dataclass(slots=True)
class Figure:
    """Panels in a grid, with one legend above them."""

    rows: int
    columns: int
    height: float  # points
    axes: list[Axes]
    heights: Sequence[float]
    sharex: bool | str = False
    sharey: bool | str = False
    legend: list[list[tuple[str, Look]]] = field(default_factory=list)  # its rows
    xlabel: str = ""
    ylabel: str = ""

    def draw(self, canvas: Canvas, top: float = 0.0) -> None:
        """Draw everything below `top`, which is a strip of so many points for a title."""
        panels = [(place // self.columns, place % self.columns, ax) for place, ax in enumerate(self.axes) if ax.visible]
        limits = self._limits()
        self._share_texts()
        legend = _legend_height(self.legend)
        if self.legend:
            _draw_legend(canvas, self.legend, _MARGIN, top + _MARGIN)
        boxes = self._boxes(limits, top + legend, top + self.height)
        for row, column, ax in panels:
            _Panel(ax, boxes[row, column], *limits[id(ax)]).draw(canvas)
        if self.xlabel:
            canvas.text(self.xlabel, WIDTH / 2, top + self.height - _MARGIN - 2, LABEL_SIZE, INK, "center")
        if self.ylabel:
            middle = top + (legend + self.height) / 2
            canvas.text(self.ylabel, _MARGIN + LABEL_SIZE * 0.8, middle, LABEL_SIZE, INK, "center", upright=True)

    def _limits(self) -> dict[int, tuple[tuple[float, float], tuple[float, float]]]:
        found: dict[int, list[tuple[float, float]]] = {}
        for side, share in (("x", self.sharex), ("y", self.sharey)):
            for place, ax in enumerate(self.axes):
                axis = ax.x if side == "x" else ax.y
                row, column = divmod(place, self.columns)
                with_it = [
                    other for at, other in enumerate(self.axes) if other is ax or (other.visible and (
                        share is True or (share == "col" and at % self.columns == column)
                        or (share == "row" and at // self.columns == row)
                    ))
                ]  # fmt: skip
                axes = [(other.x if side == "x" else other.y) for other in with_it]
                axis.log = max(each.log for each in axes)
                together = replace(axis, values=[v for each in axes for v in each.values])
                for each in axes:
                    together.low = each.low if together.low is None else together.low
                    together.high = each.high if together.high is None else together.high
                    together.from_zero |= each.from_zero
                    together.inverted |= each.inverted
                axis.inverted = together.inverted
                found.setdefault(id(ax), []).append(together.limits(together.extent()))
        return {key: (x, y) for key, (x, y) in found.items()}

    def _share_texts(self) -> None:
        """Panels that share an axis have its texts at the edge of the figure only."""
        for place, ax in enumerate(self.axes):
            row, column = divmod(place, self.columns)
            below = place + self.columns
            if self.sharex and below < len(self.axes) and self.axes[below].visible:
                ax.x.texts_shown = False
            if self.sharey and column and row >= 0:
                ax.y.texts_shown = False

    def _boxes(self, limits: Mapping[int, Any], top: float, bottom: float) -> dict[tuple[int, int], Box]:
        rough_w, rough_h = WIDTH / self.columns * 0.8, (bottom - top) / self.rows * 0.7
        edges = {
            (place // self.columns, place % self.columns): _Panel(ax, (0, 0, rough_w, rough_h), *limits[id(ax)]).edges()
            for place, ax in enumerate(self.axes) if ax.visible
        }  # fmt: skip

        def most(side: int, line: int, number: int) -> float:
            """The room at one side that the panels of one row (`line` 0) or column (1) need."""
            return max((edge[side] for place, edge in edges.items() if place[line] == number), default=0.0)

        lefts, rights = ([most(side, 1, column) for column in range(self.columns)] for side in (0, 2))
        tops, bottoms = ([most(side, 0, row) for row in range(self.rows)] for side in (1, 3))
        start = _MARGIN + (LABEL_SIZE * 1.4 if self.ylabel else 0)
        end = bottom - _MARGIN - (LABEL_SIZE * 1.4 if self.xlabel else 0)
        width = (WIDTH - _MARGIN - start - sum(lefts) - sum(rights) - _GAP * (self.columns - 1)) / self.columns
        height = end - top - _MARGIN - sum(tops) - sum(bottoms) - _GAP * 0.6 * (self.rows - 1)
        shares = [part / sum(self.heights) for part in self.heights]
        boxes = {}
        y = top + _MARGIN
        for row in range(self.rows):
            y += tops[row]
            x = start
            for column in range(self.columns):
                x += lefts[column]
                boxes[row, column] = (x, y, x + width, y + height * shares[row])
                x += width + rights[column] + _GAP
            y += height * shares[row] + bottoms[row] + _GAP * 0.6
        return boxes


class _Panel:
    """One panel at its place: turns data into points."""

    def __init__(self, ax: Axes, box: Box, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.ax, self.box = ax, box
        left, top, right, bottom = box
        self._x = _scale(ax.x, x, left, right)
        self._y = _scale(ax.y, y, bottom, top)
        self.x_ticks = _inside(ax.x.ticks(*x, right - left, 40), x)
        self.y_ticks = _inside(ax.y.ticks(*y, bottom - top, 22), y)

    def edges(self) -> Box:
        """Room that texts need at the left, above, at the right and below."""
        ax = self.ax
        left = self._y_texts_width()
        if ax.y.label:
            left += LABEL_SIZE * (1.5 + _LEADING * ax.y.label.count("\n"))
        below = LABEL_SIZE + 8 if ax.x.texts_shown else 4.0
        if ax.x.label:
            below += LABEL_SIZE * _LEADING * (1.15 + ax.x.label.count("\n"))
        above = TITLE_SIZE * _LEADING * (ax.title.count("\n") + 1) + 7 if ax.title else 4.0
        right = 2.0
        if ax.x.texts_shown and self.x_ticks.at:
            last = self.x_ticks.at[-1 if not ax.x.inverted else 0]
            over = self._x(np.array([last]))[0] + text_width(self.x_ticks.texts[-1], LABEL_SIZE) / 2 - self.box[2]
            right = max(right, float(over))
        for note in ax.drawn:
            if note.kind == "note" and not note.options["across"] and note.options["ha"] == "left":
                at = self._x(note.x)[0] + note.options["offset"][0] + text_width(note.text, note.options["size"])
                right = max(right, min(float(at) - self.box[2], 0.2 * WIDTH))
        return left, above, right, below

    def _y_texts_width(self) -> float:
        if not self.ax.y.texts_shown:
            return 3.0
        return max((text_width(text, LABEL_SIZE) for text in self.y_ticks.texts), default=0.0) + 7

    def draw(self, canvas: Canvas) -> None:
        ax, (left, top, right, bottom) = self.ax, self.box
        canvas.area(_corners(self.box), PAPER)
        if ax.cells is not None:
            self._draw_cells(canvas)
        x_at, y_at = self._x(np.array(self.x_ticks.at)), self._y(np.array(self.y_ticks.at))
        for x in x_at if ax.x.grid else ():
            canvas.line(np.array([(x, top), (x, bottom)]), RULE, 0.7)
        for y in y_at if ax.y.grid else ():
            canvas.line(np.array([(left, y), (right, y)]), RULE, 0.7)
        inside = sorted((it for it in ax.drawn if it.kind != "note"), key=lambda it: it.order)
        if inside:
            with canvas.clipped((left - 1, top - 1, right + 1, bottom + 1)):
                for it in inside:
                    self._draw(canvas, it)
        canvas.line(np.array([(left, top), (left, bottom), (right, bottom)]), MUTED, 0.8)
        self._draw_ticks(canvas, x_at, y_at)
        if ax.title:
            lines = ax.title.split("\n")
            for place, text in enumerate(lines):
                y = top - 7 - TITLE_SIZE * _LEADING * (len(lines) - 1 - place)
                canvas.text(text, left, y, TITLE_SIZE, INK, bold=True)
        if ax.legend_shown:
            x = left + max(0.18 * (right - left), text_width(ax.title, TITLE_SIZE, True) + 14)
            _draw_legend(canvas, [[*ax.labelled.items()]], x, top - 17.5, 9.0)
        for it in ax.drawn:
            if it.kind == "note":
                self._draw_note(canvas, it)

    def _draw_ticks(self, canvas: Canvas, x_at: Floats, y_at: Floats) -> None:
        ax, (left, _, _, bottom) = self.ax, self.box
        for at, length in ((x_at, 3.5), (self._x(np.array(self.x_ticks.minor)), 2.0)):
            for x in at if ax.x.ticks_shown else ():
                canvas.line(np.array([(x, bottom), (x, bottom + length)]), MUTED, 0.8)
        for at, length in ((y_at, 3.5), (self._y(np.array(self.y_ticks.minor)), 2.0)):
            for y in at if ax.y.ticks_shown else ():
                canvas.line(np.array([(left - length, y), (left, y)]), MUTED, 0.8)
        if ax.x.texts_shown:
            _spaced(canvas, x_at, self.x_ticks.texts, bottom + 5 + LABEL_SIZE)
        if ax.y.texts_shown:
            for y, text in zip(y_at, self.y_ticks.texts, strict=True):
                canvas.text(text, left - 6, y + LABEL_SIZE * 0.35, LABEL_SIZE, INK, "right")
        if ax.x.label:
            start = bottom + (8 + LABEL_SIZE if ax.x.texts_shown else 4)
            for place, text in enumerate(ax.x.label.split("\n")):
                y = start + LABEL_SIZE * _LEADING * (place + 1)
                canvas.text(text, (self.box[0] + self.box[2]) / 2, y, LABEL_SIZE, INK, "center")
        if ax.y.label:
            lines = ax.y.label.split("\n")
            for place, text in enumerate(lines):
                x = left - self._y_texts_width() - 5 - LABEL_SIZE * _LEADING * (len(lines) - 1 - place)
                canvas.text(text, x, (self.box[1] + self.box[3]) / 2, LABEL_SIZE, INK, "center", upright=True)

    def _draw(self, canvas: Canvas, it: Drawn) -> None:
        look, (left, top, right, bottom) = it.look, self.box
        if it.kind == "hline":
            y = self._y(it.y)[0]
            canvas.line(np.array([(left, y), (right, y)]), look.color, look.width, look.dash)
        elif it.kind == "vline":
            x = self._x(it.x)[0]
            canvas.line(np.array([(x, top), (x, bottom)]), look.color, look.width, look.dash)
        elif it.kind == "line":
            for points in _thinned(np.stack([self._x(it.x), self._y(it.y)], axis=1)):
                canvas.line(points, look.color, look.width, look.dash, look.alpha)
        elif it.kind == "marks":
            for x, y in np.stack([self._x(it.x), self._y(it.y)], axis=1).tolist():
                if np.isfinite((x, y)).all():
                    _mark(canvas, look, x, y)
        else:
            x = self._x(it.x)
            sides = [np.concatenate([*_thinned(np.stack([x, self._y(it.y[:, end])], axis=1)), np.zeros((0, 2))])
                     for end in (0, 1)]  # fmt: skip
            outline = np.concatenate([sides[0], sides[1][::-1]])
            if len(outline) > 2:
                _fill(canvas, outline, look)

    def _draw_note(self, canvas: Canvas, it: Drawn) -> None:
        options, (left, _, right, _) = it.options, self.box
        x = left + float(it.x[0]) * (right - left) if options["across"] else float(self._x(it.x)[0])
        x, y = x + options["offset"][0], float(self._y(it.y)[0]) - options["offset"][1]
        size = options["size"]
        y += {"baseline": 0.0, "center": size * 0.35}[options["va"]]
        if options["boxed"]:
            half = text_width(it.text, size) / 2 + 0.8
            canvas.area(_corners((x - half, y - size * 0.85, x + half, y + size * 0.25)), PAPER)
        canvas.text(it.text, x, y, size, it.look.color, options["ha"])

    def _draw_cells(self, canvas: Canvas) -> None:
        cells = self.ax.cells
        assert cells is not None
        most = float(cells.max()) or 1.0
        for (row, column), value in np.ndenumerate(cells):
            x, x_end = self._x(np.array([column - 0.5, column + 0.5]))
            y, y_end = self._y(np.array([row - 0.5, row + 0.5]))
            canvas.area(_corners((x, y, x_end, y_end)), _blue(float(value) / most))


def _blue(share: float) -> str:
    """From nearly white to dark blue."""
    stops = ((247, 251, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107))
    place = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    below = min(int(place), len(stops) - 2)
    mixed = (round(a + (b - a) * (place - below)) for a, b in zip(stops[below], stops[below + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _stepped(xs: Floats) -> Floats:
    return np.repeat(xs, 2)[1:]


def _scale(axis: Axis, limits: tuple[float, float], start: float, end: float) -> Callable[[Floats], Floats]:
    """Data to points: `start` is where the smallest value lies."""
    if axis.inverted:
        start, end = end, start
    low, high = np.log(limits) if axis.log else np.array(limits)
    span = (high - low) or 1.0

    def place(values: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            at = np.log(np.maximum(values, 1e-300)) if axis.log else values
        found: Floats = start + (at - low) / span * (end - start)
        return np.clip(found, -1e5, 1e5)

    return place


def _inside(ticks: Ticks, limits: tuple[float, float]) -> Ticks:
    low, high = limits
    room = 1e-6 * (high - low)
    kept = [place for place, at in enumerate(ticks.at) if low - room <= at <= high + room]
    return Ticks(tuple(ticks.at[k] for k in kept), tuple(ticks.texts[k] for k in kept),
                 tuple(m for m in ticks.minor if low <= m <= high))  # fmt: skip


def _spaced(canvas: Canvas, at: Floats, texts: Sequence[str], y: float) -> None:
    """The texts below an axis, without those that would touch the one before."""
    free_from = -np.inf
    for x, text in sorted(zip(at.tolist(), texts, strict=True)):
        half = text_width(text, LABEL_SIZE) / 2
        if x - half > free_from:
            canvas.text(text, x, y, LABEL_SIZE, INK, "center")
            free_from = x + half + 3


def _thinned(points: Points) -> list[Points]:
    """The line's unbroken parts; where many points share half a point of width, the first, outermost and last."""
    parts = []
    known = np.isfinite(points).all(axis=1)
    breaks = np.flatnonzero(np.diff(known.astype(np.int8))) + 1
    for part, there in zip(np.split(points, breaks), np.split(known, breaks), strict=True):
        if len(part) and there[0]:
            parts.append(_of_pixels(part) if len(part) > WIDTH else part)
    return parts


def _of_pixels(part: Points) -> Points:
    columns, (x, y) = np.floor(part[:, 0] * 2), part.T
    first = np.flatnonzero(np.concatenate([[True], columns[1:] != columns[:-1]]))
    last = np.concatenate([first[1:], [len(part)]]) - 1
    middle = (x[first] + x[last]) / 2
    low, high = np.minimum.reduceat(y, first), np.maximum.reduceat(y, first)
    corners = ((x[first], y[first]), (middle, low), (middle, high), (x[last], y[last]))
    return np.stack([np.stack(corner, axis=1) for corner in corners], axis=1).reshape(-1, 2)


def _mark(canvas: Canvas, look: Look, x: float, y: float) -> None:
    outline = mark_points(look.marker, x, y, look.size)
    if look.hollow:
        canvas.area(outline, None, 1, look.color, 1.8)
    else:
        canvas.area(outline, look.color, look.alpha)


def _corners(box: Box) -> Points:
    left, top, right, bottom = box
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def _handle(look: Look) -> float:
    """The width of a legend's sample; wide enough that dashes show at both sides of a mark."""
    return 32.0 if look.dash else 20.0


def _legend_height(rows: Sequence[Sequence[Any]]) -> float:
    return len(rows) * LEGEND_SIZE * 1.42 + 8 if rows else 0.0


def _fill(canvas: Canvas, outline: Points, look: Look) -> None:
    canvas.area(outline, look.color, look.alpha, look.edge, look.width if look.edge else 0, look.hatched)


def _draw_legend(
    canvas: Canvas, rows: Sequence[Sequence[tuple[str, Look]]], x0: float, y0: float, size: float = LEGEND_SIZE
) -> None:
    columns = max(map(len, rows))
    wide = max(_handle(look) for row in rows for _, look in row)
    widths = [max(wide + 8 + text_width(row[c][0], size) for row in rows if c < len(row)) + 20 for c in range(columns)]
    for place, row in enumerate(rows):
        y, x = y0 + size * 1.42 * (place + 0.55), x0
        for (text, look), width in zip(row, widths, strict=False):
            if look.filled:
                _fill(canvas, _corners((x, y - size * 0.38, x + wide, y + size * 0.38)), look)
            else:
                if look.width:
                    canvas.line(np.array([(x, y), (x + wide, y)]), look.color, look.width, look.dash, look.alpha)
                if look.marker:
                    _mark(canvas, look, x + wide / 2, y)
            canvas.text(text, x + wide + 8, y + size * 0.35, size, INK)
            x += width
