"""The runs of a comparison with live serving: every arm at every load, simulated, and served in each pass.

All runs of a cell have the same requests and the same profile, and so the same KV blocks. They differ in where
iterations are computed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from helios_sim.errors import UserError
from helios_sim.profile.profile import Profile
from helios_sim.profile.store import read_profile
from helios_sim.report.metrics import Band, Metrics
from helios_sim.report.result import ComparedRow, FloatArray, RequestTimes
from helios_sim.request import NS_PER_S
from helios_sim.study.build import build_profile
from helios_sim.study.jobs import Job, JobResult
from helios_sim.study.plan import entries_of, jobs_of
from helios_sim.study.runner import journal_of, run_jobs
from helios_sim.study.schema import Config
from helios_sim.vary.runner import Task

STATISTICS = ("mean", "p50", "p90", "p95", "p99")
# (metric, figure, unit, from the metric's unit to this one) of the server as a whole
SYSTEM = (
    ("throughput_requests_per_s", "throughput", "requests/s", 1.0),
    ("throughput_tokens_per_s", "throughput", "tokens/s", 1.0),
    ("batch_mean", "mean batch", "requests", 1.0),
    ("kv_utilisation_mean", "KV in use", "%", 100.0),
    ("layers_per_token", "layers run", "a token", 1.0),
    ("early_exit_fraction", "early exits", "% of tokens", 100.0),
    ("breach_fraction", "breaches", "% of tokens", 100.0),
    ("energy_wh_per_request", "energy", "Wh a request", 1.0),
    ("switches", "switches", "", 1.0),
    ("loads", "loads", "", 1.0),
    ("switch_time_s", "time of switches", "s", 1.0),
    ("preemptions", "preemptions", "", 1.0),
)
FULL_QUEUE_REQUESTS = 100  # all at once: enough that filling and emptying the batch hardly count
UNMEASURED_WITHIN = 0.5  # how far a profile of another time may be off
NO_LOAD = "the time does not suffice to serve one of them in every pass"
CALIBRATION = "calibration"  # the folder of profiles that were measured just before, in the output folder


@dataclass(frozen=True, slots=True)
class TimeLeft:
    """Seconds left of the time that a comparison should take, and of the time that it may take."""

    share_s: Callable[[], float]
    most_s: Callable[[], float]


class NoTimeLeft(UserError):
    """The time does not suffice for any load in every pass."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm at one load."""

    arm: str
    about: str
    load: float  # share of the arm's capacity
    rate_per_s: float

    @property
    def name(self) -> str:
        return f"{self.arm}, {self.load:.0%} of capacity"


@dataclass(frozen=True, slots=True)
class Pair:
    """The runs of a cell in one pass."""

    simulated: Job
    live: Job

    def paced(self, decode: float, prompt: float | None) -> Job:
        """The simulation with the times of decodes and of prompts scaled by the device's pace."""
        config = self.simulated.config
        known, of_prompts = config.profile_time_factor, config.profile_prompt_time_factor
        if prompt is not None or of_prompts is not None:
            of_prompts = (known if of_prompts is None else of_prompts) * (decode if prompt is None else prompt)
        slower = replace(config, profile_time_factor=known * decode, profile_prompt_time_factor=of_prompts)
        return replace(self.simulated, config=slower)


@dataclass(frozen=True, slots=True)
class Pass:
    """The results of a cell in one pass."""

    simulated: JobResult
    live: JobResult
    paced: JobResult | None = None  # simulated at the pace that the device had in the live run


@dataclass(frozen=True, slots=True)
class Compared:
    """A cell with the results of all passes."""

    cell: Cell
    passes: tuple[Pass, ...] = ()

    def with_pass(self, one: Pass) -> Compared:
        return replace(self, passes=(*self.passes, one))

    @property
    def rows(self) -> tuple[ComparedRow, ...]:
        runs = zip(*((one.live, one.simulated, one.paced) for one in self.passes), strict=True)
        return rows_of(*([None if run is None else run.replicate.metrics for run in of] for of in runs))

    @property
    def spreads(self) -> list[RequestTimes]:
        """TTFT and TPOT of every request."""
        live, simulated = ([getattr(one, of) for one in self.passes] for of in ("live", "simulated"))
        return [
            RequestTimes(self.cell.name, name, tuple(map(times, live)), tuple(map(times, simulated)))
            for name, times in (("TTFT", _ttfts_s), ("TPOT", _tpots_s))
        ]


