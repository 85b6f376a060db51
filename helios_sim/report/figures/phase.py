"""Figures over two settings: which arm is best at each of their values, and how every arm does there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import log2

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from helios_sim.report.figures.style import BASELINE_COLOR, INK, MUTED, ArmStyle, Drawing, annotate, new_figure
from helios_sim.report.metrics import DEFINITIONS, Better
from helios_sim.report.result import PhaseFigure, SweepPoint

BETTER, WORSE = "#1d9a5b", "#d8503f"
EVEN = 0.005  # a ratio this close to 1 has no colour
_GAP = 0.45  # of a column, between groups of columns


def phase_figure(
    name: str, spec: PhaseFigure, points: Sequence[SweepPoint], styles: Mapping[str, ArmStyle], baseline: str
) -> Drawing:
    """A tile for each value of two settings: the best arm, how much better than the baseline, and the next best.

    Arms that do as well, to a hundredth, are counted; the next best is one that does not.
    """
    xs, rows = _values(spec.x, points), _values(spec.split_by, points)
    figure, (ax,) = new_figure(1, 1, 0.8 + 0.95 * len(rows))
    size = min(9.5, 57.0 / len(xs))  # so that the longest names fit into a tile
    for point in points:
        x, y = xs.index(point.settings[spec.x]), rows.index(point.settings.get(spec.split_by))
        ranked = ranked_arms(spec, point, baseline)
        if not ranked:
            continue
        best, gain = ranked[0]
        color = BASELINE_COLOR if best == baseline else styles[best].color
        ax.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=color, alpha=0.22, edgecolor=color))
        others = [(arm, factor) for arm, factor in ranked if round(factor, 2) != round(gain, 2)]
        equal = len(ranked) - len(others) - 1
        as_good = f"  (+{equal})" if equal else ""
        annotate(ax, _short(best, size), (x, y), (0, 11), ha="center", va="center", color=INK, fontsize=size,
                 fontweight="bold")  # fmt: skip
        annotate(ax, f"{gain:.2f}×{as_good}", (x, y), (0, -2), ha="center", va="center", color=INK, fontsize=size)
        if others:
            second, factor = others[0]
            annotate(ax, f"{_short(second, size)} {factor:.2f}×", (x, y), (0, -15), ha="center", va="center",
                     fontsize=min(7.5, size))  # fmt: skip
    ax.set_xlim(-0.5, len(xs) - 0.5)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xticks(range(len(xs)), [str(x) for x in xs])
    ax.set_yticks(range(len(rows)), [str(row) for row in rows])
    _without_frame(ax)
    ax.set_xlabel(spec.x_label)
    ax.set_ylabel(spec.y_label)
    ties = "; in brackets, how many others do as well" if any("(+" in text.get_text() for text in ax.texts) else ""
    caption = (
        f"The best arm by {DEFINITIONS[spec.metric].label}{_among(spec)}, how many times better than {baseline} it "
        f"is{ties}, and the next best."
    )
    return Drawing(name, spec.title, caption, figure)


def matrix_figure(
    name: str, spec: PhaseFigure, points: Sequence[SweepPoint], styles: Mapping[str, ArmStyle], baseline: str
) -> Drawing:
    """A row for each arm: how many times better than the baseline it is at each value of `x`, grouped by `split_by`.

    Green is better and red is worse, the fuller the more, up to four times; without a colour it changes more tokens
    than `least_agreement` allows. The best of a column is bold.
    """
    xs, groups = _values(spec.x, points), _values(spec.split_by, points)
    there = dict.fromkeys(arm for point in points for arm in point.metrics)
    arms = [arm for arm in styles if arm in there and arm != baseline and (spec.arms is None or arm in spec.arms)]
    figure, (ax,) = new_figure(1, 1, 1.5 + 0.27 * len(arms))
    for group, value in enumerate(groups):
        left = group * (len(xs) + _GAP)
        annotate(ax, str(value), (left + (len(xs) - 1) / 2, -0.5), (0, 6), ha="center", va="bottom", color=INK,
                 fontsize=8.5, fontweight="bold")  # fmt: skip
        for point in (point for point in points if point.settings.get(spec.split_by) == value):
            x = left + xs.index(point.settings[spec.x])
            found = {arm: (gain, kept) for arm, gain, kept in gains(spec, point, baseline)}
            best = max((round(gain, 2) for gain, kept in found.values() if kept), default=None)
            for y, arm in enumerate(arms):
                if arm not in found:
                    annotate(ax, "–", (x, y), (0, 0), ha="center", va="center", fontsize=7, color=MUTED)
                    continue
                gain, kept = found[arm]
                _fill(ax, x, y, gain if kept else 1.0)
                weight = "bold" if kept and round(gain, 2) == best and best > 1 else "normal"
                color, slant = (INK, "normal") if kept else (MUTED, "italic")
                annotate(ax, f"{gain:.2f}", (x, y), (0, 0), ha="center", va="center", fontsize=7, color=color,
                         fontweight=weight, fontstyle=slant)  # fmt: skip
    places = [group * (len(xs) + _GAP) + x for group in range(len(groups)) for x in range(len(xs))]
    ax.set_xlim(-0.5, places[-1] + 0.5)
    ax.set_ylim(len(arms) - 0.5, -0.5)
    ax.set_xticks(places, [str(x) for x in xs] * len(groups), rotation=60, ha="right", rotation_mode="anchor",
                  fontsize=7.5)  # fmt: skip
    ax.set_yticks(range(len(arms)), arms, fontsize=8.5)
    _without_frame(ax)
    caption = (
        f"How many times better than {baseline} each arm is by {DEFINITIONS[spec.metric].label}: green is better, red "
        "worse, bold the best of a column."
    )
    if spec.least_agreement:
        caption += f" In italics, without a colour: it changes more than {_most(spec)} of the tokens."
    return Drawing(name, spec.title, f"{caption} –: left out there.", figure)


def ranked_arms(spec: PhaseFigure, point: SweepPoint, baseline: str) -> list[tuple[str, float]]:
    """Arms of a point that keep to the agreement, with how many times better than the baseline, best first.

    Of equals, to a hundredth, the baseline comes first, then the one that was named first.
    """
    found = [(arm, gain) for arm, gain, kept in gains(spec, point, baseline) if kept]
    return sorted(found, key=lambda row: (-round(row[1], 2), row[0] != baseline))


def gains(spec: PhaseFigure, point: SweepPoint, baseline: str) -> Iterator[tuple[str, float, bool]]:
    """The improvement over the baseline of each arm of a point, as a factor, and whether it keeps the agreement.

    Arms for which either is not known are left out.
    """
    lower = DEFINITIONS[spec.metric].better is Better.LOWER
    of_baseline = point.metrics.get(baseline, {}).get(spec.metric)
    for arm, metrics in point.metrics.items():
        value, agreement = metrics.get(spec.metric), metrics.get("agreement")
        shown = arm == baseline or spec.arms is None or arm in spec.arms
        if not shown or not isinstance(value, int | float) or not isinstance(of_baseline, int | float):
            continue
        if value > 0 and isinstance(agreement, int | float):
            gain = float(of_baseline / value if lower else value / of_baseline)
            yield arm, gain, agreement >= spec.least_agreement - 1e-9


def baseline_of(points: Sequence[SweepPoint], of_study: str) -> str:
    """The baseline of these points: the study's, or the arm with which a sweep of its own compares."""
    first = points[0]
    return next((arm for arm in first.metrics if arm not in first.vs_baseline), of_study)


def _fill(ax: Axes, x: float, y: float, gain: float) -> None:
    if abs(gain - 1) <= EVEN:
        color, strength = MUTED, 0.08
    else:
        color, strength = (BETTER if gain > 1 else WORSE), 0.12 + 0.24 * min(abs(log2(gain)), 2.0)
    ax.add_patch(Rectangle((x - 0.47, y - 0.44), 0.94, 0.88, facecolor=color, alpha=strength, linewidth=0))


def _short(arm: str, size: float) -> str:
    """The arm's name, over which a narrow tile is not run."""
    return arm if size > 9 or len(arm) <= 16 else f"{arm[:15]}…"


def _values(axis: str, points: Sequence[SweepPoint]) -> list[float | int | str | None]:
    return list(dict.fromkeys(point.settings.get(axis) for point in points))


def _without_frame(ax: Axes) -> None:
    ax.tick_params(length=0)
    ax.grid(visible=False)
    for side in ax.spines.values():
        side.set_visible(False)


def _most(spec: PhaseFigure) -> str:
    return f"{100 * (1 - spec.least_agreement):.3g} %"


def _among(spec: PhaseFigure) -> str:
    return f" of those that change at most {_most(spec)} of the tokens" if spec.least_agreement else ""
