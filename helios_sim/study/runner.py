"""Runs jobs in this process or in several, keeps what is finished, and takes it up again after a kill."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from helios_sim.report import files
from helios_sim.report.summary import json_value
from helios_sim.study.job import Job, JobResult, run_job

FINISHED = "finished"  # the folder of finished jobs inside the output folder
LOG = "finished.jsonl"  # one line for each, for people and other programs
JOBS_WORTH_A_POOL = 8  # fewer are done before the processes have started

OnDone = Callable[[Job, JobResult], None]


def run_jobs(jobs: Sequence[Job], folder: Path, processes: int | None, on_done: OnDone) -> dict[str, JobResult]:
    """Results by job key. Jobs that `folder` already holds are read, not run; the order does not matter.

    Raises the first job's UserError; what was finished before stays in the folder.
    """
    unique = {job.key: job for job in jobs}
    results: dict[str, JobResult] = {}
    for key, job in unique.items():
        found = _read(folder, key)
        if found is not None:
            results[key] = found
            on_done(job, found)
    missing = {key: job for key, job in unique.items() if key not in results}
    for key, result in _execute(missing, processes):
        results[key] = result
        _keep(folder, key, missing[key], result)
        on_done(missing[key], result)
    return results


def _execute(jobs: dict[str, Job], processes: int | None) -> Iterable[tuple[str, JobResult]]:
    wanted = min(len(jobs), (os.cpu_count() or 1) if processes is None else processes)
    if wanted <= 1 or (processes is None and len(jobs) < JOBS_WORTH_A_POOL):
        for key, job in jobs.items():
            yield key, run_job(job)
        return
    # spawn: the same on every platform, and no thread of this process is copied half-way
    with ProcessPoolExecutor(wanted, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(run_job, job): key for key, job in jobs.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _keep(folder: Path, key: str, job: Job, result: JobResult) -> None:
    files.write_bytes(folder / FINISHED / f"{key}.pickle", pickle.dumps(result))
    line = {
        "key": key,
        "arm": job.arm,
        "seed": job.seed,
        "wall_s": round(result.wall_s, 3),
        "metrics": json_value(result.replicate.metrics),
    }
    with (folder / LOG).open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


def _read(folder: Path, key: str) -> JobResult | None:
    path = folder / FINISHED / f"{key}.pickle"
    if not path.is_file():
        return None
    try:
        found = pickle.loads(path.read_bytes())
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError):
        return None  # of another version: run again
    return found if isinstance(found, JobResult) else None
