"""Every shipped sweep runs, small: few requests, the ends of every parameter, a few designs of a search."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from helios_sim.config import register, to_config
from helios_sim.help import conf_folder
from helios_sim.study.sweep import run_sweep

pytestmark = pytest.mark.slow

SWEEPS = sorted(path.stem for path in Path(conf_folder(), "experiment").glob("sweep_*.yaml"))


def small(name: str) -> DictConfig:
    register()
    with initialize_config_dir(conf_folder(), version_base=None):
        settings = compose("config", overrides=[
            f"+experiment={name}", "workload.n_requests=14", "sweep.backend=serial", "sweep.designs=6",
            "sweep.generation=3",
        ])  # fmt: skip
    for parameter in settings.sweep.parameters.values():
        for key in ("values", "labels"):
            if parameter.get(key) is not None and len(parameter[key]) > 2:
                parameter[key] = [parameter[key][0], parameter[key][-1]]
    return settings


def test_there_are_a_grid_and_a_search() -> None:
    assert [small(name).sweep.method for name in SWEEPS] == ["grid", "search"]


@pytest.mark.parametrize("name", SWEEPS)
def test_sweep_runs_small(name: str, tmp_path: Path, capsys) -> None:
    settings = small(name)
    assert run_sweep(to_config(settings), tmp_path) == 0
    summary = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert summary["experiment"] == name
    assert list(summary["arms"]) == [*settings.arms, settings.policy.name]
    table = pq.read_table(tmp_path / "designs.parquet").to_pylist()
    designs = [row for row in table if row["design"] is not None]
    if settings.sweep.method == "grid":
        values = [parameter["values"] for parameter in settings.sweep.parameters.values()]
        assert [tuple(row[name] for name in settings.sweep.parameters) for row in designs] == list(product(*values))
    else:
        assert 3 <= len(designs) <= 6
    assert all(row["error"] is None and row["requests_completed"] == 14 for row in table)
    front = [row["design"] for row in designs if row["front"]]
    assert front
    page = (tmp_path / "report.html").read_text()
    assert all(parameter in page for parameter in settings.sweep.parameters)
    assert (tmp_path / "pareto.png").stat().st_size > 0
