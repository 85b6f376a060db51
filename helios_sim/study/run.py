"""A study from Python, in this process, without files: for notebooks and scripts."""

from __future__ import annotations

from helios_sim.report.result import ExperimentResult
from helios_sim.study.assemble import assemble
from helios_sim.study.check import check_study
from helios_sim.study.job import run_job
from helios_sim.study.plan import plan_study
from helios_sim.study.schema import Config


def run(config: Config) -> ExperimentResult:
    """Runs every arm of the study under every seed, one after the other. UserError where settings cannot be run.

    Sweeps and overrides of arms are settings by path, which only the command line resolves: they are refused here.
    """
    if config.sweeps or any("overrides" in entry for entry in config.arms.values()):
        raise ValueError("sweeps and overrides need the command line: vary the Config in a loop instead")
    plan = plan_study(lambda changes: config)
    check_study(plan)
    return assemble(plan, {job.key: run_job(job) for job in plan.jobs}, {"seeds": list(config.seeds)})
