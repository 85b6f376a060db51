"""Figures of a capacity plan: SLO attainment against the number of replicas, and of advised fleets against load."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from helios_sim.report import format as fmt
from helios_sim.report.capacity import ATTAINMENT, CapacityResult, Tried, load_in_words
from helios_sim.report.figures.style import (
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
from helios_sim.report.result import scope_in_words

MOST_PANELS = 6
MOST_TICKS = 8
_LINES = ("-", "--", ":", "-.")
# Positions of shares on the axis: minus the logarithm of what is missed, as near 1 as the eye wants to look.
_SHARES = (0.0, 0.5, 0.9, 0.99, 0.999)


def capacity_drawings(result: CapacityResult) -> list[Drawing]:
    with look():
        return [replicas_figure(result), *([load_figure(result)] if result.advice else [])]


def replicas_figure(result: CapacityResult) -> Drawing:
    """A panel for each load; a line for each card and arm. Full marks keep the SLOs, hollow ones do not."""
    loads = result.loads[:MOST_PANELS]
    columns = min(len(loads), 2)
    rows = -(-len(loads) // columns)
    figure, axes = new_figure(rows, columns, 0.7 + 3.4 * rows, sharey=True)
    for ax, load in zip(axes, loads, strict=False):
        of_load = [
            it for it in result.tried if it.load == load and it.time_factor == 1.0 and _share(it) is not None
        ]
        for (card, arm), style in _styles(result).items():
            points = sorted(
                (it for it in of_load if (it.card, it.arm) == (card, arm)), key=lambda it: it.replicas
            )
            _line(ax, [float(it.replicas) for it in points], points, style, _label(result, card, arm))
        _shares(ax, of_load)
        _counts(ax, [it.replicas for it in of_load])
        _bound(ax, result)
        ax.set_title(load_in_words(load, next(it.requests_per_s for it in result.plans if it.load == load)))
        ax.set_xlabel("replicas")
    for ax in axes[len(loads) :]:
        ax.set_axis_off()
    for row in range(rows):
        axes[row * columns].set_ylabel("requests inside all SLOs")
    legend_above(figure, handles_of(*axes[: len(loads)]), columns=3)
    return Drawing(
        "replicas", "How many replicas are enough",
        f"Full marks: {result.rule}. Hollow marks: not. Pale bands: 95 % intervals {scope_in_words(result.seeds)}. The "
        "axis stretches towards 100 %, by what is missed.", figure,
    )  # fmt: skip


def load_figure(result: CapacityResult) -> Drawing:
    """The advised fleets under more and more load."""
    figure, (ax,) = new_figure(1, 1, 3.6)
    styles = arm_styles([f"{place}" for place in range(len(result.advice))], "")
    shown: list[Tried] = []
    for place, advice in enumerate(result.advice):
        points = [it for it in advice.against_load if _share(it) is not None]
        style, plan = styles[str(place)], advice.plan
        upto = f"{'at least' if advice.at_least else 'up to'} {fmt.number(advice.valid_up_to_rps)}/s"
        _line(ax, [it.requests_per_s for it in points], points, style, f"{plan.fleet}, {plan.arm}: {upto}")
        ax.axvline(advice.valid_up_to_rps, color=style.color, linewidth=1.2, linestyle=(0, (4, 3)))
        shown += points
    _shares(ax, shown)
    _bound(ax, result)
    if len(shown) > 1 and max(it.requests_per_s for it in shown) > 4 * min(it.requests_per_s for it in shown):
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_locator(FixedLocator(_round_values([it.requests_per_s for it in shown])))
    ax.set_xlabel("arrivals (requests/s)")
    ax.set_ylabel("requests inside all SLOs")
    legend_above(figure, handles_of(ax), columns=3)
    return Drawing(
        "load", "How much load the advised fleets carry",
        f"Full marks: {result.rule}. Hollow marks: not. Dashed: the largest load within the SLOs, up to which the plan "
        f"is valid. Pale bands: 95 % intervals {scope_in_words(result.seeds)}.", figure,
    )  # fmt: skip


def _styles(result: CapacityResult) -> dict[tuple[str, str], ArmStyle]:
    """A colour for each card, a line for each arm; where there is one card, a colour for each arm."""
    if len(result.cards) == 1:
        of_arm = arm_styles(result.arms, "")
        return {(result.cards[0], arm): of_arm[arm] for arm in result.arms}
    by_card, by_arm = arm_styles(result.cards, ""), arm_styles(result.arms, "")
    return {
        (card, arm): ArmStyle(by_card[card].color, _LINES[place % len(_LINES)], by_arm[arm].marker)
        for card in result.cards
        for place, arm in enumerate(result.arms)
    }


def _label(result: CapacityResult, card: str, arm: str) -> str:
    return card if len(result.arms) == 1 else arm if len(result.cards) == 1 else f"{card}, {arm}"


def _line(ax: Axes, xs: Sequence[float], points: Sequence[Tried], style: ArmStyle, label: str) -> None:
    if not points:
        return
    ys = [_position(share) for it in points if (share := _share(it)) is not None]
    ax.plot(xs, ys, color=style.color, linestyle=style.linestyle, linewidth=1.5, marker=style.marker, label=label)
    hollow = [(x, y) for x, y, it in zip(xs, ys, points, strict=True) if not it.kept]
    if hollow:
        ax.plot(*zip(*hollow, strict=True), style.marker, color=style.color, markerfacecolor=PAPER, zorder=3)
    bands = [
        (x, _position(found.low), _position(found.high))
        for x, it in zip(xs, points, strict=True)
        if (found := it.intervals.get(ATTAINMENT)) is not None and found.low is not None and found.high is not None
    ]
    if bands:
        ax.fill_between(*np.array(bands).T, color=style.color, alpha=0.13, linewidth=0)


def _share(it: Tried) -> float | None:
    value = it.metrics.get(ATTAINMENT)
    return float(value) if isinstance(value, int | float) else None


def _position(share: float) -> float:
    return float(-np.log10(max(1 - share, 10.0**-4.3)))


def _shares(ax: Axes, shown: Sequence[Tried]) -> None:
    """Ticks of shares, up to the one that is nearest to 1 among what is shown."""
    most = max((share for it in shown if (share := _share(it)) is not None), default=1.0)
    ticks = [share for share in (*_SHARES, 1.0) if _position(share) <= _position(most) + 0.6]
    ax.set_yticks([_position(share) for share in ticks], [f"{share * 100:g} %" for share in ticks])
    ax.yaxis.set_minor_locator(NullLocator())


def _counts(ax: Axes, replicas: Sequence[int]) -> None:
    """Whole numbers; logarithmic where there are many."""
    most = max(replicas, default=1)
    ticks = list(range(1, most + 1))
    if most > MOST_TICKS:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_minor_locator(NullLocator())
        ticks = [2**power for power in range(most.bit_length())]
    ax.set_xticks(ticks, [str(tick) for tick in ticks])


def _bound(ax: Axes, result: CapacityResult) -> None:
    """The share that is asked for, where the SLOs are kept by one."""
    for it in result.requirements:
        if it.metric == ATTAINMENT:
            ax.axhline(_position(it.bound), color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))


def _round_values(rates: Sequence[float]) -> list[float]:
    """1, 2, 5, 10, ... within what is shown."""
    powers = range(int(np.floor(np.log10(min(rates)))), int(np.ceil(np.log10(max(rates)))) + 1)
    values = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    return [value for value in values if min(rates) <= value <= max(rates)]
