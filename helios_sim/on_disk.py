"""Columns that are too large for memory: ordinary arrays over a file, of which only the pages in use are in memory.

Whoever goes over long columns does so in `spans`, after each of which their pages are let go. What does not is just as
right, and takes the memory that it reads. The file lies in the folder for temporary files and has no name, so that it
is gone with the process, however that ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

SPAN_ROWS = 65_536  # that are in memory at once
WORTH_A_FILE = 2 * SPAN_ROWS  # rows, from which columns are put on disk
_ALIGNED = mmap.PAGESIZE
_ON_DISK = "/var/tmp"  # noqa: S108 (only files without a name are put there)


def temporary_folder() -> str:
    """Where such files lie: in TMPDIR, or else in /var/tmp, since /tmp may be memory itself."""
    if any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")) or not os.access(_ON_DISK, os.W_OK):
        return tempfile.gettempdir()
    return _ON_DISK


def zeros(kinds: Mapping[str, Any], rows: int) -> dict[str, NDArray[Any]]:
    """Columns of these types, each of shape (rows,). OSError where there is no room for them."""
    ends, at = {}, 0
    for name, kind in kinds.items():
        ends[name] = at
        at += -(-rows * np.dtype(kind).itemsize // _ALIGNED) * _ALIGNED
    with tempfile.TemporaryFile(dir=temporary_folder()) as file:
        _reserve(file.fileno(), at)
        mapping = mmap.mmap(file.fileno(), at)
    columns = {name: np.frombuffer(mapping, kind, rows, ends[name]) for name, kind in kinds.items()}
    _advise(next(iter(columns.values())), "MADV_RANDOM")  # or the system maps many pages around those that are written
    return columns


def _reserve(descriptor: int, size_bytes: int) -> None:
    """A page that found no room on the disk when it is written would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size_bytes)
        return
    with open(descriptor, "wb", closefd=False) as file:
        for first in range(0, size_bytes, 1 << 20):
            file.write(bytes(min(1 << 20, size_bytes - first)))


def is_on_disk(column: NDArray[Any]) -> bool:
    return _mapping(column) is not None


def spans(column: NDArray[Any]) -> Iterator[slice]:
    """The places of a column from first to last, so many at a time that those between may be in memory."""
    for first in range(0, len(column), SPAN_ROWS):
        yield slice(first, min(first + SPAN_ROWS, len(column)))
        let_go(column)


def expect_reading(column: NDArray[Any]) -> None:
    """From now on this column, and those in the same file, are read in order."""
    _advise(column, "MADV_SEQUENTIAL")


def let_go(column: NDArray[Any]) -> None:
    """The pages of this column, and of those that lie in the same file, leave the memory of this process."""
    _advise(column, "MADV_DONTNEED")  # which loses nothing where memory is shared with a file


def _advise(column: NDArray[Any], what: str) -> None:
    mapping = _mapping(column)
    if mapping is not None and hasattr(mmap, what):
        mapping.madvise(getattr(mmap, what))


def _mapping(column: NDArray[Any]) -> mmap.mmap | None:
    """What a view is a view of, in the end."""
    base: Any = column
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return base if isinstance(base, mmap.mmap) else None
