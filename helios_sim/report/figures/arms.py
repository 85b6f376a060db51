"""Figures of the arms: gains, published values, latencies, exits, metrics against each other, replicas, timelines."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from helios_sim.report import format as fmt
from helios_sim.report.breakdown import ReplicaFigures
from helios_sim.report.figures.style import (
    BASELINE_COLOR,
    DASHES,
    FINE_DOTS,
    INK,
    MODEL_COLORS,
    MUTED,
    PAPER,
    ArmStyle,
    Drawing,
    arm_styles,
    labels_of,
    legend_above,
    new_figure,
)
from helios_sim.report.metrics import DEFINITIONS
from helios_sim.report.records import Records
from helios_sim.report.result import ArmResult, ArmsFigure, Comparisons, ExperimentResult, QualityFigure
from helios_sim.request import NS_PER_S

_KIND_MARKERS = "osD^vP*X"  # by kind of replica
_FOREST = ("throughput_requests_per_s", "e2e_s_mean", "layers_per_token")
WIDE_RATIOS = 8  # largest over smallest, from which ratios are drawn on a log scale
_CDF_POINTS = 600  # enough for a smooth line, few enough for a small file


def answer_drawings(result: ExperimentResult, ratios: Comparisons) -> list[Drawing]:
    """The figures that answer the question: ours beside the published, and each arm against the baseline."""
    styles = arm_styles(list(result.arms), result.baseline)
    found = [published_figure(result), forest_figure(result, ratios, styles)]
    return [drawing for drawing in found if drawing is not None]


def detail_drawings(result: ExperimentResult) -> list[Drawing]:
    """Latency distributions and exit depths, where there are any."""
    styles = arm_styles(list(result.arms), result.baseline)
    found = [latency_figure(result, styles), exit_figure(result, styles)]
    return [drawing for drawing in found if drawing is not None]


def forest_figure(result: ExperimentResult, ratios: Comparisons, styles: dict[str, ArmStyle]) -> Drawing | None:
    """Ratio to the baseline with its interval, a row for each arm."""
    first = (result.headline_metrics or _FOREST)[0]
    wanted = dict.fromkeys((first, *_FOREST))
    shown = [m for m in wanted if any(m in of_arm and of_arm[m].ratio for of_arm in ratios.values())][:3]
    if not ratios or not shown:
        return None
    arms = list(ratios)
    names = [arm if result.baseline_of(arm) == result.baseline else f"{arm} †" for arm in arms]
    others = dict.fromkeys(result.baseline_of(arm) for arm in arms if result.baseline_of(arm) != result.baseline)
    figure, axes = new_figure(1, len(shown), 1.15 + 0.34 * len(arms), sharey=True)
    for ax, name in zip(axes, shown, strict=True):
        ax.axvline(1, color=BASELINE_COLOR, width=1.4)
        for row, arm in enumerate(arms):
            value = ratios[arm].get(name)
            if value is None or value.ratio is None:
                continue
            color = styles[arm].color
            if value.low is not None and value.high is not None:
                ax.plot([value.low, value.high], [row, row], color=color, width=5, alpha=0.35)
            ax.scatter([value.ratio], [row], color=color, size=7)
            ax.annotate(f"{value.ratio:.2f}×", (value.ratio, row), (0, 8), ha="center", color=INK, boxed=True)
        hint = fmt.direction(name)
        ax.set_title(fmt.label(name))
        ax.set_xlabel("ratio to baseline" + (f",\n{hint}" if hint else ""))
        known = [r.ratio for arm in arms if (r := ratios[arm].get(name)) is not None and r.ratio]
        if max(known) > WIDE_RATIOS * min(known):
            ax.log("x")
        ax.set_yticks(range(len(arms)), names)
        ax.set_ylim(len(arms) - 0.4, -0.7)
        ax.x.margin = 0.14
        ax.bare("y")
    caption = f"Grey line: {result.baseline}. Pale bars: 95 % intervals, where the runs give one."
    if others:
        caption += f" † against {', '.join(others)}."
    return Drawing("arms_vs_baseline", f"Each arm against {result.baseline}", caption, figure)


def latency_figure(result: ExperimentResult, styles: dict[str, ArmStyle]) -> Drawing | None:
    """Cumulative distributions of TTFT, TPOT and E2E, one line for each arm."""
    slo = result.slo
    panels = (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s), ("E2E", slo.e2e_s))
    figure, axes = new_figure(1, 3, 3.6, sharey=True)
    for name, arm in result.arms.items():
        records = [replicate.records for replicate in arm.replicates]
        tpots = [r.tpot_ns() for r in records]
        columns = (
            np.concatenate([r.ttft_ns() for r in records]).astype(np.float64),
            np.concatenate([ns[defined] for ns, defined in tpots]),
            np.concatenate([r.e2e_ns() for r in records]).astype(np.float64),
        )
        style = styles[name]
        for ax, column in zip(axes, columns, strict=True):
            if column.size:
                share = np.linspace(0, 100, min(_CDF_POINTS, max(2, column.size)))
                values = np.percentile(column, share) / NS_PER_S
                ax.plot(values, share, color=style.color, dash=style.dash, label=name)
    if all(ax.is_empty for ax in axes):
        return None
    for ax, (title, bound_s) in zip(axes, panels, strict=True):
        ax.set_title(title)
        if bound_s is not None:
            ax.axvline(bound_s, color=MUTED, width=1.2, dash=DASHES[":"])
            ax.annotate("SLO", (bound_s, 3), (3, 0))
        ax.seconds("x")
    axes[0].set_ylabel("requests at or below (%)")
    axes[0].set_ylim(0, 100)
    legend_above(figure, labels_of(*axes))
    return Drawing("latency", "Latency distributions", "Further left is faster. Completed requests, log scale.", figure)


def exit_figure(result: ExperimentResult, styles: dict[str, ArmStyle]) -> Drawing | None:
    """Share of output tokens by the layer after which they left, a panel for each model, bars for each arm."""
    models: dict[str, list[int]] = {}
    for arm in result.arms.values():
        for depths in arm.exit_depths:
            models[depths.model] = sorted({*models.get(depths.model, []), *depths.tokens_by_depth})
    if not models:
        return None
    figure, axes = new_figure(1, len(models), 3.7, sharey=True)
    for ax, (model, depths_of_model) in zip(axes, models.items(), strict=True):
        arms = [a for a in result.arms.values() if any(d.model == model for d in a.exit_depths)]
        width = 0.84 / len(arms)
        for place, arm in enumerate(arms):
            counts = next(d.tokens_by_depth for d in arm.exit_depths if d.model == model)
            total = sum(counts.values())
            shares = [100 * counts.get(depth, 0) / total if total else 0.0 for depth in depths_of_model]
            at = np.arange(len(depths_of_model)) + (place - (len(arms) - 1) / 2) * width
            ax.bar(at, shares, width * 0.92, color=styles[arm.name].color, label=arm.name)
            if len(arms) * len(depths_of_model) <= 14:
                for x, share in zip(at.tolist(), shares, strict=True):
                    ax.annotate(f"{share:.0f}" if share >= 0.5 else "", (x, share), (0, 3), ha="center", color=INK)
        ax.set_xticks(range(len(depths_of_model)), [str(d) for d in depths_of_model])
        ax.set_xlabel("left after layer")
        ax.set_title(model)
        ax.bare("x")
    axes[0].set_ylabel("output tokens (%)")
    labels = labels_of(*axes)
    legend_above(figure, {name: labels[name] for name in result.arms if name in labels})
    caption = "Where tokens leave: under a fixed cap all leave at the cap; under per-token exits where they are sure."
    return Drawing("exit_depths", "Exit depths", caption, figure)


def published_figure(result: ExperimentResult) -> Drawing | None:
    """Bars: ours with its interval, and the published value."""
    rows = [p for p in result.published if p.ours is not None and p.unit == "x"]
    if not rows:
        return None
    figure, (ax,) = new_figure(1, 1, 1.1 + 0.62 * len(rows))
    at = np.arange(len(rows))
    ours = [p.ours or 0.0 for p in rows]
    ax.barh(at - 0.19, ours, 0.34, color=MODEL_COLORS[0], label="this run")
    published = [p.published for p in rows]
    ax.barh(at + 0.19, published, 0.34, color=PAPER, edge=MUTED, width=1.3, hatched=True, label="published")
    for row, p in enumerate(rows):
        end = ours[row]
        if p.low is not None and p.high is not None:
            ax.plot([p.low, p.high], [row - 0.19] * 2, color=INK, width=1.6)
            for edge in (p.low, p.high):
                ax.plot([edge, edge], [row - 0.27, row - 0.11], color=INK, width=1.6)
            end = max(end, p.high)
        ax.annotate(f"{ours[row]:.2f}×", (end, row - 0.19), (6, 0), va="center", size=9, color=INK)
        ax.annotate(f"{p.published:.2f}×", (p.published, row + 0.19), (6, 0), va="center", size=9)
    ax.axvline(1, color=BASELINE_COLOR, width=1.2)
    ax.set_yticks(at, [p.what for p in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel("ratio to the baseline named at the left")
    ax.x.margin = 0.1
    ax.bare("y")
    legend_above(figure, labels_of(ax))
    caption = "Whiskers: 95 % intervals of ours. Conditions and the class of every input are in the table."
    return Drawing("published", "Ours beside the published figures", caption, figure)


def arms_drawings(result: ExperimentResult) -> list[Drawing]:
    """The `ArmsFigure` and `QualityFigure` of the experiment, without those that have too little to show."""
    drawings: list[Drawing | None] = []
    for place, spec in enumerate(result.figures):
        if isinstance(spec, ArmsFigure):
            drawings.append(arms_figure(f"arms_{place}", spec, result))
        elif isinstance(spec, QualityFigure):
            drawings.append(quality_figure(f"quality_{place}", spec, result))
    return [drawing for drawing in drawings if drawing is not None]


def arms_figure(name: str, spec: ArmsFigure, result: ExperimentResult) -> Drawing | None:
    """A point for each arm; None where fewer than two arms have both metrics."""
    styles = arm_styles(list(result.arms), result.baseline)
    points = _points(spec, result)
    if len(points) < 2:
        return None
    figure, (ax,) = new_figure(1, 1, 4.6)
    for arm, x, y in points:
        style = styles[arm]
        ax.scatter([x], [y], color=style.color, marker=style.marker, size=8, label=arm)
    ax.x.margin, ax.y.margin = 0.08, 0.1
    ax.set_xlabel(_axis(spec.x))
    ax.set_ylabel(_axis(spec.y))
    legend_above(figure, labels_of(ax), columns=4)
    return Drawing(name, spec.title, "A point for each arm, means over seeds.", figure)


def quality_figure(name: str, spec: QualityFigure, result: ExperimentResult) -> Drawing | None:
    """Bits per character of consecutive requests, the replicates' means; None where no arm has bits."""
    styles = arm_styles(list(result.arms), result.baseline)
    figure, (ax,) = new_figure(1, 1, 4.2)
    for arm in spec.arms or result.arms:
        lines = [bits_over_run(replicate.records, spec.parts) for replicate in result.arms[arm].replicates]
        if any(value is not None for line in lines for value in line):
            y = np.array([[np.nan if value is None else value for value in line] for line in lines]).mean(axis=0)
            x = (np.arange(spec.parts) + 0.5) / spec.parts
            ax.plot(x, y, color=styles[arm].color, dash=styles[arm].dash, label=arm)
    if ax.is_empty:
        return None
    ax.set_xlabel("share of the requests so far")
    ax.set_ylabel("bits per character (less is better)")
    legend_above(figure, labels_of(ax), columns=3)
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
    notes = ", ".join(filter(None, (unit, fmt.direction(metric))))
    return f"{definition.label} ({notes})" if notes else definition.label


