"""What each replica of a run did, and kinds of replicas side by side. Knows records and integrals, no router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from helios_sim.report.records import Records
from helios_sim.request import NS_PER_S
from helios_sim.serving.stats import RunStats


@dataclass(frozen=True, slots=True)
class ReplicaFigures:
    """Of one replica in one run. Means and shares are over the run's span; None where nothing was completed."""

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
    """A figure over the replicas of a kind: of all together, and of the least and the most."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class KindFigures:
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
    """`records` are the run's; `stats` and `presence_ns` (requests in it, integrated over time) the replica's own."""
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
    """Kinds in the order of their first replicas."""
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
    """None where no replica has a value."""
    counts = [1] * len(values) if weights is None else weights
    known = [(value, count) for value, count in zip(values, counts, strict=True) if value is not None]
    if not known:
        return None
    mean = sum(value * count for value, count in known) / sum(count for _, count in known)
    return Spread(mean, min(value for value, _ in known), max(value for value, _ in known))
