"""The self-contained HTML page of a study or a sweep, and parts of all pages. The templates give the layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from helios_sim import __version__
from helios_sim.files import json_value, to_json
from helios_sim.report import format as fmt
from helios_sim.report.breakdown import Spread, TaskFigures, by_kind
from helios_sim.report.cautions import cautions
from helios_sim.report.compare import Ratio
from helios_sim.report.decisions import SHOWN_DECISIONS, decision_rows
from helios_sim.report.designs import Design, DesignsResult, design_label, metric_cells, thinned, value_text
from helios_sim.report.faults import COUNTED, fault_rows, fault_sentences, shown_beside
from helios_sim.report.figures.pointer import described
from helios_sim.report.figures.style import Drawing, arm_styles, lay_out, to_svg
from helios_sim.report.intervals import Method
from helios_sim.report.metrics import DEFINITIONS, ENERGY_NOTE, INTERVAL_NOTE, LATENCY_NOTE, MetricValue
from helios_sim.report.result import (
    ArmResult,
    Comparisons,
    ExperimentResult,
    Gate,
    Instead,
    Over,
    headline_metrics,
    scope_in_words,
)
from helios_sim.report.tables import baseline_marks

if TYPE_CHECKING:
    from markupsafe import Markup

    from helios_sim.report.capacity import CapacityResult

MOST_ON_PAGE = 200  # designs of a front on a page; all are in the Parquet file
MOST_CARDS = 4


@dataclass(frozen=True, slots=True)
class KeyNumber:
    """One of the numbers at the top of the page."""

    what: str
    value: str
    note: str


def render(result: ExperimentResult, ratios: Comparisons, drawings: Sequence[Drawing]) -> str:
    """The page of a study as text. Figures and their script are inline, so it needs no network."""
    warnings = cautions(result)
    assumptions = result.all_assumptions
    timelines = {drawing.of_arm: drawing.name for drawing in drawings if drawing.zooms}
    decisions = [log for arm in result.arms.values() if (log := _decision_log(arm, timelines.get(arm.name)))]
    parts = {
        "answer": ("Answer", True),
        "warnings": ("Read with care", warnings),
        "arms": ("Arms", True),
        "faults": ("Faults", any(arm.faults is not None for arm in result.arms.values())),
        "waits": ("Who waits", any(arm.waits for arm in result.arms.values())),
        "fidelity": ("Measured beside simulated", result.fidelity),
        "beside-published": ("Published", result.published),
        "gates": ("Gates", result.gates),
        "figures": ("Figures", drawings),
        "decisions": ("Decisions", decisions),
        "workload": ("Workload", True),
        "assumptions": ("Not measured", assumptions),
        "provenance": ("Provenance", True),
    }
    return render_parts(
        "report.html.j2",
        result,
        parts,
        drawings,
        cards=_cards(result, ratios),
        warnings=warnings,
        columns=[{"label": fmt.label(name)} for name in headline_metrics(result)],
        rows=_arm_rows(result, ratios),
        baseline_marks=baseline_marks(result),
        scope=scope_in_words(result.seeds),
        all_metrics=_all_metrics(result, ratios),
        tasks=_task_rows(result),
        replicas=_replica_rows(result),
        faults=_faults(result),
        waits=_waits(result),
        compared=_compared(result),
        repeated=result.fidelity is not None and result.fidelity.repeated,
        paced=result.fidelity is not None and result.fidelity.paced,
        banded=result.fidelity is not None and any(row.band for _, rows in result.fidelity.parts for row in rows),
        published=[_published(p) for p in result.published],
        gates=[_gate(gate) for gate in result.gates],
        decisions=decisions,
        assumptions=assumptions,
        definitions=list(DEFINITIONS.values()),
        notes={"latency": LATENCY_NOTE, "interval": INTERVAL_NOTE, "energy": ENERGY_NOTE},
    )


def _faults(result: ExperimentResult) -> dict[str, Any]:
    """The section on faults: their effects on each arm, and the losses."""
    return {
        "sentences": fault_sentences(result),
        "counted": [fmt.label(name) for name in COUNTED],
        "beside": [fmt.label(name) for name in shown_beside(result)],
        "rows": fault_rows(result),
    }


def _waits(result: ExperimentResult) -> dict[str, Any]:
    """The section on queue times of groups, if the order of the line prefers some requests."""
    sentences, rows = [], []
    for arm in result.arms.values():
        known = [(it.queue_s_p99, it) for it in arm.waits if it.queue_s_p99 is not None]
        if len(known) > 1:
            p99, worst = max(known, key=lambda pair: pair[0])
            least, _ = min(known, key=lambda pair: pair[0])
            sentences.append(
                f"{arm.name}: {worst.group} wait longest, p99 {fmt.seconds(p99)} and at most "
                f"{fmt.seconds(worst.queue_s_max or 0.0)}; the p99 of those who wait least is {fmt.seconds(least)}."
            )
        for it in arm.waits:
            times = (it.queue_s_p50, it.queue_s_p99, it.queue_s_max)
            shown = [fmt.NOTHING if time is None else fmt.seconds(time) for time in times]
            numbers = [f"{it.requests:,}", *shown, f"{it.never_scheduled:,}"]
            rows.append({"arm": arm.name, "group": it.group, "numbers": numbers})
    return {"sentences": sentences, "rows": rows}


def render_designs(result: DesignsResult, drawings: Sequence[Drawing]) -> str:
    """The page of a sweep as text, self-contained as well."""
    names = (*result.objectives, *result.shown_metrics)
    distinct = result.distinct_front
    front = thinned(distinct, MOST_ON_PAGE)
    parts = {
        "answer": ("Answer", True),
        "warnings": ("Read with care", result.warnings),
        "figures": ("Figures", drawings),
        "front": ("Front", front),
        "failed": ("Failed", result.failed),
        "workload": ("Workload", True),
        "assumptions": ("Not measured", result.all_assumptions),
        "provenance": ("Provenance", True),
    }
    return render_parts(
        "designs.html.j2", result, parts, drawings,
        scope=scope_in_words(result.seeds),
        columns=[fmt.label(name) for name in names],
        front=[_design_row(design, names) | {"name": design_label(design, alike)} for design, alike in front],
        distinct=len(distinct),
        references=[_design_row(design, names) for design in result.references],
        failed=[{"name": d.name, "values": [value_text(v) for v in d.parameters.values()], "error": d.error}
                for d in result.failed[:MOST_ON_PAGE]],
        definitions=[DEFINITIONS[name] for name in names],
        notes=[LATENCY_NOTE, *([ENERGY_NOTE] if any("energy" in name for name in names) else [])],
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PageFigure:
    """A figure as a page shows it; `facts` are for the script."""

    name: str
    title: str
    caption: str
    svg: Markup
    facts: dict[str, Any]


def page_figure(drawing: Drawing) -> PageFigure:
    from markupsafe import Markup

    lay_out(drawing)
    facts = described(drawing)
    svg = Markup(to_svg(drawing))  # noqa: S704 - matplotlib's output, which escapes texts
    return PageFigure(drawing.name, drawing.title, drawing.caption, svg, facts)


def render_parts(
    template: str,
    result: ExperimentResult | DesignsResult | CapacityResult,
    parts: Mapping[str, tuple[str, object]],
    drawings: Sequence[Drawing],
    **values: object,
) -> str:
    """Render a template with the parts of all pages; `parts` are (heading, whether it has content) by anchor."""
    from helios_sim.report.environment import page_environment  # imports Jinja, which only a page needs

    return page_environment().get_template(template).render(
        result=result,
        version=__version__,
        contents=[(key, text) for key, (text, there) in parts.items() if there],
        figures=[page_figure(drawing) for drawing in drawings],
        run_json=to_json(json_value(result.provenance), indent=2),
        **values,
    )


def _compared(result: ExperimentResult) -> list[dict[str, Any]]:
    """A table for each part."""
    if result.fidelity is None:
        return []
    return [
        {
            "part": part,
            "rows": [
                {
                    "name": row.name,
                    "unit": row.unit,
                    "measured": fmt.compared(row.measured),
                    "simulated": fmt.compared(row.simulated),
                    "difference": fmt.compared(row.difference, "+.2%"),
                    "at_pace": fmt.compared(row.paced_difference, "+.2%"),
                    "noise": fmt.compared(row.noise, ".2%"),
                    "band": fmt.between(row.band),
                }
                for row in rows
            ],
        }
        for part, rows in result.fidelity.parts
    ]


def _cards(result: ExperimentResult, ratios: Comparisons) -> list[KeyNumber]:
    """Published comparisons first; without any, the first headline metric of each arm against the baseline."""
    cards = [
        KeyNumber(
            p.what, fmt.in_unit(p.ours, p.unit), _beside(p.low, p.high, f"published {fmt.in_unit(p.published, p.unit)}")
        )
        for p in result.published
        if p.ours is not None
    ]
    if not cards:
        name = headline_metrics(result)[0]
        hint = f", {direction}" if (direction := fmt.direction(name)) else ""
        for arm in sorted(ratios, key=lambda arm: arm != result.subject):  # the subject first
            value = ratios[arm].get(name)
            if value is not None and value.ratio is not None:
                note = _beside(value.low, value.high, f"against {result.baseline_of(arm)}")
                cards.append(KeyNumber(f"{arm}: {fmt.label(name)}{hint}", f"{value.ratio:.2f}×", note))
    return cards[:MOST_CARDS]


def _beside(low: float | None, high: float | None, note: str) -> str:
    return f"{fmt.NO_INTERVAL if low is None or high is None else f'[{low:.2f}, {high:.2f}]'} · {note}"


def _arm_rows(result: ExperimentResult, ratios: Comparisons) -> list[dict[str, Any]]:
    names = headline_metrics(result)
    styles = arm_styles(list(result.arms), result.baseline)
    mark_of = {name: mark for mark, name in baseline_marks(result).items()}
    rows = []
    for arm in result.arms.values():
        over = result.baseline_of(arm.name)
        is_baseline = arm.name == over
        versus, interval = ("1×", "") if is_baseline else _split(ratios[arm.name].get(names[0]))
        versus = f"{versus} {mark_of[over]}" if over in mark_of else versus
        metrics = arm.metrics
        rows.append(
            {
                "name": arm.name,
                "description": arm.description,
                "is_baseline": is_baseline,
                "color": styles[arm.name].color,
                "versus": versus,
                "interval": interval,
                "cells": [_cell(name, arm, metrics[name]) for name in names],
            }
        )
    return rows


def _cell(name: str, arm: ArmResult, value: MetricValue) -> dict[str, str]:
    return {"value": fmt.metric(name, value), "interval": fmt.interval(name, value, arm.intervals.get(name))}


def _split(ratio: Ratio | None) -> tuple[str, str]:
    """A ratio and its interval as two texts."""
    text = fmt.ratio(ratio)
    if ratio is None or ratio.method is Method.BAND or " " not in text:
        return text, ""
    value, interval = text.split(" ", 1)
    return value, interval


def _all_metrics(result: ExperimentResult, ratios: Comparisons) -> list[dict[str, Any]]:
    by_arm: Mapping[str, Any] = {name: arm.metrics for name, arm in result.arms.items()}
    lines = []
    for name in by_arm[result.baseline]:
        values = [metrics[name] for metrics in by_arm.values()]
        if all(value is None for value in values):
            continue
        cells = [
            {**_cell(name, result.arms[arm], value), "ratio": _shown_ratio(ratios.get(arm, {}).get(name))}
            for arm, value in zip(by_arm, values, strict=True)
        ]
        lines.append({"name": name, "cells": cells})
    return lines


def _task_rows(result: ExperimentResult) -> list[dict[str, Any]]:
    """A row for each task with a cell for each arm; none with a single task, which the table of arms shows."""
    figures = {arm: result.by_task(arm) for arm in result.arms}
    tasks = [task for task in result.workload.tasks if any(task in of_arm for of_arm in figures.values())]
    return [
        {"task": task, "cells": [_task_cell(of_arm.get(task)) for of_arm in figures.values()]}
        for task in tasks
        if len(tasks) > 1
    ]


def _task_cell(figures: TaskFigures | None) -> dict[str, Any]:
    """Bits per character if known, else the mean time of a request; below it the depth and the models."""
    if figures is None:
        return {"value": fmt.NOTHING, "notes": []}
    bits = figures.bits_per_char
    value = fmt.seconds(figures.e2e_s_mean) if bits is None else f"{bits:.3f} bits/char"
    models = [f"{share:.0%} {model}" for model, share in figures.models.items()]
    return {"value": value, "notes": [f"{figures.layers_per_token:.1f} layers", *(models if len(models) > 1 else [])]}


def _replica_rows(result: ExperimentResult) -> list[dict[str, Any]]:
    """One row for each kind of replica of each arm that has several replicas."""
    rows = []
    for arm in result.arms.values():
        for it in by_kind(arm.replicas) if len(arm.replicas) > 1 else ():
            name = f"{it.replicas} x {it.card}"
            rows.append(
                {
                    "arm": arm.name,
                    "kind": f"{it.kind}: {name}" if it.kind else name,
                    "models": ", ".join(it.models),
                    "requests": f"{it.requests_completed:,}",
                    "cells": [
                        _spread(it.requests_in_it, fmt.number),
                        _spread(it.busy_fraction, lambda share: fmt.in_unit(share, "share")),
                        _spread(it.e2e_s, fmt.seconds),
                    ],
                    "switches": it.switches,
                    "loads": it.loads,
                }
            )
    return rows


def _spread(value: Spread | None, shown: Callable[[float], str]) -> dict[str, str]:
    if value is None:
        return {"mean": fmt.NOTHING, "range": ""}
    return {"mean": shown(value.mean), "range": f"{shown(value.low)} to {shown(value.high)}"}


def _shown_ratio(ratio: Ratio | None) -> str:
    return "" if ratio is None else fmt.ratio(ratio)


def _published(p: Any) -> dict[str, Any]:
    return {
        "it": p,
        "published": fmt.in_unit(p.published, p.unit),
        "ours": fmt.NOTHING if p.ours is None else fmt.in_unit(p.ours, p.unit),
        "interval": "" if p.ours is None else _bounds(p.low, p.high),
    }


def _gate(gate: Gate) -> dict[str, Any]:
    found = fmt.gate_value(gate.value, gate.bound), fmt.gate_interval(gate.low, gate.high, gate.bound)
    return {"it": gate, "value": found[0], "interval": found[1]}


def _bounds(low: float | None, high: float | None) -> str:
    return fmt.NO_INTERVAL if low is None or high is None else f"[{fmt.number(low)}, {fmt.number(high)}]"


def _decision_log(arm: ArmResult, timeline: str | None) -> dict[str, Any] | None:
    """The decisions of an arm for the page, beside the figure of its timeline; None if there is only the first."""
    if len(arm.decisions) < 2:
        return None
    rows = decision_rows(arm)
    shown = rows[:SHOWN_DECISIONS]
    return {
        "beside": [_instead(arm.instead.get(place)) for place in range(len(shown))],
        "arm": arm.name,
        "timeline": timeline,
        "total": len(rows),
        "any_beside": bool(arm.instead),
        "rows": shown,
        "any_standby": any(row.standby for row in shown),
        "any_replica": any(row.replica for row in shown),
    }


def _instead(found: Instead | None) -> dict[str, str] | None:
    """The next best option in words, and the results of both until the next decision."""
    if found is None:
        return None
    return {
        "option": f"{found.option.model}, {found.option.layers} layers",
        "given": f"in {fmt.seconds(found.window_s)}: {_given(found.other)}",
        "chosen": f"decided: {_given(found.chosen)}",
    }


def _given(over: Over) -> str:
    e2e = "" if over.e2e_s_mean is None else f", E2E {fmt.seconds(over.e2e_s_mean)}"
    return f"{over.completed:,} done{e2e}, {over.unfinished:,} left"


def _design_row(design: Design, names: tuple[str, ...]) -> dict[str, Any]:
    parameters = [value_text(value) for value in design.parameters.values()]
    return {"name": design.name, "values": parameters, "cells": metric_cells(design, names, intervals=True)}
