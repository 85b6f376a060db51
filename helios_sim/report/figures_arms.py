"""Figures of the arms themselves: one metric against another, and quality over the run. Draws, no more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from helios_sim.report.definitions import DEFINITIONS, Better
from helios_sim.report.records import Records
from helios_sim.report.result import ArmsFigure, ExperimentResult, QualityFigure
from helios_sim.report.style import Drawing, arm_styles, handles_of, legend_above, look, new_figure

_DIRECTION = {Better.HIGHER: "more is better", Better.LOWER: "less is better", Better.NEITHER: ""}


def arms_drawings(result: ExperimentResult) -> list[Drawing]:
    """The figures of this kind that the experiment asked for; none where fewer than two arms have both metrics."""
    drawings: list[Drawing | None] = []
    with look():
        for place, spec in enumerate(result.figures):
            if isinstance(spec, ArmsFigure):
                drawings.append(arms_figure(f"arms_{place}", spec, result))
            elif isinstance(spec, QualityFigure):
                drawings.append(quality_figure(f"quality_{place}", spec, result))
    return [drawing for drawing in drawings if drawing is not None]


def arms_figure(name: str, spec: ArmsFigure, result: ExperimentResult) -> Drawing | None:
    styles = arm_styles(list(result.arms), result.baseline)
    points = _points(spec, result)
    if len(points) < 2:
        return None
    figure, (ax,) = new_figure(1, 1, 4.6)
    for arm, x, y in points:
        style = styles[arm]
        ax.plot([x], [y], color=style.color, marker=style.marker, markersize=8, linestyle="none", label=arm)
    ax.margins(x=0.08, y=0.1)
    ax.set_xlabel(_axis(spec.x))
    ax.set_ylabel(_axis(spec.y))
    legend_above(figure, handles_of(ax), columns=4)
    return Drawing(name, spec.title, "A point for each arm, means over seeds.", figure)


def quality_figure(name: str, spec: QualityFigure, result: ExperimentResult) -> Drawing | None:
    """Bits per character of consecutive requests, the replicates' means; None where no arm knows its bits."""
    styles = arm_styles(list(result.arms), result.baseline)
    figure, (ax,) = new_figure(1, 1, 4.2)
    for arm in spec.arms or result.arms:
        lines = [bits_over_run(replicate.records, spec.parts) for replicate in result.arms[arm].replicates]
        if any(value is not None for line in lines for value in line):
            y = np.array([[np.nan if value is None else value for value in line] for line in lines]).mean(axis=0)
            x = (np.arange(spec.parts) + 0.5) / spec.parts
            ax.plot(x, y, color=styles[arm].color, linestyle=styles[arm].linestyle, label=arm)
    if not ax.lines:
        return None
    ax.set_xlabel("share of the requests so far")
    ax.set_ylabel("bits per character (less is better)")
    legend_above(figure, handles_of(ax), columns=3)
    caption = (
        f"Of each {1 / spec.parts:.0%} of the requests in their order, means over seeds. The text itself changes too."
    )
    return Drawing(name, spec.title, caption, figure)


def bits_over_run(records: Records, parts: int) -> list[float | None]:
    """Bits per character of each of `parts` equal shares of the requests, in order of arrival."""
    part = np.arange(len(records)) * parts // max(len(records), 1)
    return [records.bits_per_char(part == number) for number in range(parts)]


def _points(spec: ArmsFigure, result: ExperimentResult) -> Sequence[tuple[str, float, float]]:
    found = []
    for name, arm in result.arms.items():
        x, y = arm.metrics.get(spec.x), arm.metrics.get(spec.y)
        shown = spec.arms is None or name in spec.arms
        if shown and isinstance(x, int | float) and isinstance(y, int | float):
            found.append((name, float(x), float(y)))
    return found


def _axis(metric: str) -> str:
    definition = DEFINITIONS[metric]
    unit = "" if "/" in definition.label else definition.unit  # the label says it already
    notes = ", ".join(filter(None, (unit, _DIRECTION[definition.better])))
    return f"{definition.label} ({notes})" if notes else definition.label
