"""Writes files so that nobody ever reads half of one. Knows formats and disks, not what is in the files."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from helios_sim.errors import UserError

if TYPE_CHECKING:
    import pyarrow

_FIX = "free space on the disk or choose a folder that you may write to"


def make_folder(folder: Path) -> None:
    """Create the folder and those above it; UserError when that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` only when the block ends without an error.

    Raises UserError when the disk is full or the folder cannot be written to; an older `path` then stays as it was.
    """
    make_folder(path.parent)
    scratch: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as file:
            scratch = Path(file.name)
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.chmod(0o644)  # temporary files are private by default
        os.replace(scratch, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        if scratch is not None:
            scratch.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON: refuses NaN and infinities (ValueError) rather than writing what others cannot read."""
    return json.dumps(value, allow_nan=False, indent=indent, ensure_ascii=False)


def write_json(path: Path, value: Any) -> None:
    write_text(path, to_json(value, indent=2) + "\n")


def write_parquet(path: Path, table: pyarrow.Table) -> None:
    from pyarrow import parquet

    with replacing(path) as file:
        parquet.write_table(table, file, compression="zstd")


def write_parquet_parts(path: Path, tables: Iterable[pyarrow.Table]) -> None:
    """Tables of one schema, at least one, as row groups of one file; only one of them is in memory at a time."""
    from pyarrow import parquet

    with replacing(path) as file:
        parts = iter(tables)
        first = next(parts)
        with parquet.ParquetWriter(file, first.schema, compression="zstd") as writer:
            writer.write_table(first)
            for table in parts:
                writer.write_table(table)


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError("output folder", str(path), f"cannot be written: {error.strerror or error}", _FIX)
