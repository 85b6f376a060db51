"""Recorded request traces and their readers: Azure 2023, Mooncake, Vidur, LLMServingSim, plain CSV; plain or gzipped.

pyarrow reads a file in one pass. Only when something is wrong with it is it read again, line by line, to name the
first bad line and column.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError, require_count
from helios_sim.request import LATEST_NS, LONGEST, NS_PER_S
from helios_sim.shared_data import VARIABLE, shared_data_folder

if TYPE_CHECKING:
    import pyarrow as pa

_DAMAGE = (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error)  # what reading a damaged file may raise
_DROP = "correct or remove the line"


@dataclass(frozen=True, slots=True, eq=False)
class RequestTrace:
    """A recorded workload: columns of shape (n,), dtype int64, n >= 1, by arrival; lengths are at least 1 token."""

    source: str  # the file, for messages and reports
    arrival_ns: NDArray[np.int64] | None  # from 0, not decreasing; None: the file has lengths only
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    notices: tuple[str, ...] = ()  # what the reader changed, for the report
    priority: NDArray[np.int64] | None = None  # the lowest is served first; None: the file has no such column

    def __len__(self) -> int:
        return len(self.prompt_tokens)


class Role(StrEnum):
    """What a column tells about a request."""

    ARRIVAL = "arrival"
    PROMPT = "prompt length"
    OUTPUT = "output length"
    PRIORITY = "priority"


class CellFormat(StrEnum):
    """How a cell is written."""

    TOKENS = "tokens"
    WHOLE = "whole number"
    SECONDS = "seconds"
    MILLISECONDS = "milliseconds"
    NANOSECONDS = "nanoseconds"
    DATE = "date"  # 2023-11-16 18:15:46.6805900


@dataclass(frozen=True, slots=True)
class TraceColumn:
    """A column that traces use, by its name in the header."""

    name: str
    role: Role
    format: CellFormat


_KNOWN = {
    column.name: column
    for column in (
        TraceColumn("arrival_s", Role.ARRIVAL, CellFormat.SECONDS),  # ours; Vidur's request metrics
        TraceColumn("arrival_ns", Role.ARRIVAL, CellFormat.NANOSECONDS),  # LLMServingSim
        TraceColumn("timestamp", Role.ARRIVAL, CellFormat.MILLISECONDS),  # Mooncake
        TraceColumn("TIMESTAMP", Role.ARRIVAL, CellFormat.DATE),  # Azure 2023
        TraceColumn("prompt_tokens", Role.PROMPT, CellFormat.TOKENS),
        TraceColumn("prefill_tokens", Role.PROMPT, CellFormat.TOKENS),  # Vidur
        TraceColumn("num_prefill_tokens", Role.PROMPT, CellFormat.TOKENS),  # Vidur's processed traces
        TraceColumn("input_toks", Role.PROMPT, CellFormat.TOKENS),  # LLMServingSim, vLLM logs
        TraceColumn("input_length", Role.PROMPT, CellFormat.TOKENS),  # Mooncake
        TraceColumn("ContextTokens", Role.PROMPT, CellFormat.TOKENS),  # Azure 2023
        TraceColumn("output_tokens", Role.OUTPUT, CellFormat.TOKENS),
        TraceColumn("decode_tokens", Role.OUTPUT, CellFormat.TOKENS),
        TraceColumn("num_decode_tokens", Role.OUTPUT, CellFormat.TOKENS),
        TraceColumn("output_toks", Role.OUTPUT, CellFormat.TOKENS),
        TraceColumn("output_length", Role.OUTPUT, CellFormat.TOKENS),
        TraceColumn("GeneratedTokens", Role.OUTPUT, CellFormat.TOKENS),
        TraceColumn("priority", Role.PRIORITY, CellFormat.WHOLE),  # vLLM's field of a request: the lowest is first
    )
}
_NS_PER = {CellFormat.SECONDS: NS_PER_S, CellFormat.MILLISECONDS: 1_000_000}
_ALLOWED = {
    CellFormat.TOKENS: f"must be a whole number of tokens, from 1 to {LONGEST}",
    CellFormat.SECONDS: "must be seconds, at least 0",
    CellFormat.MILLISECONDS: "must be milliseconds, at least 0",
    CellFormat.NANOSECONDS: "must be whole nanoseconds, at least 0",
    CellFormat.WHOLE: "must be a whole number",
    CellFormat.DATE: "must be a date and time such as 2023-11-16 18:15:46.680",
}


class TraceFileError(UserError):
    """A file that is not there or is no trace as a whole; its key is a setting that is one of several."""


class _NotReadable(Exception):
    """A cell does not hold what its column needs."""


def read_trace(path: str | Path, limit: int | None = None) -> RequestTrace:
    """The requests of a trace, sorted by arrival, the first arrival at 0; at most the first `limit` of them.

    `.jsonl` is Mooncake's format (timestamp in ms, input_length, output_length); anything else is CSV with
    known names in its header (`_KNOWN`), with or without arrivals. `.gz` is unpacked. A relative path that does not
    exist is looked for in the folder of shared data. Raises UserError naming file, line, column and the fix.
    """
    if limit is not None:
        require_count("workload.trace.limit", limit, "null for all requests")
    file = locate(path)
    written = file.stat()
    return _read(file, limit, written.st_mtime_ns, written.st_size)


@lru_cache(maxsize=4)  # arrivals and lengths come from one file, and every arm and seed of a study reads it
def _read(file: Path, limit: int | None, written_ns: int, n_bytes: int) -> RequestTrace:
    """Cached by the file's time and size, so that a file that was written again is read again."""
    names = _column_names(file)
    columns = _find_columns(file.name, names)
    try:
        table = _read_table(file, columns)
        values = {column.role: _values(table, column) for column in columns}
    except _NotReadable as why:
        _refuse_file(file, columns, str(why))
    if not len(table):
        raise TraceFileError("workload.trace", str(file), "must hold at least one request", "choose another file")
    return _trace(file.name, values, limit)


