"""The common look of all figures: colours, type, lines and axes, and export as PNG and SVG.

Neutral colours are placeholders that the SVG export turns into CSS variables, so that figures inside the HTML follow
its light and dark themes; PNG files are on white. Nothing here touches pyplot or changes matplotlib's global state.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import (
    FixedFormatter,
    Formatter,
    FuncFormatter,
    Locator,
    LogLocator,
    MaxNLocator,
    NullFormatter,
)
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from helios_sim import files
from helios_sim.report import FOR_PAPER, format as fmt

INK = "#1b1f26"
MUTED = "#5e6673"
RULE = "#d4d8df"
PAPER = "#fefefd"
_CSS = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", PAPER: "var(--card)"}

WIDTH_IN = 9.0
VECTORS = ("svg", "pdf")
_PNG_DPI = 150
_TITLE_IN = 0.42

# Of middling lightness, so that they read on white and on near-black.
_NAMED = {"helios": "#2f74e6", "helios_probe": "#0fa08a", "oracle": "#8a63d2"}
_CYCLE = ("#e5822e", "#c9499c", "#c79a12", "#d8503f", "#2ba3cc", "#7fa02e", "#a86d50", "#6f7bd9", "#1d9a5b", "#b85c7a")
BASELINE_COLOR = "#7c8796"
MODEL_COLORS = ("#2f74e6", "#e5822e", "#0fa08a", "#c9499c", "#c79a12")
_MARKERS = "osD^vPX*<>"

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 2.0,
    "lines.markersize": 5,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "svg.fonttype": "none",  # a page's texts can be selected, and need no outlines
}


@dataclass(frozen=True, slots=True)
class ArmStyle:
    """The look of one arm's lines and marks."""

    color: str
    linestyle: str
    marker: str


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """Values over x that hold until the next, for a page's pointer: of what is drawn as an area. NaN: nothing there."""

    axes: Axes
    label: str
    color: str
    x: NDArray[Any]
    y: NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Drawing:
    """A figure with its file name (no suffix), title and a sentence on how to read it; the rest is for a page.

    `zooms`: all its axes share an x of time. `of_arm`: the arm whose timeline this is. `marks`: one for each of
    `mark_rows` (anchor on the page, words).
    """

    name: str
    title: str
    caption: str
    figure: SubFigure
    zooms: bool = False
    of_arm: str | None = None
    series: tuple[Series, ...] = ()
    marks: PathCollection | None = None
    mark_rows: tuple[tuple[str, str], ...] = ()

    @property
    def whole(self) -> Figure:
        """The figure with the strip for the title."""
        root = self.figure.get_figure(root=True)
        assert isinstance(root, Figure)
        return root


def arm_styles(arms: Sequence[str], baseline: str) -> dict[str, ArmStyle]:
    """The same look for an arm in every figure; the baseline is grey, the oracle dashed."""
    cycle = 0
    styles = {}
    for place, arm in enumerate(arms):
        if arm == baseline:
            color = BASELINE_COLOR
        elif arm in _NAMED:
            color = _NAMED[arm]
        else:
            color = _CYCLE[cycle % len(_CYCLE)]
            cycle += 1
        dashed = arm == "oracle" or cycle > len(_CYCLE)
        styles[arm] = ArmStyle(color, "--" if dashed else "-", _MARKERS[place % len(_MARKERS)])
    return styles


@contextmanager
def look() -> Iterator[None]:
    """The settings under which every figure is made and exported."""
    with mpl.rc_context(_RC):
        yield


def new_figure(rows: int, columns: int, height_in: float, **options: Any) -> tuple[SubFigure, list[Axes]]:
    """A figure of the standard width with its axes in reading order.

    The drawing lies in a sub-figure; the strip above it is for the title, which only the PNG shows.
    """
    whole = Figure(figsize=(WIDTH_IN, height_in + _TITLE_IN), dpi=_PNG_DPI, layout="constrained")
    FigureCanvasAgg(whole)  # texts are measured by what draws them
    figure: SubFigure = whole.subfigures(2, 1, squeeze=False, height_ratios=[_TITLE_IN, height_in])[1, 0]
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.ravel())


LEGEND_CHARACTERS = 105  # fit across a figure in the legend's size


