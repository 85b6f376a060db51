"""The common look of all figures: colours of arms, a figure of the standard width, its legend, and export."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from helios_sim.report.figures.axes import DASHES, FINE_DOTS, LEGEND_SIZE, WIDTH, Axes, Look
from helios_sim.report.figures.canvas import INK, MUTED, PAPER, Png, Svg, text_width
from helios_sim.report.figures.plot import Figure

__all__ = [
    "BASELINE_COLOR", "DASHES", "FINE_DOTS", "INK", "MODEL_COLORS", "MUTED", "PAPER", "ArmStyle", "Drawing",
    "arm_styles", "axis_positions", "labels_of", "legend_above", "new_figure", "shades", "to_png", "to_svg",
]  # fmt: skip

# Of middling lightness, so that they read on white and on near-black.
_NAMED = {"helios": "#2f74e6", "helios_probe": "#0fa08a", "oracle": "#8a63d2"}
_CYCLE = ("#e5822e", "#c9499c", "#c79a12", "#d8503f", "#2ba3cc", "#7fa02e", "#a86d50", "#6f7bd9", "#1d9a5b", "#b85c7a")
BASELINE_COLOR = "#7c8796"
MODEL_COLORS = ("#2f74e6", "#e5822e", "#0fa08a", "#c9499c", "#c79a12")
_MARKERS = "osD^vPX*<>"
_SHADES = ((71, 46, 124), (44, 113, 142), (33, 144, 141), (94, 201, 98), (189, 223, 38))  # viridis without its ends
_TITLE = 30.0  # points: the strip above a PNG
_LEGEND_WIDTH = WIDTH - 12


@dataclass(frozen=True, slots=True)
class ArmStyle:
    """The look of one arm's lines and marks."""

    color: str
    dash: tuple[float, ...]
    marker: str


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure with its file name (no suffix), title and a sentence on how to read it."""

    name: str
    title: str
    caption: str
    figure: Figure


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
        styles[arm] = ArmStyle(color, DASHES["--" if dashed else "-"], _MARKERS[place % len(_MARKERS)])
    return styles


def new_figure(
    rows: int, columns: int, height_in: float, *, sharex: bool | str = False, sharey: bool | str = False,
    heights: Sequence[float] = (),
) -> tuple[Figure, list[Axes]]:  # fmt: skip
    """A figure of the standard width with its panels in reading order. `heights`: of rows, relative to each other."""
    axes = [Axes() for _ in range(rows * columns)]
    return Figure(rows, columns, height_in * 72, axes, heights or (1.0,) * rows, sharex, sharey), axes


def legend_above(figure: Figure, labels: Mapping[str, Look], columns: int = 5) -> None:
    """One legend above all panels, read row by row, of as many columns as fit."""
    if not labels:
        return
    entry = max(text_width(text, LEGEND_SIZE) + (32 if look.dash else 20) + 28 for text, look in labels.items())
    columns = min(columns, len(labels), max(1, int(_LEGEND_WIDTH / entry)))
    entries = list(labels.items())
    figure.legend = [entries[first : first + columns] for first in range(0, len(entries), columns)]


def labels_of(*axes: Axes) -> dict[str, Look]:
    """The labelled series of these panels, each label once."""
    found: dict[str, Look] = {}
    for ax in axes:
        for label, look in ax.labelled.items():
            found.setdefault(label, look)
    return found


def to_png(drawing: Drawing) -> bytes:
    """A PNG file on white, with the title above."""
    canvas = Png(WIDTH, drawing.figure.height + _TITLE)
    canvas.text(drawing.title, 8.0, _TITLE * 0.5 + 4.4, 12.5, INK, bold=True)
    drawing.figure.draw(canvas, _TITLE)
    return canvas.content()


def to_svg(drawing: Drawing) -> str:
    """An <svg> element without title, for a page that defines the CSS variables; its ids are its own."""
    canvas = Svg(WIDTH, drawing.figure.height, drawing.name)
    drawing.figure.draw(canvas)
    return canvas.element(drawing.title)


def shades(count: int) -> list[str]:
    """Colours of one scale, so that neighbours look alike."""
    found = []
    for number in range(count):
        place = number / max(1, count - 1) * (len(_SHADES) - 1)
        below = min(int(place), len(_SHADES) - 2)
        pair = zip(_SHADES[below], _SHADES[below + 1], strict=True)
        found.append("#" + "".join(f"{round(a + (b - a) * (place - below)):02x}" for a, b in pair))
    return found


def axis_positions(values: Iterable[object]) -> dict[Any, float]:
    """Positions of a setting's values on an axis: numbers at their value, others one after the other."""
    distinct = list(dict.fromkeys(values))
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in distinct):
        return {value: float(value) for value in distinct}  # type: ignore[arg-type]
    return {value: float(place) for place, value in enumerate(distinct)}
