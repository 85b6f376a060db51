"""How long a thousand designs of the quickstart's size take on two cores. Run with -m bench; minutes.

The bound is several times what an idle machine needs; the figure is what the run prints.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from pytest_benchmark.fixture import BenchmarkFixture

from helios_sim.config import register, to_config
from helios_sim.help import conf_folder
from helios_sim.study.designs import SweepPlan, plan_sweep
from helios_sim.study.sweep import run_plan

PARAMETERS = {
    "cap_bound": ("objective.max_disagreement", [0.02, 0.04, 0.06, 0.08, 0.10, 0.12, 0.14, 0.16, 0.18, 0.20]),
    "limit": ("arms.helios.limit", [20, 30, 40, 45, 50, 55, 60, 70, 80, 90]),
    "round_requests": ("arms.helios.round_requests", [25, 50, 75, 100, 125, 150, 200, 250, 300, 400]),
}


def thousand(each: int = 10) -> SweepPlan:
    """HELIOS of the quickstart, 300 requests: `each` values of three parameters."""
    parameters = {name: {"settings": [path], "values": values[:each]} for name, (path, values) in PARAMETERS.items()}
    register()
    with initialize_config_dir(conf_folder(), version_base=None):
        settings = compose("config", overrides=[
            "+experiment=quickstart", "sweep.arm=helios", "sweep.backend=processes", "sweep.workers=2",
            f"+sweep.parameters={json.dumps(parameters).replace(chr(34), '')}",
        ])  # fmt: skip
    return plan_sweep(to_config(settings))


@pytest.mark.bench
def test_a_thousand_designs(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    plan = thousand()
    assert plan.n_designs == 1000
    result = benchmark.pedantic(run_plan, (plan, tmp_path, {}, lambda task, outcome, kept: None), rounds=1)
    assert len(result.designs) == 1000
    assert not result.failed
    assert benchmark.stats["max"] < 900


@pytest.mark.slow
def test_what_is_timed_are_designs_of_the_quickstart() -> None:
    plan = thousand(each=2)
    assert [plan.n_designs, plan.arm, plan.config.workload.n_requests] == [8, "helios", 300]
    assert plan.designs is not None
    assert len({plan.jobs(design)[0].key for design in plan.designs}) == 8
