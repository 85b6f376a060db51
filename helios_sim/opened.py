"""Which files a user's own code reads while it works: a result that it decided is made of them too.

Python tells an audit hook of every file that it opens. What a library opens by itself, in C or Rust, is not seen.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from helios_sim.contents import sha256_of

_In = TypeVar("_In")
_Out = TypeVar("_Out")
OPENED = "opened by a policy: "  # before the path, among the names of what a study was made of
_SYSTEM = ("/proc/", "/sys/", "/dev/")
_CODE = (".py", ".pyc", ".so")  # which is known by itself (study.inputs)
_opened: list[set[str]] = []  # by the innermost code that is watched
_written: set[str] = set()  # by code that is watched: what it made itself is no input
_digests: dict[str, dict[str, str]] = {}  # of files read, by the name of the code; its module is imported once
_used: set[str] = set()  # names of the code that worked since it was last asked


@contextmanager
def watched(name: str) -> Iterator[None]:
    """Note what the code of this name opens inside the `with` block."""
    _hook()
    paths: set[str] = set()
    _opened.append(paths)
    _used.add(name)
    try:
        yield
    finally:
        _opened.remove(paths)
        if paths:
            known = _digests.setdefault(name, {})
            known |= {path: digest for path in sorted(paths - _written) if (digest := digest_now(path)) is not None}


@dataclass(frozen=True, slots=True)
class Watched(Generic[_In, _Out]):
    """A function with what the user's own code read for its result: digests by path."""

    function: Callable[[_In], _Out]

    def __call__(self, value: _In) -> tuple[_Out, Mapping[str, str]]:
        _used.clear()
        result = self.function(value)
        found = [_digests.get(name, {}) for name in sorted(_used)]
        return result, {path: digest for read in found for path, digest in read.items()}


def digest_now(path: str) -> str | None:
    """The sha256 of a regular file; None where there is none."""
    with suppress(OSError, ValueError):
        if Path(path).is_file():
            return sha256_of(Path(path))[:16]
    return None


def named(read: Mapping[str, str]) -> dict[str, str]:
    """Files that were read, as they stand among what a study was made of: those below this folder by the way there."""
    here = Path.cwd()
    paths = {path: Path(path) for path in read}
    shown = {path: p.relative_to(here) if p.is_relative_to(here) else p for path, p in paths.items()}
    return {f"{OPENED}{shown[path]}": digest for path, digest in read.items()}


def opened_now(names: Iterable[str]) -> dict[str, str]:
    """Those of the names that stand for a file that a policy opened, with what it holds now."""
    paths = [name.removeprefix(OPENED) for name in names if name.startswith(OPENED)]
    return {OPENED + path: digest for path in paths if (digest := digest_now(path)) is not None}


@cache
def _hook() -> None:
    """Hooks stay until the process ends, so there is one, and it does nothing while no code is watched."""
    sys.addaudithook(_note)


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if not _opened or event not in ("open", "sqlite3.connect"):
        return
    with suppress(Exception):  # of odd names: what cannot be noted must not fail
        path = os.path.abspath(os.fsdecode(arguments[0]))
        flags = arguments[2] if event == "open" and isinstance(arguments[2], int) else os.O_RDONLY
        if flags & (os.O_WRONLY | os.O_RDWR):
            _written.add(path)
        elif not path.startswith((*_SYSTEM, *_of_libraries())) and not path.endswith(_CODE):
            _opened[-1].add(path)


@cache
def _of_libraries() -> tuple[str, ...]:
    folders = [Path(prefix).resolve() / "lib" for prefix in (sys.prefix, sys.base_prefix)]
    folders += [Path(sys.prefix) / "lib", Path(__file__).parent]
    return tuple(f"{folder}{os.sep}" for folder in folders)
