"""What a sweep over load says in numbers: the rate that each arm carries, and where the subject breaks even."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import exp, log

from helios_sim.report.metrics import DEFINITIONS, Better
from helios_sim.report.result import ExperimentResult, LoadFigure, SweepPoint

ATTAINMENT = 0.99
PROFILE_ERROR = "profile_time_factor"  # a sweep's setting


def load_findings(result: ExperimentResult, subject: str, metric: str) -> list[str]:
    """Sentences for every load figure; empty without one. Rates between two points are interpolated in log(rate)."""
    sentences = []
    for figure in result.figures:
        if not isinstance(figure, LoadFigure):
            continue
        points = [p for p in result.points if all(p.settings.get(k) == v for k, v in figure.where.items())]
        points = sorted((p for p in points if figure.x in p.settings), key=lambda p: float(p.settings[figure.x]))
        if result.slo.any:
            carried = {arm: highest_rate(points, figure.x, arm) for arm in result.arms}
            known = ", ".join(
                f"{arm} {_rate(points, figure.x, rate)}{_again(points, figure.x, arm, rate)}"
                for arm, rate in carried.items()
            )
            sentences.append(f"Highest rate with {ATTAINMENT:.0%} of requests inside the service levels: {known}.")
        crossings = break_even(points, figure.x, subject, metric)
        sentences.append(_break_even_sentence(result, subject, metric, points, crossings))
    return sentences


def error_findings(result: ExperimentResult, subject: str, metric: str) -> list[str]:
    """Whether the subject stays on its side of the baseline when the profile is off; empty without such a sweep."""
    by_setting: dict[tuple[tuple[str, object], ...], dict[float, float]] = {}
    for point in result.points:
        ratio = point.vs_baseline.get(subject, {}).get(metric)
        if PROFILE_ERROR in point.settings and ratio is not None and ratio.ratio:
            others = tuple((key, value) for key, value in point.settings.items() if key != PROFILE_ERROR)
            by_setting.setdefault(others, {})[float(point.settings[PROFILE_ERROR])] = ratio.ratio
    if not by_setting:
        return []
    factors = sorted({factor for ratios in by_setting.values() for factor in ratios})
    turned = [others for others, ratios in by_setting.items() if len({ratio < 1 for ratio in ratios.values()}) > 1]
    spread = max(max(ratios.values()) / min(ratios.values()) for ratios in by_setting.values()) - 1
    scaled = f"With every iteration {factors[0]:g} to {factors[-1]:g} times as long"
    moved = f"the ratio moves by at most {spread:.0%}"
    if not turned:
        return [f"{scaled}, {subject} stays on the same side of {result.baseline} at every setting; {moved}."]
    where = "; ".join(", ".join(f"{key} {value}" for key, value in others) for others in turned)
    return [f"{scaled}, the verdict turns at {where}; {moved}."]


def highest_rate(points: Sequence[SweepPoint], x: str, arm: str) -> float | None:
    """The largest rate up to which attainment stays at 99 %: None when it is below that at the lowest rate."""
    best = None
    for lower, upper in zip([None, *points], points, strict=False):
        attained = upper.metrics[arm].get("slo_attainment")
        if not isinstance(attained, int | float):
            return best
        if attained >= ATTAINMENT:
            best = float(upper.settings[x])
            continue
        if lower is None:
            return None
        before = lower.metrics[arm]["slo_attainment"]
        assert isinstance(before, int | float)
        return _between(float(lower.settings[x]), float(upper.settings[x]), (before - ATTAINMENT) / (before - attained))
    return best


def break_even(points: Sequence[SweepPoint], x: str, subject: str, metric: str) -> list[float]:
    """Rates at which the subject's ratio to the baseline crosses 1."""
    found = []
    ratios = [(float(p.settings[x]), p.vs_baseline.get(subject, {}).get(metric)) for p in points]
    known = [(rate, log(r.ratio)) for rate, r in ratios if r is not None and r.ratio]
    for (rate, value), (next_rate, next_value) in pairwise(known):
        if value * next_value < 0:
            found.append(_between(rate, next_rate, value / (value - next_value)))
    return found


def _break_even_sentence(
    result: ExperimentResult, subject: str, metric: str, points: Sequence[SweepPoint], crossings: list[float]
) -> str:
    label = DEFINITIONS[metric].label if metric in DEFINITIONS else metric
    if crossings:
        rates = ", ".join(f"{rate:.1f}" for rate in crossings)
        return f"In {label}, {subject} and {result.baseline} break even at {rates} requests/s."
    ratio = next((r for p in points if (r := p.vs_baseline.get(subject, {}).get(metric)) and r.ratio), None)
    if ratio is None or ratio.ratio is None:
        return f"In {label}, {subject} cannot be compared with {result.baseline}."
    better = (ratio.ratio < 1) == (metric in DEFINITIONS and DEFINITIONS[metric].better is Better.LOWER)
    return f"In {label}, {subject} is {'better' if better else 'worse'} than {result.baseline} at every rate tried."


def _again(points: Sequence[SweepPoint], x: str, arm: str, carried: float | None) -> str:
    """Higher rates at which the arm meets the levels after all: a dip, or a queue that changes the policy's mind."""
    beyond = [p for p in points if float(p.settings[x]) > (carried or 0.0)]
    met = [p for p in beyond if isinstance(a := p.metrics[arm].get("slo_attainment"), float) and a >= ATTAINMENT]
    if not met:
        return ""
    rates = [f"{float(p.settings[x]):g}" for p in met]
    if len(met) > 2 and met == beyond[beyond.index(met[0]) :]:
        return f" (and again from {rates[0]} to {rates[-1]})"
    return f" (and again at {', '.join(rates)})"


def _between(low: float, high: float, share: float) -> float:
    return exp(log(low) + share * (log(high) - log(low)))


def _rate(points: Sequence[SweepPoint], x: str, rate: float | None) -> str:
    if rate is None:
        return f"below {float(points[0].settings[x]):g}/s"
    if rate >= float(points[-1].settings[x]):
        return f"at least {rate:g}/s"
    return f"{rate:.1f}/s"
