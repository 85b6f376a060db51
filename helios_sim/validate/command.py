"""Comparisons of a real run with its simulation, from settings to files and the lines on stdout."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from helios_sim.errors import UserError
from helios_sim.report.records import Records
from helios_sim.report.result import ComparedRow, ExperimentResult, LoadError, comparisons
from helios_sim.report.silicon import print_silicon, write_silicon
from helios_sim.report.tables import print_comparison
from helios_sim.report.write import write_result
from helios_sim.study.command import end, provenance
from helios_sim.study.plan import check_study, plan_study
from helios_sim.study.runner import forget_jobs
from helios_sim.study.schema import Config
from helios_sim.validate.compare import of_live, of_log
from helios_sim.validate.live import TimeLeft, compared_cells, measured_profiles
from helios_sim.validate.logs import ServingLog, read_log
from helios_sim.validate.replay import Quantities, estimate, estimated_from, run_once
from helios_sim.validate.setup import Setup, set_up
from helios_sim.validate.silicon import SHIPPED, jobs_of, not_read, predictions, read_rows, with_front
from helios_sim.validate.silicon_gates import result_of
from helios_sim.vary.runner import at_work_in
from helios_sim.vary.settings import with_settings

PRINTED = ("mean", "median", "p95", "p99")  # statistics of live latencies on a terminal; the page has all


def run_fidelity(config: Config, folder: Path) -> int:
    """Compare a log. Returns 0, or 2 if a gate failed. Raises UserError before anything is written."""
    if config.fidelity.folder is None:
        raise UserError("fidelity.folder", None, "the folder of a log", "set fidelity.folder")
    _check_no_sweeps(config, "a log")
    result = compare(config)
    with at_work_in(folder):
        summary = write_result(result, folder, comparisons(result), config.figures_as)
    return end(lambda: print_comparison(result, _is_shown_of_log), folder, summary, result.gates)


def run_fidelity_live(config: Config, folder: Path, left: TimeLeft | None = None) -> int:
    """Compare live serving. Returns 0, or 2 if a gate failed. Raises UserError before anything is written.

    Finished runs are kept in the folder: after a kill the same folder goes on with the missing ones. `left` is the time
    if it is limited. If it does not suffice, the last loads are left out and the result says so. Raises NoTimeLeft if
    it does not suffice for any load.
    """
    _check_no_sweeps(config, "live serving")
    check_study(plan_study(with_settings(config, {"mode": "live"})))
    with at_work_in(folder):
        profiled = measured_profiles(config, folder)
        found = compared_cells(config, profiled.changes, folder, left)
        served = {one.cell.load for one in found}
        if left_out := sorted(set(config.fidelity_live.loads) - served):
            told = f"no time was left for the loads of {', '.join(f'{load:.0%}' for load in left_out)}"
            profiled = replace(profiled, notices=(*profiled.notices, told))
        result = of_live(found, with_settings(config, profiled.changes), provenance(config), profiled)
        summary = write_result(result, folder, comparisons(result), config.figures_as)
        forget_jobs(folder)
    return end(lambda: print_comparison(result, _is_shown), folder, summary, result.gates)


def run_fidelity_silicon(config: Config, folder: Path) -> int:
    """Predict published measurements. Returns 0, or 2 if a gate failed. Raises UserError before anything is written.

    Finished rows are kept in the folder: after a kill the same folder goes on with the missing ones.
    """
    path = SHIPPED if config.fidelity.rows is None else Path(config.fidelity.rows).expanduser()
    rows = read_rows(path)
    jobs, why_not = jobs_of(rows, config)
    with at_work_in(folder):
        found, failed = predictions(jobs, folder, config.jobs)
        both = [(row, with_front(row, found[row.id]) if row.id in found else None) for row in rows]
        result = result_of(both, why_not | failed, config, provenance(config), config.fidelity.rows is None)
        result = replace(result, notes=(*result.notes, *not_read(path)))
        summary = write_silicon(result, folder, config.figures_as)
    return end(lambda: print_silicon(result), folder, summary, result.gates)


def _is_shown_of_log(part: int, row: ComparedRow) -> bool:
    """Whether the terminal shows the row: all figures of all requests, and a few of the parts."""
    return part == 0 or row.statistic in ("mean", "median", "p99")


def _is_shown(_: int, row: ComparedRow) -> bool:
    return (row.group == "system" or row.statistic in PRINTED) and (row.measured is not None or bool(row.simulated))


def _check_no_sweeps(config: Config, beside: str) -> None:
    if config.sweeps or config.sweep.parameters:
        raise UserError("sweeps", len(config.sweeps), f"none beside a comparison with {beside}", "leave sweeps out")


def compare(config: Config) -> ExperimentResult:
    """The whole comparison, without files."""
    wanted = config.fidelity
    log = read_log(Path(wanted.folder or "").expanduser())
    setup = set_up(log, wanted)
    n = estimated_from(log, wanted.estimate_from)
    quantities = estimate(log, setup, n, _note) if wanted.estimate else None
    used = quantities or Quantities()
    setup = used.applied(setup)
    run = run_once(log, setup, used.warm_up_s)
    errors = _load_errors(log, setup, wanted.load_factors, wanted.profile_error)
    return of_log(log, setup, quantities, n, run, errors, config, provenance(config))


def _load_errors(log: ServingLog, setup: Setup, factors: Sequence[float], error: float) -> list[LoadError]:
    """Changes of figures at other rates if the profile is slower by `error`, with the log's requests."""
    slower = setup.with_profile(setup.profile.scaled(1.0 + error))
    found = []
    for factor in sorted(factors):
        _note(f"load {factor:g}")
        runs = [Records.of(run_once(log, each, rate=factor).records) for each in (setup, slower)]
        means = [
            (
                r.ttft_ns().mean(),
                r.tpot_ns()[0][r.tpot_ns()[1]].mean() if r.tpot_ns()[1].any() else 1.0,
                r.e2e_ns().mean(),
            )
            for r in runs
        ]
        names = ("mean TTFT", "mean TPOT", "mean E2E")
        found.append(LoadError(factor, tuple((n, float(b / a - 1)) for n, a, b in zip(names, *means, strict=True))))
    return found


def _note(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr)
