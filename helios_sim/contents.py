"""Digests of files: a result is identified by the contents of its inputs, never by a name or a time.

A file is read again only if the system says that it was written since. This is only a shortcut: a new process reads
every file anew.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path

Stamp = tuple[int, ...]


def stamp(path: Path) -> Stamp:
    """Return a value that changes when the file is written or replaced. `ctime` cannot be set back by a program."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def sha256_of(path: Path) -> str:
    """Return the file's sha256."""
    return _sha256_of(path, stamp(path))


@lru_cache(maxsize=4096)
def _sha256_of(path: Path, written: Stamp) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(*paths: Path) -> str:
    """Return one digest of files, and of all files in folders with their names."""
    parts = []
    for path in paths:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        parts += [f"{file.relative_to(path)} {sha256_of(file)}" for file in files]
    return digest("\n".join(parts).encode())


def code_of(folder: Path, *parts: str) -> str:
    """Return one digest of the Python sources in a folder and their names; `parts`: only these files and folders."""
    found: dict[tuple[str, ...], Path | str] = {}  # by the parts of their paths, which give the order of reading
    for place in [folder / part for part in parts] or [folder]:
        if place.is_file():
            found[place.relative_to(folder).parts] = place
        for above, _, names in os.walk(place):
            inside = Path(above).relative_to(folder).parts
            found |= {(*inside, name): f"{above}{os.sep}{name}" for name in names if name.endswith(".py")}
    content = []
    for path in sorted(found):
        with open(found[path], "rb", buffering=0) as file:  # unbuffered, in one read: twice as quick
            content += [os.sep.join(path).encode(), file.read()]
    return digest(b"".join(content))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
