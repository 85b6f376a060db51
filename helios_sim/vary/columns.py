"""Values of known types as bytes and back: JSON and columns under a checksum, and nothing that could run code.

Types decide what is read: a dataclass by its fields, one of a union by its name. A value of the wrong type is a
ValueError, like a checksum that does not match.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import types
import typing
from collections import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from helios_sim import on_disk

_Kind = TypeVar("_Kind")
_PLAIN = (str, int, float, bool, types.NoneType)
_SEQUENCES: tuple[tuple[Any, Callable[[list[Any]], Any]], ...] = (
    (tuple, tuple), (list, list), (abc.Sequence, tuple), (frozenset, frozenset), (set, set),
)  # fmt: skip


def to_bytes(value: Any) -> bytes:
    """Return a line with the checksum of the rest, two lines of JSON (arrays' types, the value), then the arrays."""
    return b"".join(in_parts(value))


def in_parts(value: Any) -> Iterator[Any]:
    """Yield what `to_bytes` returns piece by piece, without a second copy of the arrays."""
    arrays: list[NDArray[Any]] = []
    text = json.dumps(to_plain(value, arrays), separators=(",", ":"))
    head = json.dumps([[array.dtype.str, array.shape] for array in arrays])
    about = f"{head}\n{text}\n".encode()
    checksum: Any = hashlib.sha256(about)
    for piece in _pieces(arrays):
        checksum.update(piece)
    yield checksum.hexdigest().encode() + b"\n"
    yield about
    yield from _pieces(arrays)


def _pieces(arrays: Sequence[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    for array in map(np.atleast_1d, arrays):
        for rows in on_disk.spans(array):
            yield np.ascontiguousarray(array[rows])


def from_file(kind: type[_Kind], path: Path) -> _Kind:
    """Return the value in a file written from `in_parts`, without reading all of it into memory. ValueError as for
    `from_bytes`.
    """
    with path.open("rb") as file:
        return from_bytes(kind, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def from_bytes(kind: type[_Kind], content: bytes | mmap.mmap) -> _Kind:
    """Return the value that `to_bytes` was given. ValueError if the content is damaged, or of another type."""
    about = content.find(b"\n") + 1
    checksum: Any = hashlib.sha256()
    for piece in _pieces([np.frombuffer(content, np.uint8, offset=about)] if len(content) > about else []):
        checksum.update(piece)
    if checksum.hexdigest().encode() + b"\n" != content[:about]:
        raise ValueError("the checksum does not match")
    text = content.find(b"\n", about) + 1
    start = content.find(b"\n", text) + 1
    columns = []
    for name, shape in json.loads(content[about:text]):
        columns.append(np.frombuffer(content, name, int(np.prod(shape)), start if np.prod(shape) else 0).reshape(shape))
        start += columns[-1].nbytes
    found: _Kind = from_plain(kind, json.loads(content[text : content.find(b"\n", text)]), on_disk.copies(columns))
    return found


def to_plain(value: Any, arrays: list[NDArray[Any]] | None = None) -> Any:
    """Return JSON values. Arrays go into `arrays`; without it an array is a TypeError, as is a type without fields."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, np.ndarray) and arrays is not None:
        arrays.append(value)
        return len(arrays) - 1
    if isinstance(value, Mapping):
        return [[to_plain(key, arrays), to_plain(item, arrays)] for key, item in value.items()]
    if isinstance(value, list | tuple | set | frozenset):  # items are mostly numbers, which need no call
        return [item if type(item) in _PLAIN else to_plain(item, arrays) for item in value]
    return {"": type(value).__name__, **{name: to_plain(getattr(value, name), arrays) for name in _names(type(value))}}


def from_plain(hint: Any, value: Any, arrays: list[NDArray[Any]] | None = None) -> Any:
    """Return the value of type `hint` that `to_plain` made plain. ValueError if it is of another type."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _one_of(parts, value, arrays)
    if hint is Any:
        return _untyped(value)
    if hint in _PLAIN:
        if type(value) is hint or (hint is float and type(value) is int):  # tables show 200, not 200.0
            return value
        raise ValueError(f"{value!r} is no {hint.__name__}")
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    if origin is np.ndarray:
        if arrays is None or type(value) is not int or not 0 <= value < len(arrays):
            raise ValueError(f"{value!r} is no column")
        return arrays[value]
    if origin in (dict, abc.Mapping):
        return {from_plain(parts[0], key, arrays): from_plain(parts[1], item, arrays) for key, item in value}
    for kind, make in _SEQUENCES:
        if origin is kind:
            return make(_items(parts, value, arrays))
    return _with_fields(hint, value, arrays)


def _one_of(parts: tuple[Any, ...], value: Any, arrays: list[NDArray[Any]] | None) -> Any:
    if isinstance(value, dict):
        named = [part for part in parts if getattr(part, "__name__", "") == value.get("")]
        return _with_fields(named[0], value, arrays) if named else _unknown(value)
    exact = [part for part in parts if type(value) is part]
    for part in exact or parts:
        try:
            return from_plain(part, value, arrays)
        except (ValueError, TypeError):
            continue
    return _unknown(value)


def _items(parts: tuple[Any, ...], value: Any, arrays: list[NDArray[Any]] | None) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is no list")
    hints = parts if len(parts) > 1 and parts[1] is not Ellipsis else (parts[0],) * len(value)
    return [from_plain(part, item, arrays) for part, item in zip(hints, value, strict=True)]


def _with_fields(kind: Any, value: Any, arrays: list[NDArray[Any]] | None) -> Any:
    hints = _hints(kind)
    if not isinstance(value, dict) or value.get("") != kind.__name__ or {*value} != {"", *hints}:
        raise ValueError(f"{value!r} is no {kind.__name__}")
    made = kind.__new__(kind)
    for name, hint in hints.items():
        object.__setattr__(made, name, from_plain(hint, value[name], arrays))
    return made


def _untyped(value: Any) -> Any:
    """Return the value of a free setting; a list of pairs that each begin with a text is a mapping."""
    if isinstance(value, list):
        pairs = value and all(isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) for item in value)
        return {key: _untyped(item) for key, item in value} if pairs else [_untyped(item) for item in value]
    return value if not isinstance(value, dict) else _unknown(value)


def _unknown(value: Any) -> Any:
    raise ValueError(f"{value!r} is of no type that is expected")


def _names(kind: Any) -> tuple[str, ...]:
    return tuple(_hints(kind))


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """Return types by field, of a dataclass or of a class that declares them."""
    try:
        hints = typing.get_type_hints(kind)
    except NameError as error:
        raise TypeError(f"{kind} has types that are not known when it is kept") from error
    if is_dataclass(kind):
        return {f.name: hints[f.name] for f in fields(kind)}
    if not hints:
        raise TypeError(f"{kind} has no fields")
    return hints