def compared_cells(
    config: Config, changes: Mapping[str, Any], folder: Path, left: TimeLeft | None = None
) -> list[Compared]:
    """Run every cell in all passes. `changes` apply to every run. Runs that the folder holds are not run again.

    If `left` does not suffice, judging by the runs so far, the last loads are left out. Raises NoTimeLeft if no load
    can be served in every pass.
    """
    full = _capacity_jobs(config, changes)
    results = run_jobs(list(full.values()), journal_of(folder), 1, _tell)
    found = [Compared(cell) for cell in _cells(config, {arm: _capacity_per_s(results[full[arm].key]) for arm in full})]
    # everything once, then everything again: the noise that matters is that between moments as far apart as a profile
    # and what it predicts
    for turn in range(config.fidelity_live.passes):
        run = partial(_with_pass, config, turn=turn, changes=changes, folder=folder)
        found = [run(one) for one in found] if left is None else _as_time_allows(config, found, turn, run, left)
    return found


def _as_time_allows(
    config: Config, found: Sequence[Compared], turn: int, run: Callable[[Compared], Compared], left: TimeLeft
) -> list[Compared]:
    """Run one more pass of the loads, the lowest first, while they can also be served in the passes to come.

    The first load may take all the time. A load is expected to take as long as before, or as the longest of this pass.
    """
    later = config.fidelity_live.passes - turn - 1
    done: list[Compared] = []
    dearest_s = kept_s = 0.0
    for load in sorted({one.cell.load for one in found}):
        at = [one for one in found if one.cell.load == load]
        expected_s = max(dearest_s, sum(one.passes[-1].live.wall_s for one in at)) if turn else dearest_s
        if (left.share_s() if done else left.most_s()) < later * kept_s + (later + 1) * expected_s:
            break
        before_s = left.most_s()
        done += [run(one) for one in at]
        took_s = before_s - left.most_s()
        dearest_s, kept_s = max(dearest_s, took_s), kept_s + took_s
    if not done:
        raise NoTimeLeft("fidelity_live.loads", config.fidelity_live.loads, NO_LOAD, "allow more time, or fewer loads")
    return done


@dataclass(frozen=True, slots=True)
class Profiled:
    """The profiles of a comparison: the settings that name them, and their uncertainty."""

    changes: Mapping[str, Any]
    within: float = 0.0  # relative error of times, if there was too little time to measure; 0: the usual
    notices: tuple[str, ...] = ()  # sentences on the reasons


