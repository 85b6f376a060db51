"""Runs one study from its settings to a result, and on the command line to its files and the lines on stdout."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import helios_sim
from helios_sim import files
from helios_sim.opened import named
from helios_sim.profile.resolve import TIMES_FROM
from helios_sim.provenance import command_given, commit
from helios_sim.report.faults import fault_sentences
from helios_sim.report.format import gate_interval, gate_value
from helios_sim.report.result import Comparisons, ExperimentResult, Gate, comparisons
from helios_sim.report.tables import print_table
from helios_sim.report.terminal import JSON_ASKED, say
from helios_sim.report.write import write_result
from helios_sim.study.assemble import assemble
from helios_sim.study.inputs import inputs_of
from helios_sim.study.jobs import Job, JobResult, run_job
from helios_sim.study.modes import LIVE
from helios_sim.study.runner import forget_jobs, job_lines, journal_of, run_jobs
from helios_sim.study.schema import Config
from helios_sim.study.seeds import first_plan, settle
from helios_sim.vary.runner import Journal, at_work_in, progress

LIBRARIES = ("numpy", "scipy", "simpy")


def run_study(config: Config, folder: Path) -> int:
    """Run, write and print a study. Returns 0, or 2 if a gate failed. UserError before anything is written."""
    plan = first_plan(config)
    if config.trace:
        from helios_sim.study.traced import check_trace

        check_trace(plan)
    with at_work_in(folder):
        journal = journal_of(folder)
        settled = settle(plan, config, lambda jobs: _run_jobs(jobs, journal, config), processes(config))
        if sys.stderr.isatty():
            say("Writing the tables, the figures and the page ...", sys.stderr)
        made = with_read(provenance(config), journal) | {"seeds": list(settled.plan.config.seeds)}
        result = assemble(settled, made)
        ratios = comparisons(result)
        summary = write_result(result, folder, ratios, config.figures_as)
        if config.trace:
            from helios_sim.study.traced import FILE, trace_of

            files.write_bytes(folder / FILE, trace_of(settled.plan))
        forget_jobs(folder)
    return end(lambda: _show(result, ratios), folder, summary, result.gates)


def _run_jobs(jobs: Sequence[Job], journal: Journal[JobResult], config: Config) -> dict[str, JobResult]:
    total = len({job.key for job in jobs})
    with progress(config.name, total, job_lines(total)) as on_done:
        return run_jobs(jobs, journal, processes(config), on_done)


def _show(result: ExperimentResult, ratios: Comparisons) -> None:
    """Print the table, the sources of times, the answer and the warnings."""
    print_table(result, ratios)
    for name, source in result.inputs.items():
        if TIMES_FROM in source.details:
            say(f"{name}: times from {source.details[TIMES_FROM]}")
    for sentence in (*result.verdict, *fault_sentences(result), *result.warnings):
        say(sentence)


def processes(config: Config) -> int | None:
    """Return the number of processes; a live run has the device for itself."""
    return 1 if config.mode == LIVE else config.jobs


def provenance(config: Config) -> dict[str, object]:
    """Return what made the run: command, versions, machine, time and settings."""
    return {
        "command": command_given("helios_sim"),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "helios_sim": helios_sim.__version__,
        "commit": commit(Path(helios_sim.__file__).parent),
        "made_of": inputs_of(config),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "machine": platform.machine(),
        "seeds": config.seeds,
        "configuration": asdict(config),
    }


def with_read(made: Mapping[str, Any], journal: Journal[Any]) -> dict[str, Any]:
    """Return what made the run, with the files that the user's own code opened for the results in the journal."""
    return {**made, "made_of": {**made.get("made_of", {}), **named(journal.read)}} if journal.read else dict(made)


def end(show: Callable[[], None], folder: Path, summary: Mapping[str, Any], gates: Sequence[Gate] = ()) -> int:
    """Print the result by `show`, the gates and the folder. Returns 0, or 2 if a gate failed.

    The summary is the last line, for programs: if standard output is no terminal, or `--json` was given.
    """
    try:
        show()
        for gate in gates:
            value = f"{gate_value(gate.value, gate.bound)} {gate_interval(gate.low, gate.high, gate.bound)}"
            found = f"{gate.name} {value}, must be {gate.bound}"
            say(f"gate {'passed' if gate.passed else 'FAILED'}: {found}")
        say(f"output folder: {folder}")
        if sys.stdout.isatty() and (page := folder / "report.html").is_file():
            say(f"page: {page}")
        if JSON_ASKED.get() or not sys.stdout.isatty():
            print(json.dumps(summary, allow_nan=False))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader closed the pipe, as `head` does; the files are there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if all(gate.passed for gate in gates) else 2


def run(config: Config) -> ExperimentResult:
    """Run every arm of the study under every seed, and its sweeps. UserError if settings cannot be run."""
    settled = settle(first_plan(config), config, lambda jobs: {job.key: run_job(job) for job in jobs})
    return assemble(settled, {"seeds": list(settled.plan.config.seeds)})