def replica_drawings(result: ExperimentResult) -> list[Drawing]:
    """One figure of how even the replicas are; none where no arm has several."""
    arms = [arm for arm in result.arms.values() if len(arm.replicas) > 1]
    if not arms:
        return []
    kinds = list(dict.fromkeys(it.kind for arm in arms for it in arm.replicas))
    styles = arm_styles(list(result.arms), result.baseline)
    panels: tuple[tuple[str, Callable[[ReplicaFigures], float | None]], ...] = (
        ("Busy (% of the span)", lambda it: None if it.busy_fraction is None else 100 * it.busy_fraction),
        ("Mean E2E (s)", lambda it: it.e2e_s_mean),
    )
    figure, axes = new_figure(1, len(panels), 1.3 + 0.34 * len(arms), sharey=True)
    for ax, (title, of) in zip(axes, panels, strict=True):
        for row, arm in enumerate(arms):
            for place, kind in enumerate(kinds):
                values = [value for it in arm.replicas if it.kind == kind and (value := of(it)) is not None]
                marker = _KIND_MARKERS[place % len(_KIND_MARKERS)]
                label = kind or "all alike"
                if values:
                    color = styles[arm.name].color
                    ax.scatter(values, [row] * len(values), color=color, marker=marker, size=7, alpha=0.75, label=label)
        ax.set_title(title)
        ax.set_yticks(range(len(arms)), [arm.name for arm in arms])
        ax.set_ylim(len(arms) - 0.5, -0.5)
        ax.set_xlim(left=0)
        ax.bare("y")
    if len(kinds) > 1:
        legend_above(figure, labels_of(*axes))
    caption = "A mark for each replica, in the first seed: side by side where the load is even."
    return [Drawing("replicas", "Replicas", caption, figure)]