def _column_names(file: Path) -> Sequence[str]:
    try:
        with _open_text(file) as lines:
            if not _is_jsonl(file):
                return next(csv.reader(lines), [])
            first = json.loads(lines.readline() or "{}")
            return list(first) if isinstance(first, dict) else []
    except (*_DAMAGE, json.JSONDecodeError) as error:
        raise TraceFileError(
            "workload.trace", str(file), f"its first line cannot be read ({error})", "fetch the file again"
        ) from error


def _read_table(file: Path, columns: tuple[TraceColumn, ...]) -> pa.Table:
    import pyarrow as pa  # a tenth of a second, and only traces need it
    import pyarrow.csv
    import pyarrow.json

    kinds = {CellFormat.DATE: pa.timestamp("ns"), CellFormat.NANOSECONDS: pa.int64()}
    types = {column.name: kinds.get(column.format, pa.float64()) for column in columns}
    try:
        if _is_jsonl(file):
            return pa.json.read_json(
                str(file),
                parse_options=pa.json.ParseOptions(
                    explicit_schema=pa.schema(types.items()), unexpected_field_behavior="ignore"
                ),
            )
        return pa.csv.read_csv(
            str(file), convert_options=pa.csv.ConvertOptions(column_types=types, include_columns=list(types))
        )
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
        raise _NotReadable(str(error)) from error


def _numbers(data: pa.ChunkedArray) -> NDArray[Any]:
    """The column's values. pyarrow's own `to_numpy` would import pandas where it is installed, which is slow."""
    return np.from_dlpack(data.combine_chunks())


def _values(table: pa.Table, column: TraceColumn) -> NDArray[np.int64]:
    """A column's whole numbers: tokens, or ns from its smallest value. Raises _NotReadable for any bad cell."""
    data = table[column.name]
    if data.null_count:
        raise _NotReadable(f"{column.name} has empty cells")
    if not len(data):
        return np.zeros(0, dtype=np.int64)
    if column.format in (CellFormat.DATE, CellFormat.NANOSECONDS):
        whole: NDArray[np.int64] = _numbers(data.cast("int64")).astype(np.int64)
        first = int(whole.min())
        if first < 0:
            raise _NotReadable(f"{column.name} has values before 0")
        return whole - first
    numbers: NDArray[np.float64] = _numbers(data).astype(np.float64)
    if column.role is Role.ARRIVAL:
        ns_per = _NS_PER[column.format]
        if not ((numbers >= 0) & (numbers < LATEST_NS / ns_per)).all():  # false for NaN too
            raise _NotReadable(f"{column.name} has values out of range")
        # The offset goes first: seconds since 1970, as ns, are beyond float64's whole numbers.
        numbers = np.rint((numbers - numbers.min()) * ns_per)
    elif column.format is CellFormat.WHOLE:
        if not ((np.abs(numbers) <= LONGEST) & (numbers == np.floor(numbers))).all():
            raise _NotReadable(f"{column.name} has values that are no whole numbers")
    elif not ((numbers >= 1) & (numbers <= LONGEST) & (numbers == np.floor(numbers))).all():
        raise _NotReadable(f"{column.name} has values that are no counts of tokens")
    return numbers.astype(np.int64)


