"""A study's configuration with some settings changed by path. Knows types of settings, not what they mean.

The command line has Hydra for this; here a thousand designs are made of a `Config`, ten times as fast, and from Python
too.
"""

from __future__ import annotations

import copy
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from helios_sim.errors import UserError
from helios_sim.study.schema import Config

_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}


def with_settings(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy with these dotted paths set, every range checked anew; groups off these paths are shared, not copied.

    UserError where a path leads nowhere or a value has the wrong type or is out of range. Names below `policy`, an
    arm or `exits.parameters` are free: what is wrong there is found by those who read them.
    """
    changed = copy.copy(config)
    for path, value in changes.items():
        _set(changed, path, value)
    return changed


def _set(config: Config, path: str, value: Any) -> None:
    *above, last = path.split(".")
    place: Any = config
    groups = [config]
    for name in above:
        place = _own(place, name, _below(place, name, path))
        groups.append(place)
    if isinstance(place, dict):
        place[last] = value
    else:
        kind: Any = type(place)
        hint = _hints(kind).get(last) if is_dataclass(place) else None
        if hint is None:
            raise _nowhere(path)
        setattr(place, last, _as(hint, value, path))
    for group in reversed(groups):
        if hasattr(group, "__post_init__"):
            group.__post_init__()


def _own(place: Any, name: str, below: Any) -> Any:
    """A copy of what is below, put into its place."""
    own = copy.copy(below)
    if isinstance(place, dict):
        place[name] = own
    else:
        setattr(place, name, own)
    return own


def _below(place: Any, name: str, path: str) -> Any:
    if isinstance(place, dict) and isinstance(place.get(name), dict):
        return place[name]
    kind: Any = type(place)
    if is_dataclass(place) and name in _hints(kind):
        found = getattr(place, name)
        if isinstance(found, dict) or is_dataclass(found):
            return found
    raise _nowhere(path)


def _as(hint: Any, value: Any, path: str) -> Any:
    """The value in the setting's type: a whole number will do for a number."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    plain = [typing.get_origin(kind) or kind for kind in kinds]
    if Any in plain or type(value) in plain:
        return value
    if float in plain and type(value) is int:
        return float(value)
    allowed = " or ".join(_WORDS.get(kind, "another kind of value") for kind in plain)
    raise UserError(path, value, f"must be {allowed}", "correct the values of this parameter of the sweep")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _nowhere(path: str) -> UserError:
    fix = "name a setting of the study; settings of a policy need policy=NAME, those of an arm begin with arms.NAME"
    return UserError("sweep.parameters, settings", path, "no such setting", fix)
