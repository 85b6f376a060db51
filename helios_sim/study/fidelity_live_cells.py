"""Which runs a comparison with live serving is made of: every arm at every load, simulated and served twice.

Knows how a load is found and what the runs share, nothing of results. All runs of a cell have the same requests, the
same profile, and so the same KV blocks: what differs is where iterations are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from helios_sim.errors import UserError
from helios_sim.study.job import Job, JobResult
from helios_sim.study.plan import Variant, arms_of

FULL_QUEUE_REQUESTS = 100  # all at once: enough that filling and emptying the batch hardly count


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm at one load. `live` are runs of the same, the second one for the noise floor."""

    arm: str
    load: float  # over the arm's capacity
    rate_per_s: float
    simulated: Job
    live: tuple[Job, Job]

    def paced(self, pace: float) -> Job:
        """The simulation with iterations `pace` times as long."""
        config = self.simulated.config
        slower = replace(config, profile_time_factor=config.profile_time_factor * pace)
        return replace(self.simulated, config=slower)

    @property
    def name(self) -> str:
        return f"{self.arm}, {self.load:.0%} of capacity"


def capacity_jobs(variant: Variant, changes: Mapping[str, Any]) -> dict[str, Job]:
    """For each arm, a full queue on the simulated device."""
    full = {
        "mode": "simulate",
        "workload.n_requests": FULL_QUEUE_REQUESTS,
        "workload.arrivals.kind": "all_at_once",
        **changes,
    }
    return {arm: _job(variant, arm, full) for arm in arms_of(variant({}))}


def capacity_per_s(result: JobResult) -> float:
    """Requests/s of a run with a full queue. UserError where none was answered."""
    found = result.replicate.metrics["throughput_requests_per_s"]
    if not isinstance(found, float):
        raise UserError("arms", "capacity", "requests that can be served", "see what the arm drops at mode=simulate")
    return found


def cells(variant: Variant, capacities: Mapping[str, float], changes: Mapping[str, Any]) -> list[Cell]:
    """Arms in their order, each at its loads in ascending order. `changes` hold for every run."""
    wanted = variant({}).fidelity_live
    found = []
    for arm, capacity in capacities.items():
        for load in sorted(wanted.loads):
            rate = capacity * load
            served = {
                "workload.n_requests": max(ceil(rate * wanted.seconds), wanted.least_requests),
                "workload.arrivals.kind": "poisson",
                "workload.arrivals.rate_per_s": rate,
                **changes,
            }
            live = tuple(_job(variant, arm, {**served, "mode": "live", "live.run": run}) for run in (0, 1))
            simulated = _job(variant, arm, {**served, "mode": "simulate"})
            found.append(Cell(arm, load, rate, simulated, (live[0], live[1])))
    return found


def in_passes(found: Sequence[Cell]) -> list[Job]:
    """Live runs in the order to make them: everything once, then everything again, since the noise that matters is
    that between moments as far apart as a profile and what it predicts."""
    return [cell.live[turn] for turn in (0, 1) for cell in found]


def _job(variant: Callable[[Mapping[str, Any]], Any], arm: str, changes: Mapping[str, Any]) -> Job:
    entry = dict(arms_of(variant({}))[arm])
    overrides = dict(entry.pop("overrides", None) or {})
    rule = {f"exits.{key}": entry[key] for key in ("threshold", "confidence") if entry.get(key) is not None}
    config = variant({**overrides, **changes, **rule})
    return Job(arm, entry, config, config.seeds[0])
