"""Writes the output folder of a calibration: profile, trace, summary, page, figures, and an experiment to run."""

from __future__ import annotations

import platform
import shlex
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

import helios_sim
from calibrate.exits.before_after import AFTER, CHANGE, HEADS, TRACES as TRAINED_TRACES
from calibrate.exits.potential import potential
from calibrate.exits.reliability import ExitStatistics
from calibrate.measure.ceilings import Ceilings
from calibrate.report.calibration import Results, make_page
from calibrate.report.drafters import drafts_summary
from calibrate.report.exits import exit_summary
from calibrate.report.page import Page, render
from calibrate.schema import CARD, DRAFTERS, POTENTIAL, PREDICTORS, TRAIN_EXITS, CalibrateConfig
from calibrate.stages import Finished, StageOutcome, StageStatus
from calibrate.work import ADAPTERS, ANSWERS, CEILINGS, JOINT, PROFILE, SPEC, TRACES
from helios_sim import files
from helios_sim.errors import UserError
from helios_sim.exits.rule import Confidence
from helios_sim.exits.store import SHIPPED, load_trace, read_trace
from helios_sim.exits.trace import ExitTrace
from helios_sim.profile.profile import Profile
from helios_sim.profile.resolve import profile_of
from helios_sim.profile.shapes import Shape, shape_of
from helios_sim.profile.spec import ModelSpec
from helios_sim.profile.store import read_profile, write_profile
from helios_sim.provenance import command_given

TEXTS = (TRACES, POTENTIAL, TRAIN_EXITS)  # stages that list tasks without text
TRAINED = "trained"  # a folder with the change, its heads and its trace
NAME = "calibrated"
USERS = 4


def write_outputs(
    config: CalibrateConfig, folder: Path, finished: Mapping[str, Finished], outcomes: Sequence[StageOutcome]
) -> dict[str, Any]:
    """Write all files. Returns the content of summary.json."""
    from helios_sim.report.figures.style import to_png

    results = _results(config, finished)
    use = _write_for_use(config, folder, results)
    skipped = {o.stage: o.why for o in outcomes if o.status in (StageStatus.SKIPPED, StageStatus.FAILED)}
    page, statistics = make_page(config, results, use, skipped)
    summary = _summary(config, folder, results, page, statistics, outcomes, use)
    files.write_json(folder / "summary.json", summary)
    for drawing in page.drawings:
        files.write_bytes(folder / "figures" / f"{drawing.name}.png", to_png(drawing))
    files.write_text(folder / "report.html", render(page))
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
    if profile is not None and trace is not None:  # the mean over the whole traced text
        chars_per_token = float(trace.chars.sum() / trace.n_tokens)
        profile = replace(profile, model=replace(profile.model, chars_per_token=chars_per_token))
    joint = None
    if DRAFTERS in finished:
        joint = read_trace(finished[DRAFTERS].part(JOINT) / config.model.name)
    own, card, found = None, None, None
    if POTENTIAL in finished:
        stage = finished[POTENTIAL]
        own = read_trace(stage.part("trace"))
        spec = ModelSpec(**stage.result[SPEC])
        card = profile_of(Shape(spec, "the calibrated model"), config.priced_for)
        found = potential(own, card)
    ceilings = finished[CEILINGS].result if CEILINGS in finished else None
    return Results(
        facts=None if ceilings is None else ceilings["facts"],
        ceilings=None if ceilings is None else Ceilings.from_json(dict(ceilings["ceilings"])),
        profile=profile,
        trace=trace,
        answers=answers,
        others=() if trace is None else _others(config, trace),
        heads=_heads(config, finished),
        left_out=next((finished[name].result["left_out"] for name in TEXTS if name in finished), {}),
        potential=found,
        own_exits=own,
        card=card,
        trained=finished[TRAIN_EXITS].result if TRAIN_EXITS in finished else None,
        joint=joint,
        predictors=finished[PREDICTORS].result["reached"] if PREDICTORS in finished else None,
    )


