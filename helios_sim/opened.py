"""Notes which files a user's own code reads while it works: they are inputs of the results that it decides.

Python reports every file that it opens to an audit hook. Files that a library opens in C or Rust are not seen.
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
OPENED = "opened by a policy: "  # prefix of the path, among the names of a study's inputs
_SYSTEM = ("/proc/", "/sys/", "/dev/")
_CODE = (".py", ".pyc", ".so")  # code is an input of its own (study.inputs)
_opened: list[set[str]] = []  # paths opened in each `watched` block, the innermost last
_written: set[str] = set()  # paths that watched code has written: its own output is no input
_digests: dict[str, dict[str, str]] = {}  # of files read, by the name of the code; kept, as a module is imported once
_used: set[str] = set()  # names of the code that worked since the latest call of a `Watched` began


@contextmanager
def watched(name: str) -> Iterator[None]:
    """Note which files the code of this name opens inside the `with` block."""
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
    """A function that also returns digests, by path, of the files that the user's own code read for its result."""

    function: Callable[[_In], _Out]

    def __call__(self, value: _In) -> tuple[_Out, Mapping[str, str]]:
        _used.clear()
        result = self.function(value)
        found = [_digests.get(name, {}) for name in sorted(_used)]
        return result, {path: digest for read in found for path, digest in read.items()}


def digest_now(path: str) -> str | None:
    """Return the first 16 digits of the sha256 of a regular file; None if there is none."""
    with suppress(OSError, ValueError):
        if Path(path).is_file():
            return sha256_of(Path(path))[:16]
    return None


def named(read: Mapping[str, str]) -> dict[str, str]:
    """Return files that were read under their names among a study's inputs: paths below this folder are relative."""
    here = Path.cwd()
    paths = {path: Path(path) for path in read}
    shown = {path: p.relative_to(here) if p.is_relative_to(here) else p for path, p in paths.items()}
    return {f"{OPENED}{shown[path]}": digest for path, digest in read.items()}


def opened_now(names: Iterable[str]) -> dict[str, str]:
    """Return present digests of the files that a policy opened, for those names of inputs that stand for such files."""
    paths = [name.removeprefix(OPENED) for name in names if name.startswith(OPENED)]
    return {OPENED + path: digest for path in paths if (digest := digest_now(path)) is not None}


@cache
def _hook() -> None:
    """Install the audit hook, once: hooks stay until the process ends. It does nothing while no code is watched."""
    sys.addaudithook(_note)


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if not _opened or event not in ("open", "sqlite3.connect"):
        return
    with suppress(Exception):  # odd names: a file that cannot be noted must not stop the code
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
