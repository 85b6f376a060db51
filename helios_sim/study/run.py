"""A study from Python, in this process, without files: for notebooks and scripts."""

from __future__ import annotations

from helios_sim.report.result import ExperimentResult
from helios_sim.study.assemble import assemble
from helios_sim.study.check import check_study
from helios_sim.study.job import run_job
from helios_sim.study.plan import plan_study
from helios_sim.study.schema import Config


def run(config: Config) -> ExperimentResult:
    """Runs every arm of the study under every seed, and its sweeps. UserError where settings cannot be run."""
    plan = plan_study(config)
    check_study(plan)
    jobs = {job.key: job for job in plan.jobs}
    return assemble(plan, {key: run_job(job) for key, job in jobs.items()}, {"seeds": list(config.seeds)})
