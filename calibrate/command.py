"""One calibration, from its configuration to the output files and the lines on standard output."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from calibrate.inputs import Inputs
from calibrate.progress import progress
from calibrate.report.outputs import write_outputs
from calibrate.schema import CalibrateConfig
from calibrate.stages import Finished, Stage, StageOutcome, StageStatus, read_finished, run_stages
from calibrate.work import stages_of
from helios_sim.errors import UserError
from helios_sim.report.tables import PLAIN_WIDTH
from helios_sim.study.command import end


def run_calibration(config: CalibrateConfig, folder: Path) -> int:
    """Measure, write the outputs and print a summary. Returns 0, or 1 if a stage failed by a defect.

    Mistakes of the user raise UserError before anything is measured, if possible.
    """
    if config.task == "report":
        finished = read_finished(folder)
        if not finished:
            allowed = "a folder in which a calibration finished a stage"
            raise UserError("out", str(folder), allowed, "name the folder of an earlier calibration by out=FOLDER")
        outcomes = [StageOutcome(name, StageStatus.KEPT, finished=found) for name, found in finished.items()]
    else:
        inputs = Inputs(config)
        inputs.check()
        stages = stages_of(inputs)
        check_budget(config.budget_s, stages)
        with progress({stage.name: stage.estimate_s for stage in stages}) as watch:
            outcomes = run_stages(stages, folder, config.budget_s, watch)
        finished = _earlier(folder, inputs, stages) | _finished(outcomes)
    summary = write_outputs(config, folder, finished, outcomes)
    end(lambda: _show(summary, outcomes, folder), folder, summary)
    failed = [outcome for outcome in outcomes if outcome.status is StageStatus.FAILED]
    for outcome in failed:
        print(f"calibrate: {outcome.stage} failed by a defect: {outcome.why}; transcript.jsonl has it", file=sys.stderr)
    return 1 if failed else 0


def check_budget(budget_s: float | None, stages: Sequence[Stage]) -> None:
    """Raise UserError if not even the shortest stage fits into the budget."""
    shortest = min(stage.shortest_s for stage in stages)
    if budget_s is not None and budget_s < shortest:
        allowed = f"no stage is done in that time; the shortest takes {shortest:g} s"
        raise UserError("budget_s", budget_s, allowed, f"allow {sum(s.estimate_s for s in stages):.0f} s for all")


def _earlier(folder: Path, inputs: Inputs, stages: Sequence[Stage]) -> dict[str, Finished]:
    """Stages of other tasks that an earlier call finished in this folder for the same model on the same device."""
    now = {stage.name for stage in stages}
    identity = {**inputs.identity(), "quick": inputs.config.quick}
    return {
        name: found
        for name, found in read_finished(folder).items()
        if name not in now and all(identity.get(key, value) == value for key, value in found.settings.items())
    }


def _finished(outcomes: Sequence[StageOutcome]) -> dict[str, Finished]:
    return {outcome.stage: outcome.finished for outcome in outcomes if outcome.finished is not None}


def _show(summary: Mapping[str, Any], outcomes: Sequence[StageOutcome], folder: Path) -> None:
    """Print a table of the stages, the findings, and how to go on."""
    console = Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH, no_color=True)
    table = Table(title=summary["title"], box=SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for name in ("stage", "status", "time", "remark"):
        table.add_column(name, justify="right" if name == "time" else "left")
    for outcome in outcomes:
        took = "" if outcome.finished is None else f"{outcome.finished.wall_s:.1f} s"
        table.add_row(outcome.stage, outcome.status, took, outcome.why)
    console.print(table, highlight=False)
    for sentence in summary["verdict"]:
        print(sentence)
    for command in summary["use"]:
        print(f"    {command}")
    if any(outcome.status is StageStatus.SKIPPED for outcome in outcomes):
        print(f"skipped stages run when the same command is given again with out={folder}")
