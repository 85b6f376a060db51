"""One call of a calibration or a campaign, from its configuration to output files and the lines on standard output."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import helios_sim
from calibrate.campaigns.archives import SUFFIX, archives_in, read_archive, write_archive, write_drafts
from calibrate.campaigns.land import page
from calibrate.campaigns.plan import CampaignPlan
from calibrate.inputs import Inputs
from calibrate.measure.ceilings import Ceilings, median_ratio, over_floor
from calibrate.progress import FILE as TRANSCRIPT, OnProgress, Progress, progress
from calibrate.report.outputs import write_outputs
from calibrate.schema import CalibrateConfig, CampaignConfig
from calibrate.stages import Finished, Stage, StageOutcome, StageStatus, Timed, at_work, read_finished, run_stages
from calibrate.work import CEILINGS, stages_of
from helios_sim import files
from helios_sim.errors import UserError
from helios_sim.live.served import check_packages
from helios_sim.profile.store import read_profile
from helios_sim.provenance import command_given
from helios_sim.report.terminal import TextTable, say
from helios_sim.study.command import end

MOST_FOR_PAGE_S, PAGE_SHARE = 20.0, 0.08  # of the budget, for the page and its figures
UNFINISHED = "f-unfinished"  # the archive of interrupted stages' drafts
ENOUGH = 3  # a budget that was too short: the message proposes this many times as much


def run_calibration(config: CalibrateConfig, folder: Path, began_s: float | None = None) -> int:
    """Measure, write the outputs and print a summary. Returns 0, or 1 if a stage failed by a defect.

    The budget runs from `began_s` on the monotonic clock (None: now). Raises UserError if the budget was too short for
    any usable result; the measurements are kept for the next call. Raises UserError, if possible before anything is
    measured, for a mistake of the user and for a folder in which another process is at work.
    """
    with at_work(folder):
        return _calibrated(config, folder, time.monotonic() if began_s is None else began_s)


def _calibrated(config: CalibrateConfig, folder: Path, began_s: float) -> int:
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
            budget_s, over_s = _for_stages(config.budget_s)
            outcomes = run_stages(stages, folder, budget_s, watch, began=began_s, over_s=over_s)
        finished = _earlier(folder, inputs, stages) | _finished(outcomes)
        _check_useful(config.budget_s, folder, finished, outcomes)
    summary = write_outputs(config, folder, finished, outcomes)
    end(lambda: _show(summary, outcomes, folder), folder, summary)
    return _status(outcomes)


def check_budget(budget_s: float | None, stages: Sequence[Timed]) -> None:
    """Raise UserError if not even the shortest stage fits into the budget."""
    shortest = min(stage.shortest_s for stage in stages)
    if budget_s is not None and budget_s < shortest:
        allowed = f"no stage is done in that time; the shortest takes {shortest:g} s"
        raise UserError("budget_s", budget_s, allowed, f"allow {sum(s.estimate_s for s in stages):.0f} s for all")


def _for_stages(budget_s: float | None) -> tuple[float | None, float]:
    """The stages' budget without the time of the page and its figures, and the part of that time a stage may use."""
    page_s = 0.0 if budget_s is None else min(MOST_FOR_PAGE_S, PAGE_SHARE * budget_s)
    return None if budget_s is None else budget_s - page_s, page_s / 2


def _check_useful(
    budget_s: float | None, folder: Path, finished: Mapping[str, Finished], outcomes: Sequence[StageOutcome]
) -> None:
    """Raise UserError if there was no time for any result that can be simulated from or served with."""
    skipped = [outcome for outcome in outcomes if outcome.status is StageStatus.SKIPPED]
    failed = any(outcome.status is StageStatus.FAILED for outcome in outcomes)
    if budget_s is not None and skipped and not failed and not {*finished} - {CEILINGS}:
        allowed = f"nothing that can be used was measured: {skipped[0].stage}: {skipped[0].why}"
        fix = f"allow more, such as budget_s={ENOUGH * budget_s:g}; out={folder} goes on with what was measured"
        raise UserError("budget_s", budget_s, allowed, fix)


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
    _print_stages(summary["title"], outcomes)
    for sentence in summary["verdict"]:
        say(sentence)
    for command in summary["use"]:
        say(f"    {command}")
    if any(outcome.status is StageStatus.SKIPPED for outcome in outcomes):
        say(f"skipped stages run when the same command is given again with out={folder}")


