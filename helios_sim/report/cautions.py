"""Warnings beside a result: published inputs, saturation, dropped requests, extrapolated prices, a single seed."""

from __future__ import annotations

import numpy as np

from helios_sim.provenance import ProvenanceClass
from helios_sim.report.records import Records
from helios_sim.report.result import ArmResult, ExperimentResult

WORTH_A_WARNING = 2.0  # of `ttft_sensitivity`: an error of 1 % in the profile moves mean TTFT by 2 % or more
NEAR_SATURATION = 0.95  # completed over offered rate, or busy share, from which latency depends on the run's length


def cautions(result: ExperimentResult) -> list[str]:
    """Warnings as sentences, the experiment's own first."""
    found = list(result.warnings)
    if result.provenance_class is ProvenanceClass.PUBLISHED:
        published = [n for n, s in result.inputs.items() if s.provenance_class is ProvenanceClass.PUBLISHED]
        found.append(
            f"{', '.join(published)} {'is' if len(published) == 1 else 'are'} fitted to published statistics: quality "
            "figures restate the publication; only time, memory and the policies' costs are predictions."
        )
    arms_by_text: dict[str, list[str]] = {}
    for arm in result.arms.values():
        for text in _of_arm(arm, result.workload.offered_requests_per_s):
            arms_by_text.setdefault(text, []).append(arm.name)
    for text, arms in arms_by_text.items():
        everyone = len(arms) == len(result.arms) > 1
        found.append(f"{'Every arm' if everyone else ', '.join(arms)}: {text}")
    if all(len(arm.replicates) == 1 for arm in result.arms.values()):
        found.append("One seed: figures of the whole system, such as throughput, have no confidence interval.")
    return found


def _of_arm(arm: ArmResult, offered_per_s: float | None) -> list[str]:
    found = []
    metrics = arm.metrics
    outside, dropped = metrics["outside_grid_fraction"], metrics["requests_dropped"]
    unfinished, rate = metrics["requests_unfinished"], metrics["throughput_requests_per_s"]
    if isinstance(outside, float) and outside > 0:
        found.append(f"{outside:.1%} of the iterations were priced outside the profile's tables.")
    if isinstance(dropped, int | float) and dropped > 0:
        found.append(f"{_requests(dropped)} dropped; the reasons are in requests.parquet.")
    if isinstance(unfinished, int | float) and unfinished > 0:
        found.append(f"{_requests(unfinished)} still in the system when the run was stopped.")
    if offered_per_s and isinstance(rate, float) and rate < NEAR_SATURATION * offered_per_s:
        found.append(
            f"served {rate:.3g} of {offered_per_s:.3g} offered requests/s: it is saturated, and its latencies grow "
            "with the length of the run."
        )
    sensitivity = ttft_sensitivity(arm.replicates[0].records)
    if sensitivity is not None and sensitivity >= WORTH_A_WARNING:
        found.append(
            f"it is near saturation: requests wait so long that a profile 1 % off would move mean TTFT by about "
            f"{sensitivity:.2g} %."
        )
    return found


def _requests(count: float) -> str:
    return "1 request was" if count == 1 else f"{count:g} requests were"


def ttft_sensitivity(records: Records) -> float | None:
    """Relative change of mean TTFT for a relative change of all iteration times, 1 where nothing waits.

    None where no request was completed. Each replica is busy while any of its requests is in the system. While it is
    busy without a pause, everything that it finishes is later by the profile's error times the busy time so far. So a
    request that waited longer than its own prefill took gets its first token later by that error times the time since
    the replica was last idle, which may be many times its own waiting time. Other requests are later by that error
    times their own TTFT.
    """
    done = records.completed
    if not done.any():
        return None
    own_ns, moved_ns = 0, 0
    for replica in np.flatnonzero(np.bincount(records.replica[done])):
        rows = done & (records.replica == replica)
        arrival, first = records.arrival_ns[rows], records.first_token_ns.values[rows]
        scheduled, last = records.scheduled_ns.values[rows], records.last_token_ns.values[rows]
        order = np.argsort(arrival, kind="stable")
        arrival, first, scheduled, last = arrival[order], first[order], scheduled[order], last[order]
        busy_until = np.maximum.accumulate(last)
        begins = np.concatenate([[True], arrival[1:] > busy_until[:-1]])
        since = arrival[begins][np.cumsum(begins) - 1]  # when the server was last idle
        waited = scheduled - arrival > first - scheduled  # longer than its own prefill took
        own_ns += int((first - arrival).sum())
        moved_ns += int(np.where(waited, first - since, first - arrival).sum())
    return moved_ns / own_ns if own_ns else None
