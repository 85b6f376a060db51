"""The studies of a campaign: live serving beside its simulation, and the headline comparison.

The headline is what HELIOS gains on this device over early exits and full depth, for one user and for a full queue. It
is simulated from the profiles measured here, and served live beside a simulation of the same requests. Every arm
records where its times, exits and energy come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import Any

from calibrate.campaigns.studies import Basis, arms, basis, seconds_each, summary_of, weights_of
from calibrate.schema import CampaignConfig
from calibrate.stages import NotEnoughTime, StageRun
from helios_sim.study.command import run_study
from helios_sim.study.modes import LIVE, SIMULATE, LiveFidelityConfig
from helios_sim.validate.command import run_fidelity_live

REQUESTS, QUICK_REQUESTS = 400, 12
HELIOS, EARLY_EXIT, FULL_DEPTH = "helios", "early_exit", "full_depth"
ONE_USER, FULL_QUEUE = "one user", "full queue"
ARRIVALS: Mapping[str, Mapping[str, Any]] = {
    ONE_USER: {"workload.arrivals.kind": "closed_loop", "workload.arrivals.users": 1},
    FULL_QUEUE: {"workload.arrivals.kind": "all_at_once"},
}
METRICS = (
    "throughput_requests_per_s", "e2e_s_mean", "tpot_s_mean", "batch_mean", "energy_wh_per_request", "layers_per_token",
    "breach_fraction", "agreement",
)  # fmt: skip
GAINS = ("throughput_requests_per_s", "e2e_s_mean", "energy_wh_per_request", "batch_mean")


def served(config: CampaignConfig, models: Sequence[str], stage: StageRun) -> Mapping[str, Any]:
    """Run every arm at every load, simulated and served live in two passes. Raises as `run_fidelity_live` does."""
    made = basis(config, models, stage, {model: weights_of(config, model) for model in models})
    largest, some = models[-1], arms(config, models)
    seconds = seconds_each(config, stage, len(some) * len(config.live.loads) * 2)
    study = replace(
        made.config,
        name=f"live_{largest}",
        title=f"Live and simulated: {', '.join(models)} on {made.config.hardware}",
        question=f"How far off is the simulation from the profile just measured? Exits: {made.exits.said}.",
        arms=some,
        fidelity_live=LiveFidelityConfig(list(config.live.loads), seconds, config.live.least_requests),
    )
    stage.tell(f"{len(some)} arms at {len(config.live.loads)} loads, {seconds:.1f} s each", None)
    status, summary = summary_of(run_fidelity_live, study, stage.folder)
    return {
        "models": list(models),
        "exits": made.exits.said,
        "arrivals_s_per_run": seconds,
        "gates_passed": status == 0,
        "verdict": summary["verdict"],
        "gates": summary["gates"],
        "points": summary["points"],
    }


@dataclass(frozen=True, slots=True)
class Arm:
    """A policy under a load, simulated or live."""

    mode: str
    load: str
    policy: str

    @property
    def name(self) -> str:
        return f"{'live' if self.mode == LIVE else 'simulated'}_{self.policy}{'_batched' * (self.load == FULL_QUEUE)}"


def headline(config: CampaignConfig, models: Sequence[str], stage: StageRun) -> Mapping[str, Any]:
    """Simulate every arm with one user and with a full queue."""
    made = basis(config, models, stage, {})
    requests = dict.fromkeys(ARRIVALS, QUICK_REQUESTS if config.quick else REQUESTS)
    return _run(config, models, stage, made, _arms(SIMULATE), requests)


def live_headline(config: CampaignConfig, models: Sequence[str], simulated: str, stage: StageRun) -> Mapping[str, Any]:
    """Serve the headline's arms live with as many requests as there is time for, beside their simulation.

    `simulated` is the stage with each arm's approximate speed. Raises NotEnoughTime if an arm is too slow.
    """
    made = basis(config, models, stage, {model: weights_of(config, model) for model in models})
    live, beside = _arms(LIVE), _arms(SIMULATE)
    speeds = stage.finished[simulated].result["arms"]
    seconds = seconds_each(config, stage, len(live))
    requests = dict.fromkeys(ARRIVALS, QUICK_REQUESTS)
    for load in () if config.quick else ARRIVALS:
        each_s = [1 / speeds[arm.name]["throughput_requests_per_s"] for arm in beside if arm.load == load]
        requests[load] = requests_within(seconds * len(each_s), sum(each_s), config.live.least_requests)
    stage.tell(f"{len(live)} arms, {', '.join(f'{load}: {n} requests' for load, n in requests.items())}", None)
    return _run(config, models, stage, made, [*live, *beside], requests)


def requests_within(seconds: float, each_s: float, least: int) -> int:
    """How many requests of `each_s` fit into `seconds`, at most REQUESTS. Raises NotEnoughTime for under `least`."""
    if least * each_s > seconds:
        raise NotEnoughTime(f"{least} requests take {least * each_s:.0f} s, and {seconds:.0f} s are there for them")
    return min(floor(seconds / each_s), REQUESTS)


def gains(figures: Mapping[Arm, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """HELIOS's figures over those of each other policy, by mode, load and metric. Bands give a band."""
    found = []
    for arm, ours in figures.items():
        for policy in (EARLY_EXIT, FULL_DEPTH) if arm.policy == HELIOS else ():
            theirs = figures[replace(arm, policy=policy)]
            ratios = {metric: _ratio(ours[metric], theirs[metric]) for metric in GAINS}
            found.append({"mode": arm.mode, "load": arm.load, "over": policy, **ratios})
    return found


