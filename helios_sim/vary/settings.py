"""Changes settings by path: returns a copy of a configuration with some of them set anew.

The command line composes a configuration with Hydra; whatever varies it afterwards (sweeps, designs, overrides of an
arm, scripts) goes through `with_settings`, which checks types and ranges as Hydra does.
"""

from __future__ import annotations

import copy
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from helios_sim.errors import UserError, near_names

_Config = TypeVar("_Config")
_Names = tuple[str, ...]

_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}


def with_settings(config: _Config, changes: Mapping[str, Any]) -> _Config:
    """Return a copy of a dataclass of settings with these dotted paths set; groups off these paths are shared.

    A mapping changes the entries that it names and leaves the others, as on the command line; if a field is marked
    `whole`, as shares of a mix are, the mapping replaces the old one. Ranges are checked once, when all changes are
    made. UserError if a path leads nowhere, or a value has the wrong type or is out of range. Keys of a mapping, such
    as a policy's settings, are free: code that reads them finds mistakes in them.
    """
    own: dict[_Names, Any] = {(): copy.copy(config)}  # groups that this copy does not share
    in_full = getattr(config, "in_full", dict)  # spells out words that stand for settings
    for path, value in in_full(changes).items():
        _set(own, _names_in(config, path), _plain(value))
    for group in reversed(own.values()):  # a group comes after the one that holds it
        if hasattr(group, "__post_init__"):
            group.__post_init__()
    found: _Config = own[()]
    return found


def _names_in(config: Any, path: str) -> _Names:
    """Return the names in a dotted path. An entry of a mapping may have dots in its name, as arm opt-1.3b does."""
    if not path:
        raise UserError("setting", path, "the dotted name of a setting, such as server.replicas", "name one")
    place, left, names = config, path, []
    while left:
        keys = [str(key) for key in place if f"{left}.".startswith(f"{key}.")] if isinstance(place, dict) else []
        name = max(keys, key=len, default=left.partition(".")[0])
        names.append(name)
        place, left = _there(place, name), left[len(name) + 1 :]
    return tuple(names)


def known_settings(schema: type) -> dict[str, Any]:
    """Return all settings of a dataclass by dotted path, with their types; groups of settings too."""
    found: dict[str, Any] = {}
    for name, hint in _hints(schema).items():
        found[name] = hint
        if is_dataclass(hint):
            found |= {f"{name}.{below}": kind for below, kind in known_settings(typing.cast(type, hint)).items()}
    return found


def unknown_setting(schema: Any, values: Any, path: str = "") -> str | None:
    """Return the path of the first key of these plain values that the schema does not have; None if it has all."""
    if is_dataclass(schema) and isinstance(values, Mapping):
        hints = _hints(typing.cast(Any, schema))
        for key, value in values.items():
            below = f"{path}.{key}" if path else str(key)
            found = below if key not in hints else unknown_setting(hints[str(key)], value, below)
            if found is not None:
                return found
    parts = typing.get_args(schema)
    if parts and is_dataclass(parts[-1]) and isinstance(values, Mapping | list):  # a list or mapping of groups
        entries = values.items() if isinstance(values, Mapping) else enumerate(values)
        return next(filter(None, (unknown_setting(parts[-1], v, f"{path}.{k}") for k, v in entries)), None)
    return None