def _print_stages(title: str, outcomes: Sequence[StageOutcome], archives: Mapping[str, str] | None = None) -> None:
    """Print a table of the stages. `archives`: a further column, by stage."""
    table = TextTable(title)
    for name in ("stage", *(() if archives is None else ("archive",)), "status", "time", "remark"):
        table.column(name, number=name == "time")
    for outcome in outcomes:
        took = "" if outcome.finished is None else f"{outcome.finished.wall_s:.1f} s"
        archive = () if archives is None else (archives[outcome.stage],)
        table.row([outcome.stage, *archive, outcome.status, took, outcome.why])
    table.show()


def _status(outcomes: Sequence[StageOutcome]) -> int:
    """The exit status: 1 if a stage failed by a defect, which is printed, else 0."""
    failed = [outcome for outcome in outcomes if outcome.status is StageStatus.FAILED]
    for outcome in failed:
        say(f"calibrate: {outcome.stage} failed by a defect: {outcome.why}; {TRANSCRIPT} has it", sys.stderr)
    return 1 if failed else 0


def run_campaign(config: CampaignConfig, folder: Path, began_s: float | None = None) -> int:
    """Run the campaign. Returns 0, or 1 if a stage failed by a defect. Raises UserError for a mistake of the user.

    `folder` gets an archive for each group of stages, written again when a stage of it is finished. However this call
    ends, finished stages are kept, and the next call continues from them.
    """
    check_packages("measuring a model")
    if config.dry_run:
        _show_plan(config)
        return 0
    with at_work(folder):
        return _campaigned(config, folder, time.monotonic() if began_s is None else began_s)


def _campaigned(config: CampaignConfig, folder: Path, began_s: float) -> int:
    plan = CampaignPlan(config)
    check_budget(config.budget_s, plan.planned)
    archives = archives_in([*config.resume, *([str(folder)] if folder.is_dir() else [])])
    state = Path(tempfile.mkdtemp(prefix="helios-campaign-"))
    try:
        for path in archives:
            read_archive(path, config.campaign, state)
        plan.check()
        with progress({stage.name: stage.estimate_s for stage in plan.stages}) as watch:
            keeping = _keeping(plan, state, folder, watch)
            budget_s, over_s = _for_stages(config.budget_s)
            outcomes = run_stages(
                plan.stages, state, budget_s, keeping, began=began_s, over_s=over_s, by_worth=True
            )
        _write_groups(plan, state, folder, {o.stage for o in outcomes if o.finished is not None})
        _check_useful(config.budget_s, folder, _finished(outcomes), outcomes)
        summary = _summary(plan, state, outcomes)
        files.write_json(folder / "summary.json", summary)
        files.write_text(folder / "report.md", page(config.campaign, summary))
        shutil.copyfile(state / TRANSCRIPT, folder / TRANSCRIPT)
    finally:
        with suppress(OSError, UserError):  # what ended the command is what is told
            write_drafts(folder / f"{UNFINISHED}{SUFFIX}", config.campaign, state)
        shutil.rmtree(state, ignore_errors=True)
    _show_campaign(config, summary, outcomes, folder)
    return _status(outcomes)


def _keeping(plan: CampaignPlan, state: Path, folder: Path, watch: OnProgress) -> OnProgress:
    """A watcher that writes the archive of a stage's group as soon as the stage is finished."""
    finished: set[str] = set()

    def told(event: Progress) -> None:
        watch(event)
        if event.event in ("done", "kept"):
            finished.add(event.stage)
        if event.event == "done":
            _write_groups(plan, state, folder, finished, {plan.groups[event.stage]})

    return told


