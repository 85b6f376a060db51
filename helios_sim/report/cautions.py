"""What a reader must know before leaning on a result. Knows signs of trouble in metrics, not their cause."""

from __future__ import annotations

from helios_sim.provenance import ProvenanceClass
from helios_sim.report.result import ArmResult, ExperimentResult
from helios_sim.report.saturation import WORTH_A_WARNING, ttft_sensitivity

NEAR_SATURATION = 0.95  # completed over offered rate, or busy share, from which latency depends on the run's length


def cautions(result: ExperimentResult) -> list[str]:
    """Sentences, the experiment's own first."""
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
