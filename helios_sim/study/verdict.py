"""The answer in plain sentences, from the figures alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from helios_sim.report.compare import Ratio
from helios_sim.report.designs import cost, on_front
from helios_sim.report.format import metric as shown
from helios_sim.report.metrics import DEFINITIONS, Better, MetricValue
from helios_sim.report.records import Records
from helios_sim.report.result import ExperimentResult, headline_metrics
from helios_sim.study.build import PROFILE_RUNTIME
from helios_sim.study.findings import error_findings, load_findings
from helios_sim.study.schema import Config

EVEN = 0.01  # ratios closer to 1 than this are called even


def verdict(
    result: ExperimentResult, subject: str, ratios: Mapping[str, Ratio], comparable: Collection[str]
) -> tuple[str, ...]:
    """First the subject against the baseline in the headline metric, then what it costs, then who is best.

    `comparable` are the arms under the subject's conditions: only among those is a best one named.
    """
    name = headline_metrics(result)[0]
    sentences = [_against(result, subject, name, ratios.get(name))]
    metrics = result.arms[subject].metrics
    sentences.append(_quality(metrics))
    if metrics.get("switches") or metrics.get("loads") or metrics.get("evaluation_time_s"):
        sentences.append(_changes(metrics, max(1, len(result.arms[subject].replicas))))
    sentences.append(_best(result, name, comparable))
    sentences.append(_unbeaten(result, name, comparable))
    sentences += load_findings(result, subject, name)
    sentences += error_findings(result, subject, name)
    return tuple(filter(None, sentences))


def _against(result: ExperimentResult, subject: str, name: str, ratio: Ratio | None) -> str:
    label, over = DEFINITIONS[name].label, result.baseline_of(subject)
    if subject == over or ratio is None:
        return f"{subject}: {label} {shown(name, result.arms[subject].metrics.get(name))}."
    if ratio.ratio is None:
        return f"{subject} has {ratio.low:.2f} to {ratio.high:.2f} times the {label} of {over}."
    compared = f"{ratio.ratio:.2f} times the {label} of {over}"
    if ratio.low is not None and ratio.high is not None:
        compared += f" (95 % interval {ratio.low:.2f} to {ratio.high:.2f})"
        if ratio.low <= 1 <= ratio.high:
            return f"No clear difference: {subject} has {compared}."
    if abs(ratio.ratio - 1) < EVEN:
        return f"No difference that matters: {subject} has {compared}."
    better = (ratio.ratio < 1) == (DEFINITIONS[name].better is Better.LOWER)
    return f"{subject} {'helps' if better else 'hurts'}: {compared}."


def _quality(metrics: Mapping[str, MetricValue]) -> str:
    agreement, layers = metrics.get("agreement"), metrics.get("layers_per_token")
    if not isinstance(agreement, float) or not isinstance(layers, float):
        return ""
    bits = metrics.get("bits_per_char")
    told = f"; the text cost it {shown('bits_per_char', bits)} per character" if isinstance(bits, float) else ""
    return (
        f"Its tokens ran {layers:.1f} layers on average, and {agreement:.1%} of them equal those of full depth{told}."
    )


def _changes(metrics: Mapping[str, MetricValue], replicas: int) -> str:
    span, evaluated = metrics.get("span_s"), metrics.get("evaluation_time_s")
    share = (
        f"{evaluated / (span * replicas):.1%} of the time"
        if isinstance(span, float) and isinstance(evaluated, float)
        else ""
    )
    return (
        f"It switched {shown('switches', metrics.get('switches'))} times, loaded weights "
        f"{shown('loads', metrics.get('loads'))} times and spent {share or 'no time'} on evaluation."
    )


def _best(result: ExperimentResult, name: str, comparable: Collection[str]) -> str:
    """The best arm that a person could deploy, and how far the oracle is."""
    values = {
        arm: value
        for arm, value in ((arm, r.metrics.get(name)) for arm, r in result.arms.items())
        if isinstance(value, int | float) and arm in comparable
    }
    real = {arm: value for arm, value in values.items() if not result.arms[arm].is_bound}
    if len(real) < 2:
        return ""
    pick = min if DEFINITIONS[name].better is Better.LOWER else max
    best = pick(real, key=lambda arm: real[arm])
    label = DEFINITIONS[name].label
    sentence = f"Best of the arms in {label}: {best} with {shown(name, values[best])}"
    bounds = [value for arm, value in values.items() if result.arms[arm].is_bound]
    return f"{sentence}; the oracle reaches {shown(name, bounds[0])}." if bounds else f"{sentence}."


def _unbeaten(result: ExperimentResult, name: str, comparable: Collection[str]) -> str:
    """Where bits are known: the arms that no other beats in the first metric and in bits per character together."""
    names = (name, "bits_per_char")
    rows = {
        arm: [cost(metric, r.metrics.get(metric)) for metric in names]
        for arm, r in result.arms.items()
        if arm in comparable and not r.is_bound
    }
    if name == "bits_per_char" or not rows:
        return ""
    costs = np.array(list(rows.values()))
    front = [arm for arm, kept in zip(rows, on_front(costs), strict=True) if kept]
    if not front:
        return ""
    first_of = {tuple(rows[arm]): arm for arm in reversed(front)}  # of those that come to the same
    front = [first_of[figures] for figures in sorted(first_of)]
    told = (
        f"{arm} ({', '.join(shown(metric, result.arms[arm].metrics[metric]) for metric in names)})" for arm in front
    )
    return f"Unbeaten in {DEFINITIONS[name].label} and bits per character together: {'; '.join(told)}."


def conditions(config: Config) -> str:
    """Hardware, models, runtime and load in a sentence."""
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
    """Models and cards, kind by kind where they differ, and how requests find them."""
    n, router = config.server.replicas, config.server.router.replace("_", " ")
    if not config.cluster.kinds:
        models = ", ".join(config.models)
        return f"{models} on {config.hardware}" if n == 1 else f"{models} on {n} x {config.hardware} ({router})"
    kinds = []
    for name, entry in config.cluster.kinds.items():
        models = ", ".join(entry.get("models", config.models))
        kinds.append(f"{models} on {entry.get('count', 1)} x {entry.get('hardware', config.hardware)} ({name})")
    return f"{'; '.join(kinds)}; {router}"


def offered_requests_per_s(config: Config) -> float | None:
    """The rate of arrivals that do not wait for answers; None in a closed loop, a full queue or a trace."""
    arrivals = config.workload.arrivals
    return arrivals.rate_per_s if arrivals.kind in ("poisson", "gamma", "constant") else None


def workload_facts(config: Config, records: Records) -> tuple[tuple[str, str], ...]:
    """Lengths and mix as they were served."""
    facts = []
    for label, tokens in (("prompt tokens", records.prompt_tokens), ("output tokens", records.output_tokens)):
        p50, p95, p99 = np.percentile(tokens, (50, 95, 99))
        facts.append((label, f"mean {tokens.mean():.0f}, p50 {p50:.0f}, p95 {p95:.0f}, p99 {p99:.0f}"))
    shares = ", ".join(f"{task} {share:g}" for task, share in config.workload.mix.tasks.items())
    facts.append(("task shares", shares))
    if config.workload.mix.after:
        after = ", ".join(f"{task} {share:g}" for task, share in config.workload.mix.after.items())
        facts.append((f"drift ({config.workload.mix.drift})", f"to {after}"))
    return tuple(facts)
