"""Measured runs beside their simulations on the terminal. Knows rows, not where they come from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from helios_sim.report import format as fmt
from helios_sim.report.fidelity import ComparedRow
from helios_sim.report.result import ExperimentResult

WIDTH = 100


def plain_console() -> Console:
    """Standard output, without colours and of a fixed width where nobody looks at it."""
    return Console(file=sys.stdout) if sys.stdout.isatty() else Console(file=sys.stdout, width=WIDTH, no_color=True)


def compared_table(title: str, rows: Sequence[ComparedRow]) -> Table:
    """With columns of the difference at the device's pace, and of the noise of what was measured, where known."""
    noisy = any(row.noise is not None for row in rows)
    paced = any(row.paced is not None for row in rows)
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    headings = ["figure", "measured", "simulated", "unit", "difference"]
    for heading in (*headings, *(["at its pace"] if paced else []), *(["noise"] if noisy else [])):
        table.add_column(heading, justify="left" if heading in ("figure", "unit") else "right", no_wrap=True)
    for row in rows:
        at_pace = [fmt.compared(row.paced_difference, "+.2%")] if paced else []
        noise = [fmt.compared(row.noise, ".2%")] if noisy else []
        table.add_row(
            row.name, fmt.compared(row.measured), fmt.compared(row.simulated), row.unit,
            fmt.compared(row.difference, "+.2%"), *at_pace, *noise,
        )  # fmt: skip
    return table


def print_comparison(result: ExperimentResult, shown: Callable[[int, ComparedRow], bool]) -> None:
    """A table of every part with the rows that are shown there (by the part's place), the terms and the verdict."""
    assert result.fidelity is not None
    console = plain_console()
    for place, (part, rows) in enumerate(result.fidelity.parts):
        console.print(compared_table(part, [row for row in rows if shown(place, row)]))
    for name, value in result.fidelity.terms:
        print(f"{name}: {value}")
    for sentence in result.verdict:
        print(sentence)
