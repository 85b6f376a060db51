"""Puts finished stages together into an output folder: profile, trace, summary, page, figures."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import helios_sim
from calibrate.ceilings import Ceilings
from calibrate.report import make_page
from calibrate.report_exit_sections import exit_summary
from calibrate.report_exits import ExitStatistics
from calibrate.report_page import Page, render
from calibrate.schema import CalibrateConfig
from calibrate.stages import Finished, Outcome, Status
from calibrate.use import write_experiment
from calibrate.work import ADAPTERS, ANSWERS, CEILINGS, PROFILE, TRACES
from helios_sim.errors import UserError
from helios_sim.exits.store import SHIPPED, load_trace, read_trace
from helios_sim.exits.trace import ExitTrace
from helios_sim.profile.profile import Profile
from helios_sim.profile.store import read_profile, write_profile
from helios_sim.provenance import command_given
from helios_sim.report import files


@dataclass(frozen=True, slots=True, eq=False)
class Results:
    """What the finished stages found; None where a stage is not there."""

    facts: Mapping[str, Any] | None
    ceilings: Ceilings | None
    profile: Profile | None
    trace: ExitTrace | None
    answers: ExitTrace | None
    others: tuple[ExitTrace, ...]  # of other models on the same text
    heads: Mapping[str, Any] | None  # header of the heads that were used
    left_out: Mapping[str, str]  # tasks without texts


def write_outputs(
    config: CalibrateConfig, folder: Path, finished: Mapping[str, Finished], outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """Writes the files and returns what summary.json holds."""
    from helios_sim.report.figures.style import lay_out, to_png

    results = _results(config, finished)
    use = _write_for_use(config, folder, results)
    skipped = {o.stage: o.why for o in outcomes if o.status in (Status.SKIPPED, Status.FAILED)}
    page, statistics = make_page(config, results, use, skipped)
    summary = _summary(config, folder, results, page, statistics, outcomes, use)
    files.write_json(folder / "summary.json", summary)
    for drawing in page.drawings:
        lay_out(drawing)
    files.write_text(folder / "report.html", render(page))
    for drawing in page.drawings:
        files.write_bytes(folder / "figures" / f"{drawing.name}.png", to_png(drawing))
    return summary


def _results(config: CalibrateConfig, finished: Mapping[str, Finished]) -> Results:
    profile = trace = answers = None
    if PROFILE in finished:
        stage = finished[PROFILE]
        profile = read_profile(stage.part("profile") / stage.result["name"])
    if TRACES in finished:
        trace = read_trace(finished[TRACES].part("trace"))
    if ANSWERS in finished:
        answers = read_trace(finished[ANSWERS].part("trace"))
    if profile is not None and trace is not None:  # the mean on the whole text, not on a little of it
        chars_per_token = float(trace.chars.sum() / trace.n_tokens)
        profile = replace(profile, model=replace(profile.model, chars_per_token=chars_per_token))
    ceilings = finished[CEILINGS].result if CEILINGS in finished else None
    return Results(
        facts=None if ceilings is None else ceilings["facts"],
        ceilings=None if ceilings is None else Ceilings.from_json(dict(ceilings["ceilings"])),
        profile=profile,
        trace=trace,
        answers=answers,
        others=() if trace is None else _others(config, trace),
        heads=_heads(config, finished),
        left_out=finished[TRACES].result["left_out"] if TRACES in finished else {},
    )


def _others(config: CalibrateConfig, trace: ExitTrace) -> tuple[ExitTrace, ...]:
    """Named traces, and shipped ones of the same texts by other models."""
    found = [read_trace(Path(folder).expanduser()) for folder in config.pairs]
    for header in sorted(SHIPPED.glob("*@reference/trace.json")):
        model = header.parent.name.removesuffix("@reference")
        if model != trace.model and model not in {t.model for t in found}:
            found.append(load_trace(model, "reference"))
    return tuple(found)


def _heads(config: CalibrateConfig, finished: Mapping[str, Finished]) -> Mapping[str, Any] | None:
    from helios_sim.live.model.heads import HEADER, SHIPPED as SHIPPED_HEADS, read_header

    if ADAPTERS in finished:
        return read_header(finished[ADAPTERS].part("heads"))
    if config.heads is not None:
        return read_header(Path(config.heads).expanduser())
    shipped = SHIPPED_HEADS / config.model.name
    return read_header(shipped) if (shipped / HEADER).is_file() and config.model.exits is None else None


def _write_for_use(config: CalibrateConfig, folder: Path, results: Results) -> list[str]:
    """profile/, trace/ and a ready experiment; returns the commands that simulate from them."""
    if results.trace is not None:
        _replace(folder / "trace", folder / "stages" / TRACES / "trace")
    if results.answers is not None:
        _replace(folder / "answers", folder / "stages" / ANSWERS / "trace")
    if (heads := folder / "stages" / ADAPTERS / "heads").is_dir():
        _replace(folder / "heads", heads)
    if results.profile is None:
        return []
    profile = results.profile
    _written(folder / "profile" / profile.name, lambda place: write_profile(profile, place))
    return write_experiment(profile, results.trace, config.threshold, folder)


def _replace(place: Path, source: Path) -> None:
    _written(place, lambda draft: shutil.copytree(source, draft))


def _written(place: Path, write: Any) -> None:
    """A folder that appears whole."""
    draft = place.with_name(f".{place.name}.part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)
        write(draft)
        shutil.rmtree(place, ignore_errors=True)
        draft.rename(place)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        fix = "free space on the disk, or choose another folder"
        raise UserError("out", str(place), f"cannot be written: {error.strerror or error}", fix) from error


def _summary(
    config: CalibrateConfig,
    folder: Path,
    results: Results,
    page: Page,
    statistics: Sequence[ExitStatistics],
    outcomes: Sequence[Outcome],
    use: Sequence[str],
) -> dict[str, Any]:
    profile = results.profile
    details: Mapping[str, Any] = {} if profile is None else profile.provenance.details
    provenance = {
        "command": command_given("calibrate"),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "helios_sim": helios_sim.__version__,
        "python": platform.python_version(),
        "configuration": asdict(config),
        "profile": None if profile is None else profile.provenance.provenance_class,
        "trace": None if results.trace is None else results.trace.provenance.provenance_class,
    }
    kept = (
        "interpolation", "whole_iterations", "below_floor", "host", "serving", "memory", "loads", "energy",
        "energy_absent",
    )  # fmt: skip
    paths = {name: str(folder / name) for name in ("profile", "trace", "answers", "heads") if (folder / name).is_dir()}
    return {
        "schema_version": 1,
        "title": page.title,
        "model": config.model.name,
        "hardware": None if results.facts is None else results.facts["name"],
        "verdict": list(page.verdict),
        "stages": {
            o.stage: {
                "status": o.status,
                "wall_s": None if o.finished is None else o.finished.wall_s,
                "finished_at": None if o.finished is None else o.finished.finished_at,
                "why": o.why or None,
            }
            for o in outcomes
        },
        "device": results.facts,
        "ceilings": None if results.ceilings is None else results.ceilings.to_json(),
        **{name: details.get(name) for name in kept},
        "exits": exit_summary(statistics) or None,
        "paths": {**paths, "report": str(folder / "report.html")},
        "use": list(use),
        "provenance": provenance,
    }
