"""Progress of a study on stderr: a bar on a terminal, a line for every job elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from helios_sim.study.job import Job, JobResult
from helios_sim.study.plan import StudyPlan
from helios_sim.study.runner import OnDone


@contextmanager
def progress(plan: StudyPlan) -> Iterator[OnDone]:
    total = len({job.key for job in plan.jobs})
    if not sys.stderr.isatty():
        done = 0

        def line(job: Job, result: JobResult, kept: bool) -> None:
            nonlocal done
            done += 1
            how = "kept from before" if kept else f"{len(result.replicate.records)} requests in {result.wall_s:.1f} s"
            print(f"[{done}/{total}] {job.arm}, seed {job.seed}: {how}", file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console  # a tenth of a second, and only a terminal needs it
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(plan.config.name, total=total)

        def advance(job: Job, result: JobResult, kept: bool) -> None:
            bar.update(task, advance=1, description=job.arm)

        yield advance