def _trace(source: str, values: dict[Role, NDArray[np.int64]], limit: int | None) -> RequestTrace:
    arrival_ns, prompt, output = values.get(Role.ARRIVAL), values[Role.PROMPT], values[Role.OUTPUT]
    priority = values.get(Role.PRIORITY)
    notices = []
    if arrival_ns is not None:
        late = int(np.count_nonzero(np.diff(arrival_ns) < 0))
        if late:
            notices.append(f"{source}: {late} of {len(prompt)} rows arrive before the row above; sorted by arrival")
            order = np.argsort(arrival_ns, kind="stable")
            arrival_ns, prompt, output = arrival_ns[order], prompt[order], output[order]
            priority = None if priority is None else priority[order]
        arrival_ns = arrival_ns[:limit]
    else:
        notices.append(f"{source}: no arrival column; lengths only")
    priority = None if priority is None else priority[:limit]
    for column in (arrival_ns, prompt, output, priority):
        if column is not None:
            column.flags.writeable = False  # shared by every workload that uses the trace
    return RequestTrace(source, arrival_ns, prompt[:limit], output[:limit], tuple(notices), priority)


def _find_columns(source: str, names: Sequence[str]) -> tuple[TraceColumn, ...]:
    """The columns of a file that a workload needs, one for each role; the arrival may be missing.

    UserError where a length is missing or two columns have the same role.
    """
    found = tuple(_KNOWN[name] for name in names if name in _KNOWN)
    for role in Role:
        mine = [column.name for column in found if column.role is role]
        known = ", ".join(column.name for column in _KNOWN.values() if column.role is role)
        if len(mine) > 1:
            raise UserError(f"{source}, {role} column", mine, "there must be one", "remove or rename the others")
        if not mine and role in (Role.PROMPT, Role.OUTPUT):
            raise UserError(
                f"{source}, columns", list(names), f"the {role} column is called one of: {known}", "rename a column"
            )
    return found


def locate(path: str | Path) -> Path:
    """The file itself, or the one of that relative path in the folder of shared data. UserError where neither is."""
    given = Path(path)
    for candidate in (given, shared_data_folder() / given):  # an absolute path stays itself
        if candidate.is_file():
            return candidate
    raise TraceFileError(
        "workload.trace",
        str(path),
        f"there is no such file here, nor in {shared_data_folder()}",
        f"give a path that exists, or set {VARIABLE} to the folder that holds it",
    )


def _is_jsonl(file: Path) -> bool:
    return file.name.removesuffix(".gz").endswith(".jsonl")


def _open_text(file: Path) -> IO[str]:
    """Text of a file that may be gzipped; a byte order mark is dropped."""
    if file.suffix == ".gz":
        return cast(IO[str], gzip.open(file, "rt", encoding="utf-8-sig", newline=""))
    return file.open(encoding="utf-8-sig", newline="")


def _refuse_file(file: Path, columns: tuple[TraceColumn, ...], why: str) -> NoReturn:
    """Raises the UserError that names file, line and column; without a line where none is bad by itself."""
    try:
        for line, cells in _rows(file):
            for column in columns:
                cell = cells.get(column.name)
                if not _is_good(column, cell):
                    place = f"{file.name}, line {line}, column {column.name}"
                    raise UserError(place, cell, _ALLOWED[column.format], _DROP)
    except _DAMAGE as error:
        why = str(error)
    raise TraceFileError("workload.trace", str(file), f"cannot be read ({why})", "fetch the file again")


def _rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with _open_text(file) as lines:
        if _is_jsonl(file):
            yield from _json_rows(file, lines)
            return
        reader = csv.reader(lines)
        names = next(reader)
        for cells in reader:
            if cells and len(cells) != len(names):
                place = f"{file.name}, line {reader.line_num}"
                raise UserError(place, ",".join(cells), f"must have {len(names)} cells like the header", _DROP)
            if cells:
                yield reader.line_num, dict(zip(names, cells, strict=True))


def _json_rows(file: Path, lines: Iterator[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            place = f"{file.name}, line {number}"
            raise UserError(place, line.strip()[:80], f"must be a JSON object ({error})", _DROP) from error
        if not isinstance(row, dict):
            raise UserError(f"{file.name}, line {number}", line.strip()[:80], "must be a JSON object", _DROP)
        # Text in place of a number keeps its quotes, so that it is seen as such.
        yield number, {name: json.dumps(cell) if isinstance(cell, str) else cell for name, cell in row.items()}


def _is_good(column: TraceColumn, cell: Any) -> bool:
    if cell is None or isinstance(cell, bool):
        return False
    if column.format is CellFormat.DATE:
        return _is_date(str(cell))
    if column.format is CellFormat.NANOSECONDS:
        return str(cell).isdecimal()
    try:
        number = float(cell)
    except (TypeError, ValueError):
        return False
    if column.role is Role.ARRIVAL:
        return 0 <= number < math.inf
    if column.format is CellFormat.WHOLE:
        return abs(number) <= LONGEST and number == math.floor(number)
    return 1 <= number <= LONGEST and number == math.floor(number)


def _is_date(cell: str) -> bool:
    whole, _, fraction = cell.partition(".")  # Python's own parser knows six digits of a second, Azure writes seven
    try:
        datetime.fromisoformat(whole)
    except ValueError:
        return False
    return not fraction or fraction.isdecimal()
