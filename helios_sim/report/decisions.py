"""The decision log as rows: triggers, deployments and evidence in words and columns."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from helios_sim.files import json_value, numbers, texts, to_json
from helios_sim.policy.deployment import Cause, Deployment, Placement
from helios_sim.request import NS_PER_S

if TYPE_CHECKING:
    import pyarrow

    from helios_sim.report.result import ArmResult
    from helios_sim.serving.decider import Decision


SHOWN_DECISIONS = 200  # per arm on a page; all are in the Parquet file
_NUMBERS: dict[str, type] = {"time_s": np.float64, "replica": np.int64, "layers": np.int64}


@dataclass(frozen=True, slots=True)
class DecisionRow:
    """One decision: time, cause, new deployment, reason and evidence. `anchor` is its place on the page."""

    anchor: str
    arm: str
    time_s: float
    replica: int
    cause: str
    model: str
    layers: int
    exit_rule: str
    standby: str
    reason: str
    evidence: Mapping[str, Any]

    @property
    def evidence_text(self) -> str:
        return "; ".join(f"{key}: {_short(value)}" for key, value in self.evidence.items())

    @property
    def evidence_json(self) -> str:
        return to_json(self.evidence, indent=2)


def decision_rows(arm: ArmResult) -> list[DecisionRow]:
    of_arm = hashlib.sha256(arm.name.encode(errors="surrogatepass")).hexdigest()[:8]
    return [decision_row(arm.name, decision, f"decision-{of_arm}-{n}") for n, decision in enumerate(arm.decisions, 1)]


def decisions_table(arms: Mapping[str, ArmResult]) -> pyarrow.Table:
    """All arms' decisions; `evidence` is JSON text."""
    import pyarrow as pa

    rows = [row for arm in arms.values() for row in decision_rows(arm)]
    data: dict[str, pyarrow.Array] = {}
    for name in ("arm", "time_s", "replica", "cause", "model", "layers", "exit_rule", "standby", "reason"):
        values = [getattr(row, name) for row in rows]
        kind = _NUMBERS.get(name)
        data[name] = texts(values) if kind is None else numbers(np.array(values, kind))
    data["evidence"] = texts([to_json(row.evidence) for row in rows])
    return pa.table(data)


def decision_row(arm: str, decision: Decision, anchor: str = "") -> DecisionRow:
    deployment: Deployment = decision.deployment
    return DecisionRow(
        anchor=anchor,
        arm=arm,
        time_s=decision.time_ns / NS_PER_S,
        replica=decision.replica,
        cause=in_words(decision.cause),
        model=deployment.active.model,
        layers=deployment.active.layers,
        exit_rule=in_words(deployment.exit_rule),
        standby=", ".join(_placement(p) for p in deployment.standby),
        reason=deployment.reason,
        evidence=json_value(deployment.evidence),
    )


def in_words(value: Cause | object) -> str:
    """A trigger or exit rule as text: `breach limit (window tokens 100, limit 50)`."""
    name = "".join(f" {c.lower()}" if c.isupper() else c for c in type(value).__name__).strip()
    named = {f.name: getattr(value, f.name) for f in fields(value)}  # type: ignore[arg-type]
    for young in ("checkpoints", "near"):
        if named.get(young, "") is None:  # the usual case
            del named[young]
    settings = ", ".join(f"{name} {each}" for name, each in named.items())
    return f"{name} ({settings})".replace("_", " ") if settings else name


def _placement(placement: Placement) -> str:
    return f"{placement.model} {placement.layers}"


def _short(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_short(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_short(item) for item in value) + "]"
    return str(value)
