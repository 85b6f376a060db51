"""Progress of a sweep on stderr: a bar on a terminal, elsewhere a line now and then and one for each failure."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from helios_sim.sweep.journal import Outcome
from helios_sim.sweep.plan import SweepPlan
from helios_sim.sweep.run import OnDone

EVERY_S = 10.0


@contextmanager
def progress(plan: SweepPlan) -> Iterator[OnDone]:
    total = plan.n_designs + len(plan.references)
    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(plan.config.name, total=total)
            yield lambda outcome, kept: bar.update(task, advance=1)
        return
    started_s = said_s = monotonic()
    done = from_before = failed = 0

    def state() -> None:
        counts = [f"{from_before} kept from before" if from_before else "", f"{failed} failed" if failed else ""]
        text = ", ".join([f"{done} of at most {total} runs", *filter(None, counts)])
        print(f"{text}, {monotonic() - started_s:.0f} s", file=sys.stderr, flush=True)

    def note(outcome: Outcome, kept: bool) -> None:
        nonlocal done, from_before, failed, said_s
        done, from_before, failed = done + 1, from_before + kept, failed + (outcome.error is not None)
        if outcome.error is not None:
            print(f"a design failed: {outcome.error}", file=sys.stderr, flush=True)
        if monotonic() - said_s > EVERY_S:
            said_s = monotonic()
            state()

    yield note
    state()
