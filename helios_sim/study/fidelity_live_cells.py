"""Which runs a comparison with live serving is made of: every arm at every load, simulated, and served in each pass.

Knows how a load is found and what the runs share, nothing of results. All runs of a cell have the same requests, the
same profile, and so the same KV blocks: what differs is where iterations are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from helios_sim.errors import UserError
from helios_sim.study.job import Job, JobResult
from helios_sim.study.plan import Variant, arms_of

FULL_QUEUE_REQUESTS = 100  # all at once: enough that filling and emptying the batch hardly count


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm at one load."""

    arm: str
    about: str
    load: float  # over the arm's capacity
    rate_per_s: float

    @property
    def name(self) -> str:
        return f"{self.arm}, {self.load:.0%} of capacity"


@dataclass(frozen=True, slots=True)
class Pair:
    """A cell's runs of one pass."""

    simulated: Job
    live: Job

    def paced(self, decode: float, prompt: float | None) -> Job:
        """The simulation with what is timed by a decode step, or by a prompt, taking so many times as long."""
        config = self.simulated.config
        known, of_prompts = config.profile_time_factor, config.profile_prompt_time_factor
        if prompt is not None or of_prompts is not None:
            of_prompts = (known if of_prompts is None else of_prompts) * (decode if prompt is None else prompt)
        slower = replace(config, profile_time_factor=known * decode, profile_prompt_time_factor=of_prompts)
        return replace(self.simulated, config=slower)


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


def cells(variant: Variant, capacities: Mapping[str, float]) -> list[Cell]:
    """Arms in their order, each at its loads in ascending order."""
    loads, entries = sorted(variant({}).fidelity_live.loads), arms_of(variant({}))
    about = {arm: str(entry.get("description") or entry["policy"]) for arm, entry in entries.items()}
    return [Cell(arm, about[arm], load, capacity * load) for arm, capacity in capacities.items() for load in loads]


def pair(variant: Variant, cell: Cell, turn: int, changes: Mapping[str, Any]) -> Pair:
    """The cell's runs in one pass. `changes` hold for every run."""
    wanted = variant({}).fidelity_live
    served = {
        "workload.n_requests": max(ceil(cell.rate_per_s * wanted.seconds), wanted.least_requests),
        "workload.arrivals.kind": "poisson",
        "workload.arrivals.rate_per_s": cell.rate_per_s,
        **changes,
    }
    simulated = _job(variant, cell.arm, {**served, "mode": "simulate"})
    return Pair(simulated, _job(variant, cell.arm, {**served, "mode": "live", "live.run": turn}))


def _job(variant: Callable[[Mapping[str, Any]], Any], arm: str, changes: Mapping[str, Any]) -> Job:
    entry = dict(arms_of(variant({}))[arm])
    overrides = dict(entry.pop("overrides", None) or {})
    rule = {f"exits.{key}": entry[key] for key in ("threshold", "confidence") if entry.get(key) is not None}
    config = variant({**overrides, **changes, **rule})
    return Job(arm, entry, config, config.seeds[0])