def measured_profiles(config: Config, folder: Path) -> Profiled:
    """Measure profiles of all models now, on the device that will serve.

    Measuring is another program (`python -m calibrate`) in its own process, which resumes earlier work and keeps to
    `calibrate_s`. A profile says how far it may be off if that was short. If nothing could be measured, the profiles
    that the study names are used. Raises UserError before anything is served if there are none.
    """
    seconds = config.fidelity_live.calibrate_s
    if seconds is None:
        return _as_known(config)
    profiles = folder / CALIBRATION / "profiles"
    found: list[Profile] = []
    notices: list[str] = []
    for model in dict.fromkeys((*config.models, *_models_of_arms(config))):
        out = folder / CALIBRATION / model
        settings = [f"model={config.live.weights.get(model, model)}", f"model.name={model}"]
        settings += [f"device={config.live.device}", f"budget_s={seconds:g}", f"out={out}", "+task=latency"]
        settings += [f"max_batch={max(2, config.server.max_running_requests)}"]  # no more than will be served
        settings += [f"max_batch_tokens={config.server.max_batch_tokens}"]
        settings += [f"max_context_tokens={2 * config.server.max_batch_tokens}"]
        settings += [] if config.live.threads is None else [f"threads={config.live.threads}"]
        settings += [] if config.live.kernels is None else [f"kernels={config.live.kernels}"]
        settings += [] if config.live.dtype is None else [f"dtype={config.live.dtype}"]
        print(f"measuring {model}", file=sys.stderr)
        words = [sys.executable, "-m", "calibrate", *settings]
        done = subprocess.run(words, stdout=subprocess.DEVNULL, check=False)  # noqa: S603 - words, no shell
        measured = sorted((out / "profile").glob(f"{model}@*/profile.json"))
        if done.returncode != 0 or not measured:
            return _as_named(config, model, seconds)
        found.append(read_profile(measured[0].parent))
        if (within := found[-1].times_within) is not None:
            notices.append(f"{model} was measured in {seconds:g} s: its times are within {within:.0%}")
        target = profiles / measured[0].parent.name
        if not target.exists():
            profiles.mkdir(parents=True, exist_ok=True)
            target.symlink_to(measured[0].parent.resolve(), target_is_directory=True)
    changes = {"profile_folder": str(profiles), "hardware": found[-1].hardware.name}
    return Profiled(changes, max(profile.times_within or 0.0 for profile in found), tuple(notices))


def _as_known(config: Config) -> Profiled:
    """The profiles that the study names, with their uncertainty if they were measured in little time."""
    within: dict[str, float] = {}
    for model in dict.fromkeys((*config.models, *_models_of_arms(config))):
        with suppress(UserError):  # the study reports what is wrong
            share = build_profile(config, model).times_within
            if share is not None:
                within[model] = share
    told = "was measured in little time: its times are within"
    notices = tuple(f"{model} {told} {share:.0%}" for model, share in within.items())
    return Profiled({}, max(within.values(), default=0.0), notices)


def _as_named(config: Config, model: str, seconds: float) -> Profiled:
    """The profiles that the study names, if one could not be measured. Raises UserError if one is missing."""
    for each in dict.fromkeys((*config.models, *_models_of_arms(config))):
        try:
            build_profile(config, each)
        except UserError as error:
            fix = "allow more seconds, or name profiles that are there by profile_folder and hardware"
            allowed = f"{model} could not be measured, and there is no profile of {each} on {config.hardware}"
            raise UserError("fidelity_live.calibrate_s", seconds, allowed, fix) from error
    why = f"{model} could not be measured in {seconds:g} s: profiles of {config.hardware} are used as they were shipped"
    return Profiled({}, UNMEASURED_WITHIN, (f"{why}, so that gates are as wide as {UNMEASURED_WITHIN:.0%}",))


def _capacity_jobs(config: Config, changes: Mapping[str, Any]) -> dict[str, Job]:
    """One job for each arm: a full queue on the simulated device."""
    full = {
        "mode": "simulate",
        "workload.n_requests": FULL_QUEUE_REQUESTS,
        "workload.arrivals.kind": "all_at_once",
        **changes,
    }
    return {arm: jobs_of(config, arm, full)[0] for arm in entries_of(config)}


def _capacity_per_s(result: JobResult) -> float:
    """Requests/s of a run with a full queue. Raises UserError if none was answered."""
    found = result.replicate.metrics["throughput_requests_per_s"]
    if not isinstance(found, float):
        raise UserError("arms", "capacity", "requests that can be served", "see what the arm drops at mode=simulate")
    return found


def _cells(config: Config, capacities: Mapping[str, float]) -> list[Cell]:
    """The cells: arms in order, each at its loads in ascending order."""
    loads, entries = sorted(config.fidelity_live.loads), entries_of(config)
    about = {arm: str(entry.get("description") or entry["policy"]) for arm, entry in entries.items()}
    return [Cell(arm, about[arm], load, capacity * load) for arm, capacity in capacities.items() for load in loads]