def _write_groups(
    plan: CampaignPlan, state: Path, folder: Path, finished: set[str], only: set[str] | None = None
) -> None:
    for group in sorted(only or set(plan.groups.values())):
        stages = [stage.name for stage in plan.stages if plan.groups[stage.name] == group and stage.name in finished]
        if stages:
            written = write_archive(folder / f"{group}{SUFFIX}", plan.config.campaign, state, stages)
            for name in written.left_out:
                say(f"calibrate: {written.path.name} has no room for {name}", sys.stderr)


def _summary(plan: CampaignPlan, state: Path, outcomes: Sequence[StageOutcome]) -> dict[str, Any]:
    config = plan.config
    return {
        "schema_version": 1,
        "campaign": config.campaign,
        "device": plan.device_name,
        "worthless": config.quick,
        "stages": {
            o.stage: {
                "status": o.status,
                "archive": plan.groups[o.stage],
                "wall_s": None if o.finished is None else o.finished.wall_s,
                "finished_at": None if o.finished is None else o.finished.finished_at,
                "why": o.why or None,
                "result": None if o.finished is None else _result(o),
            }
            for o in outcomes
        },
        "provenance": {
            "command": command_given("calibrate"),
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "helios_sim": helios_sim.__version__,
            "configuration": asdict(config),
        },
    }


def _result(outcome: StageOutcome) -> Mapping[str, Any]:
    """The stage's result without the points of a comparison; for a profile, with its details."""
    assert outcome.finished is not None
    result = {key: value for key, value in outcome.finished.result.items() if key != "points"}
    name = result.get("name")
    place = outcome.finished.part("profile") / str(name)
    if name is not None and place.is_dir():
        profile = read_profile(place)
        details = profile.provenance.details
        kept = (
            "weights", "interpolation", "whole_iterations", "below_floor", "host", "serving", "memory", "loads",
            "energy",
        )  # fmt: skip
        result |= {key: details.get(key) for key in kept}
        tables = over_floor(profile, Ceilings.from_json(details["ceilings"]))
        result["over_ceiling"] = {table: median_ratio(entries) for table, entries in tables.items()}
    return result


def _show_plan(config: CampaignConfig) -> None:
    """Print when each stage would begin if each uses its whole allowance."""
    plan = CampaignPlan(config)
    whole_s = sum(planned.estimate_s for planned in plan.planned)
    budget_s, _ = _for_stages(config.budget_s)
    table = TextTable(f"plan of the campaign {config.campaign}")
    for name in ("stage", "archive", "begins", "takes", "at least"):
        table.column(name, number=name not in ("stage", "archive"))
    for planned, begins_s, lasts_s in plan.timetable(whole_s if budget_s is None else budget_s):
        times = ("", "not begun") if lasts_s is None else (f"{begins_s:.0f} s", f"{lasts_s:.0f} s")
        table.row([planned.name, planned.group, *times, f"{planned.shortest_s:g} s"])
    table.show()
    left_s = "without a budget" if budget_s is None else f"{budget_s:.0f} s of the budget are for stages"
    say(f"all stages together are estimated at {whole_s:.0f} s; {left_s}; nothing was measured")


def _show_campaign(
    config: CampaignConfig, summary: Mapping[str, Any], outcomes: Sequence[StageOutcome], folder: Path
) -> None:
    """Print a table of the stages, the folder, and summary.json as the last line."""
    archives = {name: stage["archive"] for name, stage in summary["stages"].items()}
    _print_stages(f"campaign {config.campaign} on {summary['device']}", outcomes, archives)
    if summary["worthless"]:
        say("A rehearsal with tiny shapes and few samples: no figure of it means anything.")
    if any(outcome.status is StageStatus.SKIPPED for outcome in outcomes):
        say(f"what was skipped for want of time runs when the same command is given again with resume=[{folder}]")
    say(f"output folder: {folder}")
    print(json.dumps(summary, allow_nan=False))
