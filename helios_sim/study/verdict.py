"""The answer in plain sentences, from the figures alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from itertools import pairwise
from math import exp, log

import numpy as np

from helios_sim.report.cautions import MOST_LOST, completed, lost_share, reservations
from helios_sim.report.compare import Ratio, compare
from helios_sim.report.designs import cost, on_front
from helios_sim.report.format import NO_INTERVAL, metric_with_interval
from helios_sim.report.intervals import Method, ratio_bounds
from helios_sim.report.metrics import DEFINITIONS, Better
from helios_sim.report.records import Records
from helios_sim.report.result import ExperimentResult, LoadFigure, SweepPoint, headline_metrics, scope_in_words
from helios_sim.study.build import PROFILE_RUNTIME
from helios_sim.study.promise import told
from helios_sim.study.schema import Config, FaultConfig, LastingFaultConfig

FEWEST_REQUESTS = 20  # completed by an arm, all seeds together; with fewer there is no verdict
EVEN = 0.01  # ratios closer to 1 than this are called even
ATTAINMENT = 0.99
PROFILE_ERROR = "profile_time_factor"  # a sweep's setting


def verdict(
    result: ExperimentResult,
    subject: str,
    ratios: Mapping[str, Ratio],
    comparable: Collection[str],
    why_so_many: str | None = None,
) -> tuple[str, ...]:
    """Return the answer in sentences: the subject against its baseline in the headline metric, reservations, the price
    in quality, and the best arm. Brackets are 95 % intervals, over the seeds or within the only run.

    `comparable` are the arms under the subject's conditions. A best arm is named only among the comparable arms that
    lost hardly any request and completed enough of them. `why_so_many`: with seeds=auto, why there are no more seeds.
    """
    name = headline_metrics(result)[0]
    sentences = [_against(result, subject, name, ratios.get(name))]
    metrics = result.arms[subject].metrics
    comparable = [
        arm
        for arm in comparable
        if lost_share(result.arms[arm]) <= MOST_LOST and completed(result.arms[arm]) >= FEWEST_REQUESTS
    ]
    care = reservations(result)
    sentences.append(f"Read with care: {'; '.join(care)}." if care else "")
    sentences.append(_where_off(result, subject, name))
    sentences.append(why_so_many or "")
    sentences.append(_quality(result, subject))
    sentences += told(result.trust.promises)
    if metrics.get("switches") or metrics.get("loads") or metrics.get("evaluation_time_s"):
        sentences.append(_changes(result, subject))
    sentences.append(_best(result, name, comparable))
    sentences.append(_unbeaten(result, name, comparable))
    sentences += load_findings(result, subject, name)
    sentences += error_findings(result, subject, name)
    return tuple(filter(None, sentences))


def _against(result: ExperimentResult, subject: str, name: str, ratio: Ratio | None) -> str:
    label, over = DEFINITIONS[name].label, result.baseline_of(subject)
    if subject == over:
        return f"{subject}: {label} {_figure(result, subject, name)}."
    lost = _lost(result, subject)
    if lost:
        return f"No verdict on {label}: {lost}, so {subject} and {over} did not do the same work."
    if ratio is None:
        return f"{subject}: {label} {_figure(result, subject, name)}."
    if ratio.ratio is None:
        band = f"{ratio.low:.2f} to {ratio.high:.2f}"
        return f"{subject} has {band} times the {label} of {over}: a band that is known, without sampling error."
    compared = f"{ratio.ratio:.2f} times the {label} of {over}"
    requests = _compared_requests(result, subject)
    if requests < FEWEST_REQUESTS:
        return f"Too few requests for a verdict: over {requests}, {subject} has {compared}."
    if ratio.method is Method.EXACT:
        compared += ", exactly"
    elif ratio.low is None or ratio.high is None:
        compared += f" (no interval {scope_in_words(result.seeds)})"
    else:
        compared += f" (95 % interval {scope_in_words(result.seeds)}: {ratio.low:.2f} to {ratio.high:.2f})"
    return _answer(result, subject, name, ratio, compared)


def _lost(result: ExperimentResult, subject: str) -> str:
    """Say which of the subject and its baseline lost requests, and how many; empty if neither did."""
    shares = {arm: lost_share(result.arms[arm]) for arm in (subject, result.baseline_of(subject))}
    lossy = {arm: share for arm, share in shares.items() if share > MOST_LOST}
    return " and ".join(f"{arm} did not complete {share:.1%} of its requests" for arm, share in lossy.items())


def _compared_requests(result: ExperimentResult, subject: str) -> int:
    """Return the number of requests that the subject and its baseline completed, the smaller of the two."""
    return min(completed(result.arms[arm]) for arm in (subject, result.baseline_of(subject)))


def _answer(result: ExperimentResult, subject: str, name: str, ratio: Ratio, compared: str) -> str:
    """Say what a ratio shows: several seeds may show that an arm helps, one seed only what it did in one run."""
    stance, one = stance_of(result, name, ratio), result.seeds == 1
    match stance:
        case Stance.OPEN:
            return f"{subject} has {compared}."
        case Stance.UNCLEAR:
            return f"No clear difference{' in this run' if one else ''}: {subject} has {compared}."
        case Stance.EVEN:
            return f"No difference that matters{' in this run' if one else ''}: {subject} has {compared}."
    if one:
        return f"In this run {subject} is {stance.value}: {compared}."
    return f"{subject} {'helps' if stance is Stance.BETTER else 'hurts'}: {compared}."


class Stance(StrEnum):
    """What a ratio says of the subject against its baseline."""

    OPEN = "open"  # several seeds, and no interval; or a metric of which neither more nor less is better
    UNCLEAR = "unclear"
    EVEN = "even"
    BETTER = "better"
    WORSE = "worse"


def stance_of(result: ExperimentResult, name: str, ratio: Ratio) -> Stance:
    """Return what a ratio says. One seed needs no interval: it shows what an arm did in its run."""
    assert ratio.ratio is not None
    side = side_of(ratio)
    if (side is None and result.seeds > 1) or DEFINITIONS[name].better is Better.NEITHER:
        return Stance.OPEN
    if side == 0:
        return Stance.UNCLEAR
    if abs(ratio.ratio - 1) < EVEN:
        return Stance.EVEN
    return Stance.BETTER if (ratio.ratio < 1) == (DEFINITIONS[name].better is Better.LOWER) else Stance.WORSE


def survives(
    result: ExperimentResult, subject: str, name: str, ratio: Ratio | None, ends: Sequence[Ratio | None]
) -> bool | None:
    """Whether the subject's stance is the same at each end of the profiles' band; None if it has no stance."""
    few = _compared_requests(result, subject) < FEWEST_REQUESTS
    neither = DEFINITIONS[name].better is Better.NEITHER
    if ratio is None or ratio.ratio is None or few or neither or _lost(result, subject):
        return None
    stance = stance_of(result, name, ratio)
    return all(end is not None and end.ratio is not None and stance_of(result, name, end) is stance for end in ends)


def _where_off(result: ExperimentResult, subject: str, name: str) -> str:
    """Say whether the answer holds at both ends of the profiles' band."""
    trust, label = result.trust, DEFINITIONS[name].label
    if trust.why_not is not None:
        return f"Whether that holds where the profiles are off is open: {trust.why_not}."
    if trust.band is None or not trust.at_ends:
        return ""
    factors = " and ".join(f"{end.time_factor:.2f}" for end in trust.at_ends)
    where = f"iterations {factors} times as long as the profiles say ({trust.band.source})"
    if subject == result.baseline_of(subject):
        values = " and ".join(metric_with_interval(name, end.value, None) for end in trust.at_ends)
        return f"With {where}: {label} {values}."
    if trust.survives is None:
        return ""
    ratios = [_bracketed(end.ratio) for end in trust.at_ends]
    if trust.survives:
        return f"The same holds with {where}: {' and '.join(ratios)} times."
    return f"That changes with {where}: {' and '.join(ratios)} times."