def _pair(config: Config, cell: Cell, turn: int, changes: Mapping[str, Any]) -> Pair:
    """Run the cell in one pass. `changes` apply to every run."""
    wanted = config.fidelity_live
    served = {
        "workload.n_requests": max(ceil(cell.rate_per_s * wanted.seconds), wanted.least_requests),
        "workload.arrivals.kind": "poisson",
        "workload.arrivals.rate_per_s": cell.rate_per_s,
        **changes,
    }
    simulated, *_ = jobs_of(config, cell.arm, {**served, "mode": "simulate"})
    live, *_ = jobs_of(config, cell.arm, {**served, "mode": "live", "live.run": turn})
    return Pair(simulated, live)


def _with_pass(config: Config, so_far: Compared, turn: int, changes: Mapping[str, Any], folder: Path) -> Compared:
    """Run one more pass. It is also simulated at the device's pace in the live run, if that is known."""
    jobs = _pair(config, so_far.cell, turn, changes)
    results = run_jobs([jobs.simulated, jobs.live], journal_of(folder), 1, _tell)
    live, paced = results[jobs.live.key], None
    if (notes := live.live) is not None and notes.pace is not None:
        job = jobs.paced(notes.pace, notes.prompt_pace)
        paced = run_jobs([job], journal_of(folder), 1, _tell)[job.key]
    return so_far.with_pass(Pass(results[jobs.simulated.key], live, paced))


def _models_of_arms(config: Config) -> Sequence[str]:
    """The models that only overrides of arms name."""
    overrides = [(entry or {}).get("overrides") or {} for entry in config.arms.values()]
    return [model for one in overrides for model in one.get("models", ())]


def _tell(task: Task[Job], result: JobResult, kept: bool) -> None:
    job = task.input
    rate = job.config.workload.arrivals.rate_per_s
    load = "a full queue" if job.config.workload.arrivals.kind == "all_at_once" else f"{rate:.2f} requests/s"
    what = f"{job.config.mode}, {job.arm.name}, {load}" + (f", pass {job.config.live.run + 1}" if result.live else "")
    print(f"{what}: {'kept' if kept else f'{result.wall_s:.1f} s'}", file=sys.stderr)


def _ttfts_s(run: JobResult) -> FloatArray:
    return np.sort(run.replicate.records.ttft_ns().astype(np.float64)) / NS_PER_S


def _tpots_s(run: JobResult) -> FloatArray:
    tpot_ns, defined = run.replicate.records.tpot_ns()
    return np.sort(tpot_ns[defined]) / NS_PER_S


def rows_of(*runs: Sequence[Metrics | None]) -> tuple[ComparedRow, ...]:
    """The compared rows: latencies in ms, then the server as a whole. A row is unknown if one of its passes is.

    `runs` are metrics measured, simulated, and simulated at the device's pace, in each pass.
    """
    rows = []
    for name, group in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("itl_s", "ITL"), ("e2e_s", "E2E")):
        for statistic in STATISTICS:
            values = ([_number_of(m, f"{name}_{statistic}", 1e3) for m in of] for of in runs)
            rows.append(_row_of((group, "median" if statistic == "p50" else statistic, "ms"), *values))
    for name, figure, unit, factor in SYSTEM:
        rows.append(_row_of(("system", figure, unit), *([_number_of(m, name, factor) for m in of] for of in runs)))
    return tuple(rows)


def _row_of(what: tuple[str, str, str], *runs: Sequence[float | None]) -> ComparedRow:
    known = tuple(value for value in runs[0] if value is not None)
    measured, simulated, paced = map(_mean, runs)
    return ComparedRow(*what, measured, simulated, paced, known if len(known) == len(runs[0]) else ())


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _number_of(metrics: Metrics | None, name: str, factor: float = 1.0) -> float | None:
    """The metric in another unit; of a band the middle."""
    value = None if metrics is None else metrics.get(name)
    if value is None:
        return None
    return factor * ((value.low + value.high) / 2 if isinstance(value, Band) else value)
