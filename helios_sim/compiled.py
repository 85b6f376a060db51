"""Compiles plain functions over arrays to machine code. Knows what they need, not what they compute.

The machine code is kept on disk. Numba notices that the file of a compiled function has changed, but not that another
file has whose functions were compiled into it; so the folder's name depends on the text of all of them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

_Function = TypeVar("_Function", bound=Callable[..., Any])

_PACKAGE = Path(__file__).parent
_SOURCES = (
    "compiled.py", "policy/compiled_draws.py", "profile/price_tables.py", "profile/compiled_prices.py",
    "serving/ahead/*.py",
)  # fmt: skip


def compiled(function: _Function) -> _Function:
    """The same function as machine code, made when it is first called with these types of arguments.

    It may use numbers, arrays, records, named tuples of arrays, and other compiled functions. The operations are those
    of Python in its order: floats come out the same to the last bit.
    """
    import numba

    config: Any = numba.config  # has its settings at run time only
    before, config.CACHE_DIR = config.CACHE_DIR, str(cache_folder())
    try:
        return cast(_Function, numba.njit(cache=True, error_model="numpy")(function))
    finally:
        config.CACHE_DIR = before


def is_made(function: str) -> bool:
    """Whether the machine code of a function of this name lies on disk: to make it takes tens of seconds."""
    return next(cache_folder().glob(f"*/*.{function}-*.nbi"), None) is not None


@cache
def cache_folder() -> Path:
    """Of the machine code of these sources. It may not exist yet."""
    texts = [path.read_bytes() for pattern in _SOURCES for path in sorted(_PACKAGE.glob(pattern))]
    name = hashlib.sha256(b"".join(texts)).hexdigest()[:16]
    base = os.environ.get("HELIOS_CACHE") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/helios-sim"
    return Path(base).expanduser() / "compiled" / name
