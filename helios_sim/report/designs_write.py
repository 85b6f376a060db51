"""Writes a sweep into its output folder, file by file, and its machine-readable summary. Knows no policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helios_sim import __version__
from helios_sim.report import files, format as fmt
from helios_sim.report.definitions import DEFINITIONS, ENERGY_NOTE, LATENCY_NOTE
from helios_sim.report.designs import Design, DesignsResult
from helios_sim.report.designs_table import cells, designs_table, name_of, shown, spread
from helios_sim.report.summary import SCHEMA_VERSION, json_value

MOST_ON_PAGE = 200  # designs of a front; all are in the Parquet file


def write_designs(result: DesignsResult, folder: Path) -> dict[str, Any]:
    """Write designs.parquet, provenance.json, summary.json, report.html, pareto.png and figures/*.png.

    Returns what `summary.json` holds. Raises UserError when the folder cannot be written to.
    """
    from helios_sim.report.figures_designs import design_drawings
    from helios_sim.report.style import lay_out, to_png

    summary = summarise_designs(result)
    files.write_parquet(folder / "designs.parquet", designs_table(result))
    files.write_json(folder / "provenance.json", summary["provenance"])
    files.write_json(folder / "summary.json", summary)
    drawings = design_drawings(result)
    for drawing in drawings:
        lay_out(drawing)
    files.write_text(folder / "report.html", render_designs(result, drawings))
    for drawing in drawings:
        place = folder if drawing.name == "pareto" else folder / "figures"
        files.write_bytes(place / f"{drawing.name}.png", to_png(drawing))
    return summary


def summarise_designs(result: DesignsResult) -> dict[str, Any]:
    """The structure of `summary.json`: the arms as they were set, and the front. The Parquet file has all designs."""
    return {
        "schema_version": SCHEMA_VERSION,
        "experiment": result.experiment,
        "baseline": result.arm,
        "arms": {r.name: {"metrics": json_value(r.metrics), "vs_baseline": {}} for r in result.references},
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
        "provenance": {
            "class": json_value(result.provenance_class),
            "inputs": {name: json_value(source) for name, source in result.inputs.items()},
            "assumptions": [json_value(a) for a in result.all_assumptions],
            **{key: json_value(value) for key, value in result.provenance.items()},
        },
    }


def _front_entry(design: Design) -> dict[str, Any]:
    metrics = {name: value for name, value in (design.metrics or {}).items() if value is not None}
    return {"design": design.name, "parameters": dict(design.parameters), "metrics": json_value(metrics)}


def render_designs(result: DesignsResult, drawings: list[Any]) -> str:
    """The whole page as text: no script, no network, figures inline."""
    from markupsafe import Markup

    from helios_sim.report.page import page_environment
    from helios_sim.report.style import to_svg

    environment, css = page_environment()
    names = (*result.objectives, *result.shown_metrics)
    distinct = result.distinct_front
    front = spread(distinct, MOST_ON_PAGE)
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
    return environment.get_template("designs.html.j2").render(
        result=result,
        version=__version__,
        css=css,
        contents=[(key, text) for key, (text, there) in parts.items() if there],
        columns=[fmt.label(name) for name in names],
        front=[_row(design, names) | {"name": name_of(design, alike)} for design, alike in front],
        distinct=len(distinct),
        references=[_row(design, names) for design in result.references],
        failed=[{"name": d.name, "values": [shown(v) for v in d.parameters.values()], "error": d.error}
                for d in result.failed[:MOST_ON_PAGE]],
        figures=[{"name": d.name, "title": d.title, "caption": d.caption, "svg": Markup(to_svg(d))} for d in drawings],
        run_json=files.to_json(json_value(result.provenance), indent=2),
        definitions=[DEFINITIONS[name] for name in names],
        notes=[LATENCY_NOTE, *([ENERGY_NOTE] if any("energy" in name for name in names) else [])],
    )  # fmt: skip


def _row(design: Design, names: tuple[str, ...]) -> dict[str, Any]:
    parameters = [shown(value) for value in design.parameters.values()]
    return {"name": design.name, "values": parameters, "cells": cells(design, names)}
