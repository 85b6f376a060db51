"""The machine-readable result, `summary.json`. Knows its shape (schema version 1) and strict JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from enum import Enum
from typing import Any

import numpy as np

from helios_sim.report.compare import Ratio, compare, interval_over_seeds
from helios_sim.report.fidelity import Fidelity
from helios_sim.report.metrics import Metrics
from helios_sim.report.result import ArmResult, ExperimentResult, SweepFigure, SweepPoint, headline_metrics

SCHEMA_VERSION = 1

Comparisons = Mapping[str, Mapping[str, Ratio]]  # by arm, then by metric


def comparisons(result: ExperimentResult) -> dict[str, dict[str, Ratio]]:
    """Ratios of every arm to its baseline, baselines left out."""
    runs = {name: [(r.records, r.metrics) for r in arm.replicates] for name, arm in result.arms.items()}
    return {
        name: compare(runs[name], runs[result.baseline_of(name)])
        for name in result.arms
        if name != result.baseline_of(name)
    }


def summarise_result(result: ExperimentResult, ratios: Comparisons | None = None) -> dict[str, Any]:
    """The structure of `summary.json`: JSON values only, undefined is null."""
    ratios = comparisons(result) if ratios is None else ratios
    summary: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "experiment": result.experiment,
        "baseline": result.baseline,
        "arms": {
            name: {**_arm(arm, ratios.get(name, {})), "tasks": json_value(result.by_task(name))}
            for name, arm in result.arms.items()
        },
        "gates": [json_value(gate) for gate in result.gates],
        "provenance": {
            "class": json_value(result.provenance_class),
            "inputs": {name: json_value(source) for name, source in result.inputs.items()},
            "assumptions": [json_value(a) for a in result.all_assumptions],
            **{key: json_value(value) for key, value in result.provenance.items()},
        },
    }
    summary["verdict"] = list(result.verdict)
    summary["headline_metrics"] = list(headline_metrics(result))
    if result.fidelity is not None:
        summary["fidelity"] = _fidelity(result.fidelity)
    if result.published:
        summary["published"] = [json_value(p) for p in result.published]
    if result.points:
        summary["points"] = [_point(point, _shown_metrics(result)) for point in result.points]
    return summary


def _fidelity(fidelity: Fidelity) -> dict[str, Any]:
    return {
        "parts": {
            part: [
                {
                    **json_value(row),
                    "difference": json_value(row.difference),
                    "noise": json_value(row.noise),
                    "paced_difference": json_value(row.paced_difference),
                }
                for row in rows
            ]
            for part, rows in fidelity.parts
        },
        "counts": [json_value(count) for count in fidelity.counts],
        "profile_error": fidelity.profile_error,
        "load_errors": [{"load": point.load, "changes": dict(point.changes)} for point in fidelity.load_errors],
        "terms": dict(fidelity.terms),
    }


def _shown_metrics(result: ExperimentResult) -> set[str]:
    """Metrics whose ratios are given at every point: those in the table and the figures."""
    return {*headline_metrics(result), *(f.metric for f in result.figures if isinstance(f, SweepFigure))}


def _point(point: SweepPoint, with_ratios: set[str]) -> dict[str, Any]:
    """A setting's metrics, the undefined left out, since there may be hundreds of points."""
    return {
        "settings": json_value(point.settings),
        "metrics": {arm: json_value({k: v for k, v in m.items() if v is not None}) for arm, m in point.metrics.items()},
        "vs_baseline": {
            arm: json_value({k: v for k, v in ratios.items() if k in with_ratios})
            for arm, ratios in point.vs_baseline.items()
        },
    }


def _arm(arm: ArmResult, ratios: Mapping[str, Ratio]) -> dict[str, Any]:
    entry = {"metrics": json_value(arm.metrics), "vs_baseline": json_value(ratios)}
    intervals = _intervals([replicate.metrics for replicate in arm.replicates])
    if intervals:
        entry["intervals"] = intervals
    if arm.baseline is not None:
        entry["baseline"] = arm.baseline
    if len(arm.replicas) > 1:
        entry["replicas"] = json_value(arm.replicas)
    return entry


def _intervals(runs: list[Metrics]) -> dict[str, dict[str, float]]:
    """95 % t-intervals of the means over seeds, for plain metrics that every replicate has."""
    found = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        numbers = [float(v) for v in values if isinstance(v, int | float)]
        interval = interval_over_seeds(numbers) if len(numbers) == len(values) else None
        if interval is not None:
            found[name] = {"low": interval[0], "high": interval[1]}
    return found


def json_value(value: Any) -> Any:
    """Plain JSON values of dataclasses, enums, NumPy scalars and arrays; NaN and infinities become null."""
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, np.generic | np.ndarray):
        return json_value(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return json_value(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [json_value(item) for item in value]
    return str(value)
