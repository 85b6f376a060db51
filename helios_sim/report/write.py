"""Writes a result into its output folder, file by file. Knows which files there are, not what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helios_sim.report import files
from helios_sim.report.decisions import decisions_table
from helios_sim.report.result import ExperimentResult
from helios_sim.report.summary import Comparisons, comparisons, summarise_result


def write_result(
    result: ExperimentResult, folder: Path, ratios: Comparisons | None = None, pictures: bool = True
) -> dict[str, Any]:
    """Write summary.json, requests.parquet, decisions.parquet, provenance.json, figures/*.png and report.html.

    Returns what `summary.json` holds. Data come first and the page last, so that an interruption leaves whole files.
    Without `pictures` there are no figures and no page. Raises UserError when the folder cannot be written to.
    """
    ratios = comparisons(result) if ratios is None else ratios
    summary = summarise_result(result, ratios)
    write_requests(result, folder)
    files.write_parquet(folder / "decisions.parquet", decisions_table(result.arms))
    files.write_json(folder / "provenance.json", summary["provenance"])
    files.write_json(folder / "summary.json", summary)
    if pictures:
        write_pictures(result, folder, ratios)
    return summary


def write_requests(result: ExperimentResult, folder: Path) -> None:
    """One row for each request, arm and seed, a block of rows at a time."""
    replicates = [(arm.name, replicate) for arm in result.arms.values() for replicate in arm.replicates]
    tables = (table for name, it in replicates for table in it.records.tables(name, it.seed))
    files.write_parquet_parts(folder / "requests.parquet", tables)


def write_pictures(result: ExperimentResult, folder: Path, ratios: Comparisons) -> None:
    """figures/*.png and report.html. Loads matplotlib here, because it is slow to load and not always wanted."""
    from helios_sim.report.figures import answer_drawings, detail_drawings
    from helios_sim.report.figures_arms import arms_drawings
    from helios_sim.report.figures_fidelity import fidelity_drawings
    from helios_sim.report.figures_replicas import replica_drawings
    from helios_sim.report.figures_sweep import sweep_drawings
    from helios_sim.report.figures_timeline import timeline_drawings
    from helios_sim.report.html import render
    from helios_sim.report.style import lay_out, to_png

    drawings = [
        *answer_drawings(result, ratios),
        *fidelity_drawings(result),
        *arms_drawings(result),
        *sweep_drawings(result),
        *replica_drawings(result),
        *detail_drawings(result),
        *timeline_drawings(result),
    ]
    for drawing in drawings:
        lay_out(drawing)
    files.write_text(folder / "report.html", render(result, ratios, drawings))
    for drawing in drawings:
        files.write_bytes(folder / "figures" / f"{drawing.name}.png", to_png(drawing))
