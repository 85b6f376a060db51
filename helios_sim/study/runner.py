"""Runs jobs in this process or in several, keeps what is finished, and takes it up again after a kill."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from helios_sim.errors import UserError
from helios_sim.report import files
from helios_sim.report.files import json_value
from helios_sim.study.job import Job, JobResult, run_job

FINISHED = "finished"  # the folder of finished jobs inside the output folder
LOG = "finished.jsonl"  # one line for each, for people and other programs
JOBS_WORTH_A_POOL = 8  # fewer are done before the processes have started

OnDone = Callable[[Job, JobResult, bool], None]  # true: kept from before, not run now


def run_jobs(jobs: Sequence[Job], folder: Path, processes: int | None, on_done: OnDone) -> dict[str, JobResult]:
    """Results by job key. Jobs that `folder` already holds are read, not run; the order does not matter.

    Raises the first job's UserError; what was finished before stays in the folder.
    """
    unique = {job.key: job for job in jobs}
    logged = _logged(folder / LOG)
    results: dict[str, JobResult] = {}
    for key, job in unique.items():
        found = _read(folder, key)
        if found is not None:
            results[key] = found
            if key not in logged:
                _log(folder, key, job, found)
            on_done(job, found, True)
    missing = {key: job for key, job in unique.items() if key not in results}
    for key, result in _execute(missing, processes):
        results[key] = result
        with files.replacing(folder / FINISHED / f"{key}.pickle") as file:
            pickle.dump(result, file, protocol=pickle.HIGHEST_PROTOCOL)  # columns go to disk without a copy
        _log(folder, key, missing[key], result)
        on_done(missing[key], result, False)
    return results


def forget_jobs(folder: Path) -> None:
    """Once the study's own files are written, they hold all results, and the jobs' (a quarter MB each) only take room.

    The log of finished jobs stays.
    """
    shutil.rmtree(folder / FINISHED, ignore_errors=True)


def _execute(jobs: dict[str, Job], processes: int | None) -> Iterator[tuple[str, JobResult]]:
    wanted = min(len(jobs), (os.cpu_count() or 1) if processes is None else processes)
    if wanted <= 1 or (processes is None and len(jobs) < JOBS_WORTH_A_POOL):
        for key, job in jobs.items():
            yield key, _run(job)
        return
    # spawn: the same on every platform, and no thread of this process is copied half-way
    pool = ProcessPoolExecutor(wanted, mp_context=get_context("spawn"), initializer=_leave_interrupts_to_parent)
    try:
        futures = {pool.submit(_run, job): key for key, job in jobs.items()}
        for future in as_completed(futures):
            yield futures[future], future.result()
        pool.shutdown()
    except BrokenProcessPool as error:
        allowed = "a process was killed from outside, most often for want of memory; finished jobs are kept"
        raise UserError(
            "jobs", wanted, allowed, "start again in the same hydra.run.dir with fewer, such as jobs=1"
        ) from error
    except BaseException:
        # An error or an interrupt: what is half done is lost anyway, so nobody waits for it. The pool has no public
        # way to end its processes before Python 3.14.
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _run(job: Job) -> JobResult:
    """Says in a UserError which arm it is about."""
    try:
        return run_job(job)
    except UserError as error:
        raise error.about(f"{job.arm}, seed {job.seed}: {error.key}") from error


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _log(folder: Path, key: str, job: Job, result: JobResult) -> None:
    line = {
        "key": key,
        "arm": job.arm,
        "seed": job.seed,
        "wall_s": round(result.wall_s, 3),
        "metrics": json_value(result.replicate.metrics),
    }
    path = folder / LOG
    try:
        with path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
    except OSError as error:
        fix = "free space on the disk or choose a folder that you may write to"
        raise UserError("output folder", str(path), f"cannot be written: {error.strerror}", fix) from error


def _logged(path: Path) -> set[str]:
    """Keys in the log. Half a line at its end, left by a kill, is cut off."""
    if not path.is_file():
        return set()
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        files.write_text(path, whole)
    return {json.loads(line)["key"] for line in whole.splitlines()}


def _read(folder: Path, key: str) -> JobResult | None:
    path = folder / FINISHED / f"{key}.pickle"
    if not path.is_file():
        return None
    try:
        found = pickle.loads(path.read_bytes())
    except Exception:  # unpickling damage, or classes of another version, can raise anything: run again
        return None
    return found if isinstance(found, JobResult) else None
