"""Figures of an arm by task and by replica, which totals hide: a drifting mix, or replicas of several kinds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from helios_sim.report.records import Records
from helios_sim.request import NS_PER_S
from helios_sim.serving.stats import RunStats


@dataclass(frozen=True, slots=True)
class TaskFigures:
    """The completed requests of one task, all replicates together."""

    requests: int
    bits_per_char: float | None
    layers_per_token: float
    early_exit_fraction: float
    agreement: float
    e2e_s_mean: float
    models: dict[str, float]  # share of the requests that each model finished


def by_task(replicates: Sequence[Records], tasks: Sequence[str]) -> dict[str, TaskFigures]:
    """Figures by task name, in the order of `tasks`, without tasks that have no completed request."""
    found = {}
    for number, name in enumerate(tasks):
        chosen = [(records, records.completed & (records.task == number)) for records in replicates]
        requests = sum(int(rows.sum()) for _, rows in chosen)
        if not requests:
            continue
        bits = [(records.bits_per_char(rows), int(records.output_chars[rows].sum())) for records, rows in chosen]
        tokens = _sum(chosen, "output_tokens")
        served: Counter[str | None] = Counter()
        for records, rows in chosen:
            served.update(records.model.counts(rows))
        waited_ns = sum(int((r.last_token_ns.values - r.arrival_ns)[rows].sum()) for r, rows in chosen)
        found[name] = TaskFigures(
            requests=requests,
            bits_per_char=_weighted(bits),
            layers_per_token=_sum(chosen, "layers_run") / tokens,
            early_exit_fraction=_sum(chosen, "early_tokens") / tokens,
            agreement=_sum(chosen, "agreed_tokens") / tokens,
            e2e_s_mean=waited_ns / NS_PER_S / requests,
            models={str(model): served[model] / requests for model in sorted(served, key=str)},
        )
    return found


def _sum(chosen: Sequence[tuple[Records, NDArray[np.bool_]]], column: str) -> int:
    return sum(int(getattr(records, column)[rows].sum()) for records, rows in chosen)


def _weighted(bits: Sequence[tuple[float | None, int]]) -> float | None:
    """Bits per character over all replicates; None where a replicate that served the task has none."""
    known = [(value, chars) for value, chars in bits if chars]
    total = sum(chars for _, chars in known)
    if not total or any(value is None for value, _ in known):
        return None
    return sum(value * chars for value, chars in known if value is not None) / total


@dataclass(frozen=True, slots=True)
class ReplicaFigures:
    """One replica in one run. Means and shares are over the run's span; None where nothing was completed."""

    replica: int
    kind: str  # "" where all replicas are alike
    card: str
    models: tuple[str, ...]
    requests_completed: int
    requests_in_it_mean: float | None
    busy_fraction: float | None
    throughput_tokens_per_s: float | None
    e2e_s_mean: float | None
    e2e_s_p99: float | None
    switches: int
    loads: int
    hbm_peak_bytes: int


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure of the replicas of one kind: the mean, the smallest and the largest."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class KindFigures:
    """All replicas of one kind in one run."""

    kind: str
    replicas: int
    card: str
    models: tuple[str, ...]
    requests_completed: int
    requests_in_it: Spread | None
    busy_fraction: Spread | None
    e2e_s: Spread | None  # means of replicas; the mean is over requests
    switches: int
    loads: int


def replica_figures(
    records: Records,
    replica: int,
    stats: RunStats,
    presence_ns: int,
    *,
    kind: str = "",
    card: str = "",
    models: tuple[str, ...] = (),
) -> ReplicaFigures:
    """Figures of one replica of a run.

    `records` are of the run, `stats` of the replica. `presence_ns`: requests in the replica, integrated over time.
    """
    span_ns = records.span_ns()
    own = records.part(records.completed & (records.replica == replica))
    e2e_ns = own.e2e_ns()
    tokens = int(own.output_tokens.sum())
    return ReplicaFigures(
        replica=replica,
        kind=kind,
        card=card,
        models=models,
        requests_completed=len(own),
        requests_in_it_mean=None if span_ns is None else presence_ns / span_ns,
        busy_fraction=None if span_ns is None else stats.busy_ns / span_ns,
        throughput_tokens_per_s=None if span_ns is None else tokens * NS_PER_S / span_ns,
        e2e_s_mean=float(e2e_ns.mean()) / NS_PER_S if len(own) else None,
        e2e_s_p99=float(np.percentile(e2e_ns, 99)) / NS_PER_S if len(own) else None,
        switches=stats.switches,
        loads=stats.loads,
        hbm_peak_bytes=stats.hbm_peak_bytes,
    )


def by_kind(replicas: Sequence[ReplicaFigures]) -> list[KindFigures]:
    """The replicas of each kind together, in the order of their first replicas."""
    found = []
    for name in dict.fromkeys(it.kind for it in replicas):
        own = [it for it in replicas if it.kind == name]
        found.append(
            KindFigures(
                kind=name,
                replicas=len(own),
                card=own[0].card,
                models=own[0].models,
                requests_completed=sum(it.requests_completed for it in own),
                requests_in_it=_spread([it.requests_in_it_mean for it in own]),
                busy_fraction=_spread([it.busy_fraction for it in own]),
                e2e_s=_spread([it.e2e_s_mean for it in own], [it.requests_completed for it in own]),
                switches=sum(it.switches for it in own),
                loads=sum(it.loads for it in own),
            )
        )
    return found


def _spread(values: Sequence[float | None], weights: Sequence[int] | None = None) -> Spread | None:
    """The weighted mean and the range; None where no replica has a value."""
    counts = [1] * len(values) if weights is None else weights
    known = [(value, count) for value, count in zip(values, counts, strict=True) if value is not None]
    if not known:
        return None
    mean = sum(value * count for value, count in known) / sum(count for _, count in known)
    return Spread(mean, min(value for value, _ in known), max(value for value, _ in known))