def legend_above(figure: SubFigure, handles: dict[str, Artist], columns: int = 5) -> None:
    """One legend above all panels, read row by row (matplotlib itself fills columns)."""
    if not handles:
        return
    lines = [handle for handle in handles.values() if isinstance(handle, Line2D)]
    dashed = any(line.get_linestyle() not in ("-", "None") for line in lines)
    longest = max(len(label) for label in handles) + (8 if dashed else 6)
    columns = min(columns, len(handles), max(1, LEGEND_CHARACTERS // longest))
    by_column = [label for column in range(columns) for label in list(handles)[column::columns]]
    figure.legend(
        [handles[label] for label in by_column], by_column, loc="outside upper left", ncols=columns, fontsize=9.5,
        handlelength=3.4 if dashed else 2.0,  # so that dashes show at both sides of a marker
    )  # fmt: skip


def handles_of(*axes: Axes) -> dict[str, Artist]:
    """The labelled artists of these axes, each label once."""
    return {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}


def annotate(
    ax: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], *, across: bool = False, **options: Any
) -> Text:
    """A small note, `offset` points away from `at`; `across`: the x of `at` is a share of the axes' width."""
    places = ("axes fraction", "data") if across else "data"
    look_of_note: dict[str, Any] = {"fontsize": 8.5, "color": MUTED} | options
    return ax.annotate(text, at, offset, xycoords=places, textcoords="offset points", **look_of_note)


def name_levels(ax: Axes, levels: Sequence[tuple[float, str]], **options: Any) -> None:
    """A note at each level: at the right end above it, or where the fewest points of lines would run through it.

    Call this once everything else is drawn.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    ax.get_xlim(), ax.get_ylim()  # brings the limits up to date
    lines = [line.get_transform().transform(line.get_xydata()) for line in ax.lines]
    taken: list[Bbox] = []
    for level, text in levels:
        found = []
        for end, side in ((1, 1), (0, 1), (1, -1), (0, -1)):
            note = annotate(
                ax, text, (end, level), (-4 if end else 4, 4 * side), across=True, ha="right" if end else "left",
                va="baseline" if side > 0 else "top", **options,
            )  # fmt: skip
            room = note.get_window_extent().padded(2)
            along = np.linspace(room.x0, room.x1, 100)
            crossed = sum(_within(np.interp(along, line[:, 0], line[:, 1]), room) for line in lines)
            found.append((crossed + 100 * room.count_overlaps(taken), note, room))
        _, chosen, room = min(found, key=lambda each: each[0])  # the first of those that are equally free
        taken.append(room)
        for _, note, _ in found:
            if note is not chosen:
                note.remove()


def _within(heights: NDArray[Any], room: Bbox) -> int:
    return int(((heights > room.y0) & (heights < room.y1)).sum())


@contextmanager
def _exported() -> Iterator[None]:
    """The settings of an export."""
    with look(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a script that the font lacks is no fault of the reader
        yield


def _show_plainly(whole: Figure) -> None:
    """Make every text one in which what cannot be seen stands by its code."""
    for axis in _axes_of(whole):
        axis.set_major_formatter(ShownTicks(axis.get_major_formatter()))
    for text in _texts(whole):
        text.set_text(_shown(text.get_text()))


def _axes_of(whole: Figure) -> list[Axis]:
    return [axis for ax in whole.axes for axis in (ax.xaxis, ax.yaxis)]


def _texts(artist: Artist) -> Iterator[Text]:
    """All texts in it, but those of ticks, which their formatters write."""
    for child in [artist.label] if isinstance(artist, Axis) else artist.get_children():
        if isinstance(child, Text):
            yield child
        else:
            yield from _texts(child)


class _Labels:
    """Labels of one axis, drawn as a tick of it, since a page looks for ticks."""

    def __init__(self, axis: Any, texts: list[Text]) -> None:
        self._name, self.texts = f"{axis.axis_name}tick", texts

    def draw(self, renderer: Any) -> None:
        renderer.open_group(self._name)
        for text in self.texts:
            text.draw(renderer)
        renderer.close_group(self._name)


class _Kept:
    """The ticks of an axis and the room of their labels, kept while its place and its limits stay.

    matplotlib finds them anew some twenty times for each figure, and makes five artists for each tick. Here one tick
    has the marks and grid lines of all, and other labels are texts alone: the same pixels.
    """

    def __init__(self, axis: Any) -> None:  # what matplotlib itself calls is not in its types
        self._axis = axis
        self._now: tuple[float, ...] = ()
        self._boxes: Any = None
        self._texts: dict[bool, list[Text]] = {}  # labels but the first, by whether they are of major ticks
        axis._update_ticks, axis._get_ticklabel_bboxes = self._ticks_now, self._boxes_now

    def _ticks_now(self) -> list[Any]:
        now = (*self._axis.axes.get_position().bounds, *self._axis.get_view_interval())
        if now != self._now:
            self._now, self._boxes = now, None
            self._ticks = [*self._in_one(major=True), *self._in_one(major=False)]
        return self._ticks

    def _boxes_now(self, ticks: list[Any], renderer: Any) -> Any:
        """Another renderer needs none of its own, since the axis has its label already; but for a factor beside it."""
        if self._boxes is None or self._axis.get_major_formatter().get_offset():
            texts = [text for tick in ticks for text in (tick.texts if isinstance(tick, _Labels) else [tick.label1])]
            self._boxes = [text.get_window_extent(renderer) for text in texts if text.get_visible()], []
        return self._boxes

    def _in_one(self, *, major: bool) -> list[Any]:
        axis, flat = self._axis, self._axis.axis_name == "x"
        places = axis.get_majorticklocs() if major else axis.get_minorticklocs()
        names = (axis.get_major_formatter() if major else axis.get_minor_formatter()).format_ticks(places)
        low, high = sorted(axis.get_transform().transform(axis.get_view_interval()))
        near = 1e-10 * (high - low)  # as matplotlib has it
        at = axis.get_transform().transform(np.asarray(places, dtype=np.float64))
        shown = [(p, name) for p, name, it in zip(places, names, at, strict=True) if low - near <= it <= high + near]
        if not shown:
            return []
        (tick,) = axis.get_major_ticks(1) if major else axis.get_minor_ticks(1)
        tick.update_position(shown[0][0])
        tick.label1.set_text(shown[0][1])
        along, across = np.repeat([place for place, _ in shown], 3), np.tile((0.0, 1.0, np.nan), len(shown))
        tick.gridline.set_data(*((along, across) if flat else (across, along)))
        for mark in (tick.tick1line, tick.tick2line):
            (mark.set_xdata if flat else mark.set_ydata)(along[::3])
        labelled = [it for it in shown[1:] if it[1]] if tick.label1.get_visible() else []
        texts = self._texts.setdefault(major, [])
        while len(texts) < len(labelled):
            text = Text(*tick.label1.get_position(), figure=tick.get_figure())
            text.update_from(tick.label1)
            texts.append(text)
        for text, (place, name) in zip(texts, labelled, strict=False):
            (text.set_x if flat else text.set_y)(place)
            text.set_text(name)
        return [tick, _Labels(axis, texts[: len(labelled)])]


def _place_label(axis: Any) -> None:
    """Let the label of an axis stay where it is, which otherwise is sought with each drawing."""
    if axis.get_label_text():
        axis.get_tightbbox()
        place = axis.label.get_transform().transform(axis.label.get_position())
        axis.set_label_coords(*axis.axes.transAxes.inverted().transform(place))


class ShownTicks(Formatter):
    """Labels of ticks by another formatter, as a figure may show them."""

    def __init__(self, inner: Formatter) -> None:
        self.inner = inner

    def set_axis(self, axis: Any) -> None:
        super().set_axis(axis)
        self.inner.set_axis(axis)

    def __call__(self, x: float, pos: int | None = None) -> str:
        return self._of_names(self.inner(x, pos))

    def format_ticks(self, values: Any) -> list[str]:
        return [self._of_names(text) for text in self.inner.format_ticks(values)]

    def _of_names(self, text: str) -> str:
        """Powers of ten are set as formulas by matplotlib itself; what a figure names is not."""
        return _shown(text) if isinstance(self.inner, FixedFormatter | FuncFormatter) else text

    def get_offset(self) -> str:
        return self.inner.get_offset()

    def set_locs(self, locs: Any) -> None:
        self.inner.set_locs(locs)


def _shown(text: str) -> str:
    """The text for matplotlib. To call it again changes nothing more."""
    lines = (fmt.visible(line) for line in text.replace("\t", " ").split("\n"))
    return re.sub(r"(?<!\\)\$", r"\\$", "\n".join(lines))  # what stands between dollars would be set as a formula


def lay_out(drawing: Drawing) -> None:
    """Compute the layout once, so that the exports need not compute it again; more often, it does nothing."""
    whole = drawing.whole
    engine = whole.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        with _exported():
            _show_plainly(whole)
            for axis in _axes_of(whole):
                _Kept(axis)
            engine.execute(whole)
            whole.set_layout_engine("none")
            for ax in whole.axes:
                ax.set_position(np.round(ax.get_position(original=True).bounds, 9))  # the solver's last digits vary
                setattr(ax, "_autotitlepos", False)  # noqa: B010 - titles have their places, and each drawing seeks them
            for axis in _axes_of(whole):
                _place_label(axis)


def to_png(drawing: Drawing) -> bytes:
    """A PNG file on white, with the title above."""
    lay_out(drawing)
    out, whole = io.BytesIO(), drawing.whole
    height = 1 - 0.5 * _TITLE_IN / whole.get_figheight()
    with _exported():
        shown = " ".join(_shown(drawing.title).split())
        title = whole.text(0.012, height, shown, va="center", fontsize=12.5, fontweight="bold", parse_math=False)
        whole.set_facecolor("white")
        whole.set_dpi(_PNG_DPI)
        # `savefig` would draw everything once more, for the layout
        canvas: Any = whole.canvas if isinstance(whole.canvas, FigureCanvasAgg) else FigureCanvasAgg(whole)
        canvas.print_png(out, metadata={"Software": None}, pil_kwargs={"compress_level": 3})
        title.remove()
        whole.set_facecolor(PAPER)
    return out.getvalue()


def to_svg(drawing: Drawing) -> str:
    """An <svg> element without title, for a page that defines the CSS variables; its ids are its own."""
    lay_out(drawing)
    out, whole = io.StringIO(), drawing.whole
    with _exported(), mpl.rc_context({"svg.hashsalt": drawing.name}):
        canvas: Any = FigureCanvasSVG(whole)
        canvas.print_svg(out, metadata={"Date": None, "Creator": None})
    top, height = 72 * _TITLE_IN, 72 * (whole.get_figheight() - _TITLE_IN)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' d="[^"]*', lambda path: re.sub(r"(?<=\.\d\d)\d+", "", path[0]), svg)  # hundredths of a point
    for before in ('id="', 'xlink:href="#', "url(#"):
        svg = svg.replace(before, f"{before}{drawing.name}-")
    svg = re.sub(
        r"<svg [^>]*>",
        rf'<svg viewBox="0 {top:g} {72 * WIDTH_IN:g} {height:g}" role="img" aria-label="{_plain(drawing.title)}" '
        r'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">',
        svg,
        count=1,
    )
    svg = re.sub(r"(font-family: 'DejaVu Sans')[^;\"]*", r"\1, sans-serif", svg)
    for color, variable in _CSS.items():
        svg = svg.replace(color, variable)
    return svg


def write_png(drawing: Drawing, folder: Path) -> None:
    files.write_bytes(folder / f"{drawing.name}.png", to_png(drawing))


def write_vectors(drawing: Drawing, folder: Path, style: str) -> None:
    """Write NAME.svg and NAME.pdf if the style is that of papers."""
    if style == FOR_PAPER:
        for suffix in VECTORS:
            files.write_bytes(folder / f"{drawing.name}.{suffix}", to_vector(drawing, suffix))


def to_vector(drawing: Drawing, suffix: str) -> bytes:
    """An SVG or PDF file for a paper: on white, without a title, which the caption gives. Fonts are inside."""
    lay_out(drawing)
    out, whole = io.BytesIO(), drawing.whole
    of_paper: dict[Any, Any] = {"svg.fonttype": "path", "svg.hashsalt": drawing.name, "pdf.fonttype": 42}
    box = Bbox.from_bounds(0, 0, whole.get_figwidth(), whole.get_figheight() - _TITLE_IN)  # inches
    with _exported(), mpl.rc_context(of_paper):
        faces = [(axes, axes.get_facecolor()) for axes in whole.axes]
        for axes, _ in faces:
            axes.set_facecolor("white")
        whole.set_facecolor("white")
        dated = {"CreationDate": None} if suffix == "pdf" else {"Date": None}
        whole.savefig(out, format=suffix, bbox_inches=box, facecolor="white", metadata={"Creator": None, **dated})
        for axes, face in faces:
            axes.set_facecolor(face)
        whole.set_facecolor(PAPER)
    return out.getvalue()


def _plain(text: str) -> str:
    return re.sub(r"[^\w .,:()%/+-]", "", text)


def use_log_seconds(ax: Axes, *, y: bool = False) -> None:
    """A log axis of seconds with a few readable ticks: round values of a narrow range, decades of a wide one."""
    axis = ax.yaxis if y else ax.xaxis
    (ax.set_yscale if y else ax.set_xscale)("log")
    low, high = ax.get_ylim() if y else ax.get_xlim()
    axis.set_major_locator(_few_ticks(np.log10(high / low)))
    axis.set_major_formatter(FuncFormatter(seconds_of_tick))
    axis.set_minor_formatter(NullFormatter())


def seconds_of_tick(value: float, _: int | None = None) -> str:
    return fmt.seconds(value).replace(".00 ", " ").replace(".0 ", " ")


def _few_ticks(decades: float) -> Locator:
    """A locator of at least two ticks, none so close to the next that their labels touch."""
    if decades < 0.6:
        return MaxNLocator(4)
    return LogLocator(subs=(1.0,) if decades > 2 else (1.0, 3.0) if decades > 1 else (1.0, 2.0, 3.0, 5.0))


def axis_positions(values: Iterable[object]) -> dict[object, float]:
    """The places of a setting's values on an axis: numbers at their value, others one after the other."""
    distinct = list(dict.fromkeys(values))
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in distinct):
        return {value: float(value) for value in distinct}  # type: ignore[arg-type]
    return {value: float(place) for place, value in enumerate(distinct)}
