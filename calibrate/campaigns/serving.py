"""Live serving beside its simulation, from the profile that was just measured. Knows arms and loads, serves nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from calibrate.campaigns.schema import CampaignConfig
from calibrate.campaigns.studies import arms, basis, seconds_each, summary_of, weights_of
from calibrate.stages import StageRun
from helios_sim.study.fidelity_live import run_fidelity_live
from helios_sim.study.live_schema import LiveFidelityConfig


def served(config: CampaignConfig, models: Sequence[str], stage: StageRun) -> Mapping[str, Any]:
    """Every arm at every load, simulated, and served in two passes; UserError as `run_fidelity_live` raises it."""
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
