"""Warnings beside a result: published inputs, losses, saturation, extrapolated prices, a single seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from helios_sim.exits.artificial import STATED
from helios_sim.profile.runtimes import HOST_TIME
from helios_sim.provenance import ProvenanceClass, Sourced
from helios_sim.report.records import Records
from helios_sim.report.result import ArmResult, ExperimentResult
from helios_sim.request import NS_PER_S, Status

MOST_LOST = 0.01  # largest share of requests not completed with which an arm is compared with others
NEAR_SATURATION = 0.95  # completed over offered rate, or busy share, from which latency depends on the run's length
SLOWER = 1.1  # slow-down from which a run that serves less than arrives counts as saturated
FAR_BEHIND = 0.5  # completed over offered rate below which a run always counts as saturated
WAITING = 0.05  # mean share of its time that a request waits, from which a busy server is called full


def cautions(result: ExperimentResult) -> list[str]:
    """Warnings as sentences, the experiment's own first."""
    found = [*result.warnings, *of_inputs(result), *losses(result)]
    arms_by_text: dict[str, list[str]] = {}
    for arm in result.arms.values():
        for text in _of_arm(arm, result.workload.offered_requests_per_s):
            arms_by_text.setdefault(text, []).append(arm.name)
    found += [f"{_named(arms, result)}: {text}" for text, arms in arms_by_text.items()]
    if all(len(arm.replicates) == 1 for arm in result.arms.values()):
        found.append(
            "One seed: intervals hold within this run, and figures of the whole system, such as throughput, have none. "
            "How much other seeds differ is not known: name several in seeds=[...], or seeds=auto."
        )
    return found


def of_inputs(result: Sourced) -> list[str]:
    """A sentence for each kind of input that was neither measured nor derived."""
    found = []
    published, stated = _published(result), _stated(result)
    exits = [name for name in published if name != HOST_TIME]
    if exits:
        found.append(
            f"{', '.join(exits)} {_be(exits)} fitted to published statistics: quality "
            "figures restate the publication; only time, memory and the policies' costs are predictions."
        )
    if HOST_TIME in published:
        found.append(f"{HOST_TIME} is {result.inputs[HOST_TIME].source}.")
    if stated:
        found.append(f"{', '.join(stated)} {_be(stated)} as the settings state: agreement restates them.")
    return [sentence[0].upper() + sentence[1:] for sentence in found]


def reservations(result: ExperimentResult) -> list[str]:
    """Reservations about the answer in a few words each: losses, saturation, published inputs, a single seed."""
    found = [text.rstrip(".") for text in losses(result)]
    offered = result.workload.offered_requests_per_s
    saturated = [arm.name for arm in result.arms.values() if _saturation(arm, offered) is not None]
    if saturated:
        who = "every arm is" if len(saturated) == len(result.arms) > 1 else f"{', '.join(saturated)} {_be(saturated)}"
        times = "their" if len(saturated) > 1 else "its"
        found.append(f"{who} saturated, so {times} times grow with the length of the run")
    published, stated = _published(result), _stated(result)
    if published:
        found.append(f"{', '.join(published)} {_be(published)} fitted to published statistics")
    if stated:
        found.append(f"{', '.join(stated)} {_be(stated)} as the settings state")
    if result.seeds == 1:
        found.append("one seed: what others would give is not known (seeds=auto adds them)")
    return found


def _published(result: Sourced) -> list[str]:
    """Names of inputs that were taken from, or fitted to, a publication."""
    named = [n for n, s in result.inputs.items() if s.provenance_class is ProvenanceClass.PUBLISHED]
    return [name for name in named if name not in _stated(result)]


def _stated(result: Sourced) -> list[str]:
    """Names of exits that are known by the settings' statements alone."""
    return [name for name, source in result.inputs.items() if source.command == STATED]


