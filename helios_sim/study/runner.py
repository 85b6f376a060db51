"""Runs the jobs of a study where its settings say, and keeps whole results until the study's own files are written."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

from helios_sim import files
from helios_sim.core.machine import runs_compiled
from helios_sim.errors import UserError
from helios_sim.files import json_value
from helios_sim.report.terminal import say
from helios_sim.study.fleet import digest
from helios_sim.study.jobs import Job, JobResult, run_job
from helios_sim.study.modes import SIMULATE
from helios_sim.vary.columns import from_file, in_parts
from helios_sim.vary.forks import can_fork
from helios_sim.vary.runner import Journal, OnDone, Task, run_tasks
from helios_sim.vary.workers import FORKS, Place, Workers

FINISHED = "finished"  # the folder of finished jobs inside the output folder
JOBS_WORTH_A_POOL = 8  # fewer are done before the processes have started
REQUESTS_WORTH_FORKS = 400  # of all jobs together, interpreted: fewer are served before the forks are made

_In = TypeVar("_In")


def run_jobs(
    jobs: Sequence[Job], journal: Journal[JobResult], processes: int | None, on_done: OnDone[Job, JobResult]
) -> dict[str, JobResult]:
    """Return results by job key. Jobs that the journal already holds are read, not run; the order does not matter.

    `processes`: None for one per core, which are forks if jobs are few and short. Raises the first job's UserError;
    finished results stay in the journal's folder.
    """
    tasks = [task_of((job,), {"arm": job.arm.name, "seed": job.seed}, job) for job in jobs]
    with closing(Workers(place_of(list({job.key: job for job in jobs}.values()), processes))) as workers:
        return run_tasks(_run, tasks, journal, workers, on_done)


def place_of(jobs: Sequence[Job], processes: int | None) -> Place:
    """Return where different jobs run. `processes` is the setting `jobs`."""
    if processes is not None or len(jobs) >= JOBS_WORTH_A_POOL:
        return Place("processes", processes or os.cpu_count() or 1, setting="jobs")
    requests = [job.config.workload.n_requests for job in jobs if job.config.mode == SIMULATE]
    known = [n for n in requests if n is not None]
    # Machine code is made once, in this process, and makes such jobs quick.
    forks = len(known) == len(jobs) and sum(known) >= REQUESTS_WORTH_FORKS and not any(map(runs_compiled, known))
    return Place(FORKS if forks and can_fork() else "serial", os.cpu_count() or 1, setting="jobs")


def journal_of(folder: Path) -> Journal[JobResult]:
    """Open the journal of the jobs in a folder."""
    return Journal(folder, _Columns())


def task_of(jobs: Sequence[Job], about: Mapping[str, Any], given: _In) -> Task[_In]:
    """Return the task of running these jobs; its key is equal for equal results."""
    key = jobs[0].key if len(jobs) == 1 else digest([job.key for job in jobs])
    return Task(key, about, given, digest([job.settings_key for job in jobs]), lambda: _made_of(jobs))


def _made_of(jobs: Sequence[Job]) -> dict[str, str]:
    return {name: found for job in jobs for name, found in job.made_of.items()}


def forget_jobs(folder: Path) -> None:
    """Remove the results of single jobs, a quarter MB each, once the study's own files hold all of them.

    The journal stays.
    """
    shutil.rmtree(folder / FINISHED, ignore_errors=True)


def job_lines(total: int) -> OnDone[Job, JobResult]:
    """Return a function that prints a line for every job of a study."""
    done = 0

    def line(task: Task[Job], result: JobResult, kept: bool) -> None:
        nonlocal done
        done += 1
        how = "kept from before" if kept else f"{len(result.replicate.records)} requests in {result.wall_s:.1f} s"
        job = task.input
        factor = job.config.profile_time_factor
        times = "" if factor == 1.0 else f", times x {factor:.3g}"
        say(f"[{done}/{total}] {job.arm.name}, seed {job.seed}{times}: {how}", sys.stderr)

    return line


class _Columns:
    """Keeps each result in a file of columns; its line in the journal is for people and other programs."""

    def save(self, folder: Path, key: str, result: JobResult) -> Mapping[str, Any]:
        files.write_parts(folder / FINISHED / f"{key}.columns", in_parts(result))
        return {"wall_s": round(result.wall_s, 3), "metrics": json_value(result.replicate.metrics)}

    def load(self, folder: Path, key: str, line: Mapping[str, Any]) -> JobResult | None:
        path = folder / FINISHED / f"{key}.columns"
        return from_file(JobResult, path) if path.is_file() else None


def _run(job: Job) -> JobResult:
    """Run a job. A UserError names the job's arm and seed."""
    try:
        return run_job(job)
    except UserError as error:
        raise error.about(f"{job.arm.name}, seed {job.seed}: {error.key}") from error
