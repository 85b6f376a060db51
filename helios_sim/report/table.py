"""The table of the arms on standard output. Knows columns and widths, not what to conclude."""

from __future__ import annotations

import sys
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from helios_sim.report.format import label, metric, ratio
from helios_sim.report.result import ExperimentResult, headline_metrics
from helios_sim.report.summary import Comparisons

PLAIN_WIDTH = 120


def print_table(result: ExperimentResult, ratios: Comparisons, file: TextIO | None = None) -> None:
    """Arms as rows, the ratio of the first metric to the baseline behind it; at most 120 columns off a terminal."""
    file = file or sys.stdout
    console = Console(file=file) if file.isatty() else Console(file=file, width=PLAIN_WIDTH, no_color=True)
    console.print(arms_table(result, ratios))
    for mark, name in baseline_marks(result).items():
        console.print(f"{mark} against {name}", highlight=False)


def arms_table(result: ExperimentResult, ratios: Comparisons) -> Table:
    names = headline_metrics(result)
    table = Table(
        title=result.title,
        box=SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("arm", no_wrap=True)
    for place, name in enumerate(names):
        table.add_column(in_two_lines(label(name)), justify="right", no_wrap=True)
        if place == 0:
            table.add_column("vs baseline\n[95 %]", justify="right", no_wrap=True)
    mark_of = {name: mark for mark, name in baseline_marks(result).items()}
    for arm in result.arms.values():
        cells = [metric(name, arm.metrics[name]) for name in names]
        over = result.baseline_of(arm.name)
        is_baseline = arm.name == over
        versus = "baseline" if is_baseline else ratio(ratios.get(arm.name, {}).get(names[0]))
        versus = f"{versus} {mark_of[over]}" if over in mark_of else versus
        table.add_row(arm.name, cells[0], versus, *cells[1:], style="dim" if is_baseline else None)
    return table


def baseline_marks(result: ExperimentResult) -> dict[str, str]:
    """Signs for baselines besides the result's, in the order of the arms."""
    others = dict.fromkeys(arm.baseline for arm in result.arms.values() if arm.baseline not in (None, result.baseline))
    return {"†‡§¶"[place % 4]: str(name) for place, name in enumerate(others)}


def in_two_lines(text: str) -> str:
    """A narrow header: broken at its last space, else behind its slash."""
    if " " in text:
        return "\n".join(text.rsplit(" ", 1))
    return text.replace("/", "/\n") if len(text) > 8 else text
