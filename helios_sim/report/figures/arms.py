"""Figures of the arms: gains, published values, latencies, exits, metrics against each other, replicas, timelines."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator

from helios_sim.report import format as fmt
from helios_sim.report.breakdown import ReplicaFigures
from helios_sim.report.decisions import SHOWN_DECISIONS, decision_rows
from helios_sim.report.figures.style import (
    BASELINE_COLOR,
    INK,
    MODEL_COLORS,
    MUTED,
    PAPER,
    ArmStyle,
    Drawing,
    Series,
    annotate,
    arm_styles,
    handles_of,
    legend_above,
    look,
    new_figure,
    use_log_seconds,
)
from helios_sim.report.intervals import Interval
from helios_sim.report.metrics import DEFINITIONS, Metrics
from helios_sim.report.records import Records, series_of_all
from helios_sim.report.result import (
    ArmResult,
    ArmsFigure,
    Comparisons,
    ExperimentResult,
    QualityFigure,
    scope_in_words,
)
from helios_sim.request import NS_PER_S
from helios_sim.workload.faults import FaultKind, Struck

_Row = tuple[int, str, int, int, float, int, int]  # of a timeline: as serving.stats has it

_KIND_MARKERS = "osD^vP*X"  # by kind of replica
_FOREST = ("throughput_requests_per_s", "e2e_s_mean", "layers_per_token")
WIDE_RATIOS = 8  # largest over smallest, from which ratios are drawn on a log scale
_CDF_POINTS = 600  # enough for a smooth line, few enough for a small file
_MOST_TIMELINES = 4  # those of arms that change something come first


def answer_drawings(result: ExperimentResult, ratios: Comparisons) -> list[Drawing]:
    """The figures that answer the question: ours beside the published, and each arm against the baseline."""
    styles = arm_styles(list(result.arms), result.baseline)
    with look():
        found = [published_figure(result), forest_figure(result, ratios, styles)]
    return [drawing for drawing in found if drawing is not None]


def detail_drawings(result: ExperimentResult) -> list[Drawing]:
    """Latency distributions and exit depths, where there are any."""
    styles = arm_styles(list(result.arms), result.baseline)
    with look():
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
        ax.axvline(1, color=BASELINE_COLOR, linewidth=1.4)
        for row, arm in enumerate(arms):
            value = ratios[arm].get(name)
            if value is None or value.ratio is None:
                continue
            color = styles[arm].color
            if value.low is not None and value.high is not None:
                ax.plot(
                    [value.low, value.high], [row, row], color=color, linewidth=5, alpha=0.35, solid_capstyle="butt",
                    label=f"_{arm}",
                )  # fmt: skip
            ax.plot([value.ratio], [row], "o", color=color, markersize=7, label=arm)
            box = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.8}
            annotate(ax, f"{value.ratio:.2f}×", (value.ratio, row), (0, 8), ha="center", color=INK, bbox=box)
        hint = fmt.direction(name)
        ax.set_title(fmt.label(name))
        ax.set_xlabel("ratio to baseline" + (f",\n{hint}" if hint else ""))
        known = [r.ratio for arm in arms if (r := ratios[arm].get(name)) is not None and r.ratio]
        if max(known) > WIDE_RATIOS * min(known):
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.xaxis.set_minor_formatter(lambda value, _: "")
        ax.set_yticks(range(len(arms)), names)
        ax.set_ylim(len(arms) - 0.4, -0.7)
        ax.margins(x=0.14)
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
    scope = scope_in_words(result.seeds)
    caption = f"Grey line: {result.baseline}. Pale bars: 95 % intervals {scope}, where there is one."
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
        style = styles[name]
        for ax, of in zip(axes, (Records.ttft_ns, Records.defined_tpot_ns, Records.e2e_ns), strict=True):
            times_ns = series_of_all(records, of)
            if len(times_ns):
                share = np.linspace(0, 100, min(_CDF_POINTS, max(2, len(times_ns))))
                values = np.array(times_ns.percentiles(share.tolist())) / NS_PER_S
                ax.plot(values, share, color=style.color, linestyle=style.linestyle, label=name)
    if not any(ax.lines for ax in axes):
        return None
    for ax, (title, bound_s) in zip(axes, panels, strict=True):
        ax.set_title(title)
        if bound_s is not None:
            ax.axvline(bound_s, color=MUTED, linewidth=1.2, linestyle=":")
            annotate(ax, "SLO", (bound_s, 3), (3, 0))
        use_log_seconds(ax)
    axes[0].set_ylabel("requests at or below (%)")
    axes[0].set_ylim(0, 100)
    legend_above(figure, handles_of(*axes))
    return Drawing("latency", "Latency distributions", "Further left is faster. Completed requests, log scale.", figure)


def exit_figure(result: ExperimentResult, styles: dict[str, ArmStyle]) -> Drawing | None:
    """Share of output tokens by the layer after which they left, a panel for each model, bars for each arm.

    None where all tokens of each model left at one layer: every bar would say 100.
    """
    models: dict[str, list[int]] = {}
    for arm in result.arms.values():
        for depths in arm.exit_depths:
            models[depths.model] = sorted({*models.get(depths.model, []), *depths.tokens_by_depth})
    if all(len(depths) < 2 for depths in models.values()):
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
            bars = ax.bar(at, shares, width * 0.92, color=styles[arm.name].color, label=arm.name)
            if len(arms) * len(depths_of_model) <= 14:
                ax.bar_label(bars, [f"{s:.0f}" if s >= 0.5 else "" for s in shares], fontsize=8.5, color=INK, padding=2)
        ax.set_xticks(range(len(depths_of_model)), [str(d) for d in depths_of_model])
        ax.set_xlabel("left after layer")
        ax.set_title(model)
        ax.grid(axis="x", visible=False)
        ax.tick_params(axis="x", length=0)
    axes[0].set_ylabel("output tokens (%)")
    handles = handles_of(*axes)
    legend_above(figure, {name: handles[name] for name in result.arms if name in handles})
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
    ax.barh(
        at + 0.19,
        [p.published for p in rows],
        0.34,
        color=PAPER,
        edgecolor=MUTED,
        linewidth=1.3,
        hatch="////",
        label="published",
    )
    for row, p in enumerate(rows):
        end = ours[row]
        if p.low is not None and p.high is not None:
            ax.plot([p.low, p.high], [row - 0.19] * 2, color=INK, linewidth=1.6, marker="|", markersize=8)
            end = max(end, p.high)
        annotate(ax, f"{ours[row]:.2f}×", (end, row - 0.19), (6, 0), va="center", fontsize=9, color=INK)
        annotate(ax, f"{p.published:.2f}×", (p.published, row + 0.19), (6, 0), va="center", fontsize=9)
    ax.axvline(1, color=BASELINE_COLOR, linewidth=1.2)
    ax.set_yticks(at, [p.what for p in rows])
    ax.invert_yaxis()
    ax.set_xlabel("ratio to the baseline named at the left")
    ax.margins(x=0.1)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    legend_above(figure, handles_of(ax))
    scope = scope_in_words(result.seeds)
    caption = f"Whiskers: 95 % intervals of ours {scope}. Conditions and the class of every input are in the table."
    return Drawing("published", "Ours beside the published figures", caption, figure)


def arms_drawings(result: ExperimentResult) -> list[Drawing]:
    """The `ArmsFigure` and `QualityFigure` of the experiment, without those that have too little to show."""
    drawings: list[Drawing | None] = []
    with look():
        for place, spec in enumerate(result.figures):
            if isinstance(spec, ArmsFigure):
                drawings.append(arms_figure(f"arms_{place}", spec, result))
            elif isinstance(spec, QualityFigure):
                drawings.append(quality_figure(f"quality_{place}", spec, result))
    return [drawing for drawing in drawings if drawing is not None]


def arms_figure(name: str, spec: ArmsFigure, result: ExperimentResult) -> Drawing | None:
    """A point for each arm; None where fewer than two arms have both metrics."""
    in_sweeps = [arm for point in result.points for arm in point.metrics]
    styles = arm_styles(list(dict.fromkeys((*result.arms, *in_sweeps))), result.baseline)
    points = [point for point in _points(spec, result) if point[0] in styles]
    if len(points) < 2:
        return None
    figure, (ax,) = new_figure(1, 1, 4.6)
    lines = {arm: line for arm, *_ in points if len(line := _line(spec, result, arm)) > 1}
    for arm, line in lines.items():
        style = styles[arm]
        ax.plot(*zip(*line, strict=True), color=style.color, marker=".", linewidth=1.2, alpha=0.7, label=f"_{arm}")
    there = _at(spec, result)
    for arm, x, y in points:
        style, known = styles[arm], there[arm][1]
        for place, metric in enumerate((spec.x, spec.y)):
            interval = known.get(metric)
            if interval is not None and interval.low is not None and interval.high is not None:
                ends, other = [interval.low, interval.high], [y if place == 0 else x] * 2
                along, up = (ends, other) if place == 0 else (other, ends)
                ax.plot(along, up, color=style.color, linewidth=3, alpha=0.3, label=f"_{arm}")
        ax.plot([x], [y], color=style.color, marker=style.marker, markersize=8, linestyle="none", label=arm)
    ax.margins(x=0.08, y=0.1)
    _note_hidden(points, ax)
    ax.set_xlabel(_axis(spec.x))
    ax.set_ylabel(_axis(spec.y))
    legend_above(figure, handles_of(ax), columns=4)
    caption = f"A point for each arm; pale bars: 95 % intervals {scope_in_words(result.seeds)}, where there is one."
    if lines:
        caption += f" A line joins an arm's points by {' or '.join(word.replace('_', ' ') for word in spec.along)}."
    return Drawing(name, spec.title, caption, figure)


def quality_figure(name: str, spec: QualityFigure, result: ExperimentResult) -> Drawing | None:
    """Bits per character of consecutive requests, the replicates' means; None where no arm has bits."""
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
        f"Of each {1 / spec.parts:.0%} of the requests in their order, means over seeds without intervals. The text "
        "itself changes too."
    )
    return Drawing(name, spec.title, caption, figure)


