"""The figure of published measurements beside their predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from helios_sim.report.figures.style import BASELINE_COLOR, Drawing, handles_of, legend_above, look, new_figure

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")


def silicon_drawing(rows: Sequence[Mapping[str, Any]]) -> Drawing:
    """Time per output token and time to first token of each row that is predicted, a color for each group."""
    with look():
        figure, axes = new_figure(1, 2, 4.2)
        figures = {"tpot_ms": "time per output token", "ttft_ms": "time to first token"}
        for ax, (name, title) in zip(axes, figures.items(), strict=True):
            predicted = [row for row in rows if row[f"predicted_{name}"]]
            for place, group in enumerate(dict.fromkeys(row["group"] for row in predicted)):
                own = [(row[name], row[f"predicted_{name}"]) for row in predicted if row["group"] == group]
                measured, simulated = zip(*own, strict=True)
                ax.scatter(measured, simulated, s=9, alpha=0.7, color=COLORS[place % len(COLORS)], label=group)
            ends = [value for row in predicted for value in (row[name], row[f"predicted_{name}"])] or [1.0, 10.0]
            ax.plot([min(ends), max(ends)], [min(ends), max(ends)], color=BASELINE_COLOR, linewidth=1)
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.set_title(title)
            ax.set_xlabel("measured (ms)")
            ax.set_ylabel("predicted (ms)")
        legend_above(figure, handles_of(axes[0]))
    caption = "Each point is a run on real cards that others measured; on the line both are equal."
    return Drawing("silicon", "Measured and predicted", caption, figure)
