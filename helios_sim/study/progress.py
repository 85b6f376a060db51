"""Progress on stderr: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from helios_sim.study.job import Job, JobResult
from helios_sim.vary.runner import Task

_In = TypeVar("_In")
_Out = TypeVar("_Out")
OnDone = Callable[[Task[_In], _Out, bool], None]  # true: kept from before, not run now


@contextmanager
def progress(name: str, total: int, say: OnDone[_In, _Out]) -> Iterator[OnDone[_In, _Out]]:
    """What a runner calls when a task is done. `say` prints lines, where there is no terminal for a bar."""
    if not sys.stderr.isatty():
        yield say
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
        line = bar.add_task(name, total=total)

        def advance(task: Task[_In], result: _Out, kept: bool) -> None:
            bar.update(line, advance=1, description=str(task.about.get("arm", name)))

        yield advance


def job_lines(total: int) -> OnDone[Job, JobResult]:
    """A line for every job of a study."""
    done = 0

    def say(task: Task[Job], result: JobResult, kept: bool) -> None:
        nonlocal done
        done += 1
        how = "kept from before" if kept else f"{len(result.replicate.records)} requests in {result.wall_s:.1f} s"
        job = task.input
        print(f"[{done}/{total}] {job.arm.name}, seed {job.seed}: {how}", file=sys.stderr, flush=True)

    return say
