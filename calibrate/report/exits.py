"""The page's sections on exits: tables and figures from traces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calibrate.exits.reliability import ExitStatistics, exit_statistics, joint_of_pairs, measures
from calibrate.report.page import Section, Table, palette
from helios_sim.exits.replay import JointExits
from helios_sim.exits.trace import ExitTrace
from helios_sim.provenance import weakest
from helios_sim.report import format as fmt
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

MOST_COLUMNS = 12  # most exits shown in a table
_ROW_IN = 0.3


def exit_sections(
    trace: ExitTrace, others: Sequence[ExitTrace], threshold: float, heads: Mapping[str, Any] | None
) -> tuple[list[Section], list[ExitStatistics]]:
    """Sections on the trace, on the reliability of its confidences, and on pairs with `others`.

    `heads` is the header of the exit heads that were used, if any.
    """
    found = [exit_statistics(trace, threshold, confidence) for confidence in measures(trace)]
    if not found:
        return [], []
    joints = joint_of_pairs([trace, *others], threshold)
    drawings = {drawing.name: drawing for drawing in exit_drawings(found, joints)}
    reliable = [drawing for name, drawing in drawings.items() if name.startswith("reliability_")]
    own = trace.provenance.provenance_class.value
    sections = [
        Section(
            "exits",
            "Where tokens leave",
            own,
            [_about(trace), *([] if heads is None else [_of_heads(heads)])],
            tables=[_by_task(found[0]), _sweep(found)],
            figures=[drawings["exit_histograms"], drawings["thresholds"]],
        ),
        Section(
            "unchanged",
            "Unchanged tokens at each exit",
            own,
            ["The share of tokens that the model would give unchanged if it were cut at that layer for all of them."],
            tables=[_unchanged(found[0])],
            figures=[drawings["unchanged"]],
        ),
        Section(
            "reliability",
            "How far confidences can be trusted",
            own,
            [
                "A threshold means what it says only if a confidence of 0.9 agrees with full depth nine times out of "
                "ten. ECE is the mean gap between the two."
            ],
            tables=[_calibration(found, heads)],
            figures=reliable,
        ),
    ]
    if joints:
        classes = [t.provenance.provenance_class for t in (trace, *others)]
        text = [f"Traces of the same text, lined up by characters; each at threshold {threshold:g}."]
        figures = [drawings["joint_exits"]]
        sections.append(
            Section("pairs", "Pairs of models", weakest(classes).value, text, tables=[_joint(joints)], figures=figures)
        )
    return sections, found


def exit_summary(found: Sequence[ExitStatistics]) -> dict[str, Any]:
    """The exits' part of summary.json: agreement per exit and task, calibration, and results by threshold."""
    if not found:
        return {}
    first = found[0]
    return {
        "exits": list(first.exits),
        "threshold": first.threshold,
        "tokens": {task: int(n) for task, n in zip(first.trace.tasks, first.tokens, strict=True)},
        "unchanged": {
            "all": _rounded(first.all_unchanged),
            **{task: _rounded(row) for task, row in zip(first.trace.tasks, first.unchanged, strict=True)},
        },
        "confidences": {
            s.confidence.value: {
                "ece": [round(r.ece, 4) for r in s.reliability],
                "agreement": dict(zip(s.trace.tasks, _rounded(s.agreement), strict=True)),
                "layers_per_token": dict(zip(s.trace.tasks, _rounded(s.layers_per_token), strict=True)),
                "thresholds": [
                    {
                        "threshold": p.threshold,
                        "layers_per_token": round(p.layers_per_token, 3),
                        "left_early": round(p.left_early, 4),
                        "agreement": round(p.agreement, 4),
                    }
                    for p in s.sweep
                ],
            }
            for s in found
        },
        "bits_per_char": None
        if first.bits_per_char is None
        else dict(zip(first.trace.tasks, _rounded(first.bits_per_char), strict=True)),
    }


def _about(trace: ExitTrace) -> str:
    who = "written by people" if trace.human_text else "the model's own answers"
    return (
        f"{trace.n_tokens:,} tokens of {len(trace.tasks)} tasks ({who}), {len(trace.exits) - 1} early exits below the "
        f"last of {trace.n_layers} layers. Source: {trace.provenance.source}."
    )


def _of_heads(heads: Mapping[str, Any]) -> str:
    depths = ", ".join(map(str, heads["exits"]))
    return f"Exit heads of {heads['model']} after layers {depths}, sha256 {str(heads['sha256'])[:12]}…"


def _by_task(s: ExitStatistics) -> Table:
    rows = []
    for k, task in enumerate(s.trace.tasks):
        bits = fmt.NOTHING if s.bits_per_char is None else f"{s.bits_per_char[k]:.3f}"
        rows.append(
            (
                task,
                f"{s.tokens[k]:,}",
                f"{100 * (1 - s.exit_share[k, -1]):.1f} %",
                f"{s.layers_per_token[k]:.2f}",
                f"{s.agreement[k]:.3f}",
                bits,
            )
        )
    note = f"Per-token exits at {s.confidence.value} {s.threshold:g}; layers do not count the checks."
    columns = ("task", "tokens", "left early", "layers per token", "agreement", "bits per character")
    return Table(columns, rows, note=note)


