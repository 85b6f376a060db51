"""Effects of faults on each arm, against the same arm without faults."""

from __future__ import annotations

from typing import Any

from helios_sim.report import format as fmt
from helios_sim.report.metrics import MetricValue
from helios_sim.report.result import ExperimentResult

COUNTED = ("availability", "requests_retried", "requests_lost", "wasted_tokens")
BESIDE = ("goodput_requests_per_s", "throughput_tokens_per_s", "ttft_s_p95", "e2e_s_p99")


def fault_sentences(result: ExperimentResult) -> list[str]:
    """A sentence for each arm that faults struck, from its figures alone."""
    found = []
    for arm in result.arms.values():
        if arm.faults is None:
            continue
        metrics, without = arm.metrics, arm.faults.without or {}
        count = sum(arm.faults.hits.values())
        struck = "no fault" if not count else f"{count:,} fault{'s' if count > 1 else ''}"
        again, lost = (fmt.metric(name, metrics[name]) for name in ("requests_retried", "requests_lost"))
        told = f"{arm.name}: {struck} struck it; requests sent again: {again}, lost: {lost}"
        changes = [
            f"{fmt.label(name)} {fmt.metric(name, metrics[name])} in place of {fmt.metric(name, without[name])}"
            for name in shown_beside(result)
            if _number(metrics[name]) and _number(without.get(name))
        ]
        found.append(f"{told}; {', '.join(changes)}." if changes else f"{told}.")
    return found


def shown_beside(result: ExperimentResult) -> list[str]:
    """The metrics that are shown with faults and without: those that every arm has both ways."""
    arms = [arm for arm in result.arms.values() if arm.faults is not None]
    return [name for name in BESIDE if arms and all(
        _number(arm.metrics[name]) and arm.faults.without and _number(arm.faults.without[name])
        for arm in arms if arm.faults is not None
    )]  # fmt: skip


def fault_rows(result: ExperimentResult) -> list[dict[str, Any]]:
    """A row for each arm with faults planned: cells of COUNTED, then BESIDE with faults, without, and the change."""
    rows: list[dict[str, Any]] = []
    for arm in result.arms.values():
        if arm.faults is None:
            continue
        hits = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in arm.faults.hits.items()) or "none"
        if arm.faults.missed:
            hits += f"; {arm.faults.missed:,} found nothing"
        metrics, without = arm.metrics, arm.faults.without or {}
        beside = [
            {"with": fmt.metric(name, metrics[name]), "without": fmt.metric(name, without[name]),
             "change": _change(metrics[name], without[name])}
            for name in shown_beside(result)
        ]  # fmt: skip
        counted = [fmt.metric(name, metrics[name]) for name in COUNTED]
        rows.append({"arm": arm.name, "hits": hits, "counted": counted, "beside": beside})
    return rows


def _change(value: MetricValue, over: MetricValue) -> str:
    if not isinstance(value, int | float) or not isinstance(over, int | float) or not over:
        return ""
    return f"{value / over - 1:+.1%}"


def _number(value: MetricValue) -> bool:
    return isinstance(value, int | float)
