"""Live serving beside its simulation, from the profile that was just measured. Knows arms and loads, serves nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

from calibrate.campaigns.plan import weights_of
from calibrate.campaigns.schema import CampaignConfig
from calibrate.campaigns.studies import arms, basis, variant_of
from calibrate.stages import NotEnoughTime, StageRun
from helios_sim.study.fidelity_live import run_fidelity_live
from helios_sim.study.live_schema import LiveFidelityConfig

UNHURRIED_S = 12.0  # of arrivals in each run
SERVING_SHARE = 0.6  # of the time allowed; the rest goes to opening models, overload's tails and figures
SHORTEST_S = 1.0
QUICK_S = 0.05


def served(config: CampaignConfig, models: Sequence[str], stage: StageRun) -> Mapping[str, Any]:
    """Every arm at every load, simulated once and served twice; UserError as `run_fidelity_live` raises it."""
    made = basis(config, models, stage, {model: weights_of(config, model) for model in models})
    largest, some = models[-1], arms(config, models)
    seconds = _seconds(config, stage, len(some) * len(config.live.loads) * 2)
    study = replace(
        made.config,
        name=f"live_{largest}",
        title=f"Live and simulated: {', '.join(models)} on {made.config.hardware}",
        question=f"How far off is the simulation from the profile just measured? Exits: {made.exits}.",
        arms=some,
        fidelity_live=LiveFidelityConfig(list(config.live.loads), seconds, config.live.least_requests),
    )
    stage.tell(f"{len(some)} arms at {len(config.live.loads)} loads, {seconds:.1f} s each", None)
    with (stage.folder / "table.txt").open("w", encoding="utf-8") as said, redirect_stdout(said):
        status = run_fidelity_live(variant_of(study), stage.folder)
    summary = json.loads((stage.folder / "summary.json").read_text(encoding="utf-8"))
    return {
        "models": list(models),
        "exits": made.exits,
        "arrivals_s_per_run": seconds,
        "gates_passed": status == 0,
        "verdict": summary["verdict"],
        "gates": summary["gates"],
        "points": summary["points"],
    }


def _seconds(config: CampaignConfig, stage: StageRun, runs: int) -> float:
    if config.quick:
        return QUICK_S
    if stage.allowance_s is None:
        return UNHURRIED_S
    found = min(UNHURRIED_S, SERVING_SHARE * stage.allowance_s / runs)
    if found < SHORTEST_S:
        raise NotEnoughTime(f"{runs} runs in {stage.allowance_s:.0f} s would be shorter than {SHORTEST_S:g} s each")
    return found
