"""One sweep from its configuration to its files and the lines on stdout."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from time import monotonic

from helios_sim.report.designs import DesignsResult
from helios_sim.report.files import make_folder
from helios_sim.report.tables import print_designs
from helios_sim.report.write import write_designs
from helios_sim.study.command import provenance
from helios_sim.study.ending import end
from helios_sim.study.job import Job
from helios_sim.study.schema import Config
from helios_sim.sweep.plan import plan_sweep
from helios_sim.sweep.run import Outcome, run_plan
from helios_sim.vary.runner import Task, progress

EVERY_S = 10.0  # between two lines on the state of things


def run_sweep(config: Config, folder: Path) -> int:
    """Runs, writes and prints. Returns 0. UserError before anything is written, or when every design failed."""
    plan = plan_sweep(config)
    make_folder(folder)
    total = plan.n_designs + len(plan.references)
    lines = _Lines(total)
    with redirect_stdout(sys.stderr), progress(config.name, total, lines) as on_done:  # Ray prints what nodes do
        result = run_plan(plan, folder, provenance(config), on_done)
    lines.state()
    summary = write_designs(result, folder)
    return end(lambda: _show(result), folder, summary)


class _Lines:
    """A line for each failure, and one on the state of things now and then; none where a bar shows it."""

    def __init__(self, total: int) -> None:
        self._total, self._started_s = total, monotonic()
        self._said_s = self._started_s
        self._done = self._kept = self._failed = 0

    def __call__(self, task: Task[Sequence[Job]], outcome: Outcome, kept: bool) -> None:
        self._done, self._kept = self._done + 1, self._kept + kept
        self._failed += outcome.error is not None
        if outcome.error is not None:
            print(f"a design failed: {outcome.error}", file=sys.stderr, flush=True)
        if monotonic() - self._said_s > EVERY_S:
            self.state()

    def state(self) -> None:
        if self._done:
            counts = [f"{self._kept} kept from before" if self._kept else ""]
            counts += [f"{self._failed} failed" if self._failed else ""]
            text = ", ".join([f"{self._done} of at most {self._total} runs", *filter(None, counts)])
            print(f"{text}, {monotonic() - self._started_s:.0f} s", file=sys.stderr, flush=True)
            self._said_s = monotonic()


def _show(result: DesignsResult) -> None:
    """The front, the answer and what failed."""
    print_designs(result)
    for sentence in (*result.verdict, *(f"{d.name} failed: {d.error}" for d in result.failed[:5])):
        print(sentence)
    if len(result.failed) > 5:
        print(f"{len(result.failed) - 5} more failed: see designs.parquet.")
