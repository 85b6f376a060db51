"""Words of the command line that stand for settings, without Hydra; among them presets of the server.

A preset holds the defaults of an engine's version: a file of conf/engine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from helios_sim.errors import UserError, require_one_of
from helios_sim.help import conf_folder
from helios_sim.live.checkpoint.known import SHORT_NAMES
from helios_sim.untrusted import parse_yaml

_GROUPS = {"runtime": "runtime.preset", "objective": "objective.goal"}  # groups that a name chooses
_OF_THE_COMMAND_LINE = ("experiment", "hydra", "config_dir", "config-dir", "multirun")


def settings_in_full(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted path for words that the command line takes; a preset's settings yield to the others.

    Raises UserError for words that only the command line can take.
    """
    found: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for key, value in changes.items():
        group = key.split(".")[0]
        if key[:1] in ("+", "~"):
            allowed = "a setting by its path: + and ~ are signs of the command line"
            raise UserError(key, value, allowed, f"write {key.lstrip('+~')}")
        if group in _OF_THE_COMMAND_LINE:
            allowed = "a setting of a study: this one is the command line's own"
            raise UserError(key, value, allowed, "leave it out, or give it where the study is named")
        if key == "policy" and isinstance(value, str):
            allowed = "a mapping such as {name: helios, round_requests: 50}; its file goes by words of the command line"
            raise UserError(key, value, allowed, f'write simulate(NAME, "policy={value}")')
        if key == "server.preset":
            found |= preset_settings(value)
        elif key == "server" and isinstance(value, Mapping) and "preset" in value:
            found |= preset_settings(value["preset"])
            own[key] = {name: below for name, below in value.items() if name != "preset"}
        elif key == "model":
            own["models"] = [SHORT_NAMES.get(value, value)]
        elif key == "device":
            own["live.device"] = value
        elif key in _GROUPS and isinstance(value, str):
            own[_GROUPS[key]] = value
        else:
            own[key] = value
    return {**{key: value for key, value in found.items() if key not in own}, **own}


def preset_names() -> list[str]:
    """Return the names of all presets, sorted by engine and version."""
    names = (path.stem for path in _folder().glob("*.yaml"))
    return sorted(names, key=lambda name: (name.split("-")[0], _version(name)))


@cache
def preset_settings(name: str) -> Mapping[str, Any]:
    """Return a preset's settings by dotted path. UserError for an unknown name."""
    require_one_of("server.preset", name, preset_names())
    groups: dict[str, dict[str, Any]] = parse_yaml((_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    return {f"{group}.{key}": value for group, values in groups.items() for key, value in values.items()}


def preset_of(engine: str, version: str) -> str | None:
    """Return the preset for an engine's version: the latest that is not later, else the first; None without any."""
    own = [name for name in preset_names() if name.split("-")[0] == engine]
    earlier = [name for name in own if _version(name) <= _version(version)]
    return earlier[-1] if earlier else next(iter(own), None)


def _folder() -> Path:
    return Path(conf_folder()) / "engine"


def _version(text: str) -> tuple[int, ...]:
    """Return the first two numbers in a text."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])
