"""The comparison of live serving with its simulation, from settings to files and the lines on stdout."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from helios_sim.errors import UserError
from helios_sim.report import files
from helios_sim.report.fidelity import ComparedRow
from helios_sim.report.result import comparisons
from helios_sim.report.tables import print_comparison
from helios_sim.report.write import write_result
from helios_sim.study.check import check_study
from helios_sim.study.command import provenance
from helios_sim.study.ending import end
from helios_sim.study.fidelity_live_cells import Cell, capacity_jobs, capacity_per_s, cells, pair
from helios_sim.study.fidelity_live_result import Compared, Pass, comparison
from helios_sim.study.job import Job, JobResult
from helios_sim.study.plan import plan_study
from helios_sim.study.runner import forget_jobs, run_jobs
from helios_sim.study.schema import Config
from helios_sim.vary.runner import Task
from helios_sim.vary.settings import with_settings

CALIBRATION = "calibration"  # the folder of profiles that were measured just before, in the output folder
PRINTED = ("mean", "median", "p95", "p99")  # latencies in the terminal's tables; the page has all


def run_fidelity_live(config: Config, folder: Path) -> int:
    """Runs, writes and prints. Returns 0, or 2 when a gate failed. UserError before anything is written.

    Every run that is finished is kept in the folder: after a kill the same folder goes on with what is missing.
    """
    _check(config)
    files.make_folder(folder)
    changes = _measured_profiles(config, folder)
    found = [Compared(cell) for cell in _cells(config, changes, folder)]
    # everything once, then everything again: the noise that matters is that between moments as far apart as a profile
    # and what it predicts
    for turn in range(config.fidelity_live.passes):
        found = [_compared(config, one, turn, changes, folder) for one in found]
    result = comparison(found, with_settings(config, changes), provenance(config))
    summary = write_result(result, folder, comparisons(result))
    forget_jobs(folder)
    return end(lambda: print_comparison(result, _is_shown), folder, summary, result.gates)


def _check(config: Config) -> None:
    if config.sweeps or config.sweep.parameters:
        raise UserError("sweeps", len(config.sweeps), "none beside a comparison with live serving", "leave sweeps out")
    check_study(plan_study(with_settings(config, {"mode": "live"})))


def _cells(config: Config, changes: Mapping[str, Any], folder: Path) -> list[Cell]:
    full = capacity_jobs(config, changes)
    results = run_jobs(list(full.values()), folder, 1, _tell)
    return cells(config, {arm: capacity_per_s(results[job.key]) for arm, job in full.items()})


def _compared(config: Config, so_far: Compared, turn: int, changes: Mapping[str, Any], folder: Path) -> Compared:
    """With one pass more; simulated also at the pace that the device had in the live run, where that is known."""
    jobs = pair(config, so_far.cell, turn, changes)
    results = run_jobs([jobs.simulated, jobs.live], folder, 1, _tell)
    live, paced = results[jobs.live.key], None
    if (notes := live.live) is not None and notes.pace is not None:
        job = jobs.paced(notes.pace, notes.prompt_pace)
        paced = run_jobs([job], folder, 1, _tell)[job.key]
    return so_far.with_pass(Pass(results[jobs.simulated.key], live, paced))


def _measured_profiles(config: Config, folder: Path) -> dict[str, Any]:
    """Profiles of every model, measured now on the device that will serve, and the settings that name them.

    In a process of its own: measuring is another program (`python -m calibrate`), which resumes what it has begun.
    """
    seconds = config.fidelity_live.calibrate_s
    if seconds is None:
        return {}
    profiles = folder / CALIBRATION / "profiles"
    models = dict.fromkeys((*config.models, *_models_of_arms(config)))
    hardware = config.hardware
    for model in models:
        out = folder / CALIBRATION / model
        settings = [f"model={config.live.weights.get(model, model)}", f"model.name={model}"]
        settings += [f"device={config.live.device}", f"budget_s={seconds:g}", f"out={out}", "+task=latency"]
        settings += [f"max_batch={max(2, config.server.max_running_requests)}"]  # no more than will be served
        settings += [f"max_batch_tokens={config.server.max_batch_tokens}"]
        settings += [f"max_context_tokens={2 * config.server.max_batch_tokens}"]
        settings += [] if config.live.threads is None else [f"threads={config.live.threads}"]
        settings += [] if config.live.dtype is None else [f"dtype={config.live.dtype}"]
        print(f"measuring {model}", file=sys.stderr)
        done = subprocess.run([sys.executable, "-m", "calibrate", *settings], stdout=subprocess.DEVNULL, check=False)
        measured = sorted((out / "profile").glob(f"{model}@*/profile.json"))
        if done.returncode != 0 or not measured:
            fix = "allow more seconds, or leave it out and use a shipped profile"
            raise UserError("fidelity_live.calibrate_s", seconds, f"enough to measure {model}", fix)
        hardware = measured[0].parent.name.partition("@")[2]
        target = profiles / measured[0].parent.name
        if not target.exists():
            profiles.mkdir(parents=True, exist_ok=True)
            target.symlink_to(measured[0].parent.resolve(), target_is_directory=True)
    return {"profile_folder": str(profiles), "hardware": hardware}


def _models_of_arms(config: Config) -> Sequence[str]:
    """Models that only an arm's overrides name."""
    overrides = [(entry or {}).get("overrides") or {} for entry in config.arms.values()]
    return [model for one in overrides for model in one.get("models", ())]


def _tell(task: Task[Job], result: JobResult, kept: bool) -> None:
    job = task.input
    rate = job.config.workload.arrivals.rate_per_s
    load = "a full queue" if job.config.workload.arrivals.kind == "all_at_once" else f"{rate:.2f} requests/s"
    what = f"{job.config.mode}, {job.arm.name}, {load}" + (f", pass {job.config.live.run + 1}" if result.live else "")
    print(f"{what}: {'kept' if kept else f'{result.wall_s:.1f} s'}", file=sys.stderr)


def _is_shown(_: int, row: ComparedRow) -> bool:
    return (row.group == "system" or row.statistic in PRINTED) and (row.measured is not None or bool(row.simulated))
