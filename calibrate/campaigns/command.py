"""One call of a campaign: reads archives, runs stages, writes archives, and prints the results."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import helios_sim
from calibrate.campaigns.archives import SUFFIX, archives_in, read_archive, write_archive
from calibrate.campaigns.page import page
from calibrate.campaigns.plan import CampaignPlan
from calibrate.command import check_budget
from calibrate.measure.ceilings import Ceilings, median_ratio, over_floor
from calibrate.progress import FILE as TRANSCRIPT, OnProgress, Progress, progress
from calibrate.schema import CampaignConfig
from calibrate.stages import StageOutcome, StageStatus, run_stages
from helios_sim.live.served import check_packages
from helios_sim.profile.store import read_profile
from helios_sim.provenance import command_given
from helios_sim.report import files
from helios_sim.report.tables import PLAIN_WIDTH


def run_campaign(config: CampaignConfig, folder: Path) -> int:
    """Run the campaign. Returns 0, or 1 if a stage failed by a defect. Raises UserError for a mistake of the user.

    `folder` gets an archive for each group of stages, written again when a stage of it is finished. However this call
    ends, finished stages are kept, and the next call continues from them.
    """
    check_packages("measuring a model")
    plan = CampaignPlan(config)
    check_budget(config.budget_s, plan.stages)
    archives = archives_in([*config.resume, *([str(folder)] if folder.is_dir() else [])])
    state = Path(tempfile.mkdtemp(prefix="helios-campaign-"))
    try:
        for path in archives:
            read_archive(path, config.campaign, state)
        plan.check()
        with progress({stage.name: stage.estimate_s for stage in plan.stages}) as watch:
            outcomes = run_stages(plan.stages, state, config.budget_s, _keeping(plan, state, folder, watch))
        _write_groups(plan, state, folder, {o.stage for o in outcomes if o.finished is not None})
        summary = _summary(plan, state, outcomes)
        files.write_json(folder / "summary.json", summary)
        files.write_text(folder / "report.md", page(config.campaign, summary))
        shutil.copyfile(state / TRANSCRIPT, folder / TRANSCRIPT)
    finally:
        shutil.rmtree(state, ignore_errors=True)
    _show(config, summary, outcomes, folder)
    failed = [outcome for outcome in outcomes if outcome.status is StageStatus.FAILED]
    for outcome in failed:
        print(f"calibrate: {outcome.stage} failed by a defect: {outcome.why}; {TRANSCRIPT} has it", file=sys.stderr)
    return 1 if failed else 0


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
                print(f"calibrate: {written.path.name} has no room for {name}", file=sys.stderr)


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


def _show(config: CampaignConfig, summary: Mapping[str, Any], outcomes: Sequence[StageOutcome], folder: Path) -> None:
    """Print a table of the stages, the folder, and summary.json as the last line."""
    console = Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH, no_color=True)
    title = f"campaign {config.campaign} on {summary['device']}"
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for name in ("stage", "archive", "status", "time", "remark"):
        table.add_column(name, justify="right" if name == "time" else "left")
    for outcome in outcomes:
        took = "" if outcome.finished is None else f"{outcome.finished.wall_s:.1f} s"
        archive = summary["stages"][outcome.stage]["archive"]
        table.add_row(outcome.stage, archive, outcome.status, took, outcome.why)
    console.print(table, highlight=False)
    if summary["worthless"]:
        print("A rehearsal with tiny shapes and few samples: no figure of it means anything.")
    if any(outcome.status is StageStatus.SKIPPED for outcome in outcomes):
        print(f"what was skipped for want of time runs when the same command is given again with resume=[{folder}]")
    print(f"output folder: {folder}")
    print(json.dumps(summary, allow_nan=False))
