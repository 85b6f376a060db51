"""What a calibration is good for: a ready experiment over its results and the lines that run it. Measures nothing."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml

from helios_sim.exits.trace import ExitTrace
from helios_sim.profile.profile import Profile
from helios_sim.report import files

NAME = "calibrated"
USERS = 4


def write_experiment(profile: Profile, trace: ExitTrace | None, threshold: float, folder: Path) -> list[str]:
    """Writes conf/experiment/calibrated.yaml and its workload; returns the commands that simulate from `folder`."""
    files.write_text(folder / "conf" / "workload" / f"{NAME}.yaml", _yaml(_workload(profile, trace)))
    header = f"# @package _global_\n# {_command(folder, profile, trace)}\n"
    experiment = header + _yaml(_experiment(profile, trace, threshold))
    files.write_text(folder / "conf" / "experiment" / f"{NAME}.yaml", experiment)
    line = _command(folder, profile, trace)
    return [line, f"{line} workload.arrivals.users=1", f"{line} policy=helios"] if trace is not None else [line]


def _command(folder: Path, profile: Profile, trace: ExitTrace | None) -> str:
    here = Path.cwd()
    place = folder.resolve()
    shown = place.relative_to(here) if place.is_relative_to(here) else place
    source = "none" if trace is None else str(shown / "trace")
    words = [
        "--config-dir", str(shown / "conf"), f"+experiment={NAME}", f"profile_folder={shown / 'profile'}",
        f"exits.source={source}",
    ]  # fmt: skip
    return shlex.join(["python", "-m", "helios_sim", *words])


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
        if trace.classifier is not None and profile.check_classifier is not None:
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
