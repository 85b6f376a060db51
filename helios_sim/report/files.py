"""Output files: JSON values and Arrow columns, and writing that leaves a complete file or none."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

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
    write_bytes(path, text.encode(errors="backslashreplace"))  # of bytes that were no text where they came from


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinities, which other programs cannot read, raise a ValueError."""
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


def numbers(values: NDArray[Any], present: NDArray[np.bool_] | None = None) -> pyarrow.Array:
    """A column of numbers over the same memory, shape (n,), null where not `present`."""
    import pyarrow as pa

    known = None if present is None else pa.py_buffer(np.packbits(present, bitorder="little"))
    content = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [known, content])


def texts(values: Sequence[str]) -> pyarrow.Array:
    """A column of texts, at most 2 GB in all."""
    import pyarrow as pa

    encoded = [value.encode(errors="backslashreplace") for value in values]
    ends = np.cumsum([0, *map(len, encoded)]).astype(np.int32)
    return pa.Array.from_buffers(pa.string(), len(encoded), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))])


def json_value(value: Any) -> Any:
    """Plain JSON values of dataclasses, enums, NumPy scalars and arrays; NaN and infinities become null."""
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, np.generic | np.ndarray):
        return json_value(value.tolist())
    if is_dataclass(value) and not isinstance(value, type):
        return json_value(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [json_value(item) for item in value]
    return str(value)
