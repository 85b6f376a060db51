"""Figures of an arm that totals hide: by task, by replica, by priority or prompt length, and under faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from helios_sim.report.columns import BoolColumn
from helios_sim.report.metrics import Metrics
from helios_sim.report.records import Chosen, Records, series_of_all
from helios_sim.report.series import Series
from helios_sim.request import NS_PER_S
from helios_sim.serving.stats import RunStats
from helios_sim.workload.faults import Struck

PriorityOf = Callable[[Records], NDArray[np.int64]]  # maps requests to their priorities, (n,)

_SUMS = ("output_chars", "output_tokens", "layers_run", "early_tokens", "agreed_tokens")


@dataclass(frozen=True, slots=True)
class TaskFigures:
    """Figures of the completed requests of one task, over all replicates."""

    requests: int
    bits_per_char: float | None
    layers_per_token: float
    early_exit_fraction: float
    agreement: float
    e2e_s_mean: float
    models: dict[str, float]  # share of the requests that each model finished


def by_task(replicates: Sequence[Records], tasks: Sequence[str]) -> dict[str, TaskFigures]:
    """Figures by task name, in the order of `tasks`. Tasks without a completed request are left out."""
    found = {}
    for number, name in enumerate(tasks):
        of_task = partial(_of_task, number)
        served: Counter[str | None] = Counter()
        for records in replicates:
            served.update(records.counts("model", partial(Records.done, chosen=of_task)))
        requests = served.total()
        if not requests:
            continue
        sums = [records.sums(_SUMS, of_task) for records in replicates]
        _, tokens, layers, early, agreed = map(sum, zip(*sums, strict=True))
        bits = [(records.bits_per_char(of_task), own[0]) for records, own in zip(replicates, sums, strict=True)]
        waited_ns = sum(_e2e_ns(records, of_task).total() for records in replicates)
        found[name] = TaskFigures(
            requests=requests,
            bits_per_char=_weighted(bits),
            layers_per_token=layers / tokens,
            early_exit_fraction=early / tokens,
            agreement=agreed / tokens,
            e2e_s_mean=waited_ns / NS_PER_S / requests,
            models={str(model): served[model] / requests for model in sorted(served, key=str)},
        )
    return found


def _of_task(number: int, records: Records) -> BoolColumn:
    return np.asarray(records.task == number)


def _e2e_ns(records: Records, chosen: Chosen) -> Series:
    return records.series(lambda part: (part.last_token_ns.values - part.arrival_ns)[part.done(chosen)])


def _weighted(bits: Sequence[tuple[float | None, int]]) -> float | None:
    """Bits per character over all replicates; None if they are unknown in one that served the task."""
    known = [(value, chars) for value, chars in bits if chars]
    total = sum(chars for _, chars in known)
    if not total or any(value is None for value, _ in known):
        return None
    return sum(value * chars for value, chars in known if value is not None) / total


@dataclass(frozen=True, slots=True)
class ReplicaFigures:
    """Figures of one replica in one run. Means and shares are over the run's span; None if nothing was completed."""

    replica: int
    kind: str  # "" if all replicas are alike
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
    """Mean, smallest and largest value of a figure over the replicas of one kind."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class KindFigures:
    """Figures of all replicas of one kind in one run."""

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

    `records` are those of the run, `stats` those of the replica. `presence_ns` is the integral of requests in the
    replica over time.
    """
    span_ns = records.span_ns()

    def own(part: Records) -> BoolColumn:
        return np.asarray(part.replica == replica)

    e2e_ns = _e2e_ns(records, own)
    (tokens,) = records.sums(["output_tokens"], own)
    return ReplicaFigures(
        replica=replica,
        kind=kind,
        card=card,
        models=models,
        requests_completed=len(e2e_ns),
        requests_in_it_mean=None if span_ns is None else presence_ns / span_ns,
        busy_fraction=None if span_ns is None else stats.busy_ns / span_ns,
        throughput_tokens_per_s=None if span_ns is None else tokens * NS_PER_S / span_ns,
        e2e_s_mean=e2e_ns.mean() / NS_PER_S if len(e2e_ns) else None,
        e2e_s_p99=e2e_ns.percentiles([99])[0] / NS_PER_S if len(e2e_ns) else None,
        switches=stats.switches,
        loads=stats.loads,
        hbm_peak_bytes=stats.hbm_peak_bytes,
    )


