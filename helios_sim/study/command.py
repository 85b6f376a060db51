"""One study from its configuration to its files and the lines on stdout."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import helios_sim
from helios_sim.report.files import make_folder
from helios_sim.report.summary import comparisons
from helios_sim.report.table import print_table
from helios_sim.report.write import write_result
from helios_sim.study.assemble import assemble
from helios_sim.study.plan import StudyPlan, Variant, plan_study
from helios_sim.study.progress import progress
from helios_sim.study.runner import run_jobs

LIBRARIES = ("numpy", "scipy", "simpy")


def run_study(variant: Variant, folder: Path) -> int:
    """Runs, writes and prints. Returns 0, or 2 when a gate failed."""
    plan = plan_study(variant)
    make_folder(folder)
    with progress(plan) as on_done:
        results = run_jobs(plan.jobs, folder, plan.config.jobs, on_done)
    result = assemble(plan, results, _provenance(plan))
    ratios = comparisons(result)
    summary = write_result(result, folder, ratios)
    print_table(result, ratios)
    for sentence in result.verdict:
        print(sentence)
    for gate in result.gates:
        print(f"gate {'passed' if gate.passed else 'FAILED'}: {gate.name} = {gate.value}, must be {gate.bound}")
    print(f"report: {folder / 'report.html'}")
    print(json.dumps(summary, allow_nan=False))
    return 0 if all(gate.passed for gate in result.gates) else 2


def _provenance(plan: StudyPlan) -> dict[str, object]:
    return {
        "command": " ".join(["python -m helios_sim", *sys.argv[1:]]),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "helios_sim": helios_sim.__version__,
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "machine": platform.machine(),
        "seeds": list(plan.config.seeds),
        "configuration": asdict(plan.config),
    }
