"""What HELIOS gains on this device over early exits and full depth, alone and in a batch. Knows arms, runs no model.

Times are measured; exits are the text model's own or published ones, and the result says which.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

from calibrate.campaigns.schema import CampaignConfig
from calibrate.campaigns.studies import arms, basis, variant_of
from calibrate.stages import StageRun
from helios_sim.study.command import run_study

REQUESTS, QUICK_REQUESTS = 400, 12
METRICS = (
    "throughput_requests_per_s", "e2e_s_mean", "tpot_s_mean", "batch_mean", "energy_wh_per_request", "layers_per_token",
    "breach_fraction", "agreement",
)  # fmt: skip


def headline(config: CampaignConfig, models: Sequence[str], stage: StageRun) -> Mapping[str, Any]:
    """One user, then a full queue: every arm simulated from the profiles that were measured here."""
    made = basis(config, models, stage, {})
    largest = models[-1]
    queue = {"workload.arrivals.kind": "all_at_once"}
    batched = arms(config, models, baseline="early_exit_batched", overrides=queue)
    workload = replace(made.config.workload, n_requests=QUICK_REQUESTS if config.quick else REQUESTS)
    workload.arrivals = replace(workload.arrivals, kind="closed_loop", users=1)
    study = replace(
        made.config,
        name=f"headline_{largest}",
        title=f"HELIOS over {', '.join(models)} on {made.config.hardware}",
        question=f"What does HELIOS gain over early exits and full depth? Times: measured. Exits: {made.exits}.",
        workload=workload,
        arms=arms(config, models) | {f"{name}_batched": arm for name, arm in batched.items()},
        baseline="early_exit",
        subject="helios",
        headline_metrics=list(METRICS),
        jobs=1,
    )
    with (stage.folder / "table.txt").open("w", encoding="utf-8") as said, redirect_stdout(said):
        run_study(variant_of(study), stage.folder)
    summary = json.loads((stage.folder / "summary.json").read_text(encoding="utf-8"))
    figures = {
        name: {metric: arm["metrics"].get(metric) for metric in METRICS} for name, arm in summary["arms"].items()
    }
    return {"models": list(models), "exits": made.exits, "verdict": summary["verdict"], "arms": figures}
