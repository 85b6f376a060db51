"""Figures of a sweep of designs: the front between objectives, and the effect of each parameter on them."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from helios_sim.report.designs import Design, DesignsResult, merits_of, on_front, plain_value
from helios_sim.report.figures.style import (
    INK,
    MUTED,
    RULE,
    Drawing,
    arm_styles,
    axis_positions,
    handles_of,
    legend_above,
    look,
    new_figure,
)
from helios_sim.report.format import in_unit
from helios_sim.report.metrics import DEFINITIONS, Better

FRONT_COLOR = "#2f74e6"
MOST_COLUMNS = 4
BINS = 8  # of a parameter's values, where it has more
WIDE = 20  # times from the smallest to the largest value: from here on an axis is logarithmic


def design_drawings(result: DesignsResult) -> list[Drawing]:
    """The Pareto front where there are several objectives, and the parameters."""
    with look():
        found = [parameter_figure(result)]
        if len(result.objectives) > 1:
            found.insert(0, pareto_figure(result))
    return found


def pareto_figure(result: DesignsResult) -> Drawing:
    """The first objective against each other one; a line joins the designs on the front of those two alone."""
    x, others = result.objectives[0], result.objectives[1:]
    columns = min(len(others), 2)
    rows = -(-len(others) // columns)
    figure, axes = new_figure(rows, columns, 0.6 + 3.9 * rows)
    styles = arm_styles([design.name for design in result.references], "")
    front = {design.name for design in result.front}
    for ax, y in zip(axes, others, strict=False):
        beaten = [d for d in result.designs if d.name not in front]
        _dots(ax, beaten, x, y, color=MUTED, alpha=0.35, size=12, text="a design")
        _dots(ax, list(result.front), x, y, color=FRONT_COLOR, alpha=0.95, size=26, text="beaten by none")
        merits = merits_of(result.designs, (x, y))
        best = [d for d, there in zip(result.designs, on_front(merits), strict=True) if there]
        line = sorted(_points(best, x, y))
        if line:
            ax.plot(*zip(*line, strict=True), color=FRONT_COLOR, linewidth=1.2, alpha=0.6, zorder=1)
        for reference in result.references:
            own = reference.name == result.arm
            color = INK if own else styles[reference.name].color
            for px, py in _points([reference], x, y):
                ax.plot(
                    [px], [py], styles[reference.name].marker, color=color, markersize=8, markerfacecolor="none",
                    markeredgewidth=1.8, label=f"{reference.name}, as set" if own else reference.name, zorder=4,
                )  # fmt: skip
        _name_axes(ax, x, y)
    for ax in axes[len(others) :]:
        ax.set_axis_off()
    legend_above(figure, handles_of(*axes[: len(others)]), columns=4)
    better = "; ".join(_hint(name) for name in result.objectives)
    caption = (
        f"Each dot is a design under the same requests; blue ones are beaten by no other in all "
        f"{len(result.objectives)} objectives together. The line joins the best between the two shown. {better}."
    )
    return Drawing("pareto", "What can be had for what", caption, figure)


def parameter_figure(result: DesignsResult) -> Drawing:
    """Each objective against each parameter, all designs; the front in blue."""
    matter = influence(result)
    shown = sorted(result.parameters, key=lambda name: -matter[name])[:MOST_COLUMNS]
    rows = len(result.objectives)
    figure, axes = new_figure(rows, len(shown), 0.5 + 2.1 * rows, sharex="col", sharey="row")
    front = {design.name for design in result.front}
    for place, ax in enumerate(axes):
        row, column = divmod(place, len(shown))
        parameter, metric = shown[column], result.objectives[row]
        positions = axis_positions([design.parameters[parameter] for design in result.designs])
        for chosen, color, alpha, size in ((False, MUTED, 0.3, 10), (True, FRONT_COLOR, 0.9, 18)):
            rows_of = [
                (positions[design.parameters[parameter]], value)
                for design in result.designs
                if (design.name in front) is chosen and (value := _value(design, metric)) is not None
            ]
            if rows_of:
                text = "beaten by none" if chosen else "a design"
                xs, ys = zip(*rows_of, strict=True)
                ax.scatter(xs, ys, s=size, color=color, alpha=alpha, linewidth=0, label=text)
        if any(not isinstance(value, int | float) for value in positions):
            ax.set_xticks(list(positions.values()), [str(value) for value in positions])
        if column == 0:
            ax.set_ylabel(DEFINITIONS[metric].label)
            _format(ax, metric, "y")
        if row == rows - 1:
            ax.set_xlabel(parameter)
    legend_above(figure, handles_of(*axes), columns=2)
    left = len(result.parameters) - len(shown)
    caption = "Every design by the value of each parameter, all others being whatever they are in that design." + (
        f" Shown are the parameters that move the objectives most; {left} more are in designs.parquet." if left else ""
    )
    return Drawing("parameters", "What each parameter does", caption, figure)


def influence(result: DesignsResult) -> dict[str, float]:
    """Each parameter's share of the variance: between its values (up to BINS bins), averaged over the objectives."""
    merits = merits_of(result.designs, result.objectives)
    known = np.isfinite(merits).all(axis=1)
    total = merits[known].var(axis=0)
    found = {}
    for name in result.parameters:
        positions = axis_positions([design.parameters[name] for design in result.designs])
        value = np.array([positions[design.parameters[name]] for design in result.designs])[known]
        edges = np.unique(np.quantile(value, np.linspace(0, 1, BINS + 1))) if len(value) else np.array([0.0])
        group = np.searchsorted(edges, value, side="right")
        within = sum((group == g).mean() * merits[known][group == g].var(axis=0) for g in np.unique(group))
        found[name] = float(np.mean(np.divide(total - within, total, out=np.zeros_like(total), where=total > 0)))
    return found


def _dots(ax: Axes, designs: list[Design], x: str, y: str, *, color: str, alpha: float, size: int, text: str) -> None:
    points = _points(designs, x, y)
    if points:
        xs, ys = zip(*points, strict=True)
        ax.scatter(xs, ys, s=size, color=color, alpha=alpha, linewidth=0, label=text, zorder=2)


def _points(designs: list[Design], x: str, y: str) -> list[tuple[float, float]]:
    pairs = ((_value(design, x), _value(design, y)) for design in designs)
    return [(px, py) for px, py in pairs if px is not None and py is not None]


def _value(design: Design, metric: str) -> float | None:
    return None if design.metrics is None else plain_value(metric, design.metrics[metric])


def _name_axes(ax: Axes, x: str, y: str) -> None:
    ax.set_xlabel(DEFINITIONS[x].label)
    ax.set_ylabel(DEFINITIONS[y].label)
    _format(ax, x, "x")
    _format(ax, y, "y")


def _format(ax: Axes, metric: str, side: str) -> None:
    """Ticks with their unit; logarithmic where values differ by orders of magnitude."""
    axis = ax.xaxis if side == "x" else ax.yaxis
    low, high = ax.dataLim.intervalx if side == "x" else ax.dataLim.intervaly
    if np.isfinite([low, high]).all() and low > 0 and high / low > WIDE:
        ax.set_xscale("log") if side == "x" else ax.set_yscale("log")
    unit = DEFINITIONS[metric].unit
    if unit and unit != "1/s":  # the label says it
        axis.set_major_formatter(FuncFormatter(lambda value, _: in_unit(value, unit)))
    ax.grid(color=RULE)


def _hint(name: str) -> str:
    word = "more" if DEFINITIONS[name].better is Better.HIGHER else "less"
    return f"{DEFINITIONS[name].label}: {word} is better"
