"""Figures of the arms: what each gains, its latencies, exit depths, and ours beside the published. Draws, no more."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullFormatter

from helios_sim.report import format as fmt
from helios_sim.report.definitions import DEFINITIONS, Better
from helios_sim.report.result import ExperimentResult
from helios_sim.report.style import (
    BASELINE_COLOR,
    INK,
    MODEL_COLORS,
    MUTED,
    PAPER,
    ArmStyle,
    Drawing,
    arm_styles,
    handles_of,
    legend_above,
    look,
    new_figure,
)
from helios_sim.report.summary import Comparisons
from helios_sim.request import NS_PER_S

_FOREST = ("throughput_requests_per_s", "e2e_s_mean", "layers_per_token")
_CDF_POINTS = 600  # enough for a smooth line, few enough for a small file


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


WIDE_RATIOS = 8  # from here on ratios are drawn on a log scale


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
                    [value.low, value.high], [row, row], color=color, linewidth=5, alpha=0.35, solid_capstyle="butt"
                )
            ax.plot([value.ratio], [row], "o", color=color, markersize=7)
            ax.annotate(
                f"{value.ratio:.2f}×",
                (value.ratio, row),
                (0, 8),
                textcoords="offset points",
                fontsize=8.5,
                ha="center",
                color=INK,
                bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.8},
            )
        better = DEFINITIONS[name].better if name in DEFINITIONS else Better.NEITHER
        hint = {Better.HIGHER: "more is better", Better.LOWER: "less is better", Better.NEITHER: ""}[better]
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
                ax.plot(values, share, color=style.color, linestyle=style.linestyle, label=name)
    if not any(ax.lines for ax in axes):
        return None
    for ax, (title, bound_s) in zip(axes, panels, strict=True):
        ax.set_title(title)
        if bound_s is not None:
            ax.axvline(bound_s, color=MUTED, linewidth=1.2, linestyle=":")
            ax.annotate("SLO", (bound_s, 3), (3, 0), textcoords="offset points", fontsize=8.5, color=MUTED)
        use_log_seconds(ax)
    axes[0].set_ylabel("requests at or below (%)")
    axes[0].set_ylim(0, 100)
    legend_above(figure, handles_of(*axes))
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
        ax.annotate(f"{ours[row]:.2f}×", (end, row - 0.19), (6, 0), textcoords="offset points", va="center", fontsize=9)
        ax.annotate(
            f"{p.published:.2f}×",
            (p.published, row + 0.19),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=MUTED,
        )
    ax.axvline(1, color=BASELINE_COLOR, linewidth=1.2)
    ax.set_yticks(at, [p.what for p in rows])
    ax.invert_yaxis()
    ax.set_xlabel("ratio to the baseline named at the left")
    ax.margins(x=0.1)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    legend_above(figure, handles_of(ax))
    caption = "Whiskers: 95 % intervals of ours. Conditions and the class of every input are in the table."
    return Drawing("published", "Ours beside the published figures", caption, figure)


def use_log_seconds(ax: Axes, *, y: bool = False) -> None:
    """A log axis of seconds with a few readable ticks: round values of a narrow range, decades of a wide one."""
    axis = ax.yaxis if y else ax.xaxis
    (ax.set_yscale if y else ax.set_xscale)("log")
    low, high = ax.get_ylim() if y else ax.get_xlim()
    axis.set_major_locator(_few_ticks(np.log10(high / low)))
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: fmt.seconds(value).replace(".00 ", " ").replace(".0 ", " "))
    )
    axis.set_minor_formatter(NullFormatter())


def _few_ticks(decades: float) -> Locator:
    """At least two within the range, and none so close to the next that their labels touch."""
    if decades < 0.6:
        return MaxNLocator(4)
    return LogLocator(subs=(1.0,) if decades > 2 else (1.0, 3.0) if decades > 1 else (1.0, 2.0, 3.0, 5.0))
