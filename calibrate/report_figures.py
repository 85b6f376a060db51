"""Figures of a calibration: exits by task, reliability, unchanged tokens, times over their floor. Draws, no more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.ticker import FuncFormatter

from calibrate.report_exits import ExitStatistics
from helios_sim.exits.replay import JointExits
from helios_sim.report.figures.style import (
    BASELINE_COLOR,
    INK,
    MODEL_COLORS,
    MUTED,
    PAPER,
    Drawing,
    handles_of,
    legend_above,
    look,
    new_figure,
)

_PALETTE = "viridis"
_ROW_IN = 0.3


def exit_drawings(found: Sequence[ExitStatistics], joints: Sequence[JointExits]) -> list[Drawing]:
    """Of each way to be confident, what it gives; of the trace, what each exit keeps; of pairs, where both leave."""
    if not found:
        return []
    with look():
        drawings = [histogram_figure(found[0]), unchanged_figure(found[0]), sweep_figure(found)]
        drawings += [reliability_figure(statistics) for statistics in found]
        if joints:
            drawings.append(joint_figure(joints))
    return drawings


def histogram_figure(s: ExitStatistics) -> Drawing:
    """A bar for each task, cut into the shares that leave at each exit."""
    tasks = s.trace.tasks
    figure, (ax,) = new_figure(1, 1, 1.3 + _ROW_IN * len(tasks))
    start = np.zeros(len(tasks))
    for e, (depth, color) in enumerate(zip(s.exits, _colors(len(s.exits)), strict=True)):
        share = 100 * s.exit_share[:, e]
        last = e == len(s.exits) - 1
        ax.barh(tasks, share, left=start, height=0.72, color=BASELINE_COLOR if last else color,
                label=f"layer {depth}{' (all)' if last else ''}")  # fmt: skip
        start += share
    for row, agreement in enumerate(s.agreement):
        ax.annotate(f"{agreement:.3f}", (100, row), (5, 0), textcoords="offset points", va="center", fontsize=9,
                    color=INK, annotation_clip=False)  # fmt: skip
    ax.set_xlim(0, 100)
    ax.set_ylim(len(tasks) - 0.4, -0.6)
    ax.set_xlabel("tokens (%); at the right: share of the task's tokens that full depth gives too")
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    legend_above(figure, handles_of(ax), columns=8)
    caption = (
        f"Per-token exits at {s.confidence.value} {s.threshold:g}: each token leaves at the first exit that is "
        "confident. Another threshold gives another picture from the same trace."
    )
    return Drawing("exit_histograms", "Where tokens leave, by task", caption, figure)


def unchanged_figure(s: ExitStatistics) -> Drawing:
    """A line for each task over depth."""
    figure, (ax,) = new_figure(1, 1, 3.5)
    for k, (task, color) in enumerate(zip(s.trace.tasks, _colors(len(s.trace.tasks)), strict=True)):
        ax.plot(s.exits, 100 * s.unchanged[k], color=color, linewidth=1.1, alpha=0.85, label=task)
    ax.plot(s.exits, 100 * s.all_unchanged, "o-", color=INK, linewidth=2.4, label="all tasks")
    ax.set_xticks(s.exits)
    ax.set_xlabel("all tokens leave after layer")
    ax.set_ylabel("unchanged tokens (%)")
    ax.set_ylim(top=101)
    legend_above(figure, handles_of(ax), columns=8)
    caption = "Share of tokens that are the same as full depth's if the model is cut there, confident or not."
    return Drawing("unchanged", "Unchanged tokens at each exit", caption, figure)


def sweep_figure(found: Sequence[ExitStatistics]) -> Drawing:
    """Layers per token against agreement as the threshold moves."""
    figure, (ax,) = new_figure(1, 1, 3.3)
    for s, color in zip(found, MODEL_COLORS, strict=False):
        layers = [p.layers_per_token for p in s.sweep]
        agreement = [100 * p.agreement for p in s.sweep]
        ax.plot(layers, agreement, "o-", color=color, label=_named(s))
        for point in s.sweep:
            ax.annotate(f"{point.threshold:g}", (point.layers_per_token, 100 * point.agreement), (4, -10),
                        textcoords="offset points", fontsize=8, color=MUTED)  # fmt: skip
    ax.axvline(found[0].exits[-1], color=BASELINE_COLOR, linewidth=1.2)
    ax.set_xlabel("layers per token, checks not counted (grey line: all layers)")
    ax.set_ylabel("agreement with full depth (%)")
    legend_above(figure, handles_of(ax))
    caption = "What a threshold costs and saves. Further left and up is better; numbers are thresholds."
    return Drawing("thresholds", "Layers saved against tokens changed", caption, figure)


def reliability_figure(s: ExitStatistics) -> Drawing:
    """Agreement against confidence, a panel for each exit below the last, with tokens per bin underneath."""
    columns = min(4, len(s.reliability))
    rows = -(-len(s.reliability) // columns)
    figure, axes = new_figure(rows, columns, 0.5 + 2.35 * rows, sharex=True, sharey=True)
    for ax, curve, depth in zip(axes, s.reliability, s.exits, strict=False):
        ax.plot([0, 1], [0, 1], color=BASELINE_COLOR, linewidth=1.2)
        share = curve.tokens / curve.tokens.sum()
        ax.bar(curve.confidence, share, 0.05, color=MUTED, alpha=0.35)
        ax.plot(curve.confidence, curve.agreement, "o-", color=MODEL_COLORS[0], linewidth=1.6, markersize=4)
        ax.set_title(f"layer {depth}: ECE {curve.ece:.3f}")
        ax.set_xlim(0, 1)
        ax.set_ylim(0, 1.02)
    for ax in axes[len(s.reliability) :]:
        ax.set_visible(False)
    figure.supxlabel(f"confidence ({s.confidence.value})", fontsize=10)
    figure.supylabel("share that agrees", fontsize=10)
    caption = (
        "On the grey line a confidence is what it says. Bars: share of the tokens with that confidence. ECE: mean gap "
        "between line and dots, weighted with tokens."
    )
    return Drawing(f"reliability_{s.confidence.value}", f"How reliable: {_named(s)}", caption, figure)


def joint_figure(joints: Sequence[JointExits]) -> Drawing:
    """A heat map for each pair of models."""
    columns = min(3, len(joints))
    rows = -(-len(joints) // columns)
    figure, axes = new_figure(rows, columns, 0.4 + 3.4 * rows)
    for ax, joint in zip(axes, joints, strict=False):
        ax.imshow(joint.share, cmap="Blues", aspect="auto", vmin=0)
        ax.set_xticks(range(len(joint.exits[1])), [str(d) for d in joint.exits[1]])
        ax.set_yticks(range(len(joint.exits[0])), [str(d) for d in joint.exits[0]])
        ax.set_xlabel(f"{joint.models[1]} leaves after layer")
        ax.set_ylabel(f"{joint.models[0]} leaves after")
        ax.grid(visible=False)
        dark = joint.share.max() / 2
        for (row, column), share in np.ndenumerate(joint.share):
            if share >= 0.005:
                color = PAPER if share > dark else "#1b1f27"  # not the theme's ink: the map is light in both
                ax.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)
    for ax in axes[len(joints) :]:
        ax.set_visible(False)
    caption = "Share of the characters of the same text (%), by where each model's token leaves."
    return Drawing("joint_exits", "Where pairs of models leave on the same text", caption, figure)


def over_floor_figure(curves: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> Drawing | None:
    """Measured over floor against rows: (label, rows, ratio) of each curve."""
    if not curves:
        return None
    with look():
        figure, (ax,) = new_figure(1, 1, 3.2)
        for (label, rows, ratio), color in zip(curves, _colors(len(curves)), strict=True):
            ax.plot(rows, ratio, "o-", color=color, markersize=4, linewidth=1.6, label=label)
        ax.axhline(1, color=BASELINE_COLOR, linewidth=1.4)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        ax.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}×" if str(value)[0] in "25" else ""))
        ax.set_xlabel("rows that go through together (batch, or tokens of a prompt)")
        ax.set_ylabel("measured time over its floor")
        legend_above(figure, handles_of(ax))
    caption = (
        "The floor is the larger of bytes over the measured bandwidth and operations over the measured matrix rate. "
        "Nothing can lie below the grey line; what lies far above is where a kernel could be better."
    )
    return Drawing("over_floor", "Measured time over its floor", caption, figure)


def _named(s: ExitStatistics) -> str:
    return {"max_probability": "largest probability", "classifier": "classifier"}.get(s.confidence, s.confidence)


def _colors(count: int) -> list[tuple[float, ...]]:
    """From one map, so that neighbours look alike; its dark and pale ends left out for both themes."""
    return [colormaps[_PALETTE](0.15 + 0.75 * i / max(1, count - 1)) for i in range(count)]
