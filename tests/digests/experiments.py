"""Every shipped experiment that runs on any machine, with few requests, and digests of what it writes."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from digests.canonical import digest
from helios_sim.config import register, to_config
from helios_sim.help import conf_folder
from helios_sim.report.faults import COUNTED
from helios_sim.report.metrics import (
    OF_CASCADES,
    OF_COST,
    OF_DRAFTS,
    OF_LATE_LAYERS,
    OF_PREFIXES,
    OF_RELEASES,
    OF_SPLITS,
)
from helios_sim.report.records import DERIVED
from helios_sim.shared_data import shared_data_folder
from helios_sim.study.capacity import run_capacity
from helios_sim.study.command import run_study
from helios_sim.study.sweep import run_sweep

REQUESTS = 60
CAPACITY = ("capacity.seconds=4", "capacity.most_replicas=4", "seeds=[0]", "jobs=1", "pictures=false")
MORE_REQUESTS = {  # of experiments with few or quick arms
    "faults": 200, "field": 30, "live_drift": 400, "own": 400, "paper_batch": 120, "paper_energy": 120,
    "paper_latency": 120, "quickstart": 400, "scale": 400, "speed_w1": 200,
}  # fmt: skip
SLOW = {"ablation", "field", "paper_opt"}
# Left out: these need a log of a real engine or a model on a device, have rows for arms, or a search whose draws depend
# on a package.
LEFT_OUT = {"fidelity_vllm", "fidelity_live", "fidelity_silicon", "from_log", "sweep_helios"}
NEEDS_SHARED_DATA = {"autoscale", "prefix_caching", "speed_w1"}


def experiment_names() -> list[str]:
    """Those that can run here: some need data from elsewhere."""
    names = {path.stem for path in Path(conf_folder(), "experiment").glob("*.yaml")} - LEFT_OUT
    return sorted(names if shared_data_folder().is_dir() else names - NEEDS_SHARED_DATA)


def small(name: str) -> DictConfig:
    """Few requests, one seed, the ends of every sweep, no pictures."""
    requests = MORE_REQUESTS.get(name, REQUESTS)
    changes = [f"workload.n_requests={requests}", "seeds=[0]", "jobs=1", "pictures=false"]
    changes = [f"+experiment={name}", *(CAPACITY if name == "capacity" else changes)]
    if name.startswith("sweep_"):
        changes.append("sweep.backend=serial")
    register()
    with initialize_config_dir(conf_folder(), version_base=None):
        settings = compose("config", overrides=changes)
    axes = [axis for sweep in settings.sweeps for axis in sweep.axes]
    if name.startswith("sweep_"):
        axes += settings.sweep.parameters.values()
    for axis in axes:
        for key in ("values", "labels"):
            if axis.get(key) is not None and len(axis[key]) > 2:
                axis[key] = [axis[key][0], axis[key][-1]]
    # A point keeps the metrics of figures, though none is drawn; those of a value between the ends have no point.
    left = {(axis.name, v) for sweep in settings.sweeps for axis in sweep.axes for v in axis.labels or axis["values"]}
    settings.figures = [f for f in settings.figures if all(at in left for at in (f.get("where") or {}).items())]
    return settings


def experiment_digests(name: str) -> dict[str, Any]:
    settings = small(name)
    run = run_capacity if name == "capacity" else run_sweep if name.startswith("sweep_") else run_study
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            run(to_config(settings), folder)
        summary = json.loads((folder / "summary.json").read_text())
        tables = {path.stem: pq.read_table(path).to_pylist() for path in sorted(folder.glob("*.parquet"))}
    return folder_digests(summary, tables)


def folder_digests(summary: Mapping[str, Any], tables: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Digests by arm of rows and figures, by point of a sweep, and of what is concluded."""
    arms = {name: {"figures": digest(_defined(arm["metrics"])), "compared": _without(arm, "metrics")}
            for name, arm in summary.get("arms", {}).items()}  # fmt: skip
    for row in tables.get("decisions", []):
        row["evidence"] = json.loads(row["evidence"])
    for table in ("requests", "decisions"):
        for name, arm in arms.items():
            rows = [row for row in tables.get(table, []) if row["arm"] == name]
            if table == "requests":
                rows = [{name: value for name, value in row.items() if name not in DERIVED} for row in rows]
                rows.sort(key=lambda row: (row["seed"], row["request_id"], row["replica"]))
            arm[table] = digest(rows, exact=table == "requests")
    found: dict[str, Any] = {"arms": arms}
    if "points" in summary:
        found["points"] = {_settings(point["settings"]): digest(point) for point in summary["points"]}
    if "designs" in tables:
        found["designs"] = [digest(_defined(row)) for row in tables["designs"]]
    if "fleets" in tables:
        found["fleets"] = [digest(_defined(row)) for row in tables["fleets"]]
        found["capacity"] = digest(summary["capacity"])
    found["concluded"] = digest({key: summary.get(key) for key in ("baseline", "gates", "verdict", "published")})
    return found


YOUNG = (*OF_COST, *OF_PREFIXES, *OF_DRAFTS, *OF_SPLITS, *OF_RELEASES, *OF_CASCADES, *OF_LATE_LAYERS)


def _defined(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Without those of faults and costs where there were none: they are younger than most of what is recorded."""
    return {name: value for name, value in metrics.items() if value is not None or name not in (*COUNTED, *YOUNG)}


def _without(arm: Mapping[str, Any], *names: str) -> str:
    return digest(_without_costs({key: value for key, value in arm.items() if key not in names}))


def _without_costs(value: Any) -> Any:
    """The value without metrics of costs that were not counted, as deep as they are."""
    if not isinstance(value, Mapping):
        return value
    return {k: _without_costs(v) for k, v in value.items() if v is not None or k not in YOUNG}


def _settings(settings: Any) -> str:
    return json.dumps(settings, sort_keys=True)