def by_kind(replicas: Sequence[ReplicaFigures]) -> list[KindFigures]:
    """Figures for each kind of replica, in the order of their first replicas."""
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
    """The weighted mean and the range; None if no replica has a value."""
    counts = [1] * len(values) if weights is None else weights
    known = [(value, count) for value, count in zip(values, counts, strict=True) if value is not None]
    if not known:
        return None
    mean = sum(value * count for value, count in known) / sum(count for _, count in known)
    return Spread(mean, min(value for value, _ in known), max(value for value, _ in known))


@dataclass(frozen=True, slots=True)
class WaitFigures:
    """Queue time of the scheduled requests of one group, over all replicates."""

    group: str
    requests: int
    never_scheduled: int  # dropped, or left when the run was stopped
    queue_s_p50: float | None
    queue_s_p99: float | None
    queue_s_max: float | None


Group = tuple[str, Sequence[Chosen]]  # its name, and its requests in each replicate


def waits(replicates: Sequence[Records], groups: Sequence[Group]) -> tuple[WaitFigures, ...]:
    """Queue times of each group with requests."""
    found = []
    for name, members in groups:
        own = list(zip(replicates, members, strict=True))
        requests = sum(int(np.count_nonzero(rows)) for _, rows in _chosen(own))
        if not requests:
            continue
        waited_ns = _waited_ns(own)
        figures: list[float | None] = [None] * 3
        if len(waited_ns):
            figures = [value / NS_PER_S for value in waited_ns.percentiles((50, 99, 100))]
        found.append(WaitFigures(name, requests, requests - len(waited_ns), *figures))
    return tuple(found)


def _chosen(own: Sequence[tuple[Records, Chosen]]) -> Iterator[tuple[Records, BoolColumn]]:
    return ((part, chosen(part)) for records, chosen in own for part in records.parts())


def _waited_ns(own: Sequence[tuple[Records, Chosen]]) -> Series:
    def of(part: Records, rows: BoolColumn) -> NDArray[np.int64]:
        return (part.scheduled_ns.values - part.arrival_ns)[rows & part.scheduled_ns.present]

    return Series(lambda: (of(*found) for found in _chosen(own)))


def by_priority(replicates: Sequence[Records], priorities: Sequence[PriorityOf]) -> list[Group]:
    """A group for each priority, in the order of service. `priorities` are those of each replicate's requests."""
    known: set[int] = set()
    for records, priority_of in zip(replicates, priorities, strict=True):
        known.update(*(np.unique(priority_of(part)).tolist() for part in records.parts()))
    return [(f"priority {value}", [partial(_has_priority, value, of) for of in priorities]) for value in sorted(known)]


def _has_priority(value: int, priority_of: PriorityOf, records: Records) -> BoolColumn:
    return np.asarray(priority_of(records) == value)


def by_prompt_length(replicates: Sequence[Records]) -> list[Group]:
    """Quarters of the requests by prompt length, shortest first. Equal lengths stay together."""
    lengths = series_of_all(replicates, lambda part: part.prompt_tokens)
    ends = [max(-(-len(lengths) * quarter // 4) - 1, 0) for quarter in range(5)]
    groups: list[Group] = []
    for place, (low, high) in enumerate(pairwise(map(int, lengths.at(ends)))):
        first = low if place == 0 else low + 1
        if first <= high:
            within = partial(_has_length, first, high)
            groups.append((f"prompts of {first:,} to {high:,} tokens", [within] * len(replicates)))
    return groups


def _has_length(first: int, last: int, records: Records) -> BoolColumn:
    return (records.prompt_tokens >= first) & (records.prompt_tokens <= last)


@dataclass(frozen=True, slots=True)
class FaultFigures:
    """Faults of one arm, over all replicates."""

    hits: Mapping[str, int]  # faults that struck something, by kind
    missed: int  # faults that struck nothing
    without: Metrics | None  # metrics of the same arm and requests without faults; None if not run


def fault_figures(replicates: Sequence[Sequence[Struck]], without: Metrics | None) -> FaultFigures:
    faults = [fault for found in replicates for fault in found]
    hits = Counter(fault.kind.value for fault in faults if fault.hit)
    return FaultFigures(dict(sorted(hits.items())), sum(not fault.hit for fault in faults), without)
