"""What the page says about exits: tables and figures from traces. Knows traces, not how they were recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calibrate.report_exits import ExitStatistics, exit_statistics, joint_of_pairs, measures
from calibrate.report_figures import exit_drawings
from calibrate.report_page import Section, Table
from helios_sim.exits.replay import JointExits
from helios_sim.exits.trace import ExitTrace
from helios_sim.provenance import weakest
from helios_sim.report import format as fmt

MOST_COLUMNS = 12  # of exits in a table; the trace has all


def exit_sections(
    trace: ExitTrace, others: Sequence[ExitTrace], threshold: float, heads: Mapping[str, Any] | None
) -> tuple[list[Section], list[ExitStatistics]]:
    """Sections on the trace, on how far its confidences can be trusted, and on pairs with `others`.

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
    """For summary.json: agreement per exit and task, calibration, and what thresholds give."""
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
    """ECE before calibration by confidence and depth, where the heads' header tells."""
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
    """Places of at most MOST_COLUMNS of `count`, evenly, the first and the last among them."""
    return sorted({round(x) for x in np.linspace(0, count - 1, min(count, MOST_COLUMNS))})


def _rounded(values: Any) -> list[float]:
    return [round(float(v), 4) for v in values]
