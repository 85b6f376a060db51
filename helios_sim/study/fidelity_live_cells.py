"""Which runs a comparison with live serving is made of: every arm at every load, simulated, and served in each pass.

Knows how a load is found and what the runs share, nothing of results. All runs of a cell have the same requests, the
same profile, and so the same KV blocks: what differs is where iterations are computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from helios_sim.errors import UserError
from helios_sim.study.job import Job, JobResult
from helios_sim.study.plan import entries_of, jobs_of
from helios_sim.study.schema import Config

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


def capacity_jobs(config: Config, changes: Mapping[str, Any]) -> dict[str, Job]:
    """For each arm, a full queue on the simulated device."""
    full = {
        "mode": "simulate",
        "workload.n_requests": FULL_QUEUE_REQUESTS,
        "workload.arrivals.kind": "all_at_once",
        **changes,
    }
    return {arm: jobs_of(config, arm, full)[0] for arm in entries_of(config)}


def capacity_per_s(result: JobResult) -> float:
    """Requests/s of a run with a full queue. UserError where none was answered."""
    found = result.replicate.metrics["throughput_requests_per_s"]
    if not isinstance(found, float):
        raise UserError("arms", "capacity", "requests that can be served", "see what the arm drops at mode=simulate")
    return found


def cells(config: Config, capacities: Mapping[str, float]) -> list[Cell]:
    """Arms in their order, each at its loads in ascending order."""
    loads, entries = sorted(config.fidelity_live.loads), entries_of(config)
    about = {arm: str(entry.get("description") or entry["policy"]) for arm, entry in entries.items()}
    return [Cell(arm, about[arm], load, capacity * load) for arm, capacity in capacities.items() for load in loads]


def pair(config: Config, cell: Cell, turn: int, changes: Mapping[str, Any]) -> Pair:
    """The cell's runs in one pass. `changes` hold for every run."""
    wanted = config.fidelity_live
    served = {
        "workload.n_requests": max(ceil(cell.rate_per_s * wanted.seconds), wanted.least_requests),
        "workload.arrivals.kind": "poisson",
        "workload.arrivals.rate_per_s": cell.rate_per_s,
        **changes,
    }
    simulated, *_ = jobs_of(config, cell.arm, {**served, "mode": "simulate"})
    live, *_ = jobs_of(config, cell.arm, {**served, "mode": "live", "live.run": turn})
    return Pair(simulated, live)
