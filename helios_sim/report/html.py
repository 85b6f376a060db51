"""The self-contained HTML report. Knows what is shown and in which words; the template knows how it looks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from helios_sim import __version__
from helios_sim.report import format as fmt
from helios_sim.report.by_task import TaskFigures
from helios_sim.report.cautions import cautions
from helios_sim.report.compare import Method, Ratio
from helios_sim.report.decisions import decision_rows
from helios_sim.report.definitions import DEFINITIONS, ENERGY_NOTE, INTERVAL_NOTE, LATENCY_NOTE, Better
from helios_sim.report.files import to_json
from helios_sim.report.page import page_environment
from helios_sim.report.replicas import Spread, by_kind
from helios_sim.report.result import ArmResult, ExperimentResult, headline_metrics
from helios_sim.report.style import Drawing, arm_styles, to_svg
from helios_sim.report.summary import Comparisons, json_value
from helios_sim.report.table import baseline_marks

SHOWN_DECISIONS = 200  # per arm; all are in the Parquet file
_MOST_CARDS = 4


@dataclass(frozen=True, slots=True)
class Card:
    """One number that stands out."""

    what: str
    value: str
    note: str


def render(result: ExperimentResult, ratios: Comparisons, drawings: Sequence[Drawing]) -> str:
    """The whole page as text: no script, no network, figures inline."""
    from markupsafe import Markup

    environment, css = page_environment()
    warnings = cautions(result)
    assumptions = result.all_assumptions
    decisions = [log for arm in result.arms.values() if (log := _decision_log(arm))]
    parts = {
        "answer": ("Answer", True),
        "warnings": ("Read with care", warnings),
        "arms": ("Arms", True),
        "fidelity": ("Measured beside simulated", result.fidelity),
        "published": ("Published", result.published),
        "gates": ("Gates", result.gates),
        "figures": ("Figures", drawings),
        "decisions": ("Decisions", decisions),
        "workload": ("Workload", True),
        "assumptions": ("Not measured", assumptions),
        "provenance": ("Provenance", True),
    }
    return environment.get_template("report.html.j2").render(
        result=result,
        version=__version__,
        css=css,
        contents=[(key, text) for key, (text, there) in parts.items() if there],
        cards=_cards(result, ratios),
        warnings=warnings,
        columns=[{"label": fmt.label(name)} for name in headline_metrics(result)],
        rows=_arm_rows(result, ratios),
        baseline_marks=baseline_marks(result),
        all_metrics=_all_metrics(result, ratios),
        tasks=_task_rows(result),
        replicas=_replica_rows(result),
        compared=_compared(result),
        repeated=result.fidelity is not None and result.fidelity.repeated,
        paced=result.fidelity is not None and result.fidelity.paced,
        published=[_published(p) for p in result.published],
        gates=[{"it": g, "value": fmt.gate_value(g.value, g.bound)} for g in result.gates],
        figures=[{"name": d.name, "title": d.title, "caption": d.caption, "svg": Markup(to_svg(d))} for d in drawings],
        decisions=decisions,
        assumptions=assumptions,
        run_json=to_json(json_value(result.provenance), indent=2),
        definitions=list(DEFINITIONS.values()),
        notes={"latency": LATENCY_NOTE, "interval": INTERVAL_NOTE, "energy": ENERGY_NOTE},
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
                }
                for row in rows
            ],
        }
        for part, rows in result.fidelity.parts
    ]


def _cards(result: ExperimentResult, ratios: Comparisons) -> list[Card]:
    """Published comparisons first; without any, the first headline metric of each arm against the baseline."""
    cards = [
        Card(
            p.what, fmt.in_unit(p.ours, p.unit), _beside(p.low, p.high, f"published {fmt.in_unit(p.published, p.unit)}")
        )
        for p in result.published
        if p.ours is not None
    ]
    if not cards:
        name = headline_metrics(result)[0]
        better = DEFINITIONS[name].better if name in DEFINITIONS else Better.NEITHER
        hint = {Better.HIGHER: ", more is better", Better.LOWER: ", less is better", Better.NEITHER: ""}[better]
        for arm, of_arm in ratios.items():
            value = of_arm.get(name)
            if value is not None and value.ratio is not None:
                note = _beside(value.low, value.high, f"against {result.baseline_of(arm)}")
                cards.append(Card(f"{arm}: {fmt.label(name)}{hint}", f"{value.ratio:.2f}×", note))
    return cards[:_MOST_CARDS]


def _beside(low: float | None, high: float | None, note: str) -> str:
    return note if low is None or high is None else f"[{low:.2f}, {high:.2f}] · {note}"


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
                "cells": [fmt.metric(name, metrics[name]) for name in names],
            }
        )
    return rows


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
            {"value": fmt.metric(name, value), "ratio": _shown_ratio(ratios.get(arm, {}).get(name))}
            for arm, value in zip(by_arm, values, strict=True)
        ]
        lines.append({"name": name, "cells": cells})
    return lines


def _task_rows(result: ExperimentResult) -> list[dict[str, Any]]:
    """One row for each task, one cell for each arm; none with a single task, which the arms' table shows."""
    figures = {arm: result.by_task(arm) for arm in result.arms}
    tasks = [task for task in result.workload.tasks if any(task in of_arm for of_arm in figures.values())]
    return [
        {"task": task, "cells": [_task_cell(of_arm.get(task)) for of_arm in figures.values()]}
        for task in tasks
        if len(tasks) > 1
    ]


def _task_cell(figures: TaskFigures | None) -> dict[str, Any]:
    """Bits per character where known, else the mean time of a request; below it depth and who served."""
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
        "interval": "" if p.low is None or p.high is None else f"[{fmt.number(p.low)}, {fmt.number(p.high)}]",
    }


def _decision_log(arm: ArmResult) -> dict[str, Any] | None:
    """Rows for the page; None for an arm that only ever started."""
    if len(arm.decisions) < 2:
        return None
    rows = decision_rows(arm)
    shown = rows[:SHOWN_DECISIONS]
    return {
        "arm": arm.name,
        "total": len(rows),
        "rows": shown,
        "any_standby": any(row.standby for row in shown),
        "any_replica": any(row.replica for row in shown),
    }