def wrong_type(hint: Any, value: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Return path, value and expected type of the first of these plain values that has a wrong type; None if none has.

    A setting that copies another one, ${other}, counts as a text until it is resolved.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or value == "???":  # "???" stands for a value that is still to be given
        return None
    below: Iterable[tuple[Any, Any, Any]] = ()
    if origin in (typing.Union, types.UnionType):
        fits = any(wrong_type(part, value) is None for part in parts)
    elif origin is list:
        fits = isinstance(value, list)
        below = ((i, parts[0], v) for i, v in enumerate(value)) if fits else ()
    elif origin is dict:
        fits = isinstance(value, Mapping)
        below = ((key, parts[1], v) for key, v in value.items()) if fits else ()
    elif is_dataclass(hint):
        fits, hints = isinstance(value, Mapping), _hints(typing.cast(Any, hint))
        below = ((key, hints[key], v) for key, v in value.items() if key in hints) if fits else ()
    elif hint is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        fits = type(value) is (type(None) if hint is None else hint)
    if not fits:
        return path, value, hint
    if origin is list:  # named as a whole, unless the setting is in a group of the list
        wrong = (wrong_type(kind, v, f"{path}.{i}") for i, kind, v in below)
        found = next(filter(None, wrong), None)
        of_one = found is not None and is_dataclass(parts[0]) and found[0].count(".") > path.count(".") + 1
        return found if found is None or of_one else (path, value, hint)
    inner = (wrong_type(kind, v, f"{path}.{key}" if path else str(key)) for key, kind, v in below)
    return next(filter(None, inner), None)


def kind_in_words(hint: Any) -> str:
    """Return a type in the words of messages."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind_in_words(part) for part in parts)
    if origin is list:
        return f"a list such as [a,b], each {kind_in_words(parts[0])}"
    if origin is dict:
        return f"a mapping such as {{a: b}}, each {kind_in_words(parts[1])}"
    if is_dataclass(hint):
        return f"a group of settings: {', '.join(field.name for field in fields(hint))}"
    return _WORDS.get(hint, "a value")


def closest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """Return a fix with the name that was probably meant; empty if no name is near."""
    matches = near_names(name, names, cutoff=0.7)
    return f"you may have meant {prefix}{matches[0]}" if matches else ""


def _plain(value: Any) -> Any:
    """Turn a script's value into types of settings: NumPy values become plain ones, tuples lists, and paths texts."""
    if isinstance(value, Mapping):
        return {key: _plain(below) for key, below in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(below) for below in value]
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return str(value) if isinstance(value, Path) else value


def _set(own: dict[_Names, Any], names: _Names, value: Any) -> None:
    place: Any = _own_group(own, names[:-1], names, value)
    there = _there(place, names[-1])
    whole = is_dataclass(place) and any(f.name == names[-1] and f.metadata.get("whole") for f in fields(place))
    if isinstance(value, Mapping) and not whole and (is_dataclass(there) or isinstance(there, dict)):
        for name, below in value.items():
            _set(own, (*names, str(name)), below)
        return
    hint = _hint_at(type(own[()]), names)
    if hint is None:
        raise _nowhere(own, names, value)
    _put(place, names[-1], _as(hint, value, ".".join(names)))


def _own_group(own: dict[_Names, Any], group: _Names, names: _Names, value: Any) -> Any:
    """Return the group at this path, copied if it is still shared. `names` and `value` are for messages."""
    if group not in own:
        above = _own_group(own, group[:-1], names, value)
        there = _there(above, group[-1])
        if not (is_dataclass(there) or isinstance(there, dict)):
            raise _nowhere(own, names, value)
        own[group] = copy.copy(there)
        _put(above, group[-1], own[group])
    return own[group]


def _there(place: Any, name: str) -> Any:
    return place.get(name) if isinstance(place, dict) else getattr(place, name, None)


def _put(place: Any, name: str, value: Any) -> None:
    if isinstance(place, dict):
        place[name] = value
    else:
        setattr(place, name, value)


def _hint_at(schema: Any, names: _Names) -> Any:
    """Return the type of the setting at this path; None if there is no such setting."""
    kind: Any = schema
    for name in names:
        if is_dataclass(kind):
            kind = _hints(typing.cast(Any, kind)).get(name)
        else:
            of_dicts = [typing.get_args(part) for part in _parts(kind) if typing.get_origin(part) is dict]
            kind = of_dicts[0][1] if of_dicts else Any
    return kind


def _parts(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _as(hint: Any, value: Any, path: str) -> Any:
    """Return the value in the setting's type; a whole number will do for a number. UserError for a wrong type."""
    for kind in _parts(hint):
        plain, parts = typing.get_origin(kind) or kind, typing.get_args(kind)
        if plain is list and isinstance(value, list | tuple):
            return [_as(parts[0], item, path) for item in value]
        if plain is dict and isinstance(value, Mapping):
            return {str(key): _as(parts[1], item, path) for key, item in value.items()}
        if plain is float and type(value) is int:
            return float(value)
        if plain is str and isinstance(value, str):
            return str(value)  # a plain text, not a StrEnum
        if plain is Any or type(value) is plain:
            return value
    raise UserError(path, value, f"must be {kind_in_words(hint)}", f"set {path} to such a value")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _nowhere(own: Mapping[_Names, Any], names: Sequence[str], value: Any) -> UserError:
    path = ".".join(names)
    fix = "name a setting of the study; settings of a policy need policy=NAME, those of an arm begin with arms.NAME"
    return UserError(path, value, "no such setting", closest(path, known_settings(type(own[()]))) or fix)
