"""Settings of the server that go with an engine's version: the files of conf/engine, without Hydra."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from helios_sim.errors import require_one_of
from helios_sim.help import conf_folder
from helios_sim.untrusted import parse_yaml


def preset_names() -> list[str]:
    """All presets, by engine and version."""
    names = (path.stem for path in _folder().glob("*.yaml"))
    return sorted(names, key=lambda name: (name.split("-")[0], _version(name)))


@cache
def preset_settings(name: str) -> Mapping[str, Any]:
    """The preset's settings by dotted path. UserError for a name that there is not."""
    require_one_of("server.preset", name, preset_names())
    groups: dict[str, dict[str, Any]] = parse_yaml((_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    return {f"{group}.{key}": value for group, values in groups.items() for key, value in values.items()}


def preset_of(engine: str, version: str) -> str | None:
    """The preset for an engine's version: the latest that is not later, else the first; None: no such engine."""
    own = [name for name in preset_names() if name.split("-")[0] == engine]
    earlier = [name for name in own if _version(name) <= _version(version)]
    return earlier[-1] if earlier else next(iter(own), None)


def _folder() -> Path:
    return Path(conf_folder()) / "engine"


def _version(text: str) -> tuple[int, ...]:
    """The first two numbers in it."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])