def _bracketed(ratio: Ratio | None) -> str:
    if ratio is None or ratio.ratio is None:
        return "not defined"
    if ratio.low is None or ratio.high is None:
        return f"{ratio.ratio:.2f}{'' if ratio.method is Method.EXACT else ' ' + NO_INTERVAL}"
    return f"{ratio.ratio:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def side_of(ratio: Ratio) -> int | None:
    """Return the side of 1 on which the interval lies: -1 or 1; 0 if on both sides; None without an interval."""
    if ratio.low is None or ratio.high is None:
        return None
    return -1 if ratio.high < 1 else 1 if ratio.low > 1 else 0


def _figure(result: ExperimentResult, arm: str, name: str) -> str:
    """Return a metric of an arm with its interval."""
    found = result.arms[arm]
    return metric_with_interval(name, found.metrics.get(name), found.intervals.get(name))


def _quality(result: ExperimentResult, subject: str) -> str:
    metrics = result.arms[subject].metrics
    if not isinstance(metrics.get("agreement"), float) or not isinstance(metrics.get("layers_per_token"), float):
        return ""
    layers, agreement = (_figure(result, subject, name) for name in ("layers_per_token", "agreement"))
    told = ""
    if isinstance(metrics.get("bits_per_char"), float):
        told = f"; the text cost it {_figure(result, subject, 'bits_per_char')} per character"
    return f"Its tokens ran {layers} layers on average, and {agreement} of them equal those of full depth{told}."


