"""Results of a sweep: its designs, the Pareto front, and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from helios_sim.provenance import Assumption, Provenance, Sourced
from helios_sim.report.format import NOTHING, metric, metric_with_interval
from helios_sim.report.intervals import Interval, Method
from helios_sim.report.metrics import DEFINITIONS, Band, Better, Metrics, MetricValue
from helios_sim.report.result import ServedWorkload

if TYPE_CHECKING:
    import pyarrow

FIXED_COLUMNS = ("design", "arm", "front", "error")

_Item = TypeVar("_Item")
Shown = float | int | str | bool | None


@dataclass(frozen=True, slots=True)
class Design:
    """One design, or a reference: an arm at the study's own settings, with its name in place of parameters."""

    name: str  # "#12", or the arm's
    parameters: Mapping[str, Shown]  # empty for a reference
    metrics: Metrics | None  # means over the seeds; None if it failed
    error: str | None = None  # why it failed
    intervals: Mapping[str, Interval] = field(default_factory=dict)  # of the objectives and the shown metrics


@dataclass(frozen=True, slots=True)
class DesignsResult(Sourced):
    """The result of a sweep, from which its table, figures and page are made."""

    experiment: str
    title: str
    question: str
    conditions: str
    verdict: tuple[str, ...]
    arm: str  # the arm that was varied
    parameters: tuple[str, ...]
    objectives: tuple[str, ...]  # metrics
    shown_metrics: tuple[str, ...]  # columns beside the objectives
    designs: tuple[Design, ...]
    references: tuple[Design, ...]
    workload: ServedWorkload
    inputs: Mapping[str, Provenance]
    provenance: Mapping[str, Any]
    assumptions: tuple[Assumption, ...] = ()
    warnings: tuple[str, ...] = ()
    seeds: int = 1  # of each design

    @property
    def front(self) -> tuple[Design, ...]:
        """The Pareto front: designs that no other beats, ordered by the first objective."""
        merits = merits_of(self.designs, self.objectives)
        chosen = np.flatnonzero(on_front(merits))
        order = chosen[np.argsort(merits[chosen, 0], kind="stable")]
        return tuple(self.designs[i] for i in order)

    @property
    def distinct_front(self) -> tuple[tuple[Design, int], ...]:
        """The front, with designs that are equal in every objective as one entry, and their number."""
        costs = map(tuple, merits_of(self.front, self.objectives).tolist())
        alike: dict[tuple[float, ...], list[Design]] = {}
        for design, found in zip(self.front, costs, strict=True):
            alike.setdefault(found, []).append(design)
        return tuple((designs[0], len(designs)) for designs in alike.values())

    @property
    def failed(self) -> tuple[Design, ...]:
        return tuple(design for design in self.designs if design.error is not None)


def plain_value(name: str, value: MetricValue) -> float | None:
    """A metric as one number: of a band the less favourable end."""
    if isinstance(value, Band):
        return value.low if DEFINITIONS[name].better is Better.HIGHER else value.high
    return None if value is None else float(value)


def cost(name: str, value: MetricValue) -> float:
    """The metric as a number to minimise; infinite if it is undefined."""
    number = plain_value(name, value)
    if number is None:
        return float("inf")
    return -number if DEFINITIONS[name].better is Better.HIGHER else number


def merits_of(designs: Sequence[Design], objectives: Sequence[str]) -> NDArray[np.float64]:
    """Costs, (designs, objectives); infinite if a design failed or a metric is undefined."""
    rows = [[cost(name, None if d.metrics is None else d.metrics[name]) for name in objectives] for d in designs]
    return np.array(rows, dtype=np.float64).reshape(len(designs), len(objectives))


def on_front(costs: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(n,) whether no other row is at most as costly in every column and cheaper in one. Equals share the front."""
    defined = np.flatnonzero(np.isfinite(costs).all(axis=1))
    known = costs[defined]
    beaten = [((known <= row).all(axis=1) & (known < row).any(axis=1)).any() for row in known]
    front: NDArray[np.bool_] = np.zeros(len(costs), dtype=np.bool_)
    front[defined] = np.logical_not(beaten)
    return front


def designs_table(result: DesignsResult) -> pyarrow.Table:
    """A row for each design and, without parameters, each arm at the study's own settings.

    Columns: design (null for an arm as it was set), arm, front, the parameters, error (null unless it failed), and
    every metric; of a metric that is a band its ends as <metric>_low and <metric>_high. The objectives and the shown
    metrics have their 95 % intervals as <metric>_interval_low and <metric>_interval_high. Undefined is null.
    """
    import pyarrow as pa

    rows = [*result.designs, *result.references]
    front = {design.name for design in result.front}
    first_reference = len(result.designs)
    columns: dict[str, Any] = {
        "design": pa.array([row.name if i < first_reference else None for i, row in enumerate(rows)], pa.string()),
        "arm": pa.array([result.arm if i < first_reference else row.name for i, row in enumerate(rows)], pa.string()),
        "front": pa.array([row.name in front and i < first_reference for i, row in enumerate(rows)], pa.bool_()),
    }
    columns |= {name: _column([row.parameters.get(name) for row in rows]) for name in result.parameters}
    columns["error"] = pa.array([row.error for row in rows], pa.string())
    columns |= metric_columns([row.metrics for row in rows])
    for name in (*result.objectives, *result.shown_metrics):
        found = [row.intervals.get(name) for row in rows]
        if any(it is not None and it.low is not None and it.method is not Method.BAND for it in found):
            for end in ("low", "high"):
                ends = [None if it is None else getattr(it, end) for it in found]
                columns[f"{name}_interval_{end}"] = pa.array(ends, pa.float64())
    return pa.table(columns)


def metric_columns(rows: Sequence[Metrics | None]) -> dict[str, pyarrow.Array]:
    """A column for each metric, two for a band."""
    import pyarrow as pa

    columns = {}
    for name in DEFINITIONS:
        values = [None if metrics is None else metrics.get(name) for metrics in rows]
        if any(isinstance(value, Band) for value in values):
            for end in ("low", "high"):
                ends = [getattr(value, end) if isinstance(value, Band) else value for value in values]
                columns[f"{name}_{end}"] = pa.array(ends, pa.float64())
        else:
            columns[name] = pa.array(values, pa.float64())
    return columns


def _column(values: Sequence[Shown]) -> pyarrow.Array:
    """A column of numbers where all values are numbers, of texts otherwise; null where there is no value."""
    import pyarrow as pa

    given = [value for value in values if value is not None]
    if all(type(value) is int for value in given):
        return pa.array(values, pa.int64())
    if all(type(value) in (int, float) for value in given):
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def design_label(design: Design, alike: int) -> str:
    """`#12`, or `#12 +3` where three more designs come to the same in every objective."""
    return design.name if alike == 1 else f"{design.name} +{alike - 1}"


def thinned(designs: Sequence[_Item], most: int) -> list[_Item]:
    """Return up to `most` of the designs, evenly spaced from the first to the last."""
    if len(designs) <= most:
        return list(designs)
    return [designs[round(i * (len(designs) - 1) / (most - 1))] for i in range(most)]


def value_text(value: Shown) -> str:
    """A parameter's value as the tables show it."""
    if value is None:
        return NOTHING
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def metric_cells(design: Design, names: Sequence[str], intervals: bool = False) -> list[str]:
    """The design's metrics of these names as the tables show them, with their intervals where there is room."""
    if design.metrics is None:
        return [NOTHING for _ in names]
    if not intervals:
        return [metric(name, design.metrics[name]) for name in names]
    return [metric_with_interval(name, design.metrics[name], design.intervals.get(name)) for name in names]
