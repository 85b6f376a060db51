"""Designs as rows: the table of all for other programs, the front's for people. Knows columns, not what to conclude."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from helios_sim.report.definitions import DEFINITIONS
from helios_sim.report.designs import Design, DesignsResult, Shown
from helios_sim.report.format import NOTHING, label, metric
from helios_sim.report.metrics import Band
from helios_sim.report.table import PLAIN_WIDTH, in_two_lines

if TYPE_CHECKING:
    import pyarrow

_Item = TypeVar("_Item")
FIXED_COLUMNS = ("design", "arm", "front", "error")
MOST_ROWS = 20  # of a front on standard output


def designs_table(result: DesignsResult) -> pyarrow.Table:
    """A row for each design and, without parameters, each arm at the study's own settings.

    Columns: design (null for an arm as it was set), arm, front, the parameters, error (null unless it failed), and
    every metric; of a metric that is a band its ends as <metric>_low and <metric>_high. Undefined is null.
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
    for name in DEFINITIONS:
        values = [None if row.metrics is None else row.metrics.get(name) for row in rows]
        if any(isinstance(value, Band) for value in values):
            for end in ("low", "high"):
                ends = [getattr(value, end) if isinstance(value, Band) else value for value in values]
                columns[f"{name}_{end}"] = pa.array(ends, pa.float64())
        else:
            columns[name] = pa.array(values, pa.float64())
    return pa.table(columns)


def print_designs(result: DesignsResult, file: TextIO | None = None) -> None:
    """The front, best in the first objective first, and the arms as they were set below it."""
    file = file or sys.stdout
    table = front_table(result)
    console = Console(file=file) if file.isatty() else Console(file=file, width=PLAIN_WIDTH, no_color=True)
    if not file.isatty():  # nothing is cut off in a file
        console.width = max(PLAIN_WIDTH, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)
    left = len(result.distinct_front) - MOST_ROWS
    if left > 0:
        console.print(f"{left} more of the front, between these, are in designs.parquet", highlight=False)


def front_table(result: DesignsResult) -> Table:
    """Parameters and objectives; designs that come to the same stand in one row."""
    table = Table(
        title=result.title, box=SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False,
        collapse_padding=True,
    )  # fmt: skip
    table.add_column("design", no_wrap=True)
    for name in result.parameters:
        table.add_column(name.replace("_", "_\n"), justify="right", no_wrap=True)
    for name in result.objectives:
        table.add_column(in_two_lines(label(name)), justify="right", no_wrap=True)
    for design, alike in spread(result.distinct_front, MOST_ROWS):
        parameters = (shown(value) for value in design.parameters.values())
        table.add_row(name_of(design, alike), *parameters, *cells(design, result.objectives))
    table.add_section()
    for design in result.references:
        empty = ("" for _ in result.parameters)
        table.add_row(design.name, *empty, *cells(design, result.objectives), style="dim")
    return table


def name_of(design: Design, alike: int) -> str:
    """#12, or #12 and 3 more that come to the same."""
    return design.name if alike == 1 else f"{design.name} +{alike - 1}"


def spread(designs: Sequence[_Item], most: int) -> list[_Item]:
    """At most so many, from the first to the last at even distances."""
    if len(designs) <= most:
        return list(designs)
    return [designs[round(i * (len(designs) - 1) / (most - 1))] for i in range(most)]


def shown(value: Shown) -> str:
    if value is None:
        return NOTHING
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def cells(design: Design, names: Sequence[str]) -> list[str]:
    return [NOTHING if design.metrics is None else metric(name, design.metrics[name]) for name in names]


def _column(values: Sequence[Shown]) -> pyarrow.Array:
    """Numbers as numbers; where any value is none, all as texts."""
    import pyarrow as pa

    given = [value for value in values if value is not None]
    if all(type(value) is int for value in given):
        return pa.array(values, pa.int64())
    if all(type(value) in (int, float) for value in given):
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return pa.array([None if value is None else str(value) for value in values], pa.string())