def _be(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 and not names[0].startswith("exits of ") else "are"


def losses(result: ExperimentResult) -> list[str]:
    """A sentence for each arm (or all alike) with requests that were dropped, most often why, or left unfinished."""
    arms_by_text: dict[str, list[str]] = {}
    for arm in result.arms.values():
        for text in _lost(arm):
            arms_by_text.setdefault(text, []).append(arm.name)
    return [f"{_named(arms, result)}: {text}" for text, arms in arms_by_text.items()]


def lost_share(arm: ArmResult) -> float:
    """The share of the arm's requests, all seeds together, that were not completed."""
    requests = sum(len(replicate.records) for replicate in arm.replicates)
    return 1 - completed(arm) / requests if requests else 0.0


def completed(arm: ArmResult) -> int:
    """Requests that the arm completed, all seeds together."""
    return sum(replicate.records.n_completed for replicate in arm.replicates)


def _named(arms: list[str], result: ExperimentResult) -> str:
    return "Every arm" if len(arms) == len(result.arms) > 1 else ", ".join(arms)


def _lost(arm: ArmResult) -> list[str]:
    requests = sum(len(replicate.records) for replicate in arm.replicates)
    dropped, unfinished = (
        sum(replicate.records.counts("status").get(status, 0) for replicate in arm.replicates)
        for status in (Status.DROPPED, Status.UNFINISHED)
    )
    found = []
    if dropped:
        reasons: Counter[str | None] = Counter()
        for replicate in arm.replicates:
            reasons.update(replicate.records.counts("drop_reason"))
        reasons.pop(None, None)
        text = f"{_of_all(dropped, requests)} dropped"
        text += f", most often: {reasons.most_common(1)[0][0]}" if reasons else ""
        text += "; there are no times." if dropped == requests else "; all reasons are in requests.parquet."
        found.append(text)
    if unfinished:
        found.append(f"{_of_all(unfinished, requests)} still in the system when the run was stopped.")
    return found


def _of_all(count: int, requests: int) -> str:
    if count == 1:
        return "1 request was"
    return f"all {requests:,} requests were" if count == requests else (
        f"{count:,} of {requests:,} requests ({count / requests:.1%}) were"
    )


def _of_arm(arm: ArmResult, offered_per_s: float | None) -> list[str]:
    found = []
    outside, busy = arm.metrics["outside_grid_fraction"], arm.metrics["busy_fraction"]
    if isinstance(outside, float) and outside > 0:
        found.append(f"{outside:.1%} of the iterations were priced outside the profile's tables.")
    saturation = _saturation(arm, offered_per_s)
    if saturation is not None:
        served, taken_per_s = saturation
        found.append(
            f"served {served:.3g} of {taken_per_s:.3g} requests/s that it took in: it is saturated, and its latencies "
            "grow with the length of the run."
        )
    elif isinstance(busy, float) and busy >= NEAR_SATURATION and _waits(arm):
        found.append(
            f"it is near saturation, busy {busy:.1%} of the time: how long requests wait depends much on the profile's "
            "error, and a run with profile_time_factor=1.01 says how much."
        )
    return found


def kept_up_to_rps(result: ExperimentResult, arms: Iterable[str]) -> float | None:
    """Requests/s up to which all of these arms kept up: the arrival rate, or the lowest rate that was served.

    None if arrivals wait for answers, or are those of a trace.
    """
    offered = result.workload.offered_requests_per_s
    if offered is None:
        return None
    saturations = [_saturation(result.arms[arm], offered) for arm in arms]
    return min([offered, *(found[0] for found in saturations if found is not None)])


def _waits(arm: ArmResult) -> bool:
    """Whether requests wait. A server with few requests is also busy while one of them runs."""
    queue_s, e2e_s = arm.metrics.get("queue_s_mean"), arm.metrics.get("e2e_s_mean")
    return isinstance(queue_s, float) and isinstance(e2e_s, float) and queue_s >= WAITING * e2e_s


def _saturation(arm: ArmResult, offered_per_s: float | None) -> tuple[float, float] | None:
    """Served and offered requests/s of the first seed if the arm could not keep up; else None."""
    records = arm.replicates[0].records
    served = served_per_s(records)
    taken_per_s = None if offered_per_s is None else offered_per_s * records.n_completed / max(len(records), 1)
    if not taken_per_s or served is None or served >= NEAR_SATURATION * taken_per_s:
        return None
    return (served, taken_per_s) if served < FAR_BEHIND * taken_per_s or slows_down(records) else None


def slows_down(records: Records) -> bool:
    """Whether a token takes longer, waiting included, in the last third of the arrivals than in the first.

    A short run may serve less than arrives only because a long request came last. One that cannot keep up slows down.
    """
    pace_s, arrival_ns = records.series(_pace_ns), records.series(lambda part: part.arrival_ns[part.completed])
    n, third = len(pace_s), len(pace_s) // 3
    if not third:
        return False
    if not arrival_ns.ascends():
        pace_s = pace_s.in_order_of(arrival_ns)
    return pace_s.between(n - third, n).median() >= SLOWER * pace_s.between(0, third).median()


def _pace_ns(records: Records) -> NDArray[np.float64]:
    return np.asarray(records.e2e_ns() / np.maximum(records.output_tokens[records.completed], 1))


def served_per_s(records: Records) -> float | None:
    """Completed requests per second from the first arrival to the last completion, less the time of a typical request.

    That time is subtracted since a short run ends with requests that came last, which is no sign of saturation. None
    without a completed request, or if all came and went at once.
    """
    span_ns = records.span_ns()
    if span_ns is None:
        return None
    e2e_ns = records.series(Records.e2e_ns)
    serving_ns = span_ns - e2e_ns.median()
    return len(e2e_ns) * NS_PER_S / serving_ns if serving_ns > 0 else None
