"""Figures over many settings: lines of a metric, throughput and latency against load, and designs of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from helios_sim.report.designs import Design, DesignsResult, merits_of, on_front, plain_value
from helios_sim.report.figures.phase import baseline_of, matrix_figure, phase_figure
from helios_sim.report.figures.style import (
    INK,
    MUTED,
    RULE,
    ArmStyle,
    Drawing,
    annotate,
    arm_styles,
    axis_positions,
    handles_of,
    legend_above,
    look,
    name_levels,
    new_figure,
    use_log_seconds,
)
from helios_sim.report.format import in_unit
from helios_sim.report.metrics import DEFINITIONS, Band, Better
from helios_sim.report.result import (
    ExperimentResult,
    LoadFigure,
    PhaseFigure,
    SweepFigure,
    SweepPoint,
    scope_in_words,
)

_SPLIT_LINES = ("-", "--", ":", "-.")
_UNITS = {"_us": "µs", "_ms": "ms", "_s": "s"}  # by how a setting's name ends
FRONT_COLOR = "#2f74e6"
MOST_COLUMNS = 4
BINS = 8  # of a parameter's values, where it has more
WIDE = 20  # times from the smallest to the largest value: from here on an axis is logarithmic


def sweep_drawings(result: ExperimentResult) -> list[Drawing]:
    """The figures that the experiment asked for and that have points."""
    arms = list(dict.fromkeys(arm for point in result.points for arm in point.metrics))
    styles = arm_styles(list(dict.fromkeys((*result.arms, *arms))), result.baseline)
    found = []
    with look():
        for place, spec in enumerate(result.figures):
            if not isinstance(spec, LoadFigure | SweepFigure | PhaseFigure):
                continue
            points = [p for p in result.points if all(p.settings.get(k) == v for k, v in spec.where.items())]
            points = [p for p in points if spec.x in p.settings]
            if points and isinstance(spec, LoadFigure):
                found.append(load_figure(f"load_{place}", spec, points, styles, scope_in_words(result.seeds)))
            elif points and isinstance(spec, PhaseFigure):
                draw, kind = (phase_figure, "phase") if spec.best_only else (matrix_figure, "matrix")
                found.append(draw(f"{kind}_{place}", spec, points, styles, baseline_of(points, result.baseline)))
            elif points and isinstance(spec, SweepFigure):
                scope = scope_in_words(result.seeds)
                found.append(sweep_figure(f"sweep_{place}", spec, points, styles, result.baseline, scope))
    return found


def sweep_figure(
    name: str,
    spec: SweepFigure,
    points: Sequence[SweepPoint],
    styles: Mapping[str, ArmStyle],
    baseline: str,
    scope: str,
) -> Drawing:
    """A line for each arm and each value of `split_by`; pale bands are intervals."""
    figure, (ax,) = new_figure(1, 1, 4.2)
    shown = [a for a in styles if any(a in p.metrics for p in points) and (spec.arms is None or a in spec.arms)]
    if spec.relative:
        shown = [a for a in shown if a != baseline]
        ax.axhline(1, color=styles[baseline].color, linewidth=1.4)
    splits = list(dict.fromkeys(p.settings.get(spec.split_by) for p in points)) if spec.split_by else [None]
    ticks = axis_positions(p.settings[spec.x] for p in points)
    for arm in shown:
        for place, split in enumerate(splits):
            chosen = [p for p in points if spec.split_by is None or p.settings.get(spec.split_by) == split]
            rows = sorted(row for p in chosen if (row := _row(p, arm, spec, ticks)) is not None)
            if not rows:
                continue
            style = styles[arm]
            x, y, low, high = (np.array(column) for column in zip(*rows, strict=True))
            line = _SPLIT_LINES[place % len(_SPLIT_LINES)] if spec.split_by else style.linestyle
            text = arm if split is None else f"{arm}, {_in_words(str(spec.split_by), split)}"
            ax.plot(x, y, color=style.color, linestyle=line, marker=style.marker, label=text)
            if (high > low).any():
                ax.fill_between(x, low, high, color=style.color, alpha=0.16, linewidth=0, label=f"_{text}")
    if any(isinstance(x, str) for x in ticks):
        ax.set_xticks(list(ticks.values()), [str(x) for x in ticks])
    elif spec.log_x:
        ax.set_xscale("log")
    if spec.log_y:
        ax.set_yscale("log")
    for mark in spec.marks:
        ax.axhline(mark.value, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
    name_levels(ax, [(mark.value, mark.label) for mark in spec.marks], fontsize=9, color=INK)
    ax.set_xlabel(spec.x_label)
    ax.set_ylabel(spec.y_label)
    legend_above(figure, handles_of(ax), columns=4)
    caption = f"Pale bands: 95 % intervals {scope}, where there is one." + (
        f" Baseline: {baseline}." if spec.relative else ""
    )
    return Drawing(name, spec.title, caption, figure)


def load_figure(
    name: str, spec: LoadFigure, points: Sequence[SweepPoint], styles: Mapping[str, ArmStyle], scope: str
) -> Drawing:
    """Throughput, TTFT, TPOT and, with SLOs, attainment (else E2E) against load; solid p50 or mean, dashed p99."""
    figure, axes = new_figure(2, 2, 6.4, sharex=True)
    fourth = ("slo_attainment",) if spec.slo.any else ("e2e_s_p50", "e2e_s_p99")
    panels = (
        ("Throughput", "requests/s", ("throughput_requests_per_s",), None),
        ("TTFT", "p50 solid, p99 dashed", ("ttft_s_p50", "ttft_s_p99"), spec.slo.ttft_s),
        ("TPOT", "p50 solid, p99 dashed", ("tpot_s_p50", "tpot_s_p99"), spec.slo.tpot_s),
        ("SLO attainment" if spec.slo.any else "E2E", "" if spec.slo.any else "p50 solid, p99 dashed", fourth, None),
    )
    arms = [a for a in styles if any(a in p.metrics for p in points)]
    loads = sorted({float(p.settings[spec.x]) for p in points})
    for ax, (title, y_label, metrics, bound) in zip(axes, panels, strict=True):
        for arm in arms:
            for metric, line in zip(metrics, ("-", "--"), strict=False):
                _plot_metric(ax, points, spec.x, arm, metric, styles[arm], line)
        ax.set_title(title)
        ax.set_ylabel(y_label)
        if ax.lines and DEFINITIONS[metrics[0]].unit == "s":
            use_log_seconds(ax, y=True)
        if bound is not None:
            ax.axhline(bound, color=MUTED, linewidth=1.2, linestyle=":")
            annotate(ax, "SLO", (0, bound), (4, 3), across=True)
    axes[0].plot(loads, loads, color=MUTED, linewidth=1.1, linestyle=":", zorder=1)
    annotate(axes[0], "all served", (loads[-1], loads[-1]), (-6, -2), ha="right")
    if spec.slo.any:
        axes[3].axhline(0.99, color=MUTED, linewidth=1.2, linestyle=":")
        annotate(axes[3], "99 %", (1, 0.99), (-4, -11), across=True, ha="right")
        axes[3].set_ylim(0, 1.03)
    for ax in axes[2:]:
        ax.set_xlabel(spec.x_label)
    legend_above(figure, handles_of(axes[0]))
    caption = (
        "Beyond saturation an arm serves less than is offered, and its latencies depend on how long the run is. Pale "
        f"bands: 95 % intervals {scope}, where there is one."
    )
    return Drawing(name, spec.title, caption, figure)


def _plot_metric(
    ax: Axes, points: Sequence[SweepPoint], x: str, arm: str, metric: str, style: ArmStyle, line: str
) -> None:
    found = (
        (float(p.settings[x]), float(value), p.intervals.get(arm, {}).get(metric))
        for p in points
        if isinstance(value := p.metrics.get(arm, {}).get(metric), int | float)
    )
    rows = sorted(found, key=lambda row: row[:2])
    if rows:
        xs, ys, intervals = zip(*rows, strict=True)
        known = [(at, it.low, it.high) for at, it in zip(xs, intervals, strict=True) if it is not None]
        banded = [(at, low, high) for at, low, high in known if low is not None and high is not None]
        if banded:
            at, low, high = zip(*banded, strict=True)
            ax.fill_between(at, low, high, color=style.color, alpha=0.13, linewidth=0)
        marker = style.marker if line == "-" else None
        label = arm if line == "-" else None
        ax.plot(xs, ys, color=style.color, linestyle=line, marker=marker, label=label, linewidth=2 if marker else 1.4)


def _row(
    point: SweepPoint, arm: str, spec: SweepFigure, at: Mapping[object, float]
) -> tuple[float, float, float, float] | None:
    """(x, y, low, high) of a point; None where the arm or the metric has nothing there."""
    x = at[point.settings[spec.x]]
    if spec.relative:
        ratio = point.vs_baseline.get(arm, {}).get(spec.metric)
        if ratio is None:
            return None
        middle = ratio.ratio
        if middle is None and ratio.low is not None and ratio.high is not None:
            middle = (ratio.low + ratio.high) / 2
        if middle is None:
            return None
        low, high = ratio.low, ratio.high
        return x, middle, middle if low is None else low, middle if high is None else high
    value = point.metrics.get(arm, {}).get(spec.metric)
    if value is None:
        return None
    if isinstance(value, Band):
        return x, (value.low + value.high) / 2, value.low, value.high
    interval = point.intervals.get(arm, {}).get(spec.metric)
    if interval is None or interval.low is None or interval.high is None:
        return x, float(value), float(value), float(value)
    return x, float(value), interval.low, interval.high


def _in_words(name: str, value: float | int | str) -> str:
    """`launch_us`, 500 as launch 500 µs; `evaluated_tokens`, 5 as evaluated tokens 5."""
    for suffix, unit in _UNITS.items():
        if name.endswith(suffix) and not isinstance(value, str):
            return f"{name.removesuffix(suffix).replace('_', ' ')} {value:g} {unit}"
    return f"{name.replace('_', ' ')} {value}"


def design_drawings(result: DesignsResult) -> list[Drawing]:
    """The Pareto front where there are several objectives, and the parameters."""
    with look():
        found = [parameter_figure(result)]
        if len(result.objectives) > 1:
            found.insert(0, pareto_figure(result))
    return found


def pareto_figure(result: DesignsResult) -> Drawing:
    """The first objective against each other one; a line joins the designs on the front of those two alone."""
    x, others = result.objectives[0], result.objectives[1:]
    columns = min(len(others), 2)
    rows = -(-len(others) // columns)
    figure, axes = new_figure(rows, columns, 0.6 + 3.9 * rows)
    styles = arm_styles([design.name for design in result.references], "")
    front = {design.name for design in result.front}
    for ax, y in zip(axes, others, strict=False):
        beaten = [d for d in result.designs if d.name not in front]
        _dots(ax, beaten, x, y, color=MUTED, alpha=0.35, size=12, text="a design")
        _dots(ax, list(result.front), x, y, color=FRONT_COLOR, alpha=0.95, size=26, text="beaten by none")
        merits = merits_of(result.designs, (x, y))
        best = [d for d, there in zip(result.designs, on_front(merits), strict=True) if there]
        line = sorted(_points(best, x, y))
        if line:
            ax.plot(*zip(*line, strict=True), color=FRONT_COLOR, linewidth=1.2, alpha=0.6, zorder=1)
        for reference in result.references:
            own = reference.name == result.arm
            color = INK if own else styles[reference.name].color
            for px, py in _points([reference], x, y):
                ax.plot(
                    [px], [py], styles[reference.name].marker, color=color, markersize=8, markerfacecolor="none",
                    markeredgewidth=1.8, label=f"{reference.name}, as set" if own else reference.name, zorder=4,
                )  # fmt: skip
        _name_axes(ax, x, y)
    for ax in axes[len(others) :]:
        ax.set_axis_off()
    legend_above(figure, handles_of(*axes[: len(others)]), columns=4)
    better = "; ".join(_hint(name) for name in result.objectives)
    caption = (
        f"Each dot is a design under the same requests; blue ones are beaten by no other in all "
        f"{len(result.objectives)} objectives together. The line joins the best between the two shown. {better}."
    )
    return Drawing("pareto", "What can be had for what", caption, figure)


def parameter_figure(result: DesignsResult) -> Drawing:
    """Each objective against each parameter, all designs; the front in blue."""
    matter = influence(result)
    shown = sorted(result.parameters, key=lambda name: -matter[name])[:MOST_COLUMNS]
    rows = len(result.objectives)
    figure, axes = new_figure(rows, len(shown), 0.5 + 2.1 * rows, sharex="col", sharey="row")
    front = {design.name for design in result.front}
    for place, ax in enumerate(axes):
        row, column = divmod(place, len(shown))
        parameter, metric = shown[column], result.objectives[row]
        positions = axis_positions([design.parameters[parameter] for design in result.designs])
        for chosen, color, alpha, size in ((False, MUTED, 0.3, 10), (True, FRONT_COLOR, 0.9, 18)):
            rows_of = [
                (positions[design.parameters[parameter]], value)
                for design in result.designs
                if (design.name in front) is chosen and (value := _value(design, metric)) is not None
            ]
            if rows_of:
                text = "beaten by none" if chosen else "a design"
                xs, ys = zip(*rows_of, strict=True)
                ax.scatter(xs, ys, s=size, color=color, alpha=alpha, linewidth=0, label=text)
        if any(not isinstance(value, int | float) for value in positions):
            ax.set_xticks(list(positions.values()), [str(value) for value in positions])
        if column == 0:
            ax.set_ylabel(DEFINITIONS[metric].label)
            _format(ax, metric, "y")
        if row == rows - 1:
            ax.set_xlabel(parameter)
    legend_above(figure, handles_of(*axes), columns=2)
    left = len(result.parameters) - len(shown)
    caption = "Every design by the value of each parameter, all others being whatever they are in that design." + (
        f" Shown are the parameters that move the objectives most; {left} more are in designs.parquet." if left else ""
    )
    return Drawing("parameters", "What each parameter does", caption, figure)


def influence(result: DesignsResult) -> dict[str, float]:
    """Each parameter's share of the variance: between its values (up to BINS bins), averaged over the objectives."""
    merits = merits_of(result.designs, result.objectives)
    known = np.isfinite(merits).all(axis=1)
    total = merits[known].var(axis=0)
    found = {}
    for name in result.parameters:
        positions = axis_positions([design.parameters[name] for design in result.designs])
        value = np.array([positions[design.parameters[name]] for design in result.designs])[known]
        edges = np.unique(np.quantile(value, np.linspace(0, 1, BINS + 1))) if len(value) else np.array([0.0])
        group = np.searchsorted(edges, value, side="right")
        within = sum((group == g).mean() * merits[known][group == g].var(axis=0) for g in np.unique(group))
        found[name] = float(np.mean(np.divide(total - within, total, out=np.zeros_like(total), where=total > 0)))
    return found


