"""Measured rows beside their predictions: errors by group, gates, the table, the files and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from helios_sim import files
from helios_sim.files import json_value
from helios_sim.report import FOR_PAGE
from helios_sim.report.environment import page_environment
from helios_sim.report.page import page_figure
from helios_sim.report.result import Gate
from helios_sim.report.terminal import TextTable, say

SCHEMA_VERSION = 1  # of summary.json


@dataclass(frozen=True, slots=True)
class Errors:
    """Statistics of prediction / measurement - 1: mean and 90th percentile of absolute values, and the mean."""

    rows: int
    mean: float
    p90: float
    bias: float

    @classmethod
    def of(cls, errors: NDArray[np.float64]) -> Errors:
        """The statistics of at least one error."""
        size = np.abs(errors)
        return cls(len(errors), float(size.mean()), float(np.quantile(size, 0.9)), float(errors.mean()))


@dataclass(frozen=True, slots=True)
class Compared:
    """A group of rows. Errors are None if none of them is predicted."""

    name: str
    rows: int
    tpot: Errors | None
    ttft: Errors | None
    others: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # other predictors' errors of TPOT, TTFT


@dataclass(frozen=True, slots=True)
class SiliconResult:
    experiment: str
    title: str
    question: str
    rows: Sequence[Mapping[str, Any]]  # one mapping for each row, measured and predicted
    groups: Sequence[Compared]
    together: Sequence[Compared]  # sums over groups
    gates: tuple[Gate, ...]
    not_predicted: Sequence[tuple[str, str]]  # (row's id, why)
    notes: Sequence[str]
    others: Sequence[str]  # names of the other predictors' columns
    provenance: Mapping[str, Any]


def table_of(result: SiliconResult) -> TextTable:
    table = TextTable(result.title)
    table.column("rows of", number=False)
    tpot, ttft = ("TPOT\nerror", "90 %\nwithin", "bias"), ("TTFT\nerror", "bias")
    for heading in ("number", *tpot, *result.others, *ttft, *result.others):
        table.column(heading)
    for compared in result.groups:
        table.row(cells(compared, result.others))
    table.rows.append(None)
    for compared in result.together:
        table.row(cells(compared, result.others))
    return table


def cells(compared: Compared, others: Sequence[str]) -> list[str]:
    """A row of the table, with percentages to one decimal."""
    tpot, ttft = compared.tpot, compared.ttft
    of_others = [compared.others.get(name) for name in others]
    shown = [
        *([_share(tpot.mean), _share(tpot.p90), f"{tpot.bias:+.1%}"] if tpot else ["-"] * 3),
        *(_share(pair[0]) if pair else "" for pair in of_others),
        *([_share(ttft.mean), f"{ttft.bias:+.1%}"] if ttft else ["-"] * 2),
        *(_share(pair[1]) if pair else "" for pair in of_others),
    ]
    return [compared.name, str(compared.rows), *shown]


def print_silicon(result: SiliconResult) -> None:
    table_of(result).show()
    for sentence in result.notes:
        say(sentence)
    for name, why in result.not_predicted[:20]:
        say(f"not predicted: {name}: {why}")
    if len(result.not_predicted) > 20:
        say(f"and {len(result.not_predicted) - 20} more, in summary.json")


def write_silicon(result: SiliconResult, folder: Path, style: str | None = FOR_PAGE) -> dict[str, Any]:
    """Write rows.parquet, provenance.json, summary.json, report.html and figures/silicon.png.

    Returns what `summary.json` holds. Raises UserError when the folder cannot be written to.
    """
    summary = {
        "schema_version": SCHEMA_VERSION, "experiment": result.experiment,
        "groups": [json_value(group) for group in result.groups],
        "together": [json_value(group) for group in result.together],
        "gates": [json_value(gate) for gate in result.gates],
        "not_predicted": [{"id": name, "why": why} for name, why in result.not_predicted],
        "notes": list(result.notes), "provenance": json_value(result.provenance),
    }  # fmt: skip
    files.write_parquet(folder / "rows.parquet", pa.Table.from_pylist([dict(row) for row in result.rows]))
    files.write_json(folder / "provenance.json", summary["provenance"])
    files.write_json(folder / "summary.json", summary)
    if style is not None:
        _write_pictures(result, folder, style)
    return summary


def _write_pictures(result: SiliconResult, folder: Path, style: str) -> None:
    from helios_sim.report.figures.silicon import silicon_drawing
    from helios_sim.report.figures.style import write_png, write_vectors

    drawing = silicon_drawing(result.rows)
    write_png(drawing, folder / "figures")
    page = page_environment().get_template("silicon.html.j2").render(
        result=result,
        figures=[page_figure(drawing)],
        groups=[cells(group, result.others) for group in result.groups],
        together=[cells(group, result.others) for group in result.together],
    )
    files.write_text(folder / "report.html", page)
    write_vectors(drawing, folder / "figures", style)


def _share(value: float) -> str:
    return f"{value:.1%}"
