"""One sweep from its configuration to its files and the lines on stdout."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from helios_sim.report.designs import DesignsResult
from helios_sim.report.designs_table import print_designs
from helios_sim.report.designs_write import write_designs
from helios_sim.report.files import make_folder
from helios_sim.study.command import provenance
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
    try:
        _show(result, folder, summary)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader left, as `head` does; the files are there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _show(result: DesignsResult, folder: Path, summary: Mapping[str, Any]) -> None:
    """Standard output: the front, the answer, what failed, the folder, and summary.json as the last line."""
    print_designs(result)
    for sentence in (*result.verdict, *(f"{d.name} failed: {d.error}" for d in result.failed[:5])):
        print(sentence)
    if len(result.failed) > 5:
        print(f"{len(result.failed) - 5} more failed: see designs.parquet.")
    print(f"output folder: {folder}")
    print(json.dumps(summary, allow_nan=False))
