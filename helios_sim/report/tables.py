"""Tables on standard output: the arms of a study, measured beside simulated, and the front of a sweep."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from helios_sim.report import format as fmt
from helios_sim.report.designs import DesignsResult, design_label, metric_cells, thinned, value_text
from helios_sim.report.fidelity import ComparedRow
from helios_sim.report.result import Comparisons, ExperimentResult, headline_metrics

PLAIN_WIDTH = 120
COMPARED_WIDTH = 100
MOST_ROWS = 20  # of a front


def plain_console(width: int = COMPARED_WIDTH, file: TextIO | None = None) -> Console:
    """A console on `file` (None: standard output); without colours and of this width where that is no terminal."""
    file = file or sys.stdout
    return Console(file=file) if file.isatty() else Console(file=file, width=width, no_color=True)


def print_table(result: ExperimentResult, ratios: Comparisons, file: TextIO | None = None) -> None:
    """Arms as rows, the ratio of the first metric to the baseline next to it; 120 columns wide outside a terminal."""
    console = plain_console(PLAIN_WIDTH, file)
    console.print(arms_table(result, ratios))
    for mark, name in baseline_marks(result).items():
        console.print(f"{mark} against {name}", highlight=False)


def arms_table(result: ExperimentResult, ratios: Comparisons) -> Table:
    """A row for each arm with the headline metrics."""
    names = headline_metrics(result)
    table = _table(result.title, collapse=True)
    table.add_column("arm", no_wrap=True)
    for place, name in enumerate(names):
        table.add_column(_in_two_lines(fmt.label(name)), justify="right", no_wrap=True)
        if place == 0:
            table.add_column("vs baseline\n[95 %]", justify="right", no_wrap=True)
    mark_of = {name: mark for mark, name in baseline_marks(result).items()}
    for arm in result.arms.values():
        first, *others = (fmt.metric(name, arm.metrics[name]) for name in names)
        over = result.baseline_of(arm.name)
        is_baseline = arm.name == over
        versus = "baseline" if is_baseline else fmt.ratio(ratios.get(arm.name, {}).get(names[0]))
        versus = f"{versus} {mark_of[over]}" if over in mark_of else versus
        table.add_row(arm.name, first, versus, *others, style="dim" if is_baseline else None)
    return table


def baseline_marks(result: ExperimentResult) -> dict[str, str]:
    """Marks of the baselines other than the result's own: name by mark, in the order of the arms."""
    others = dict.fromkeys(arm.baseline for arm in result.arms.values() if arm.baseline not in (None, result.baseline))
    return {"†‡§¶"[place % 4]: str(name) for place, name in enumerate(others)}


def _in_two_lines(text: str) -> str:
    """A narrow header: broken at its last space, else after its slash."""
    if " " in text:
        return "\n".join(text.rsplit(" ", 1))
    return text.replace("/", "/\n") if len(text) > 8 else text


def compared_table(title: str, rows: Sequence[ComparedRow]) -> Table:
    """Measured and simulated figures with their difference; where known also at the device's pace, and noise."""
    noisy = any(row.noise is not None for row in rows)
    paced = any(row.paced is not None for row in rows)
    table = _table(title)
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
    """A table of every part, the terms and the verdict; `shown` takes a part's index and a row."""
    assert result.fidelity is not None
    console = plain_console()
    for place, (part, rows) in enumerate(result.fidelity.parts):
        console.print(compared_table(part, [row for row in rows if shown(place, row)]))
    for name, value in result.fidelity.terms:
        print(f"{name}: {value}")
    for sentence in result.verdict:
        print(sentence)


def print_designs(result: DesignsResult, file: TextIO | None = None) -> None:
    """The front, best in the first objective first; below it the arms at the study's own settings."""
    table = front_table(result)
    console = plain_console(PLAIN_WIDTH, file)
    if not console.is_terminal:  # nothing is cut off in a file
        console.width = max(PLAIN_WIDTH, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)
    left = len(result.distinct_front) - MOST_ROWS
    if left > 0:
        console.print(f"{left} more of the front, between these, are in designs.parquet", highlight=False)


def front_table(result: DesignsResult) -> Table:
    """Parameters and objectives; designs that come to the same in every objective share a row."""
    table = _table(result.title, collapse=True)
    table.add_column("design", no_wrap=True)
    for name in result.parameters:
        table.add_column(name.replace("_", "_\n"), justify="right", no_wrap=True)
    for name in result.objectives:
        table.add_column(_in_two_lines(fmt.label(name)), justify="right", no_wrap=True)
    for design, alike in thinned(result.distinct_front, MOST_ROWS):
        parameters = (value_text(value) for value in design.parameters.values())
        table.add_row(design_label(design, alike), *parameters, *metric_cells(design, result.objectives))
    table.add_section()
    for design in result.references:
        empty = ("" for _ in result.parameters)
        table.add_row(design.name, *empty, *metric_cells(design, result.objectives), style="dim")
    return table


def _table(title: str, collapse: bool = False) -> Table:
    return Table(
        title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False,
        collapse_padding=collapse,
    )  # fmt: skip
