"""The comparison of a real serving log with its simulation, from settings to files and the lines on stdout."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from helios_sim.errors import UserError
from helios_sim.report.fidelity import ComparedRow, LoadError
from helios_sim.report.files import make_folder
from helios_sim.report.records import Records
from helios_sim.report.result import ExperimentResult, comparisons
from helios_sim.report.tables import print_comparison
from helios_sim.report.write import write_result
from helios_sim.study.command import provenance
from helios_sim.study.ending import end
from helios_sim.study.fidelity_estimate import Quantities, estimate, estimated_from
from helios_sim.study.fidelity_log import ServingLog, read_log
from helios_sim.study.fidelity_result import comparison
from helios_sim.study.fidelity_run import run_once
from helios_sim.study.fidelity_setup import Setup, set_up
from helios_sim.study.schema import Config


def run_fidelity(config: Config, folder: Path) -> int:
    """Runs, writes and prints. Returns 0, or 2 when a gate failed. UserError before anything is written."""
    if config.fidelity.folder is None:
        raise UserError("fidelity.folder", None, "the folder of a log", "set fidelity.folder")
    if config.sweeps or config.sweep.parameters:
        raise UserError("sweeps", len(config.sweeps), "none beside a comparison with a log", "leave sweeps out")
    result = compare(config)
    make_folder(folder)
    ratios = comparisons(result)
    summary = write_result(result, folder, ratios)
    return end(lambda: print_comparison(result, _is_shown), folder, summary, result.gates)


def compare(config: Config) -> ExperimentResult:
    """The whole comparison, without files."""
    wanted = config.fidelity
    log = read_log(Path(wanted.folder or ""))
    setup = set_up(log, wanted)
    n = estimated_from(log, wanted.estimate_from)
    quantities = estimate(log, setup, n, _note) if wanted.estimate else None
    used = quantities or Quantities()
    setup = used.applied(setup)
    run = run_once(log, setup, used.warm_up_s)
    errors = _load_errors(log, setup, wanted.load_factors, wanted.profile_error)
    return comparison(log, setup, quantities, n, run, errors, config, provenance(config))


def _load_errors(log: ServingLog, setup: Setup, factors: Sequence[float], error: float) -> list[LoadError]:
    """The log's requests at other rates, with the profile as it is and slower by `error`."""
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


def _is_shown(place: int, row: ComparedRow) -> bool:
    """All figures of all requests, and a few of the parts."""
    return place == 0 or row.statistic in ("mean", "median", "p99")
