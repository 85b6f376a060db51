"""A figure of the arms themselves: one metric against another, a point for each. Draws, no more."""

from __future__ import annotations

from collections.abc import Sequence

from helios_sim.report.definitions import DEFINITIONS, Better
from helios_sim.report.result import ArmsFigure, ExperimentResult
from helios_sim.report.style import INK, Drawing, arm_styles, handles_of, legend_above, look, new_figure

_DIRECTION = {Better.HIGHER: "more is better", Better.LOWER: "less is better", Better.NEITHER: ""}


def arms_drawings(result: ExperimentResult) -> list[Drawing]:
    """The figures of this kind that the experiment asked for; none where fewer than two arms have both metrics."""
    wanted = [spec for spec in result.figures if isinstance(spec, ArmsFigure)]
    with look():
        return [d for place, spec in enumerate(wanted) if (d := arms_figure(f"arms_{place}", spec, result)) is not None]


def arms_figure(name: str, spec: ArmsFigure, result: ExperimentResult) -> Drawing | None:
    styles = arm_styles(list(result.arms), result.baseline)
    points = _points(spec, result)
    if len(points) < 2:
        return None
    figure, (ax,) = new_figure(1, 1, 4.6)
    for arm, x, y in points:
        style = styles[arm]
        ax.plot([x], [y], color=style.color, marker=style.marker, markersize=8, linestyle="none", label=arm)
        ax.annotate(arm, (x, y), (6, 5), textcoords="offset points", fontsize=8.5, color=INK)
    ax.margins(x=0.16, y=0.12)
    ax.set_xlabel(_axis(spec.x))
    ax.set_ylabel(_axis(spec.y))
    legend_above(figure, handles_of(ax), columns=4)
    return Drawing(name, spec.title, "A point for each arm, means over seeds.", figure)


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
    notes = ", ".join(filter(None, (definition.unit, _DIRECTION[definition.better])))
    return f"{definition.label} ({notes})" if notes else definition.label