def bits_over_run(records: Records, parts: int) -> list[float | None]:
    """Bits per character of each of `parts` equal shares of the requests, in order of arrival."""
    ends = [-(-len(records) * number // parts) for number in range(parts + 1)]
    return [records.part(slice(*rows)).bits_per_char() for rows in pairwise(ends)]


def _points(spec: ArmsFigure, result: ExperimentResult) -> Sequence[tuple[str, float, float]]:
    found = []
    for name, (metrics, _) in _at(spec, result).items():
        x, y = metrics.get(spec.x), metrics.get(spec.y)
        shown = spec.arms is None or name in spec.arms
        if shown and isinstance(x, int | float) and isinstance(y, int | float):
            found.append((name, float(x), float(y)))
    return found


def _note_hidden(points: Sequence[tuple[str, float, float]], ax: Axes) -> None:
    """Name below a mark the arms that it covers: earlier marks within half a per cent of both axes."""
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    width, height = right - left, high - low

    def near(one: tuple[float, float], other: tuple[float, float], share_x: float, share_y: float) -> bool:
        return abs(one[0] - other[0]) < share_x * width and abs(one[1] - other[1]) < share_y * height

    hidden: dict[str, list[str]] = {}  # by the arm on top
    for place, (arm, x, y) in enumerate(points):
        after = [other for other, *at in points[place + 1 :] if near((x, y), (at[0], at[1]), 0.005, 0.005)]
        if after:
            hidden.setdefault(after[-1], []).append(arm)
    noted: list[tuple[float, float]] = []
    for arm, x, y in points:
        if arm in hidden:
            lines = sum(near((x, y), other, 0.2, 0.04) for other in noted)  # notes that this one would be written over
            noted.append((x, y))
            share = (x - left) / width
            side = "left" if share < 0.15 else "right" if share > 0.85 else "center"
            told = f"also {', '.join(hidden[arm])}"
            annotate(ax, told, (x, y), (0, -16 - 12 * lines), ha=side, color=INK, fontsize=8)


def _line(spec: ArmsFigure, result: ExperimentResult, arm: str) -> list[tuple[float, float]]:
    """Both metrics of an arm at the points along an axis, by its values; empty where no axis has points of it."""
    found = []
    for point in result.points:
        values = [point.settings[axis] for axis in spec.along if axis in point.settings]
        metrics = point.metrics.get(arm, {})
        x, y = metrics.get(spec.x), metrics.get(spec.y)
        if not all(point.settings.get(key) == value for key, value in spec.where.items()):
            continue
        if values and isinstance(x, int | float) and isinstance(y, int | float):
            found.append((values, (float(x), float(y))))
    return [place for _, place in sorted(found, key=lambda row: row[0])]


def _at(spec: ArmsFigure, result: ExperimentResult) -> dict[str, tuple[Metrics, Mapping[str, Interval]]]:
    """Metrics and intervals of each arm, at the study's own settings or at the point that is wanted."""
    if not spec.where:
        return {name: (arm.metrics, arm.intervals) for name, arm in result.arms.items()}
    for point in result.points:
        if all(point.settings.get(key) == value for key, value in spec.where.items()):
            return {name: (metrics, point.intervals.get(name, {})) for name, metrics in point.metrics.items()}
    return {}


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
    with look():
        figure, axes = new_figure(1, len(panels), 1.3 + 0.34 * len(arms), sharey=True)
        for ax, (title, of) in zip(axes, panels, strict=True):
            for row, arm in enumerate(arms):
                for place, kind in enumerate(kinds):
                    values = [value for it in arm.replicas if it.kind == kind and (value := of(it)) is not None]
                    marker = _KIND_MARKERS[place % len(_KIND_MARKERS)]
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


def scaling_drawings(result: ExperimentResult) -> list[Drawing]:
    """A figure of the number of replicas that were on, with a line for each autoscaled arm."""
    styles = arm_styles(list(result.arms), result.baseline)
    scaled = [(arm, arm.scaled) for arm in result.arms.values() if arm.scaled is not None]
    if not scaled:
        return []
    with look():
        figure, (ax,) = new_figure(1, 1, 3.4)
        for arm, its in scaled:
            ends = arm.replicates[0].records.ends_ns()
            end_ns = its.counts[-1][0] if ends is None else max(ends[1], its.counts[-1][0])
            times_s = [time_ns / NS_PER_S for time_ns, _, _ in its.counts] + [end_ns / NS_PER_S]
            on = [on for _, _, on in its.counts]
            color, line = styles[arm.name].color, styles[arm.name].linestyle
            ax.step(times_s, [*on, on[-1]], where="post", color=color, linestyle=line, linewidth=1.6, label=arm.name)
        ax.set_xlabel("time (s)")
        ax.set_ylabel("replicas that are on")
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        legend_above(figure, handles_of(ax), columns=3)
    caption = "On: it starts, serves, or finishes what it has. First seed."
    return [Drawing("replicas_on", "Replicas over time", caption, figure, zooms=True)]


def timeline_drawings(result: ExperimentResult) -> list[Drawing]:
    """Timelines of the arms that change their placement, else of the last arm that has one."""
    with_samples = [a for a in result.arms.values() if a.timeline is not None and len(a.timeline.rows) > 1]
    moving = [a for a in with_samples if _transitions_ns(a)]
    shown = (moving or with_samples[-1:])[:_MOST_TIMELINES]
    names = [_file_name(arm.name) for arm in shown]
    names = [f"{name}_{place}" if names.index(name) < place else name for place, name in enumerate(names)]
    with look():
        return [_timeline(arm, name) for arm, name in zip(shown, names, strict=True)]


def _file_name(arm: str) -> str:
    return re.sub(r"[^\w.-]", "_", arm)[:80]


FAULT_COLOR = "#c0392b"
_MOST_FAULTS = 200  # in a timeline


def _timeline(arm: ArmResult, file: str) -> Drawing:
    assert arm.timeline is not None
    rows = without_dead(arm.timeline.rows, arm.timeline_faults)
    times_ns, models, layers, running, queued, kv_bytes, weight_bytes = zip(*rows, strict=True)
    time_s = np.array(times_ns, dtype=np.float64) / NS_PER_S
    names = sorted(set(models))  # so that a model has its colour in every arm
    figure, axes = new_figure(3, 1, 6.2, sharex=True, gridspec_kw={"height_ratios": [1, 1.2, 1]})
    depth, memory, load = axes

    series = []
    for place, name in enumerate(names):
        here = np.array([model == name for model in models])
        color = MODEL_COLORS[place % len(MODEL_COLORS)]
        depth.fill_between(
            time_s, 0, np.where(here, layers, 0), step="post", color=color, alpha=0.75, linewidth=0, label=f"_{name}"
        )
        series.append(Series(depth, name, color, time_s, np.where(here, layers, np.nan)))
    marked = [row for row in decision_rows(arm)[:SHOWN_DECISIONS] if row.replica == 0 and row.time_s <= time_s[-1]]
    marks = None
    if len(arm.decisions) > 1 and marked:
        at_s = [row.time_s for row in marked]
        marks = depth.scatter(at_s, [max(layers) * 1.1] * len(marked), s=26, marker="v", color=INK, linewidth=0)
    keys = [Patch(color=MODEL_COLORS[i % len(MODEL_COLORS)], alpha=0.75) for i in range(len(names))]
    moments_ns = _transitions_ns(arm)
    moments = {}
    if marks is not None:
        moments["decision"] = Line2D([], [], color=INK, marker="v", linestyle="none", markeredgewidth=0)
    if moments_ns:
        moments["new placement"] = Line2D([], [], color=MUTED, linewidth=0.8, linestyle=":")
    depth.legend(
        [*keys, *moments.values()],
        [*names, *moments],
        loc="lower left",
        bbox_to_anchor=(0.18, 1.01),
        ncols=5,
        fontsize=9,
        borderaxespad=0,
    )
    depth.set_title("Model and layers")
    depth.set_ylabel("layers run")
    depth.set_ylim(0, max(layers) * 1.18)
    depth.yaxis.set_major_locator(MaxNLocator(5, integer=True))

    weights_gb, kv_gb = np.array(weight_bytes) / 1e9, np.array(kv_bytes) / 1e9
    memory.fill_between(
        time_s,
        0,
        weights_gb,
        step="post",
        color=BASELINE_COLOR,
        alpha=0.55,
        linewidth=0,
        label="weights and activations",
    )
    memory.fill_between(
        time_s,
        weights_gb,
        weights_gb + kv_gb,
        step="post",
        color="#0fa08a",
        alpha=0.75,
        linewidth=0,
        label="KV cache in use",
    )
    series += [
        Series(memory, "weights and activations", BASELINE_COLOR, time_s, weights_gb),
        Series(memory, "with the KV cache in use", "#0fa08a", time_s, weights_gb + kv_gb),
    ]
    if arm.capacity_bytes is not None:
        memory.axhline(arm.capacity_bytes / 1e9, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        annotate(memory, "card", (1, arm.capacity_bytes / 1e9), (-4, -11), across=True, ha="right", color=INK)
    memory.set_title("Memory")
    memory.set_ylabel("GB")
    memory.set_ylim(bottom=0)
    memory.legend(loc="lower left", bbox_to_anchor=(0.18, 1.01), ncols=2, fontsize=9, borderaxespad=0)

    load.step(time_s, running, where="post", color=INK, linewidth=1.5, label="running")
    load.step(time_s, queued, where="post", color="#e5822e", linewidth=1.5, label="waiting")
    load.set_title("Requests")
    load.set_ylabel("requests")
    load.set_ylim(bottom=0)
    load.set_xlabel("time (s)")
    load.legend(loc="lower left", bbox_to_anchor=(0.18, 1.01), ncols=2, fontsize=9, borderaxespad=0)

    for ax in axes:
        ax.set_xlim(time_s[0], time_s[-1])
        for moment_ns in moments_ns:
            ax.axvline(moment_ns / NS_PER_S, color=MUTED, linewidth=0.8, linestyle=":")
        for fault in arm.timeline_faults[:_MOST_FAULTS]:
            ends_ns = (fault.time_ns / NS_PER_S, fault.until_ns / NS_PER_S)
            if ends_ns[0] <= time_s[-1]:
                ax.axvspan(*ends_ns, color=FAULT_COLOR, alpha=0.25, linewidth=0.8)
    caption = "Triangles: decisions, which the log below explains. " if marks is not None else ""
    caption += "Dotted lines: a changed placement came into force. " if moments_ns else ""
    some = f" (the first {_MOST_FAULTS} are shown)" if len(arm.timeline_faults) > _MOST_FAULTS else ""
    caption += f"Red: a fault strikes, for as long as it lasts{some}. " if arm.timeline_faults else ""
    caption += "Samples of the first seed; metrics do not use them."
    which = f", the first of {len(arm.replicas)} replicas" if len(arm.replicas) > 1 else ""
    words = (f"{row.time_s:.3f} s, {row.cause}. {row.model}, {row.layers} layers: {row.reason}" for row in marked)
    return Drawing(
        f"timeline_{file}", f"What {arm.name} did{which}", caption, figure, zooms=True, of_arm=arm.name,
        series=tuple(series), marks=marks,
        mark_rows=tuple((row.anchor, text) for row, text in zip(marked, words, strict=True)),
    )  # fmt: skip


def without_dead(rows: Iterable[_Row], faults: Sequence[Struck]) -> list[_Row]:
    """The rows of a timeline, where a replica that is dead holds nothing, and what waits for it is not known (NaN)."""
    found = list(rows)
    for fault in faults:
        if fault.kind is not FaultKind.REPLICA_DIES or not found or not found[0][0] <= fault.time_ns <= found[-1][0]:
            continue
        before = [row for row in found if row[0] <= fault.time_ns]
        after = [row for row in found if row[0] >= fault.until_ns]
        _, model, layers, *_, weight_bytes = before[-1]
        found = [*before, (fault.time_ns, model, 0, 0, math.nan, 0, 0)]
        if after and after[0][0] > fault.until_ns:
            found.append((fault.until_ns, model, layers, 0, math.nan, 0, weight_bytes))
        found += after
    return found


def _transitions_ns(arm: ArmResult) -> Sequence[int]:
    own = arm.timeline_transitions_ns
    return arm.replicates[0].stats.transitions_ns if own is None else own