def _changes(result: ExperimentResult, subject: str) -> str:
    switches, loads = (_times(_figure(result, subject, name)) for name in ("switches", "loads"))
    return f"It switched {switches}, loaded weights {loads} and spent {_evaluation(result, subject)} on evaluation."


def _evaluation(result: ExperimentResult, subject: str) -> str:
    """Return time under evaluation as a share of the span, or in seconds if it went on after the last completion."""
    arm = result.arms[subject]
    evaluated = [run.metrics.get("evaluation_time_s") for run in arm.replicates]
    spans = [run.metrics.get("span_s") for run in arm.replicates]
    times = [float(value) for value in evaluated if isinstance(value, int | float)]
    of = [float(value) * max(1, len(arm.replicas)) for value in spans if isinstance(value, int | float)]
    if not sum(times):
        return "no time"
    if len(of) < len(times) or sum(times) > sum(of):
        told = _figure(result, subject, "evaluation_time_s")
        return told if len(of) < len(times) else f"{told} (more than until its last answer: it went on after that)"
    low, high = ratio_bounds(np.array(times), np.array(of))
    interval = f"[{100 * low:.1f}, {min(100 * high, 100.0):.1f}]" if np.isfinite(high) else NO_INTERVAL
    return f"{100 * sum(times) / sum(of):.1f} % {interval} of the time"


def _times(count: str) -> str:
    return "once" if count == "1" else f"{count} times"


def _best(result: ExperimentResult, name: str, comparable: Collection[str]) -> str:
    """Name the best arm that can be deployed, and how far the oracle is."""
    values = {
        arm: value
        for arm, value in ((arm, r.metrics.get(name)) for arm, r in result.arms.items())
        if isinstance(value, int | float) and arm in comparable
    }
    real = {arm: value for arm, value in values.items() if not result.arms[arm].is_bound}
    if len(real) < 2 or DEFINITIONS[name].better is Better.NEITHER:
        return ""
    pick = min if DEFINITIONS[name].better is Better.LOWER else max
    best = pick(real, key=lambda arm: real[arm])
    rival = pick((arm for arm in real if arm != best), key=lambda arm: real[arm])
    where = "" if result.seeds > 1 else " in this run"
    sentence = f"Best of the arms{where} in {DEFINITIONS[name].label}: {best} with {_figure(result, best, name)}"
    runs = [[(it.records, it.metrics) for it in result.arms[arm].replicates] for arm in (best, rival)]
    ratio = compare(*runs).get(name)
    if real[best] == real[rival]:
        alike = [arm for arm in real if real[arm] == real[best] and arm != best]
        sentence += f", as {', '.join(alike)}"
    elif ratio is not None and side_of(ratio) == 0:
        sentence += f", not clearly ahead of {rival}"
    bounds = [arm for arm in values if result.arms[arm].is_bound]
    return f"{sentence}; the oracle reaches {_figure(result, bounds[0], name)}." if bounds else f"{sentence}."


