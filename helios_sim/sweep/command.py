"""One sweep from its configuration to its files and the lines on stdout."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path

from helios_sim.report.designs import DesignsResult
from helios_sim.report.files import make_folder
from helios_sim.report.tables import print_designs
from helios_sim.report.write import write_designs
from helios_sim.study.command import provenance
from helios_sim.study.ending import end
from helios_sim.study.plan import Variant
from helios_sim.sweep.plan import plan_sweep
from helios_sim.sweep.progress import progress
from helios_sim.sweep.run import run_plan


def run_sweep(variant: Variant, folder: Path) -> int:
    """Runs, writes and prints. Returns 0. UserError before anything is written, or when every design failed."""
    plan = plan_sweep(variant)
    make_folder(folder)
    with redirect_stdout(sys.stderr), progress(plan) as on_done:  # Ray prints what happens to its nodes
        result = run_plan(plan, folder, provenance(plan.config), on_done)
    summary = write_designs(result, folder)
    return end(lambda: _show(result), folder, summary)


def _show(result: DesignsResult) -> None:
    """The front, the answer and what failed."""
    print_designs(result)
    for sentence in (*result.verdict, *(f"{d.name} failed: {d.error}" for d in result.failed[:5])):
        print(sentence)
    if len(result.failed) > 5:
        print(f"{len(result.failed) - 5} more failed: see designs.parquet.")
