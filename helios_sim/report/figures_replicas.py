"""The figure of the replicas: how evenly a router loads them, and what that does to those who wait. Draws, no more."""

from __future__ import annotations

from collections.abc import Callable

from helios_sim.report.replicas import ReplicaFigures
from helios_sim.report.result import ExperimentResult
from helios_sim.report.style import Drawing, arm_styles, handles_of, legend_above, look, new_figure

_MARKERS = "osD^vP*X"  # by kind


def replica_drawings(result: ExperimentResult) -> list[Drawing]:
    """One figure where any arm has several replicas."""
    arms = [arm for arm in result.arms.values() if len(arm.replicas) > 1]
    if not arms:
        return []
    kinds = list(dict.fromkeys(it.kind for arm in arms for it in arm.replicas))
    styles = arm_styles(list(result.arms), result.baseline)
    panels: tuple[tuple[str, Callable[[ReplicaFigures], float | None]], ...] = (
        ("Busy (% of the span)", lambda it: None if it.busy_fraction is None else 100 * it.busy_fraction),
        ("Mean E2E (s)", lambda it: it.e2e_s_mean),
    )
    with look():
        figure, axes = new_figure(1, len(panels), 1.3 + 0.34 * len(arms), sharey=True)
        for ax, (title, of) in zip(axes, panels, strict=True):
            for row, arm in enumerate(arms):
                for place, kind in enumerate(kinds):
                    values = [value for it in arm.replicas if it.kind == kind and (value := of(it)) is not None]
                    marker = _MARKERS[place % len(_MARKERS)]
                    label = kind or "all alike"
                    if values:
                        ax.plot(
                            values,
                            [row] * len(values),
                            color=styles[arm.name].color,
                            marker=marker,
                            markersize=7,
                            alpha=0.75,
                            linestyle="none",
                            label=label,
                        )
            ax.set_title(title)
            ax.set_yticks(range(len(arms)), [arm.name for arm in arms])
            ax.set_ylim(len(arms) - 0.5, -0.5)
            ax.set_xlim(left=0)
            ax.grid(axis="y", visible=False)
            ax.tick_params(axis="y", length=0)
        if len(kinds) > 1:
            legend_above(figure, handles_of(*axes))
    caption = "A mark for each replica, in the first seed: side by side where the load is even."
    return [Drawing("replicas", "Replicas", caption, figure)]
