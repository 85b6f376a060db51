"""Tables on standard output: the arms of a study, measured beside simulated, and the front of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TextIO

from helios_sim.report import format as fmt
from helios_sim.report.designs import DesignsResult, design_label, metric_cells, thinned, value_text
from helios_sim.report.result import ComparedRow, Comparisons, ExperimentResult, headline_metrics, scope_in_words
from helios_sim.report.terminal import TextTable, say

MOST_ROWS = 20  # shown rows of a front


def print_table(result: ExperimentResult, ratios: Comparisons, file: TextIO | None = None) -> None:
    """Print the arms as rows, with the ratio of the first metric to the baseline next to it."""
    arms_table(result, ratios).show(file)
    for mark, name in baseline_marks(result).items():
        say(f"{mark} against {name}", file)
    say(intervals_told(result.seeds), file)


def intervals_told(seeds: int) -> str:
    """The line below a table of arms: what its intervals mean, and where the other metrics are."""
    if seeds > 1:
        return f"Means over {seeds} seeds; their own intervals are in report.html and summary.json."
    return "One seed: intervals hold within this run, not for other seeds; [–]: no interval."


def arms_table(result: ExperimentResult, ratios: Comparisons) -> TextTable:
    """A row for each arm with the headline metrics."""
    names = headline_metrics(result)
    table = TextTable(result.title)
    table.column("arm", number=False)
    for place, name in enumerate(names):
        table.column(_in_two_lines(fmt.label(name)))
        if place == 0:
            table.column(f"vs baseline\n[95 %,\n{scope_in_words(result.seeds)}]")
    mark_of = {name: mark for mark, name in baseline_marks(result).items()}
    for arm in result.arms.values():
        first, *others = (fmt.metric(name, arm.metrics[name]) for name in names)
        over = result.baseline_of(arm.name)
        is_baseline = arm.name == over
        versus = "baseline" if is_baseline else fmt.ratio(ratios.get(arm.name, {}).get(names[0]))
        versus = f"{versus} {mark_of[over]}" if over in mark_of else versus
        table.row([arm.name, first, versus, *others], dim=is_baseline)
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


def compared_table(title: str, rows: Sequence[ComparedRow]) -> TextTable:
    """Measured and simulated figures with their difference; if known also at the device's pace, and the noise."""
    noisy = any(row.noise is not None for row in rows)
    paced = any(row.paced is not None for row in rows)
    banded = any(row.band is not None for row in rows)
    table = TextTable(title)
    headings = ["figure", "measured", "simulated", "unit", "difference", *(["95 %"] if banded else [])]
    for heading in (*headings, *(["at its pace"] if paced else []), *(["noise"] if noisy else [])):
        table.column(heading, number=heading not in ("figure", "unit"))
    for row in rows:
        at_pace = [fmt.compared(row.paced_difference, "+.2%")] if paced else []
        noise = [fmt.compared(row.noise, ".2%")] if noisy else []
        both = fmt.compared(row.measured), fmt.compared(row.simulated)
        band = [fmt.between(row.band)] if banded else []
        table.row([row.name, *both, row.unit, fmt.compared(row.difference, "+.2%"), *band, *at_pace, *noise])
    return table


def print_comparison(result: ExperimentResult, shown: Callable[[int, ComparedRow], bool]) -> None:
    """Print a table of every part, the terms, verdict and warnings. `shown` gets a part's index and a row."""
    assert result.fidelity is not None
    for place, (part, rows) in enumerate(result.fidelity.parts):
        compared_table(part, [row for row in rows if shown(place, row)]).show()
    say("Differences are without intervals; noise, where it is given, is how far two measurements lie apart.")
    for name, value in result.fidelity.terms:
        say(f"{name}: {value}")
    for sentence in (*result.verdict, *result.warnings):
        say(sentence)


def print_designs(result: DesignsResult, file: TextIO | None = None) -> None:
    """Print the front, ordered by the first objective, and below it the arms at the study's own settings."""
    front_table(result).show(file)
    say(f"[ ]: 95 % intervals {scope_in_words(result.seeds)}; [–]: no interval.", file)
    left = len(result.distinct_front) - MOST_ROWS
    if left > 0:
        say(f"{left} more of the front, between these, are in designs.parquet", file)


def front_table(result: DesignsResult) -> TextTable:
    """Parameters and objectives of the front. Designs that are equal in every objective share a row."""
    table = TextTable(result.title)
    table.column("design", number=False)
    for name in result.parameters:
        table.column(name.replace("_", "_\n"))
    for name in result.objectives:
        table.column(_in_two_lines(fmt.label(name)))
    for design, alike in thinned(result.distinct_front, MOST_ROWS):
        parameters = (value_text(value) for value in design.parameters.values())
        cells = metric_cells(design, result.objectives, intervals=True)
        table.row([design_label(design, alike), *parameters, *cells])
    table.rows.append(None)
    for design in result.references:
        empty = ("" for _ in result.parameters)
        table.row([design.name, *empty, *metric_cells(design, result.objectives, intervals=True)], dim=True)
    return table
