"""What a finished sweep of designs hands to the report, and which designs no other beats. Knows no policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.provenance import Assumption, Provenance, ProvenanceClass, weakest
from helios_sim.report.definitions import DEFINITIONS, Better
from helios_sim.report.metrics import Band, Metrics, MetricValue
from helios_sim.report.result import Workload

Shown = float | int | str | bool | None


@dataclass(frozen=True, slots=True)
class Design:
    """One design, or an arm at the study's own settings (a reference) with its name in place of parameters."""

    name: str  # "#12", or the arm's
    parameters: Mapping[str, Shown]  # empty for a reference
    metrics: Metrics | None  # means over the seeds; None: failed
    error: str | None = None  # why it failed


@dataclass(frozen=True, slots=True)
class DesignsResult:
    """Everything that a sweep's table, figures and page are made of."""

    experiment: str
    title: str
    question: str
    conditions: str
    verdict: tuple[str, ...]
    arm: str  # whose designs these are
    parameters: tuple[str, ...]
    objectives: tuple[str, ...]  # metrics
    shown_metrics: tuple[str, ...]  # columns beside the objectives
    designs: tuple[Design, ...]
    references: tuple[Design, ...]
    workload: Workload
    inputs: Mapping[str, Provenance]
    provenance: Mapping[str, Any]
    assumptions: tuple[Assumption, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def front(self) -> tuple[Design, ...]:
        """Designs that no other beats, the best in the first objective first."""
        merits = merits_of(self.designs, self.objectives)
        chosen = np.flatnonzero(on_front(merits))
        order = chosen[np.argsort(merits[chosen, 0], kind="stable")]
        return tuple(self.designs[i] for i in order)

    @property
    def distinct_front(self) -> tuple[tuple[Design, int], ...]:
        """The front with designs that come to the same in every objective named once, and how many they are."""
        costs = map(tuple, merits_of(self.front, self.objectives).tolist())
        alike: dict[tuple[float, ...], list[Design]] = {}
        for design, found in zip(self.front, costs, strict=True):
            alike.setdefault(found, []).append(design)
        return tuple((designs[0], len(designs)) for designs in alike.values())

    @property
    def failed(self) -> tuple[Design, ...]:
        return tuple(design for design in self.designs if design.error is not None)

    @property
    def provenance_class(self) -> ProvenanceClass | None:
        classes = [source.provenance_class for source in self.inputs.values()]
        return weakest(classes) if classes else None

    @property
    def all_assumptions(self) -> tuple[Assumption, ...]:
        of_inputs = (a for source in self.inputs.values() for a in source.assumptions)
        return tuple(dict.fromkeys((*self.assumptions, *of_inputs)))


def plain_value(name: str, value: MetricValue) -> float | None:
    """A metric as one number; a band counts with its less favourable end."""
    if isinstance(value, Band):
        return value.low if DEFINITIONS[name].better is Better.HIGHER else value.high
    return None if value is None else float(value)


def cost(name: str, value: MetricValue) -> float:
    """To be made small; infinite where the metric is undefined."""
    number = plain_value(name, value)
    if number is None:
        return float("inf")
    return -number if DEFINITIONS[name].better is Better.HIGHER else number


def merits_of(designs: Sequence[Design], objectives: Sequence[str]) -> NDArray[np.float64]:
    """(designs, objectives) costs; infinite for what failed or is undefined."""
    rows = [[cost(name, None if d.metrics is None else d.metrics[name]) for name in objectives] for d in designs]
    return np.array(rows, dtype=np.float64).reshape(len(designs), len(objectives))


def on_front(costs: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(n,) true where no other row is at most as dear in every column and cheaper in one. Equals stand together."""
    defined = np.flatnonzero(np.isfinite(costs).all(axis=1))
    known = costs[defined]
    beaten = [((known <= row).all(axis=1) & (known < row).any(axis=1)).any() for row in known]
    front: NDArray[np.bool_] = np.zeros(len(costs), dtype=np.bool_)
    front[defined] = np.logical_not(beaten)
    return front
