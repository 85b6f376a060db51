"""Figures of panels: where everything lies, and drawing it on a canvas.

`draw` lays out all panels of a figure and turns data into points. What a long line has between two points that lie less
than half a point apart is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from helios_sim.report.figures.axes import (
    LABEL_SIZE,
    LEGEND_SIZE,
    TITLE_SIZE,
    WIDTH,
    Axes,
    Axis,
    Drawn,
    Floats,
    Look,
    Ticks,
)
from helios_sim.report.figures.canvas import INK, MUTED, PAPER, RULE, Box, Canvas, Points, mark_points, text_width

_GAP, _MARGIN = 16.0, 6.0  # between panels, and around a figure
_LEADING = 1.22


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
    """A colour between nearly white (0) and dark blue (1)."""
    stops = ((247, 251, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107))
    place = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    below = min(int(place), len(stops) - 2)
    mixed = (round(a + (b - a) * (place - below)) for a, b in zip(stops[below], stops[below + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


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