def _arms(mode: str) -> list[Arm]:
    return [Arm(mode, load, policy) for load in ARRIVALS for policy in (FULL_DEPTH, EARLY_EXIT, HELIOS)]


def _run(
    config: CampaignConfig, models: Sequence[str], stage: StageRun, made: Basis, chosen: Sequence[Arm],
    requests: Mapping[str, int],
) -> Mapping[str, Any]:  # fmt: skip
    policies = arms(config, models)
    entries = {}
    for arm in chosen:
        overrides = {"mode": arm.mode, "workload.n_requests": requests[arm.load], **ARRIVALS[arm.load]}
        baseline = replace(arm, policy=EARLY_EXIT).name
        entries[arm.name] = {**policies[arm.policy], "baseline": baseline, "overrides": overrides}
    study = replace(
        made.config,
        name=f"headline_{models[-1]}",
        title=f"HELIOS over {', '.join(models)} on {made.config.hardware}",
        question=f"What does HELIOS gain over early exits and full depth? Times: measured. Exits: {made.exits.said}.",
        arms=entries,
        baseline=replace(chosen[0], policy=EARLY_EXIT).name,
        subject=replace(chosen[0], policy=HELIOS).name,
        headline_metrics=list(METRICS),
        pictures=any(arm.mode == LIVE for arm in chosen),  # drawing takes longer than simulating
        jobs=1,
    )
    _, summary = summary_of(run_study, study, stage.folder)
    figures = {arm: {m: summary["arms"][arm.name]["metrics"].get(m) for m in METRICS} for arm in chosen}
    counter = summary["provenance"]["inputs"].get("energy")
    return {
        "models": list(models),
        "exits": made.exits.said,
        "requests": dict(requests),
        "verdict": summary["verdict"],
        "counter": None if counter is None else counter["source"],
        "arms": {arm.name: {**values, "provenance": _provenance(made, arm, values)} for arm, values in figures.items()},
        "gains": gains(figures),
    }


def _provenance(made: Basis, arm: Arm, figures: Mapping[str, Any]) -> dict[str, str | None]:
    """Where the arm's figures come from. `class` is the weakest source; full depth uses no exits."""
    energy = figures["energy_wh_per_request"]
    exits = None if arm.policy == FULL_DEPTH else made.exits.origin
    return {
        "times": "served here" if arm.mode == LIVE else "simulated from a profile measured here",
        "exits": exits,
        "energy": "counter" if isinstance(energy, float) else None if energy is None else "band",
        "class": exits or "measured",
    }


def _ratio(ours: Any, theirs: Any) -> Any:
    """The ratio. None if either is undefined, or one is a number and the other a band."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        ends = [_ratio(ours[end], theirs[end]) for end in ("low", "high")]
        return None if None in ends else {"low": min(ends), "high": max(ends)}
    if isinstance(ours, Mapping) or isinstance(theirs, Mapping) or ours is None or not theirs:
        return None
    return ours / theirs
