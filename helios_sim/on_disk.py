"""Columns that are too large for memory: ordinary arrays over a file, of which only the pages in use are in memory.

Code that goes over long columns does so in `spans`, and the pages of each span are released after it. Other code gives
the same results, but takes the memory of all that it reads. The file lies in the folder for temporary files and has no
name, so that it is gone with the process, however the process ends.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

SPAN_ROWS = 65_536  # rows that are in memory at once
WORTH_A_FILE = 2 * SPAN_ROWS  # rows from which on columns are put on disk
_Name = TypeVar("_Name")
_ALIGNED = mmap.PAGESIZE
_ON_DISK = "/var/tmp"  # noqa: S108 (only files without a name are put there)


def temporary_folder() -> str:
    """Return the folder of such files: TMPDIR, or else /var/tmp, since /tmp may be memory itself."""
    if any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")) or not os.access(_ON_DISK, os.W_OK):
        return tempfile.gettempdir()
    return _ON_DISK


def free_bytes() -> int:
    """Return how much room there is for such files; 0 where that cannot be told."""
    with suppress(OSError):
        disk = os.statvfs(temporary_folder())
        return disk.f_bavail * disk.f_frsize
    return 0


def zeros(kinds: Mapping[_Name, Any], rows: int) -> dict[_Name, NDArray[Any]]:
    """Make columns of these types, each of shape (rows,). OSError if there is no room for them on the disk."""
    starts, at = {}, 0
    for name, kind in kinds.items():
        starts[name] = at
        at += -(-rows * np.dtype(kind).itemsize // _ALIGNED) * _ALIGNED
    with tempfile.TemporaryFile(dir=temporary_folder()) as file:
        _reserve(file.fileno(), at)
        mapping = mmap.mmap(file.fileno(), at)
    columns = {name: np.frombuffer(mapping, kind, rows, starts[name]) for name, kind in kinds.items()}
    _advise(next(iter(columns.values())), "MADV_RANDOM")  # or the system maps many pages around each written page
    return columns


def _reserve(descriptor: int, size_bytes: int) -> None:
    """Reserve room on the disk: a written page without room would end the process."""
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
        return
    except AttributeError:
        pass  # a system without it
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # those of a file system without it
            raise
    with open(descriptor, "wb", closefd=False) as file:
        for first in range(0, size_bytes, 1 << 20):
            file.write(bytes(min(1 << 20, size_bytes - first)))


def copies(columns: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """Return copies of these arrays, those with many rows on disk if there is room for them."""
    kinds = {place: it.dtype for place, it in enumerate(columns) if it.ndim == 1 and len(it) >= WORTH_A_FILE}
    try:
        long = zeros(kinds, max(len(columns[place]) for place in kinds)) if kinds else {}
    except OSError:
        long = {}
    found = []
    for place, column in enumerate(columns):
        if place not in long:
            found.append(column.copy())
            continue
        own = long[place][: len(column)]
        for rows in spans(column):
            own[rows] = column[rows]
            let_go(own)
        found.append(own)
    for column in long.values():
        expect_reading(column)
    return found


def is_on_disk(column: NDArray[Any]) -> bool:
    return _mapping(column) is not None


def spans(column: NDArray[Any]) -> Iterator[slice]:
    """Yield slices of a column from first to last, each small enough for memory, and release each after its use."""
    for first in range(0, len(column), SPAN_ROWS):
        yield slice(first, min(first + SPAN_ROWS, len(column)))
        let_go(column)


def expect_reading(column: NDArray[Any]) -> None:
    """Tell the system that this column, and those in the same file, are read in order from now on."""
    _advise(column, "MADV_SEQUENTIAL")


def let_go(column: NDArray[Any]) -> None:
    """Release the pages of this column, and of those in the same file, from the memory of this process."""
    _advise(column, "MADV_DONTNEED")  # nothing is lost, since the memory is shared with a file


def _advise(column: NDArray[Any], what: str) -> None:
    mapping = _mapping(column)
    if mapping is not None and hasattr(mmap, what):
        mapping.madvise(getattr(mmap, what))


def _mapping(column: NDArray[Any]) -> mmap.mmap | None:
    """Return the mapping over which a column is a view; None if it is in ordinary memory."""
    base: Any = column
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return base if isinstance(base, mmap.mmap) else None
