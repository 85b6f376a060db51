"""Progress of a calibration on stderr: a bar on a terminal, a line for every event elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress as Bar, TextColumn, TimeElapsedColumn

from calibrate.stages import Stage
from calibrate.transcript import OnProgress, Progress

_SAYS_ENOUGH = ("kept", "skipped", "failed", "outdated")


@contextmanager
def progress(stages: Sequence[Stage]) -> Iterator[OnProgress]:
    if not sys.stderr.isatty():
        yield _line
        return
    columns = (TextColumn("{task.description:<12}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[now]}"))
    weight = {stage.name: stage.estimate_s for stage in stages}
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=sum(weight.values()), now="")
        done = 0.0

        def show(event: Progress) -> None:
            nonlocal done
            whole = weight.get(event.stage, 0.0)
            if event.event in _SAYS_ENOUGH:
                bar.console.print(_words(event), highlight=False)
            if event.event in ("done", "kept", "skipped", "failed"):
                done += whole
                bar.update(task, completed=done, description=event.stage, now="")
            else:
                at = done + whole * min(1.0, event.share or 0.0)
                bar.update(task, completed=at, description=event.stage, now=event.text)

        yield show


def _line(event: Progress) -> None:
    if event.event != "going":
        print(_words(event), file=sys.stderr, flush=True)


def _words(event: Progress) -> str:
    return f"{event.stage}: {event.event}{', ' if event.text else ''}{event.text}"
