"""Every shipped experiment runs, small: few requests, one seed, the ends of every sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from helios_sim.config import register, to_config
from helios_sim.help import conf_folder
from helios_sim.study.capacity import run_capacity
from helios_sim.study.command import run_study

EXPERIMENTS = sorted(path.stem for path in Path(conf_folder(), "experiment").glob("*.yaml"))
# sweeps: test_sweep_experiments.py; of a log: test_fidelity_command.py and test_from_log.py; below: capacity
STUDIES = [name for name in EXPERIMENTS if not name.startswith(("sweep_", "fidelity_", "capacity", "from_log"))]
DRAWN = {"quickstart", "autoscale", "faults", "guarantee", "paper_batch"}  # the others: sketches of figures
NEEDS_SHARED_DATA = {"autoscale", "prefix_caching", "speed_w1"}


def small(name: str) -> DictConfig:
    register()
    with initialize_config_dir(conf_folder(), version_base=None):
        settings = compose("config", overrides=[f"+experiment={name}", "workload.n_requests=14", "seeds=[0]", "jobs=1"])
    named = {str(value) for figure in settings.figures for value in (figure.get("where") or {}).values()}
    for sweep in settings.sweeps:
        for axis in sweep.axes:
            names = axis.get("labels") or axis["values"]
            kept = [n for n, name in enumerate(names) if n in (0, len(names) - 1) or str(name) in named]
            for key in ("values", "labels"):
                if axis.get(key) is not None:
                    axis[key] = [axis[key][n] for n in kept]
            if "workload.n_requests" in axis.settings:
                place = list(axis.settings).index("workload.n_requests")
                axis["values"] = [[*values[:place], 14, *values[place + 1 :]] for values in axis["values"]]
    return settings


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in STUDIES if name not in DRAWN])
def test_the_figures_of_the_others_are_drawn(name: str, tmp_path: Path, capsys, request) -> None:
    check_small(name, tmp_path, capsys, request)
    assert all(path.stat().st_size > 5000 for path in (tmp_path / "figures").glob("*.png"))


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_experiment_runs_small(name: str, tmp_path: Path, capsys, request) -> None:
    if name not in DRAWN:
        request.getfixturevalue("sketched")
    check_small(name, tmp_path, capsys, request)


def check_small(name: str, tmp_path: Path, capsys, request) -> None:
    if name in NEEDS_SHARED_DATA:
        request.getfixturevalue("shared_data")
    settings = small(name)
    status = run_study(to_config(settings), tmp_path)
    assert status in (0, 2)  # a gate may fail on fourteen requests
    printed = capsys.readouterr().out.strip().splitlines()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert json.loads(printed[-1]) == summary
    assert summary["experiment"] == name
    assert summary["baseline"] in summary["arms"]
    own = [arm for arm, entry in settings.arms.items() if not entry.get("sweeps_only")]
    assert list(summary["arms"]) == [*own, *([settings.policy.name] if settings.policy else [])]
    for arm in summary["arms"].values():
        left = [arm["metrics"][f"requests_{status}"] for status in ("completed", "dropped", "unfinished")]
        assert sum(left) == 14
        assert arm["metrics"]["requests_completed"] > 0
    assert len(summary.get("points", [])) == sum(_points(sweep) for sweep in settings.sweeps)
    assert len(summary.get("published", [])) == len(settings.published)
    page = (tmp_path / "report.html").read_text()
    assert all(arm in page for arm in summary["arms"])
    for file in ("requests.parquet", "decisions.parquet", "provenance.json"):
        assert (tmp_path / file).stat().st_size > 0
    assert len(list((tmp_path / "figures").glob("*.png"))) >= 1 + len(settings.figures)


@pytest.mark.slow
@pytest.mark.usefixtures("sketched")
def test_capacity_runs_small(tmp_path: Path, capsys) -> None:
    register()
    changes = ["+experiment=capacity", "capacity.seconds=1", "capacity.most_replicas=4", "seeds=[0]", "jobs=1"]
    with initialize_config_dir(conf_folder(), version_base=None):
        settings = compose("config", overrides=changes)
    assert run_capacity(to_config(settings), tmp_path) == 0
    summary = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    (load,) = summary["capacity"]["loads"]
    assert [(plan["card"], plan["policy"]) for plan in load["plans"]] == [
        (card, arm) for card in settings.capacity.cards for arm in settings.arms
    ]
    page = (tmp_path / "report.html").read_text()
    assert all(name in page for name in (*settings.capacity.cards, *settings.arms))
    assert (tmp_path / "fleets.parquet").stat().st_size > 0


def _points(sweep: DictConfig) -> int:
    points = 1
    for axis in sweep.axes:
        points *= len(axis["values"])
    return points


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_opens_with_the_line_that_runs_it(name: str) -> None:
    text = Path(conf_folder(), "experiment", f"{name}.yaml").read_text()
    assert f"# python -m helios_sim +experiment={name}" in text.splitlines()[1]
    assert OmegaConf.create(text).name == name