_MOST_TIMELINES = 4  # those of arms that change something come first


def timeline_drawings(result: ExperimentResult) -> list[Drawing]:
    """Timelines of the arms that change their placement, else of the last arm that has one."""
    with_samples = [a for a in result.arms.values() if a.timeline is not None and len(a.timeline.rows) > 1]
    moving = [a for a in with_samples if _transitions_ns(a)]
    shown = (moving or with_samples[-1:])[:_MOST_TIMELINES]
    names = [_file_name(arm.name) for arm in shown]
    names = [f"{name}_{place}" if names.index(name) < place else name for place, name in enumerate(names)]
    return [_timeline(arm, name) for arm, name in zip(shown, names, strict=True)]


def _file_name(arm: str) -> str:
    return re.sub(r"[^\w.-]", "_", arm)[:80]


def _timeline(arm: ArmResult, file: str) -> Drawing:
    assert arm.timeline is not None
    times_ns, models, layers, running, queued, kv_bytes, weight_bytes = zip(*arm.timeline.rows, strict=True)
    time_s = np.array(times_ns, dtype=np.float64) / NS_PER_S
    names = sorted(set(models))  # so that a model has its colour in every arm
    figure, axes = new_figure(3, 1, 6.2, sharex=True, heights=(1, 1.2, 1))
    depth, memory, load = axes

    for place, name in enumerate(names):
        here = np.array([model == name for model in models])
        color = MODEL_COLORS[place % len(MODEL_COLORS)]
        depth.fill_between(time_s, 0, np.where(here, layers, 0), post=True, color=color, alpha=0.75, label=name)
    moments_ns = _transitions_ns(arm)
    if moments_ns:
        depth.plot([], [], color=MUTED, width=0.8, dash=FINE_DOTS, label="new placement")
    depth.set_title("Model and layers")
    depth.set_ylabel("layers run")
    depth.set_ylim(0, max(layers) * 1.12)
    depth.y.whole = True

    weights_gb, kv_gb = np.array(weight_bytes) / 1e9, np.array(kv_bytes) / 1e9
    parts = (("weights and activations", 0, weights_gb, BASELINE_COLOR, 0.55),
             ("KV cache in use", weights_gb, weights_gb + kv_gb, MODEL_COLORS[2], 0.75))  # fmt: skip
    for label, low, high, color, alpha in parts:
        memory.fill_between(time_s, low, high, post=True, color=color, alpha=alpha, label=label)
    if arm.capacity_bytes is not None:
        memory.axhline(arm.capacity_bytes / 1e9, color=MUTED, dash=(4, 3))
        memory.annotate("card", (1, arm.capacity_bytes / 1e9), (-4, -11), across=True, ha="right", color=INK)
    memory.set_title("Memory")
    memory.set_ylabel("GB")
    memory.set_ylim(bottom=0)

    load.plot(time_s, running, post=True, color=INK, width=1.5, label="running")
    load.plot(time_s, queued, post=True, color=MODEL_COLORS[1], width=1.5, label="waiting")
    load.set_title("Requests")
    load.set_ylabel("requests")
    load.set_ylim(bottom=0)
    load.set_xlabel("time (s)")

    for ax in axes:
        ax.legend_shown = True
        ax.set_xlim(float(time_s[0]), float(time_s[-1]))
        for moment_ns in moments_ns:
            ax.axvline(moment_ns / NS_PER_S, color=MUTED, width=0.8, dash=FINE_DOTS)
    caption = "Dotted lines: a changed placement came into force. " if moments_ns else ""
    caption += "Samples of the first seed; metrics do not use them."
    which = f", the first of {len(arm.replicas)} replicas" if len(arm.replicas) > 1 else ""
    return Drawing(f"timeline_{file}", f"What {arm.name} did{which}", caption, figure)


def _transitions_ns(arm: ArmResult) -> Sequence[int]:
    own = arm.timeline_transitions_ns
    return arm.replicates[0].stats.transitions_ns if own is None else own
