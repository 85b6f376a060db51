"""Output files: JSON values and Arrow columns, and writing that leaves a complete file or none.

Every file that this program keeps goes through `replacing`: it is written beside its place, synced to the disk, and
renamed. Files that are read together and described by one of them go through `write_together`.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
    """Open a binary file that takes the place of `path` only if the block ends without an error.

    Raises UserError when the disk is full or the folder cannot be written to; an older `path` then stays as it was.
    """
    make_folder(path.parent)
    scratch = _beside(path)
    try:
        with scratch.open("xb") as file:  # with the permissions that the umask allows
            yield file
            _sync(file)
        os.replace(scratch, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        _remove(scratch)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.tmp")


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _remove(scratch: Path) -> None:
    with suppress(OSError):
        scratch.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    write_parts(path, [content])


def write_parts(path: Path, parts: Iterable[Any]) -> None:
    """Write a file of several parts, bytes or buffers, one after the other."""
    with replacing(path) as file:
        for part in parts:
            file.write(part)


def write_together(folder: Path, parts: Mapping[str, bytes | None], header: str, described: bytes) -> None:
    """Write files of one folder by name (None removes that file), and the header that describes them.

    An interruption leaves the old files, the new ones, or a folder without a header, never a header with mixed files.
    Raises UserError if they cannot be written.
    """
    make_folder(folder)
    whole = {**{name: content for name, content in parts.items() if content is not None}, header: described}
    scratch = {name: _beside(folder / name) for name in whole}
    try:
        for name, content in whole.items():
            with scratch[name].open("xb") as file:
                file.write(content)
                _sync(file)
        (folder / header).unlink(missing_ok=True)
        for name in parts:
            if name in scratch:
                os.replace(scratch[name], folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        os.replace(scratch[header], folder / header)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        for draft in scratch.values():
            _remove(draft)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode(errors="backslashreplace"))  # for input bytes that were no valid text


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return strict JSON: NaN and infinities, which other programs cannot read, raise a ValueError."""
    return json.dumps(value, allow_nan=False, indent=indent, ensure_ascii=False)


def write_json(path: Path, value: Any) -> None:
    write_text(path, to_json(value, indent=2) + "\n")


def parquet(table: pyarrow.Table) -> bytes:
    """Return the content of a Parquet file."""
    from pyarrow import BufferOutputStream, parquet as arrow_parquet

    sink = BufferOutputStream()
    arrow_parquet.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())


def write_parquet(path: Path, table: pyarrow.Table) -> None:
    from pyarrow import parquet

    with replacing(path) as file:
        parquet.write_table(table, file, **_compact(table.schema))


def write_parquet_parts(path: Path, tables: Iterable[pyarrow.Table]) -> None:
    """Write tables of one schema, at least one, as row groups of one file; only one is in memory at a time."""
    from pyarrow import parquet

    with replacing(path) as file:
        parts = iter(tables)
        table = next(parts)
        with parquet.ParquetWriter(file, table.schema, **_compact(table.schema)) as writer:
            writer.write_table(table)
            del table  # free it before the next one is made
            for table in parts:
                writer.write_table(table)
                del table


def _compact(schema: pyarrow.Schema) -> dict[str, Any]:
    """Return options for long tables: dictionary encoding pays for texts alone, since nearly all numbers differ."""
    from pyarrow import types

    texts = [f.name for f in schema if not (types.is_integer(f.type) or types.is_floating(f.type))]
    return {"compression": "zstd", "use_dictionary": texts}


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError("output folder", str(path), f"cannot be written: {error.strerror or error}", _FIX)


def numbers(values: NDArray[Any], present: NDArray[np.bool_] | None = None) -> pyarrow.Array:
    """Return a column over the memory of `values`, shape (n,), null where not `present`."""
    import pyarrow as pa

    known = None if present is None else pa.py_buffer(np.packbits(present, bitorder="little"))
    content = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [known, content])


def texts(values: Sequence[str]) -> pyarrow.Array:
    """Return a column of texts, at most 2 GB in all."""
    import pyarrow as pa

    encoded = [value.encode(errors="backslashreplace") for value in values]
    ends = np.cumsum([0, *map(len, encoded)]).astype(np.int32)
    return pa.Array.from_buffers(pa.string(), len(encoded), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))])


def json_value(value: Any) -> Any:
    """Turn dataclasses, enums, NumPy scalars and arrays into plain JSON values; NaN and infinities become null."""
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