def _sweep(found: Sequence[ExitStatistics]) -> Table:
    columns = ["threshold"]
    for s in found:
        columns += [f"{s.confidence.value}: layers per token", "left early", "agreement"]
    rows = []
    for points in zip(*(s.sweep for s in found), strict=True):
        cells = [f"{points[0].threshold:g}"]
        for p in points:
            cells += [f"{p.layers_per_token:.2f}", f"{100 * p.left_early:.1f} %", f"{p.agreement:.3f}"]
        rows.append(cells)
    return Table(columns, rows, title="What a threshold gives, all tasks together")


def _unchanged(s: ExitStatistics) -> Table:
    shown = _some(len(s.exits))
    rows = [
        ["all tasks", *(f"{s.all_unchanged[e]:.3f}" for e in shown)],
        *([task, *(f"{s.unchanged[k, e]:.3f}" for e in shown)] for k, task in enumerate(s.trace.tasks)),
    ]
    left_out = len(s.exits) - len(shown)
    note = f"{left_out} more exits are in summary.json." if left_out else ""
    return Table(["after layer", *(str(s.exits[e]) for e in shown)], rows, note=note)


def _calibration(found: Sequence[ExitStatistics], heads: Mapping[str, Any] | None) -> Table:
    before = _before(heads)
    columns = ["exit after layer"]
    for s in found:
        if s.confidence.value in before:
            columns.append(f"{s.confidence.value}: ECE before calibration")
        columns.append(f"{s.confidence.value}: ECE")
    rows = []
    for e, depth in enumerate(found[0].exits[:-1]):
        cells = [str(depth)]
        for s in found:
            if s.confidence.value in before:
                value = before[s.confidence.value].get(depth)
                cells.append(fmt.NOTHING if value is None else f"{value:.3f}")
            cells.append(f"{s.reliability[e].ece:.3f}")
        rows.append(cells)
    note = "ECE is taken on this trace's text." if not before else (
        "ECE on this trace's text; before calibration: as recorded when the heads were trained."
    )  # fmt: skip
    return Table(columns, rows, note=note)


def _before(heads: Mapping[str, Any] | None) -> dict[str, dict[int, float]]:
    """ECE before calibration by confidence and depth, from the heads' header."""
    recorded: Mapping[str, Mapping[str, float]] = {} if heads is None else heads.get("calibration", {})
    names = {"max_probability": "probability_before", "classifier": "check_before"}
    return {
        confidence: {int(depth): float(found[name]) for depth, found in recorded.items() if name in found}
        for confidence, name in names.items()
        if recorded
    }


def _joint(joints: Sequence[JointExits]) -> Table:
    rows = [
        (
            f"{joint.models[0]} with {joint.models[1]}",
            f"{100 * joint.share[0].sum():.1f} %",
            f"{100 * joint.share[:, 0].sum():.1f} %",
            f"{100 * joint.early_in_either:.1f} %",
            fmt.NOTHING if joint.late_helped is None else f"{100 * joint.late_helped:.1f} %",
        )
        for joint in joints
    ]
    columns = ("pair", "first exit of the first", "first exit of the second", "of either", "late in the first, helped")
    note = (
        "Shares of characters. The last column: of what misses the first model's first exit, the share that makes the "
        "second's."
    )
    return Table(columns, rows, note=note)


def _some(count: int) -> list[int]:
    """Indices out of `count`, at most MOST_COLUMNS, evenly spaced, including the first and the last."""
    return sorted({round(x) for x in np.linspace(0, count - 1, min(count, MOST_COLUMNS))})


def _rounded(values: Any) -> list[float]:
    return [round(float(v), 4) for v in values]


def exit_drawings(found: Sequence[ExitStatistics], joints: Sequence[JointExits]) -> list[Drawing]:
    """All figures: exits by task, unchanged tokens, thresholds, reliability by confidence, and pairs of models."""
    if not found:
        return []
    with look():
        drawings = [histogram_figure(found[0]), unchanged_figure(found[0]), sweep_figure(found)]
        drawings += [reliability_figure(statistics) for statistics in found]
        if joints:
            drawings.append(joint_figure(joints))
    return drawings


def histogram_figure(s: ExitStatistics) -> Drawing:
    """A bar per task, divided into the shares that exit at each depth."""
    tasks = s.trace.tasks
    figure, (ax,) = new_figure(1, 1, 1.3 + _ROW_IN * len(tasks))
    start = np.zeros(len(tasks))
    for e, (depth, color) in enumerate(zip(s.exits, palette(len(s.exits)), strict=True)):
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
    """A line per task: the share of unchanged tokens over depth."""
    figure, (ax,) = new_figure(1, 1, 3.5)
    for k, (task, color) in enumerate(zip(s.trace.tasks, palette(len(s.trace.tasks)), strict=True)):
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
    """Agreement against layers per token, by threshold."""
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
    """Agreement against confidence: a panel per exit below the last, with the tokens per bin as bars."""
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
    """A heat map per pair of models."""
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
                color = PAPER if share > dark else "#1b1f27"  # not INK: the map is light in both themes
                ax.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)
    for ax in axes[len(joints) :]:
        ax.set_visible(False)
    caption = "Share of the characters of the same text (%), by where each model's token leaves."
    return Drawing("joint_exits", "Where pairs of models leave on the same text", caption, figure)


def _named(s: ExitStatistics) -> str:
    return {"max_probability": "largest probability", "classifier": "classifier"}.get(s.confidence, s.confidence)
