"""Recorded request traces: Azure, Mooncake, BurstGPT, Vidur, LLMServingSim, plain tables, and logs of benchmark tools.

Logs of tools are read by the readers of helios_sim/logs; everything else, plain or gzipped, is read here. Such a file
is a table with a header, separated by commas or tabs, or JSON objects, one in each line or in one array. The meaning of
its columns is in `columns`. pyarrow reads a file in one pass. If that fails, the file is read again, line by line, to
name the first bad line and column.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.contents import Stamp, stamp
from helios_sim.errors import UserError, require_count
from helios_sim.logs import PromptTexts, RequestLog
from helios_sim.logs.document import Document
from helios_sim.logs.record import pause_told
from helios_sim.request import LATEST_NS, LONGEST, NS_PER_S, all_to_ns
from helios_sim.shared_data import VARIABLE, shared_data_folder
from helios_sim.untrusted import MIB, check_quotes, in_short, parse_json, read_text, reading, shortened
from helios_sim.workload.bad_lines import (
    DROP,
    OTHER_FILE,
    TraceFileError,
    TraceText,
    refuse,
    refuse_bad,
    refuse_texts,
)
from helios_sim.workload.columns import (
    HASH_IDS,
    NS_PER,
    REQUEST_IDS,
    CellFormat,
    Role,
    TraceColumn,
    check_dates,
    check_unit,
    column_of,
    doubt,
    find_columns,
    known_names,
    not_read,
    plain_name,
    with_unit,
)

if TYPE_CHECKING:
    import pyarrow as pa

MOST_BYTES = 2048 * MIB  # of unpacked text
_OBJECTS = (
    "write a table as CSV, or a JSON object in each line, with prompt_tokens, output_tokens and arrival_s of a request"
)
_TEXTS = ("conversations", "conversation", "messages", "prompt", "instruction", "text_input", "text", "question")


@dataclass(frozen=True, slots=True, eq=False)
class RequestTrace:
    """A recorded workload: columns of shape (n,), int64, n >= 1, sorted by arrival; lengths are at least 1 token."""

    source: str  # the file, for messages and reports
    arrival_ns: NDArray[np.int64] | None  # from 0, not decreasing; None if the file has no usable arrivals
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    notices: tuple[str, ...] = ()  # what the reader changed or did not read, for the report
    priority: NDArray[np.int64] | None = None  # the lowest is served first; None if the file has no such column
    no_arrivals: str = "this one has lengths only"  # why there are no arrivals
    texts: PromptTexts | None = None  # ids of the texts that make up the prompts; None if not read or not recorded

    def __len__(self) -> int:
        return len(self.prompt_tokens)


class _NotReadable(Exception):
    """Raised if a cell does not hold what its column needs."""


def read_trace(
    path: str | Path, limit: int | None = None, time_unit: str | None = None, texts: bool = False
) -> RequestTrace:
    """Reads the requests of a trace, sorted by arrival, the first arrival at 0; at most the first `limit` of them.

    `.gz` is unpacked. A relative path that does not exist is looked for in the folder of shared data. `time_unit` (s,
    ms, us, ns) is the unit of the arrivals, to be given if the file does not state it. With `texts` the column hash_ids
    is read. Raises UserError naming file, line, column and the fix.
    """
    if limit is not None:
        require_count("workload.trace.limit", limit, "null for all requests")
    if not isinstance(path, str | Path):
        raise TraceFileError("workload.trace", path, "the path of a file", "name one")
    file = locate(path)
    return _read(file, limit, time_unit, stamp(file), texts)


@lru_cache(maxsize=4)  # arrivals and lengths come from one file, and every arm and seed of a study reads it
def _read(path: Path, limit: int | None, unit: str | None, written: Stamp, texts: bool = False) -> RequestTrace:
    """Reads a trace, and keeps it until the file is written again (`written` is its stamp)."""
    with reading("workload.trace", str(path), "cannot be read", OTHER_FILE, TraceFileError):
        content = read_text(path, MOST_BYTES, OTHER_FILE, TraceFileError)
        from helios_sim.logs.tools import read_tool  # with all readers, which few studies need

        log = read_tool(Document(path, content))
        if log is not None:
            return _of_log(log, limit, unit)
        file = _opened(path, content)
        if file.separator is not None:
            check_quotes(file.name, file.content, DROP, file.separator)
        names, first = _beginning(file)
        columns = tuple(with_unit(file.name, c, unit, first, names) for c in find_columns(file.name, names))
        wanted = names if texts and file.separator is None else ()
        listed = next((name for name in wanted if plain_name(name) in HASH_IDS), None)
        try:
            table = _table(file, columns, listed)
            numbers = {column.role: _numbers(table, column) for column in columns}
            answered = numbers[Role.OUTPUT] != 0
            left_out = int(np.count_nonzero(~answered)) if answered.any() else 0
            if left_out:
                numbers = {role: found[answered] for role, found in numbers.items()}
            for column in columns:
                check_unit(file.name, column, numbers[column.role])
            coarse = [said for c in columns if (said := check_dates(file.name, c, numbers[c.role])) is not None]
            for column in columns:
                if column.format is CellFormat.DATE and not (numbers[column.role] % (86_400 * NS_PER_S)).all():
                    refuse_bad(file, (column,))  # a midnight may be a date without a time of day
            doubts = {c.role: text for c in columns if (text := doubt(c, numbers[c.role])) is not None}
            values = {c.role: numbers[c.role] if c.role in doubts else _values(numbers[c.role], c) for c in columns}
        except _NotReadable as why:
            refuse(path, file, columns, listed, str(why))
        if not len(table):
            raise TraceFileError("workload.trace", str(path), "must hold at least one request", "choose another file")
        notices = not_read(file.name, [name for name in names if name != listed], columns) + coarse
        notices += _within_quotes(file, len(table)) + _twice(file, names)
        if left_out:
            told = f"{left_out} of {len(table)} requests got an answer of 0 tokens and are left out"
            notices.append(f"{file.name}: {told}")
        chunks = [] if listed is None else table[listed].chunks
        if listed is not None and any(chunk.null_count or chunk.values.null_count for chunk in chunks):
            refuse_texts(file, listed)
        ids = None if listed is None else table[listed].combine_chunks()
        if ids is not None and left_out:
            ids = ids.take(np.flatnonzero(answered))
        return _trace(file.name, values, limit, doubts.get(Role.ARRIVAL), notices, names, ids)


def _of_log(log: RequestLog, limit: int | None, unit: str | None) -> RequestTrace:
    """The answered requests of a log, as a trace. UserError if a unit is given: a tool's files state their own."""
    if unit is not None:
        raise UserError("workload.arrivals.time_unit", unit, f"null: {log.format} states its times", "leave it null")
    done = np.flatnonzero(log.completed)[:limit]
    arrival_ns, why = None, f"{log.format} says nothing of when requests came"
    if log.arrival_s is not None:
        times = log.arrival_s[done]
        arrival_ns = all_to_ns(times - times.min(), "arrivals")
    prompt, output = log.prompt_tokens[done], log.output_tokens[done]
    priority = None if log.priority is None else log.priority[done]
    for column in (arrival_ns, prompt, output, priority):
        if column is not None:
            column.flags.writeable = False
    return RequestTrace(log.source, arrival_ns, prompt, output, (*log.notices, *log.failures), priority, why)


