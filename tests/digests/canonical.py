"""Digests of results: the same for equal results, whatever the types that hold them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import numpy as np

# Fields that are left out where they are None, as before there were any.
YOUNG = ("resident_layers", "checkpoints", "near")
DIGITS = 10  # significant ones of figures that need not be the same on every CPU


def digest(value: Any, *, exact: bool = False, length: int = 12) -> str:
    """Hex digits of sha256 over plain JSON of the value. Floats count to DIGITS digits unless `exact`."""
    text = json.dumps(plain(value, exact), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def digest_of_bytes(parts: Iterable[bytes], length: int = 12) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:length]


def plain(value: Any, exact: bool = False) -> Any:
    """Lists, dicts, texts and numbers. Dataclasses carry their name; floats become texts."""
    if isinstance(value, Enum):
        return plain(value.value, exact)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return repr(value) if exact else f"{value:.{DIGITS - 1}e}"
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist(), exact)
    if isinstance(value, Mapping):
        return {str(plain(key, exact)): plain(item, exact) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(item, exact) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in fields(value) if f.name not in YOUNG or getattr(value, f.name) is not None]
        return {"is": type(value).__name__} | {name: plain(getattr(value, name), exact) for name in names}
    raise TypeError(f"{type(value).__name__} has no plain form")


def difference(expected: Any, found: Any, place: str = "") -> list[str]:
    """Where two nested mappings of digests differ, as paths."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        both = [key for key in expected if key in found]
        inside = [line for key in both for line in difference(expected[key], found[key], f"{place}/{key}")]
        alone = [f"{place}/{key} is only on one side" for key in expected.keys() ^ found.keys()]
        return sorted(alone) + inside
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        return [line for i, (a, b) in pairs for line in difference(a, b, f"{place}/{i}")]
    return [] if expected == found else [f"{place}: recorded {expected}, found {found}"]
