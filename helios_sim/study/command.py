"""One study from its configuration to its files and the lines on stdout."""

from __future__ import annotations

import platform
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import helios_sim
from helios_sim.provenance import command_given
from helios_sim.report.files import make_folder
from helios_sim.report.result import Comparisons, ExperimentResult, comparisons
from helios_sim.report.tables import print_table
from helios_sim.report.write import write_result
from helios_sim.study.assemble import assemble
from helios_sim.study.check import check_study
from helios_sim.study.ending import end
from helios_sim.study.live_schema import LIVE
from helios_sim.study.plan import plan_study
from helios_sim.study.runner import forget_jobs, job_lines, run_jobs
from helios_sim.study.schema import Config
from helios_sim.vary.runner import progress

LIBRARIES = ("numpy", "scipy", "simpy")


def run_study(config: Config, folder: Path) -> int:
    """Runs, writes and prints. Returns 0, or 2 when a gate failed. UserError before anything is written."""
    plan = plan_study(config)
    check_study(plan)
    make_folder(folder)
    total = len({job.key for job in plan.jobs})
    with progress(config.name, total, job_lines(total)) as on_done:
        results = run_jobs(plan.jobs, folder, processes(config), on_done)
    result = assemble(plan, results, provenance(config))
    ratios = comparisons(result)
    summary = write_result(result, folder, ratios, config.pictures)
    forget_jobs(folder)
    return end(lambda: _show(result, ratios), folder, summary, result.gates)


def _show(result: ExperimentResult, ratios: Comparisons) -> None:
    """The table and the answer."""
    print_table(result, ratios)
    for sentence in (*result.verdict, *_without_answers(result)):
        print(sentence)


def _without_answers(result: ExperimentResult) -> list[str]:
    """Arms that dropped every request: their metrics are blank, and this is why."""
    found = []
    for name, arm in result.arms.items():
        reasons: Counter[str | None] = Counter()
        for replicate in arm.replicates:
            reasons.update(replicate.records.drop_reason.counts())
        if reasons and None not in reasons:
            most, _ = reasons.most_common(1)[0]
            found.append(f"{name} dropped all {reasons.total()} requests, so it has no times. Most often: {most}.")
    return found


def processes(config: Config) -> int | None:
    """A live run has the device for itself."""
    return 1 if config.mode == LIVE else config.jobs


def provenance(config: Config) -> dict[str, object]:
    """Of the run: what made it, with what, when."""
    return {
        "command": command_given("helios_sim"),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "helios_sim": helios_sim.__version__,
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "machine": platform.machine(),
        "seeds": list(config.seeds),
        "configuration": asdict(config),
    }