def _unbeaten(result: ExperimentResult, name: str, comparable: Collection[str]) -> str:
    """Name arms that no other beats in both the first metric and bits per character; empty if bits are not known."""
    names = (name, "bits_per_char")
    rows = {
        arm: [cost(metric, r.metrics.get(metric)) for metric in names]
        for arm, r in result.arms.items()
        if arm in comparable and not r.is_bound
    }
    if name == "bits_per_char" or DEFINITIONS[name].better is Better.NEITHER or not rows:
        return ""
    costs = np.array(list(rows.values()))
    front = [arm for arm, kept in zip(rows, on_front(costs), strict=True) if kept]
    if not front:
        return ""
    first_of = {tuple(rows[arm]): arm for arm in reversed(front)}  # the first of arms with equal figures
    front = [first_of[figures] for figures in sorted(first_of)]
    told = (
        f"{arm} ({', '.join(_figure(result, arm, metric) for metric in names)})" for arm in front
    )
    return f"Unbeaten in {DEFINITIONS[name].label} and bits per character together: {'; '.join(told)}."


def conditions(config: Config) -> str:
    """Return hardware, models, runtime and load in a sentence."""
    runtime = config.runtime.preset.replace("_", " ")
    if config.runtime.preset == PROFILE_RUNTIME:
        runtime = "host costs of the profiles"
    arrivals = config.workload.arrivals
    load = {
        "closed_loop": f"a closed loop of {arrivals.users} user" + ("" if arrivals.users == 1 else "s"),
        "all_at_once": "all requests queued at the start",
        "trace": f"the arrivals of {arrivals.trace}",
    }.get(arrivals.kind, f"{arrivals.kind} arrivals at {arrivals.rate_per_s} requests/s")
    return f"{_machines(config)}, {runtime}, {load}."


def _machines(config: Config) -> str:
    """Return models and cards, kind by kind if they differ, and the router."""
    n, router = config.server.replicas, config.server.router.replace("_", " ")
    if not config.cluster.kinds:
        models = ", ".join(config.models)
        return f"{models} on {config.device}" if n == 1 else f"{models} on {n} x {config.device} ({router})"
    kinds = []
    for name, entry in config.cluster.kinds.items():
        models = ", ".join(entry.get("models", config.models))
        kinds.append(f"{models} on {entry.get('count', 1)} x {config.device_of(entry)} ({name})")
    return f"{'; '.join(kinds)}; {router}"


def offered_requests_per_s(config: Config) -> float | None:
    """Return the rate of open-loop arrivals; None for a closed loop, a queue filled at the start, or a trace."""
    arrivals = config.workload.arrivals
    return arrivals.rate_per_s if arrivals.kind in ("poisson", "gamma", "constant") else None


def workload_facts(config: Config, records: Records) -> tuple[tuple[str, str], ...]:
    """Return lengths as served, task shares and faults, each with a label."""
    facts = []
    n_done = records.n_completed
    answered = "" if n_done == len(records) else f" of the {n_done:,} completed"
    for label, tokens in (
        ("prompt tokens", records.series(lambda part: part.prompt_tokens)),
        (f"output tokens{answered}", records.series(lambda part: part.output_tokens[part.completed])),
    ):
        p50, p95, p99 = tokens.percentiles((50, 95, 99)) if len(tokens) else (0, 0, 0)
        told = f"mean {tokens.mean():.0f}, p50 {p50:.0f}, p95 {p95:.0f}, p99 {p99:.0f}" if len(tokens) else "none"
        facts.append((label, told))
    shares = ", ".join(f"{task} {share:g}" for task, share in config.workload.mix.tasks.items())
    facts.append(("task shares", shares))
    if config.workload.mix.after:
        after = ", ".join(f"{task} {share:g}" for task, share in config.workload.mix.after.items())
        facts.append((f"drift ({config.workload.mix.drift})", f"to {after}"))
    strikes = config.workload.faults.strikes
    if strikes:
        facts.append(("faults", "; ".join(_when(kind, fault) for kind, fault in strikes.items())))
    return tuple(facts)


