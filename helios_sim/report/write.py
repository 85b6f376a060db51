"""The output folder of a study, a sweep or a capacity plan: `summary.json`, Parquet tables, figures and the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helios_sim import files
from helios_sim.files import json_value
from helios_sim.report import FOR_PAGE
from helios_sim.report.cautions import reservations
from helios_sim.report.compare import Ratio
from helios_sim.report.decisions import decisions_table
from helios_sim.report.designs import Design, DesignsResult, designs_table
from helios_sim.report.intervals import LEVEL
from helios_sim.report.metrics import INTERVAL_NOTE
from helios_sim.report.result import (
    ArmResult,
    Comparisons,
    ExperimentResult,
    Fidelity,
    SweepPoint,
    comparisons,
    headline_metrics,
    scope,
    shown_metrics,
)
from helios_sim.request import NS_PER_S

if TYPE_CHECKING:
    from helios_sim.report.capacity import CapacityResult
    from helios_sim.report.figures.style import Drawing

SCHEMA_VERSION = 1  # of summary.json
# Figures of summary.json without an interval, by their place. Every other figure has one, says why not, or is a count.
WITHOUT = (
    "arms.*.tasks", "arms.*.replicas", "arms.*.waits", "arms.*.faults.without", "fidelity",
    "points.*.metrics but those in points.*.intervals",
)  # fmt: skip


def write_result(
    result: ExperimentResult, folder: Path, ratios: Comparisons | None = None, style: str | None = FOR_PAGE
) -> dict[str, Any]:
    """Write summary.json, requests.parquet, decisions.parquet, provenance.json, figures/*.png and report.html.

    Returns what `summary.json` holds. Data come first and the page last, so that an interruption leaves whole files.
    `style` is that of the figures, page or paper; None if there are none, and no page. Raises UserError when the folder
    cannot be written to.
    """
    ratios = comparisons(result) if ratios is None else ratios
    summary = summarise_result(result, ratios)
    write_requests(result, folder)
    files.write_parquet(folder / "decisions.parquet", decisions_table(result.arms))
    files.write_json(folder / "provenance.json", summary["provenance"])
    files.write_json(folder / "summary.json", summary)
    if style is not None:
        write_pictures(result, folder, ratios, style)
    return summary


def write_requests(result: ExperimentResult, folder: Path) -> None:
    """Write requests.parquet: one row for each request, arm and seed, in blocks of rows."""
    files.write_parquet_parts(folder / "requests.parquet", result.request_tables())


def write_pictures(result: ExperimentResult, folder: Path, ratios: Comparisons, style: str = FOR_PAGE) -> None:
    """Write figures/* and report.html."""
    from helios_sim.report.figures.arms import (
        answer_drawings,
        arms_drawings,
        detail_drawings,
        replica_drawings,
        scaling_drawings,
        timeline_drawings,
    )
    from helios_sim.report.figures.fidelity import fidelity_drawings
    from helios_sim.report.figures.sweep import sweep_drawings
    from helios_sim.report.page import render

    drawings = [
        *answer_drawings(result, ratios),
        *fidelity_drawings(result),
        *arms_drawings(result),
        *sweep_drawings(result),
        *replica_drawings(result),
        *scaling_drawings(result),
        *detail_drawings(result),
        *timeline_drawings(result),
    ]
    _write_page(folder, lambda: render(result, ratios, drawings), drawings, style)


def _write_page(
    folder: Path, page: Callable[[], str], drawings: Sequence[Drawing], style: str, beside: str | None = None
) -> None:
    """Write report.html, and every drawing to figures/, except for the one beside the page."""
    from helios_sim.report.figures.style import write_png, write_vectors

    folders = {drawing.name: folder if drawing.name == beside else folder / "figures" for drawing in drawings}
    for drawing in drawings:  # before the page, while the measured layout is still known
        write_png(drawing, folders[drawing.name])
    files.write_text(folder / "report.html", page())
    for drawing in drawings:
        write_vectors(drawing, folders[drawing.name], style)


def write_designs(result: DesignsResult, folder: Path, style: str | None = FOR_PAGE) -> dict[str, Any]:
    """Write designs.parquet, provenance.json, summary.json and, unless `style` is None, report.html and figures/*.

    Returns what `summary.json` holds. Raises UserError when the folder cannot be written to.
    """
    summary = summarise_designs(result)
    files.write_parquet(folder / "designs.parquet", designs_table(result))
    files.write_json(folder / "provenance.json", summary["provenance"])
    files.write_json(folder / "summary.json", summary)
    if style is None:
        return summary
    from helios_sim.report.figures.sweep import design_drawings
    from helios_sim.report.page import render_designs

    drawings = design_drawings(result)
    _write_page(folder, lambda: render_designs(result, drawings), drawings, style, beside="pareto")
    return summary


def write_capacity(result: CapacityResult, folder: Path, style: str | None = FOR_PAGE) -> dict[str, Any]:
    """Write fleets.parquet, provenance.json, summary.json and, unless `style` is None, report.html and figures/*.

    Returns what `summary.json` holds. Raises UserError when the folder cannot be written to.
    """
    from helios_sim.report.capacity import tried_table

    summary = summarise_capacity(result)
    files.write_parquet(folder / "fleets.parquet", tried_table(result))
    files.write_json(folder / "provenance.json", summary["provenance"])
    files.write_json(folder / "summary.json", summary)
    if style is None:
        return summary
    from helios_sim.report.figures.capacity import capacity_drawings
    from helios_sim.report.page_capacity import render_capacity

    drawings = capacity_drawings(result)
    _write_page(folder, lambda: render_capacity(result, drawings), drawings, style)
    return summary


def summarise_capacity(result: CapacityResult) -> dict[str, Any]:
    """The content of `summary.json`: the plans and the advice. All fleets tried are in fleets.parquet."""
    from helios_sim.report.capacity import summarise_plans

    return {
        "schema_version": SCHEMA_VERSION,
        "experiment": result.experiment,
        "intervals": intervals_told(result.seeds, WITHOUT_OF_CAPACITY),
        "capacity": summarise_plans(result),
        "gates": [],
        "verdict": list(result.verdict),
        "warnings": list(result.warnings),
        "confidence": {
            "inputs": {name: source.provenance_class.value for name, source in result.inputs.items()},
            "read_with_care": list(result.warnings),
            "survives": _all_survive(result),
        },
        "provenance": _provenance(result),
    }


def _all_survive(result: CapacityResult) -> bool | None:
    """Whether every advised fleet is the same at both ends of the profiles' band; None if one was not run there."""
    found = [advice.survives for advice in result.advice]
    return None if None in found or not found else all(found)


def summarise_result(result: ExperimentResult, ratios: Comparisons | None = None) -> dict[str, Any]:
    """The content of `summary.json`, as JSON values; undefined ones are null."""
    ratios = comparisons(result) if ratios is None else ratios
    summary: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "experiment": result.experiment,
        "baseline": result.baseline,
        "intervals": intervals_told(result.seeds, WITHOUT),
        "arms": {
            name: {**_arm(arm, ratios.get(name, {})), "tasks": json_value(result.by_task(name)), **_next_best(arm)}
            for name, arm in result.arms.items()
        },
        "gates": [json_value(gate) for gate in result.gates],
        "provenance": _provenance(result),
    }
    summary["verdict"] = list(result.verdict)
    if result.subject is not None:
        summary["confidence"] = _confidence(result)
    summary["headline_metrics"] = list(headline_metrics(result))
    if result.fidelity is not None:
        summary["fidelity"] = _fidelity(result.fidelity)
    if result.published:
        summary["published"] = [json_value(p) for p in result.published]
    if result.points:
        shown = shown_metrics(result.headline_metrics, result.figures)
        summary["points"] = [_point(point, shown) for point in result.points]
    return summary


def _next_best(arm: ArmResult) -> dict[str, Any]:
    """Decisions compared with the next best option; empty if none was run."""
    if not arm.instead:
        return {}
    times = {place: arm.decisions[place].time_ns / NS_PER_S for place in arm.instead}
    rows = [{"time_s": times[place], **json_value(found)} for place, found in arm.instead.items()]
    for row in rows:  # `resident_layers` only if not all layers stay
        row["option"] = {name: value for name, value in row["option"].items() if value is not None}
    return {"next_best": rows}


def _confidence(result: ExperimentResult) -> dict[str, Any]:
    """The reservations about the verdict, for programs."""
    trust = result.trust
    return {
        "inputs": {name: source.provenance_class.value for name, source in result.inputs.items()},
        "read_with_care": reservations(result),
        "outside_grid_fraction": {name: arm.metrics.get("outside_grid_fraction") for name, arm in result.arms.items()},
        "busy_fraction": {name: arm.metrics.get("busy_fraction") for name, arm in result.arms.items()},
        "metric": headline_metrics(result)[0],
        "profile_band": json_value(trust.band),
        "at_ends": [json_value(end) for end in trust.at_ends],
        "survives": trust.survives,
        "not_run_at_ends": trust.why_not,
        "valid_up_to_rps": trust.valid_up_to_rps,
        **({"promises": [{**json_value(p), "kept": p.kept} for p in trust.promises]} if trust.promises else {}),
    }


def summarise_designs(result: DesignsResult) -> dict[str, Any]:
    """The content of `summary.json`: the arms at the study's settings and the front. All are in designs.parquet."""
    return {
        "schema_version": SCHEMA_VERSION,
        "experiment": result.experiment,
        "baseline": result.arm,
        "intervals": intervals_told(result.seeds, WITHOUT_OF_DESIGNS),
        "arms": {
            r.name: {"metrics": json_value(r.metrics), "vs_baseline": {}, "intervals": json_value(r.intervals)}
            for r in result.references
        },
        "gates": [],
        "sweep": {
            "arm": result.arm,
            "parameters": list(result.parameters),
            "objectives": list(result.objectives),
            "designs": len(result.designs),
            "failed": [{"design": d.name, "parameters": dict(d.parameters), "error": d.error} for d in result.failed],
            "front": [_front_entry(design) for design in result.front],
        },
        "verdict": list(result.verdict),
        "headline_metrics": [*result.objectives, *result.shown_metrics],
        "provenance": _provenance(result),
    }


def _provenance(result: ExperimentResult | DesignsResult | CapacityResult) -> dict[str, Any]:
    return {
        "class": json_value(result.provenance_class),
        "inputs": {name: json_value(source) for name, source in result.inputs.items()},
        "assumptions": [json_value(a) for a in result.all_assumptions],
        **{key: json_value(value) for key, value in result.provenance.items()},
    }


def _arm(arm: ArmResult, ratios: Mapping[str, Ratio]) -> dict[str, Any]:
    entry = {
        "metrics": json_value(arm.metrics),
        "vs_baseline": json_value(ratios),
        "intervals": json_value(arm.intervals),
    }
    if arm.baseline is not None:
        entry["baseline"] = arm.baseline
    if len(arm.replicas) > 1:
        entry["replicas"] = json_value(arm.replicas)
    if arm.waits:
        entry["waits"] = json_value(arm.waits)
    if arm.faults is not None:
        entry["faults"] = json_value(arm.faults)
    return entry


# Metrics with the least and the most over the seeds beside them.
WITHOUT_OF_CAPACITY = (
    "capacity.loads.*.plans.*.replicas", "capacity.loads.*.recommended.replicas",
    "capacity.loads.*.recommended.valid_up_to_rps",
    "capacity.loads.*.plans.*.metrics but those in capacity.loads.*.plans.*.intervals",
)  # fmt: skip
WITHOUT_OF_DESIGNS = ("metrics that are not in the intervals beside them",)


def intervals_told(seeds: int, without: Sequence[str]) -> dict[str, Any]:
    """An explanation of a summary's intervals, and of the figures without one."""
    return {
        "level": LEVEL,
        "scope": scope(seeds).value,
        "seeds": seeds,
        "note": INTERVAL_NOTE,
        "without": list(without),
    }


def _point(point: SweepPoint, with_ratios: set[str]) -> dict[str, Any]:
    """One setting's defined metrics; undefined ones are left out, since there may be hundreds of points."""
    return {
        "settings": json_value(point.settings),
        "metrics": {arm: json_value({k: v for k, v in m.items() if v is not None}) for arm, m in point.metrics.items()},
        "vs_baseline": {
            arm: json_value({k: v for k, v in ratios.items() if k in with_ratios})
            for arm, ratios in point.vs_baseline.items()
        },
        "intervals": json_value(point.intervals),
    }


def _fidelity(fidelity: Fidelity) -> dict[str, Any]:
    return {
        "parts": {
            part: [
                {
                    **{key: value for key, value in json_value(row).items() if key != "band" or value is not None},
                    "difference": json_value(row.difference),
                    "noise": json_value(row.noise),
                    "paced_difference": json_value(row.paced_difference),
                }
                for row in rows
            ]
            for part, rows in fidelity.parts
        },
        "counts": [json_value(count) for count in fidelity.counts],
        "profile_error": fidelity.profile_error,
        "load_errors": [{"load": point.load, "changes": dict(point.changes)} for point in fidelity.load_errors],
        "terms": dict(fidelity.terms),
    }


def _front_entry(design: Design) -> dict[str, Any]:
    metrics = {name: value for name, value in (design.metrics or {}).items() if value is not None}
    return {
        "design": design.name,
        "parameters": dict(design.parameters),
        "metrics": json_value(metrics),
        "intervals": json_value(design.intervals),
    }