def _dots(ax: Axes, designs: list[Design], x: str, y: str, *, color: str, alpha: float, size: int, text: str) -> None:
    points = _points(designs, x, y)
    if points:
        xs, ys = zip(*points, strict=True)
        ax.scatter(xs, ys, s=size, color=color, alpha=alpha, linewidth=0, label=text, zorder=2)


def _points(designs: list[Design], x: str, y: str) -> list[tuple[float, float]]:
    pairs = ((_value(design, x), _value(design, y)) for design in designs)
    return [(px, py) for px, py in pairs if px is not None and py is not None]


def _value(design: Design, metric: str) -> float | None:
    return None if design.metrics is None else plain_value(metric, design.metrics[metric])


def _name_axes(ax: Axes, x: str, y: str) -> None:
    ax.set_xlabel(DEFINITIONS[x].label)
    ax.set_ylabel(DEFINITIONS[y].label)
    _format(ax, x, "x")
    _format(ax, y, "y")


def _format(ax: Axes, metric: str, side: str) -> None:
    """Ticks with their unit; logarithmic where values differ by orders of magnitude."""
    axis = ax.xaxis if side == "x" else ax.yaxis
    low, high = ax.dataLim.intervalx if side == "x" else ax.dataLim.intervaly
    if np.isfinite([low, high]).all() and low > 0 and high / low > WIDE:
        ax.set_xscale("log") if side == "x" else ax.set_yscale("log")
    unit = DEFINITIONS[metric].unit
    if unit and unit != "1/s":  # the label says it
        axis.set_major_formatter(FuncFormatter(lambda value, _: in_unit(value, unit)))
    ax.grid(color=RULE)


def _hint(name: str) -> str:
    word = "more" if DEFINITIONS[name].better is Better.HIGHER else "less"
    return f"{DEFINITIONS[name].label}: {word} is better"