def _others(config: CalibrateConfig, trace: ExitTrace) -> tuple[ExitTrace, ...]:
    """The named traces, and the shipped traces of other models on the same texts."""
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
    """Write profile/, trace/ and an experiment. Returns the commands that simulate from them."""
    if results.trace is not None:
        _replace(folder / "trace", folder / "stages" / TRACES / "trace")
    if results.answers is not None:
        _replace(folder / "answers", folder / "stages" / ANSWERS / "trace")
    if results.joint is not None:
        _replace(folder / JOINT, folder / "stages" / DRAFTERS / JOINT)
    if (heads := folder / "stages" / ADAPTERS / "heads").is_dir():
        _replace(folder / "heads", heads)
    trained = folder / "stages" / TRAIN_EXITS
    if (trained / CHANGE).is_dir():
        _written(folder / TRAINED, lambda draft: _join(draft, trained))
    if results.profile is None and results.joint is not None:
        return use_joint(results.joint, folder / JOINT)
    if results.profile is None:
        return [] if results.trained is None else _use_trained(config, folder / TRAINED)
    profile = results.profile
    _written(folder / "profile" / profile.name, lambda place: write_profile(profile, place))
    return write_experiment(profile, results.trace, config.threshold, folder)


def _join(place: Path, stage: Path) -> None:
    """Copy change and heads into one folder, which can be used as weights and as heads, and the trace below it."""
    shutil.copytree(stage / CHANGE, place)
    shutil.copytree(stage / HEADS[AFTER], place, dirs_exist_ok=True)
    shutil.copytree(stage / TRAINED_TRACES[AFTER], place / "trace")


def _use_trained(config: CalibrateConfig, place: Path) -> list[str]:
    """The command that measures the trained model in full."""
    name = config.model.name
    return [shlex.join(["python", "-m", "calibrate", f"model={place}", f"model.name={name}", f"heads={place}"])]


def use_joint(joint: ExitTrace, place: Path) -> list[str]:
    """The commands that simulate drafts by the first drafter; none if the catalogue lacks a shape of the two models."""
    drafter = next(iter(joint.drafters))
    with suppress(UserError):
        for name in (drafter, joint.model):
            shape_of(name)
        words = [
            "+experiment=own", f"models=[{drafter},{joint.model}]", f"hardware={CARD}",
            f"exits.source={_shown(place)}/{{model}}",
            f"workload.mix.tasks={{{', '.join(f'{task}: 1' for task in joint.tasks)}}}",
            "policy=draft_model", f"policy.drafter={drafter}", f"policy.model={joint.model}",
        ]  # fmt: skip
        return [shlex.join(["python", "-m", "helios_sim", *words])]
    return []


def _replace(place: Path, source: Path) -> None:
    _written(place, lambda draft: shutil.copytree(source, draft))


def _written(place: Path, write: Any) -> None:
    """Write a folder atomically. Raises UserError if it cannot be written."""
    draft = place.with_name(f".{place.name}.part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)
        write(draft)
        shutil.rmtree(place, ignore_errors=True)
        draft.rename(place)
    except UserError:
        shutil.rmtree(draft, ignore_errors=True)
        raise
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
    outcomes: Sequence[StageOutcome],
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
        **({} if results.joint is None else {"joint trace": results.joint.provenance.provenance_class}),
        **({} if results.own_exits is None else {"own exits": results.own_exits.provenance.provenance_class}),
        **({} if results.card is None else {"times on the card": results.card.provenance.provenance_class}),
    }
    kept = (
        "interpolation", "whole_iterations", "below_floor", "host", "serving", "memory", "loads", "energy",
        "energy_absent",
    )  # fmt: skip
    names = ("profile", "trace", "answers", JOINT, "heads", TRAINED)
    paths = {name: str(folder / name) for name in names if (folder / name).is_dir()}
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
        **({} if results.potential is None else {"potential": results.potential.to_json()}),
        **({} if results.trained is None else {"trained": dict(results.trained)}),
        **({} if results.joint is None else {"drafts": drafts_summary(results.joint)}),
        **({} if results.predictors is None else {"predictors": dict(results.predictors)}),
        "paths": {**paths, "report": str(folder / "report.html")},
        "use": list(use),
        "provenance": provenance,
    }