def _opened(path: Path, content: bytes) -> TraceText:
    begins = content[:4096].lstrip()[:1]
    if not begins and not content.strip():
        raise TraceFileError("workload.trace", path.name, "it is empty: must hold at least one request", OTHER_FILE)
    if begins == b"[":
        rows = _array(path, content)
        if not rows:
            raise TraceFileError("workload.trace", path.name, "it is empty: must hold at least one request", OTHER_FILE)
        lines = [json.dumps(row) for row in rows]
        return TraceText(path.name, "\n".join(lines).encode() + b"\n", None)
    if begins == b"{" or path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        return TraceText(path.name, content, None)
    if path.name.removesuffix(".gz").endswith((".yaml", ".yml")):
        raise TraceFileError("workload.trace", path.name, "YAML that none of the tools wrote", _OBJECTS)
    header = content[: content.find(b"\n")] if b"\n" in content else content
    return TraceText(path.name, content, "\t" if b"\t" in header and b"," not in header else ",")


def _array(path: Path, content: bytes) -> list[Any]:
    """The value of a file that is one JSON array. UserError if each line is an array."""
    try:
        return list(parse_json(content))
    except ValueError:
        try:
            first = shortened(parse_json(content.lstrip().partition(b"\n")[0]))
        except (ValueError, RecursionError):  # the first line is no value: this is one array, and damaged
            first = None
        if first is None:
            raise
        raise TraceFileError("workload.trace", path.name, f"its lines are arrays such as {first}", _OBJECTS) from None


