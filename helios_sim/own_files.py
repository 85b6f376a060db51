"""The user's own files of settings, below --config-dir: which of them a study is made from, and what they set."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from helios_sim.errors import UserError
from helios_sim.help import conf_folder, config_dirs

EXPERIMENT, GLOBAL = "experiment", "_global_"
_PACKAGE = re.compile(r"(?:\s*(?:#[^\n]*)?\n)*?[ \t]*#\s*@package[ \t]+([\w.]+)")  # among the comments at the beginning


@dataclass(frozen=True, slots=True)
class OwnFile:
    """A file of the user's and its settings, nested by the groups of a study."""

    path: Path
    values: Mapping[str, Any]
    group: str  # the group that it was chosen from; "" if the experiment builds on it


def package_of(text: str, group: str) -> str:
    """Return the package of a file's settings: what its first comments say, else its group; "" for the whole study."""
    found = _PACKAGE.match(text)
    package = found[1].replace("_group_", group.replace("/", ".")) if found else group.replace("/", ".")
    return "" if package == GLOBAL else package


def placed(values: Mapping[str, Any], package: str) -> dict[str, Any]:
    """Return the values of a file, nested in the groups to which they belong."""
    inner = {str(key): value for key, value in values.items() if key != "defaults"}
    for name in reversed(package.split(".") if package else []):
        inner = {name: inner}
    return inner


def leaves(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting in `values` with its dotted path; an empty group yields none."""
    if not isinstance(values, Mapping):
        yield path, values
        return
    for key, value in values.items():
        yield from leaves(value, f"{path}.{key}" if path else str(key))


def own_files(choices: Mapping[str, str | None], arguments: Sequence[str]) -> list[OwnFile]:
    """Return the user's chosen files; last the experiment, before it the files beside it that it builds on."""
    found = []
    for group, name in choices.items():
        for place in map(Path, config_dirs(arguments)):
            file = _file(place, group, str(name))
            if not file.is_file() or group.startswith("hydra"):
                continue
            if group == EXPERIMENT:
                found += [OwnFile(base, _read(base, ""), "") for base in _bases(file, place)]
            found.append(OwnFile(file, _read(file, "" if group == EXPERIMENT else group), group))
    return sorted(found, key=lambda own: (own.group == EXPERIMENT, own.group == ""))


def check_names(choices: Mapping[str, str | None], arguments: Sequence[str]) -> None:
    """Raise UserError if a chosen file of the user's has the name of a shipped one, which Hydra takes instead."""
    for group, name in choices.items():
        shipped = _file(Path(conf_folder()), group, str(name))
        for place in map(Path, config_dirs(arguments)):
            file = _file(place, group, str(name))
            if file.is_file() and shipped.is_file() and file.read_bytes() != shipped.read_bytes():
                allowed = f"a name of its own: {group}={name} is the program's, which is taken in place of it"
                raise UserError(str(file), file.name, allowed, f"rename it, such as my_{file.name}")


def shipped_paths(choices: Mapping[str, str | None]) -> list[str]:
    """Return the paths that a shipped experiment sets; none if the experiment is the user's own."""
    file = _file(Path(conf_folder()), EXPERIMENT, str(choices.get(EXPERIMENT)))
    return [path for path, _ in leaves(_read(file, ""))] if file.is_file() else []


def _file(place: Path, group: str, name: str) -> Path:
    return place / group / f"{name.removesuffix('.yaml')}.yaml"


def _read(file: Path, group: str) -> dict[str, Any]:
    """Return what a file sets; nothing if it is no mapping, which other checks report."""
    try:
        text = file.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OSError):
        return {}
    return placed(values, package_of(text, group)) if isinstance(values, dict) else {}


def _bases(file: Path, place: Path, seen: tuple[Path, ...] = ()) -> list[Path]:
    """Return the files below the same folder that a file's `defaults` name, in order, each after its own bases."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, OSError):
        return []
    listed = values.get("defaults") if isinstance(values, dict) else None
    found: list[Path] = []
    for entry in listed if isinstance(listed, list) else ():
        if not isinstance(entry, str) or entry == "_self_":
            continue
        base = place / f"{entry.strip('/')}.yaml" if entry.startswith("/") else file.parent / f"{entry}.yaml"
        if base.is_file() and base not in (*seen, file):
            found += [*_bases(base, place, (*seen, file)), base]
    return found