def write_experiment(profile: Profile, trace: ExitTrace | None, threshold: float, folder: Path) -> list[str]:
    """Write conf/experiment/calibrated.yaml and its workload. Returns the commands that simulate from `folder`."""
    files.write_text(folder / "conf" / "workload" / f"{NAME}.yaml", _yaml(_workload(profile, trace)))
    header = f"# @package _global_\n# {_command(folder, profile, trace)}\n"
    experiment = header + _yaml(_experiment(profile, trace, threshold))
    files.write_text(folder / "conf" / "experiment" / f"{NAME}.yaml", experiment)
    line = _command(folder, profile, trace)
    return [line, f"{line} workload.arrivals.users=1", f"{line} policy=helios"] if trace is not None else [line]


def _command(folder: Path, profile: Profile, trace: ExitTrace | None) -> str:
    shown = _shown(folder)
    source = "none" if trace is None else str(shown / "trace")
    words = [
        "--config-dir", str(shown / "conf"), f"+experiment={NAME}", f"profile_folder={shown / 'profile'}",
        f"exits.source={source}",
    ]  # fmt: skip
    return shlex.join(["python", "-m", "helios_sim", *words])


def _shown(folder: Path) -> Path:
    """The folder as the user may name it from here."""
    here, place = Path.cwd(), folder.resolve()
    return place.relative_to(here) if place.is_relative_to(here) else place


def _workload(profile: Profile, trace: ExitTrace | None) -> dict[str, Any]:
    """A closed loop of a few users, with prompts and answers that fit into the measured context."""
    context = min(int(profile.layer_tables[0].decode_attention.second[-1]), profile.model.max_context_tokens)
    prompt, output = max(4, context // 6), max(4, context // 12)
    tasks = ("text",) if trace is None else trace.tasks
    return {
        "statement": f"{USERS} users who each ask again when answered. Prompts of about {prompt} tokens and answers of "
        f"about {output}: chosen to fit into the measured context of {context} tokens, not taken from any real load.",
        "n_requests": 60,
        "chars_per_token": round(profile.model.chars_per_token, 4),
        "arrivals": {"kind": "closed_loop", "users": USERS},
        "lengths": {
            "kind": "drawn",
            "prompt": _lengths(prompt, context // 3),
            "output": _lengths(output, context // 4),
        },
        "mix": {"tasks": {task: round(1 / len(tasks), 6) for task in tasks}},
    }


def _lengths(mean: int, maximum: int) -> dict[str, Any]:
    return {"kind": "lognormal", "mean": mean, "sigma": 0.5, "minimum": 2, "maximum": maximum}


def _experiment(profile: Profile, trace: ExitTrace | None, threshold: float) -> dict[str, Any]:
    arms: dict[str, Any] = {"full_depth": {"policy": "full_depth"}}
    subject = "full_depth"
    if trace is not None:
        arms["early_exit"] = {"policy": "early_exit"}
        arms["static_cap"] = {"policy": "static_cap"}
        subject = "early_exit"
        if Confidence.CLASSIFIER in trace.confidences and profile.check_classifier is not None:
            arms["early_exit_classifier"] = {"policy": "early_exit", "confidence": "classifier"}
            subject = "early_exit_classifier"
    limits = profile.provenance.details["limits"]
    return {
        "defaults": [{"override /workload": NAME}],
        "name": NAME,
        "title": f"{profile.model.name} on {profile.hardware.name}, from its calibration",
        "question": "What would early exits give on the device that was just measured?",
        "hardware": profile.hardware.name,
        "models": [profile.model.name],
        "runtime": {"preset": "profile"},
        "exits": {"threshold": threshold},
        "server": {
            "max_running_requests": limits["max_batch"],
            "max_batch_tokens": limits["max_rows"],
        },
        "arms": arms,
        "baseline": "full_depth",
        "subject": subject,
    }


def _yaml(data: dict[str, Any]) -> str:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)