def _beginning(file: TraceText) -> tuple[Sequence[str], Mapping[str, Any]]:
    """The names of the columns, and the cells of the first row ({} if there is no row)."""
    if file.separator is not None:
        rows = csv.reader(file.lines, delimiter=file.separator)
        names = next(rows, [])
        cells: Sequence[str] = next((row for row in rows if row), [])
        return names, dict(zip(names, cells, strict=False))
    line = next((text for text in file.lines if text.strip()), "{}")
    try:
        row = parse_json(line)
    except ValueError as error:
        allowed = f"its first line is no JSON object ({in_short(error)})"
        fix = "write one object for each request, in a line of its own, or take the log of a tool that is read (README)"
        raise TraceFileError("workload.trace", file.name, allowed, fix) from error
    if not isinstance(row, dict):
        raise UserError(f"{file.name}, line 1", shortened(row), "must be a JSON object", DROP)
    texts = [name for name in _TEXTS if isinstance(row.get(name), str | list)]
    columns = [name for name, value in row.items() if column_of(name) is not None and isinstance(value, list | dict)]
    if columns and not _is_table(row, columns):
        allowed = f"a number of tokens, not a list as of their ids: {columns[0]}={shortened(row[columns[0]])}"
        raise UserError(f"{file.name}, line 1", columns[0], allowed, "write how many there are")
    if columns:
        raise TraceFileError("workload.trace", file.name, f"one object that holds all of {columns[0]}", _OBJECTS)
    if texts and not any((column := column_of(name)) and column.role is Role.PROMPT for name in row):
        raise TraceFileError(
            "workload.trace", file.name, f"lengths in tokens; {texts[0]} holds texts, as in ShareGPT, and no lengths",
            "count them with the model's tokenizer and write a table with prompt_tokens and output_tokens",
        )  # fmt: skip
    return list(dict.fromkeys((*row, *_keys(file)))), row


def _is_table(row: Mapping[str, Any], columns: Sequence[str]) -> bool:
    """Whether all known columns hold lists or mappings of equal length: then one object holds a whole table."""
    known = [name for name in row if (found := column_of(name)) is not None and found.role is not Role.PRIORITY]
    return all(isinstance(row[name], list | dict) for name in known) and len({len(row[name]) for name in columns}) == 1


def _keys(file: TraceText) -> list[str]:
    """The names in all lines of JSON. Damaged lines are skipped here: the reader of values reports them."""
    import pyarrow as pa
    import pyarrow.json

    try:
        return list(pa.json.read_json(pa.BufferReader(file.content)).schema.names)
    except (pa.ArrowException, OSError):  # cells of one name may differ in type, which is fine if nothing reads them
        found: dict[str, None] = {}
        for line in file.lines:
            with suppress(ValueError, RecursionError):
                row = parse_json(line) if line.strip() else {}
                found |= dict.fromkeys(row if isinstance(row, dict) else ())
        return list(found)


