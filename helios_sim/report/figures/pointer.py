"""What the script of a page has to know of a figure, so that it can answer to the pointer.

The script reads values from the drawn elements themselves (`templates/charts.js`). It is told where the axes are, what
their scales are, and the ids of the elements of each series. The figure looks the same with it and without.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer, Container
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter

from helios_sim.report.figures.style import Drawing, ShownTicks, seconds_of_tick

_POINTS_PER_IN = 72  # the unit of the SVG


def described(drawing: Drawing) -> dict[str, Any]:
    """The axes and legends of a figure that is laid out, as JSON values; gives every element that is named an id.

    A line or area whose label is that of a series after `_` (which hides it from legends) belongs to the series: it is
    shown and hidden with it.
    """
    ids = _Ids(drawing.name)
    legends = [*drawing.figure.legends, *drawing.whole.legends]
    axes = [ax for ax in drawing.whole.axes if ax.get_visible()]
    legends += [legend for ax in axes if (legend := ax.get_legend()) is not None]
    names = {text.get_text() for legend in legends for text in legend.get_texts()}
    names |= {label for ax in axes for label in ax.get_legend_handles_labels()[1]}
    return {
        "legend": [entry for legend in legends for entry in _entries(legend, ids)],
        "axes": [_axes(ax, drawing, names, ids) for ax in axes],
        "marks": None if drawing.marks is None else _marks(drawing, ids),
    }


class _Ids:
    """Ids of the elements of one figure, as the page has them: `to_svg` puts the figure's name before each."""

    def __init__(self, name: str) -> None:
        self._name, self._count = name, 0

    def __call__(self, artist: Artist) -> str:
        if artist.get_gid() is None:
            self._count += 1
            artist.set_gid(f"e{self._count}")
        return f"{self._name}-{artist.get_gid()}"


def _entries(legend: Legend, ids: _Ids) -> Iterator[dict[str, Any]]:
    for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
        shown = [text] if handle is None else [text, handle]
        yield {"label": text.get_text(), "ids": [ids(artist) for artist in shown]}


def _axes(ax: Axes, drawing: Drawing, names: set[str], ids: _Ids) -> dict[str, Any]:
    whole = drawing.whole
    scale, height = _POINTS_PER_IN / whole.dpi, _POINTS_PER_IN * whole.get_figheight()
    box = ax.get_window_extent()
    moved: list[Artist] = [*ax.lines, *ax.collections, *ax.patches] if drawing.zooms else []
    return {
        "box": [box.x0 * scale, height - box.y1 * scale, box.x1 * scale, height - box.y0 * scale],
        "title": ax.get_title(loc="left"),
        "x": _scale(ax, "x"),
        "y": _scale(ax, "y"),
        "x_axis": ids(ax.xaxis),
        "zooms": drawing.zooms,
        "moved": [ids(artist) for artist in moved if artist is not drawing.marks],
        "series": [*_given(ax, drawing), *_drawn(ax, names, ids)],
    }


def _scale(ax: Axes, which: str) -> dict[str, Any]:
    axis = ax.xaxis if which == "x" else ax.yaxis
    low, high = (float(end) for end in (ax.get_xlim() if which == "x" else ax.get_ylim()))
    formatter = axis.get_major_formatter()
    inner = formatter.inner if isinstance(formatter, ShownTicks) else formatter
    names = None
    if isinstance(axis.get_major_locator(), FixedLocator) and isinstance(inner, FixedFormatter | FuncFormatter):
        names = [[float(place), formatter(place, at)] for at, place in enumerate(axis.get_majorticklocs())]
    shown = axis.get_tick_params()["labelbottom" if which == "x" else "labelleft"]
    return {
        "low": low, "high": high, "log": axis.get_scale() == "log", "label": " ".join(axis.get_label_text().split()),
        "names": names, "labelled": shown and any(formatter.format_ticks([*axis.get_majorticklocs()])),
        "seconds": isinstance(inner, FuncFormatter) and inner.func is seconds_of_tick,
    }  # fmt: skip


def _given(ax: Axes, drawing: Drawing) -> Iterator[dict[str, Any]]:
    """Series with values given by the figure itself, since they cannot be read from what is drawn."""
    for series in drawing.series:
        if series.axes is ax:
            values = [[_short(x), _short(y)] for x, y in zip(series.x.tolist(), series.y.tolist(), strict=True)]
            yield {"label": series.label, "kind": "given", "color": series.color, "ids": [], "values": values}


def _short(value: float) -> float | None:
    return None if value != value else float(f"{value:.6g}")


def _drawn(ax: Axes, names: set[str], ids: _Ids) -> Iterator[dict[str, Any]]:
    for artist, label in zip(*ax.get_legend_handles_labels(), strict=True):
        parts: list[Artist] = list(artist) if isinstance(artist, Container) else [artist]
        yield {"label": label, "kind": _kind(artist), "color": _color(parts[0]), "ids": [ids(part) for part in parts]}
    for part in ax.get_children():
        label = str(part.get_label())
        if label[:1] == "_" and label[1:] in names:
            yield {"label": label[1:], "kind": "beside", "color": None, "ids": [ids(part)]}


def _kind(artist: Artist | Container) -> str:
    """`line`, `points`, `bars`; `beside` for what has no values of its own, as a band or a key of the legend."""
    if isinstance(artist, Line2D):
        if not len(artist.get_xdata()):  # type: ignore[arg-type]
            return "beside"
        return "points" if artist.get_linestyle() == "None" else "line"
    if isinstance(artist, PathCollection):
        return "points"
    return "bars" if isinstance(artist, BarContainer) else "beside"


def _color(artist: Artist) -> str | None:
    read = getattr(artist, "get_color", None) or getattr(artist, "get_facecolor", None)
    if read is None:
        return None
    color = read()
    return to_hex(color[0] if getattr(color, "ndim", 1) > 1 else color)


def _marks(drawing: Drawing, ids: _Ids) -> dict[str, Any]:
    """The drawn marks and what each of them is for: the anchor on the page it leads to, and words."""
    assert drawing.marks is not None
    return {"id": ids(drawing.marks), "rows": [list(row) for row in drawing.mark_rows]}
