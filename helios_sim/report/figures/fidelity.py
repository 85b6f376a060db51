"""Figures of a comparison with a measured run: counts over time, error against load, distributions of times."""

from __future__ import annotations

import numpy as np

from helios_sim.report.figures.style import (
    BASELINE_COLOR,
    MODEL_COLORS,
    Drawing,
    handles_of,
    legend_above,
    look,
    new_figure,
)
from helios_sim.report.result import ExperimentResult


def fidelity_drawings(result: ExperimentResult) -> list[Drawing]:
    """The figures; none where the result is no comparison with a measured run."""
    if result.fidelity is None:
        return []
    with look():
        found = [_counts(result), _load_errors(result), _spreads(result, "TTFT"), _spreads(result, "TPOT")]
        return [d for d in found if d is not None]


def _counts(result: ExperimentResult) -> Drawing | None:
    fidelity = result.fidelity
    if fidelity is None or not fidelity.counts:
        return None
    figure, axes = new_figure(1, len(fidelity.counts), 3.2)
    for ax, count in zip(axes, fidelity.counts, strict=True):
        ax.plot(count.time_s, count.measured, color=BASELINE_COLOR, label="measured")
        ax.plot(count.time_s, count.simulated, color=MODEL_COLORS[0], linewidth=1.2, label="simulated")
        ax.set_title(f"{count.name} requests")
        ax.set_xlabel("time since the first request (s)")
        ax.set_ylim(bottom=0)
    legend_above(figure, handles_of(*axes))
    caption = "The log's series has one sample a second; its clock is set by when its counts of prompt tokens rise."
    return Drawing("running_and_waiting", "Running and waiting requests", caption, figure)


def _load_errors(result: ExperimentResult) -> Drawing | None:
    fidelity = result.fidelity
    if fidelity is None or len(fidelity.load_errors) < 2:
        return None
    figure, (ax,) = new_figure(1, 1, 3.4)
    loads = [point.load for point in fidelity.load_errors]
    names = [name for name, _ in fidelity.load_errors[0].changes]
    for place, name in enumerate(names):
        changes = [100 * dict(point.changes)[name] for point in fidelity.load_errors]
        ax.plot(loads, changes, "o-", color=MODEL_COLORS[place % len(MODEL_COLORS)], label=name)
    ax.axhline(100 * fidelity.profile_error, color=BASELINE_COLOR, linewidth=1)
    ax.set_xlabel("arrivals over the log's own")
    ax.set_ylabel(f"change by a profile {fidelity.profile_error:.0%} slower (%)")
    legend_above(figure, handles_of(ax))
    caption = (
        "Grey: the profile's own error. Where waiting begins, a small error of capacity becomes a large one of TTFT."
    )
    return Drawing("error_against_load", "Error of the prediction against load", caption, figure)


def _spreads(result: ExperimentResult, name: str) -> Drawing | None:
    """Cumulative distributions of one time, a panel for each arm at each load."""
    spreads = [] if result.fidelity is None else [s for s in result.fidelity.spreads if s.name == name]
    if not spreads:
        return None
    columns = min(4, len(spreads))
    rows = -(-len(spreads) // columns)
    figure, axes = new_figure(rows, columns, 2.6 * rows)
    for place, (ax, spread) in enumerate(zip(axes, spreads, strict=False)):
        for runs, color, label in (
            (spread.measured_s, BASELINE_COLOR, "measured"),
            (spread.simulated_s, MODEL_COLORS[0], "simulated"),
        ):
            for times_s in runs:
                share = 100 * (np.arange(len(times_s)) + 1) / max(len(times_s), 1)
                ax.step(times_s * 1e3, share, where="post", color=color, linewidth=1.1, label=label)
        ax.set_title(spread.part.replace(", ", "\n", 1), fontsize="small")
        ax.set_ylabel("requests at or below (%)" if place % columns == 0 else "")
        ax.set_xlabel(f"{name} (ms)")
        ax.set_ylim(0, 102)
        ax.set_xlim(left=0)
    for ax in axes[len(spreads) :]:
        ax.set_visible(False)
    legend_above(figure, handles_of(axes[0]))
    caption = f"Share of requests whose {name} is at most so long, a line for each pass: their distance is the noise."
    return Drawing(f"spread_{name.lower()}", f"{name}, measured and simulated", caption, figure)