def _table(file: TraceText, columns: tuple[TraceColumn, ...], listed: str | None) -> pa.Table:
    import pyarrow as pa  # imported here since it takes a tenth of a second, and only traces need it
    import pyarrow.csv
    import pyarrow.json

    def parsed(date: pa.DataType, part: pa.DataType) -> pa.Table:
        kinds = {CellFormat.DATE: date, CellFormat.NANOSECONDS: pa.int64()}
        types = {column.name: kinds.get(column.format, pa.float64()) for column in columns}
        source = pa.BufferReader(file.content)
        if listed is not None:
            types[listed] = pa.list_(part)
        if file.separator is None:
            return pa.json.read_json(
                source,
                parse_options=pa.json.ParseOptions(
                    explicit_schema=pa.schema(types.items()), unexpected_field_behavior="ignore"
                ),
            )
        return pa.csv.read_csv(
            source,
            parse_options=pa.csv.ParseOptions(delimiter=file.separator),
            convert_options=pa.csv.ConvertOptions(column_types=types, include_columns=list(types)),
        )

    dates = [pa.timestamp("ns"), pa.timestamp("ns", tz="UTC")]  # without, and with Z or an offset
    dated = any(column.format is CellFormat.DATE for column in columns)
    why: Exception | None = None
    for part in (pa.int64(), pa.uint64())[: 1 if listed is None else 2]:  # ids may be unsigned 64-bit hashes
        for date in dates if dated else dates[:1]:
            try:
                return parsed(date, part)
            except (pa.ArrowException, OSError) as error:
                why = why or error
    raise _NotReadable(str(why)) from why


def _within_quotes(file: TraceText, rows: int) -> list[str]:
    """A notice if cells go over several lines, as happens if one of two quotes was lost; else no notice."""
    if file.separator is None or b'"' not in file.content:
        return []
    more = sum(bool(line.strip()) for line in file.content.splitlines()) - 1 - rows
    return [f"{file.name}: {more} lines go on within quotes: {rows} rows are read"] if more > 0 else []


def _twice(file: TraceText, names: Sequence[str]) -> list[str]:
    """A notice if rows have the id of another row, as happens if files were joined; else no notice."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.json

    name = next((name for name in names if plain_name(name) in REQUEST_IDS), None)
    source, found = pa.BufferReader(file.content), None
    for kind in (pa.string(), pa.int64()) if name is not None else ():
        with suppress(pa.ArrowException, OSError):
            options = {"explicit_schema": pa.schema([(name, kind)]), "unexpected_field_behavior": "ignore"}
            found = pa.json.read_json(source, parse_options=pa.json.ParseOptions(**options)) if (
                file.separator is None
            ) else pa.csv.read_csv(
                source, parse_options=pa.csv.ParseOptions(delimiter=file.separator),
                convert_options=pa.csv.ConvertOptions(column_types={name: kind}, include_columns=[name]),
            )  # fmt: skip
            break
        source.seek(0)
    if found is None:
        return []
    ids = [each for each in found[name].to_pylist() if each not in (None, "")]
    again = len(ids) - len(set(ids))
    told = f"{again} of {len(found)} rows have the {name} of another one; all are replayed"
    return [f"{file.name}: {told}"] if again else []


def _numbers(table: pa.Table, column: TraceColumn) -> NDArray[Any]:
    """The column's cells as int64 or float64, (n,). pyarrow's own `to_numpy` would import pandas, which is slow."""
    data = table[column.name]
    if data.null_count:
        raise _NotReadable(f"{column.name} has empty cells")
    if not len(data):
        return np.zeros(0)
    cells = data.combine_chunks()
    return np.from_dlpack(cells.view("int64") if column.format is CellFormat.DATE else cells)


def _values(numbers: NDArray[Any], column: TraceColumn) -> NDArray[np.int64]:
    """The column's values as tokens or, for arrivals, ns after the smallest. Raises _NotReadable for any bad cell."""
    if not len(numbers):
        return np.zeros(0, dtype=np.int64)
    if column.role is Role.ARRIVAL and numbers.dtype == np.int64:
        first, last = int(numbers.min()), int(numbers.max())
        if (first < 0 and column.format is CellFormat.NANOSECONDS) or last - first > LATEST_NS:
            raise _NotReadable(f"{column.name} has values out of range")
        return numbers - first
    if column.role is Role.ARRIVAL:
        ns_per = NS_PER[column.format]
        if not ((numbers >= 0) & (numbers < LATEST_NS / ns_per)).all():  # false for NaN too
            raise _NotReadable(f"{column.name} has values out of range")
        # Subtract the offset first: seconds since 1970, as ns, exceed the whole numbers that float64 holds exactly.
        return all_to_ns(numbers - numbers.min(), column.name, ns_per)
    least, most = (-LONGEST, LONGEST) if column.format is CellFormat.WHOLE else (1, LONGEST)
    most = 2 * LONGEST if column.role is Role.TOTAL else most
    if not ((numbers >= least) & (numbers <= most) & (numbers == np.floor(numbers))).all():
        raise _NotReadable(f"{column.name} has values that are no {column.format}")
    return numbers.astype(np.int64)


