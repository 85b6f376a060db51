"""Checks of the list `defaults` at the beginning of a user's experiment file, before Hydra reads it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from helios_sim.errors import UserError
from helios_sim.help import conf_folder
from helios_sim.own_files import EXPERIMENT, leaves, placed
from helios_sim.untrusted import shortened
from helios_sim.vary.settings import closest

CHOSEN = ("workload", "policy", "objective", "runtime")  # groups of which every study has one file
ENGINE = "engine"  # the group of which a study has no file until one is named
_EXAMPLE = "write each in a line of its own, such as - override /objective: energy"


def check_defaults(file: Path) -> None:
    """Raise UserError for a list that Hydra would refuse in words of its own, or would read only in part.

    A file that is no YAML, or has no such list, is left to later readers.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, OSError, RecursionError):
        return
    if not isinstance(values, dict) or "defaults" not in values:
        return
    place, listed = f"{file.name}: defaults", values["defaults"]
    if not isinstance(listed, list):
        raise UserError(place, shortened(listed), "a list, each entry in a line that begins with -", _EXAMPLE)
    seen = set()
    for entry in listed:
        name = _checked(place, file.stem, entry)
        if name in seen:
            raise UserError(place, shortened(entry), f"{name.lstrip('/')} once", "leave all but one out")
        seen.add(name)
    if "_self_" in listed:
        _check_order(place, file, values, listed[listed.index("_self_") + 1 :])


def _check_order(place: str, file: Path, values: dict[str, Any], after: list[Any]) -> None:
    """Raise UserError if a file that is listed after `_self_` overwrites a setting of this file."""
    own = dict(leaves(placed(values, "")))
    for entry in after:
        (key, value), = entry.items() if isinstance(entry, dict) else [("", entry)]
        words = key.split()
        if "override" in words or not isinstance(value, str):
            continue  # it replaces a file that came earlier
        group = words[-1].strip("/") if words else ""
        name = f"{value.removesuffix('.yaml')}.yaml"
        places = [folder / group / name for folder in (file.parent.parent, Path(conf_folder()))] if group else [
            file.parent / name, Path(conf_folder()) / name.lstrip("/"), Path(conf_folder()) / EXPERIMENT / name,
        ]  # fmt: skip
        found = next((path for path in places if path.is_file()), None)
        read = yaml.safe_load(found.read_text(encoding="utf-8")) if found is not None else None
        theirs = dict(leaves(placed(read, ""))) if isinstance(read, dict) else {}
        both = next((path for path in own if path in theirs and own[path] != theirs[path]), None)
        if both is not None:
            allowed = f"before _self_: it sets {both} to {shortened(theirs[both])}, in place of {shortened(own[both])}"
            raise UserError(place, shortened(entry), allowed, "put _self_ last, or leave it out")


def _checked(place: str, own: str, entry: Any) -> str:
    """Return what the entry chooses: a group, or a file beside this one. Raises UserError for a wrong entry."""
    if isinstance(entry, str):
        name = entry.removesuffix(".yaml")
        if name in (own, f"/experiment/{own}"):
            raise UserError(place, entry, "other files than this one itself", "leave it out, or rename this file")
        if found := re.fullmatch(r"(override|optional)\s+/?([\w/]+)\s+([\w.-]+)", entry):
            raise UserError(place, entry, "GROUP: FILE", f"write {found[1]} /{found[2]}: {found[3]}")
        if name.startswith("experiment/"):
            fix = f"write {name.removeprefix('experiment/')}, which lies in the same folder, or /{name}"
            raise UserError(place, entry, "a path from the folder of this file", fix)
        return name
    if not isinstance(entry, dict) or len(entry) != 1 or not isinstance(next(iter(entry)), str):
        raise UserError(place, shortened(entry), "GROUP: FILE, or a file beside this one", _EXAMPLE)
    (key, value), = entry.items()
    words = key.split()
    group = words[-1] if words else ""
    if group.lstrip("/").startswith("hydra") or "@" in group:
        return str(key)
    plain = group.lstrip("/")
    if "override" in words[:-1]:
        if plain == ENGINE:
            fix = f"write /{ENGINE}: {value}, without override"
            raise UserError(place, f"{key}: {shortened(value)}", "override is for what a study has already", fix)
        if plain not in CHOSEN:
            near = closest(plain, CHOSEN, "override /")
            fix = near or "write settings of other groups as KEY: VALUE below, not among the defaults"
            raise UserError(place, f"{key}: {shortened(value)}", f"a group to choose from: {', '.join(CHOSEN)}", fix)
        if not group.startswith("/"):
            allowed = "a path from the folder of this file, or from the program's with / before it"
            raise UserError(place, f"{key}: {shortened(value)}", allowed, f"write override /{plain}: {value}")
    if isinstance(value, list):
        raise UserError(place, f"{key}: {shortened(value)}", "one file of a group", "name one; arms compare several")
    return f"/{plain}"