def _when(kind: str, fault: FaultConfig) -> str:
    """Return a kind of fault in words, and when it strikes."""
    where = "" if fault.replicas is None else f" on replica {', '.join(map(str, fault.replicas))}"
    when = [f"at {', '.join(f'{time_s:g}' for time_s in fault.at_s)} s"] if fault.at_s else []
    when += [f"{fault.rate_per_hour:g} per hour and replica"] if fault.rate_per_hour is not None else []
    lasts = f", for {fault.lasts_s:g} s" if isinstance(fault, LastingFaultConfig) else ""
    return f"{kind.replace('_', ' ')}{where} {' and '.join(when)}{lasts}"


def load_findings(result: ExperimentResult, subject: str, metric: str) -> list[str]:
    """Return sentences for every load figure; empty without one. Rates are interpolated in log(rate) between points."""
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
            told = f"Highest rate with {ATTAINMENT:.0%} of requests inside the service levels"
            sentences.append(f"{told}, between those tried and without intervals: {known}.")
        crossings = break_even(points, figure.x, subject, metric)
        sentences.append(_break_even_sentence(result, subject, metric, points, crossings))
    return sentences


def error_findings(result: ExperimentResult, subject: str, metric: str) -> list[str]:
    """Say whether the subject stays on its side of the baseline if the profile is off; empty without such a sweep."""
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
    moved = f"the ratio moves by at most {spread:.0%}, without an interval"
    if not turned:
        return [f"{scaled}, {subject} stays on the same side of {result.baseline} at every setting; {moved}."]
    where = "; ".join(", ".join(f"{key} {value}" for key, value in others) for others in turned)
    return [f"{scaled}, the verdict turns at {where}; {moved}."]


def highest_rate(points: Sequence[SweepPoint], x: str, arm: str) -> float | None:
    """Return the largest rate up to which attainment is at least 99 %, interpolated; None if even the lowest fails."""
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
    """Return the rates at which the subject's ratio to the baseline crosses 1."""
    found = []
    ratios = [(float(p.settings[x]), p.vs_baseline.get(subject, {}).get(metric)) for p in points]
    known = [(rate, log(r.ratio)) for rate, r in ratios if r is not None and r.ratio and r.ratio != 1]
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
        return f"In {label}, {subject} and {result.baseline} break even at {rates} requests/s, without intervals."
    ratios = [r.ratio for p in points if (r := p.vs_baseline.get(subject, {}).get(metric)) and r.ratio]
    if not ratios:
        return f"In {label}, {subject} cannot be compared with {result.baseline}."
    differing = [ratio for ratio in ratios if ratio != 1]
    if not differing:
        return f"In {label}, {subject} and {result.baseline} are equal at every rate tried."
    way = DEFINITIONS[metric].better if metric in DEFINITIONS else Better.NEITHER
    better, worse = ("lower", "higher") if way is Better.NEITHER else ("better", "worse")
    word = better if (differing[0] < 1) == (way is not Better.HIGHER) else worse
    where = "every rate tried" if len(differing) == len(points) else f"{len(differing)} of {len(points)} rates tried"
    sides = [side_of(p.vs_baseline[subject][metric]) for p in points if metric in p.vs_baseline.get(subject, {})]
    clear = f", clearly at {sum(side in (-1, 1) for side in sides)}" if any(side is not None for side in sides) else ""
    return f"In {label}, {subject} is {word} than {result.baseline} at {where}{clear}."


def _again(points: Sequence[SweepPoint], x: str, arm: str, carried: float | None) -> str:
    """Name higher rates at which the arm meets the levels again: after a dip, or since a queue changes its policy."""
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