def _trace(
    source: str, values: dict[Role, NDArray[np.int64]], limit: int | None, in_doubt: str | None, notices: list[str],
    names: Sequence[str], listed: pa.ListArray | None,
) -> RequestTrace:  # fmt: skip
    arrival_ns, prompt, output = values.get(Role.ARRIVAL), values[Role.PROMPT], values[Role.OUTPUT]
    priority, total, why = values.get(Role.PRIORITY), values.get(Role.TOTAL), ""
    if total is not None and (wrong := np.flatnonzero(total != prompt + output)).size:
        row = int(wrong[0])
        allowed = f"the sum of prompt and output, {prompt[row]} + {output[row]}"
        raise UserError(f"{source}, request {row + 1}, total length", int(total[row]), allowed, DROP)
    if arrival_ns is not None:
        late = int(np.count_nonzero(np.diff(arrival_ns) < 0))
        if late:
            notices.append(f"{source}: {late} of {len(prompt)} rows arrive before the row above; sorted by arrival")
            order = np.argsort(arrival_ns, kind="stable")
            arrival_ns, prompt, output = arrival_ns[order], prompt[order], output[order]
            priority = None if priority is None else priority[order]
            listed = None if listed is None else listed.take(order)
        told = pause_told(source, arrival_ns / NS_PER_S)
        notices += [] if told is None else [told]
        arrival_ns = arrival_ns[:limit]
    else:
        shown = ", ".join(list(names)[:12])
        why = f"none of its columns ({shown}) is called {known_names(Role.ARRIVAL)}"
        notices.append(f"{source}: no arrival column; lengths only")
    if in_doubt is not None:
        arrival_ns, why = None, f"{in_doubt}; set workload.arrivals.time_unit to s, ms, us or ns"
        notices.append(f"{source}: lengths only: {why}")
    priority = None if priority is None else priority[:limit]
    for column in (arrival_ns, prompt, output, priority):
        if column is not None:
            column.flags.writeable = False  # shared by every workload that uses the trace
    texts = None if listed is None else _texts(listed[:limit])
    return RequestTrace(source, arrival_ns, prompt[:limit], output[:limit], tuple(notices), priority, why, texts)


def _texts(listed: pa.ListArray) -> PromptTexts:
    starts = np.concatenate([[0], np.cumsum(np.from_dlpack(listed.value_lengths().cast("int64")))])
    values = listed.flatten()
    _, ids = np.unique(np.from_dlpack(values) if len(values) else np.zeros(0, np.int64), return_inverse=True)
    return PromptTexts(starts, ids.astype(np.int64))


def locate(path: str | Path) -> Path:
    """The file at `path`, or at that relative path in the folder of shared data. UserError if neither exists."""
    with reading("workload.trace", shortened(str(path)), "is no path", "name a file", TraceFileError):
        for candidate in (Path(path).expanduser(), shared_data_folder() / path):  # an absolute path stays itself
            if candidate.is_file():
                return candidate
        raise TraceFileError(
            "workload.trace",
            str(path),
            f"there is no such file here, nor in {shared_data_folder()}; a folder or a device is none",
            f"give a path that exists, or set {VARIABLE} to the folder that holds it",
        )


