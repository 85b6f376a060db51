"""Reads public traces: Azure 2023, Mooncake, Vidur, plain CSV; plain or gzipped. Knows formats, not workloads.

A file is read by Arrow in one pass. Only when something is wrong with it is it read again, line by line, to name the
first bad line (`bad_line`).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.request import NS_PER_S
from helios_sim.workload.bad_line import refuse_file
from helios_sim.workload.columns import Column, Kind, Role, find_columns
from helios_sim.workload.ranges import LATEST_NS, LONGEST, require_count
from helios_sim.workload.text_file import DAMAGE, is_jsonl, locate, open_text
from helios_sim.workload.trace import Trace

if TYPE_CHECKING:
    import pyarrow as pa

_NS_PER = {Kind.SECONDS: NS_PER_S, Kind.MILLISECONDS: 1_000_000}


class _NotReadable(Exception):
    """Some line does not hold what its column needs."""


def read_trace(path: str | Path, limit: int | None = None) -> Trace:
    """The requests of a trace, sorted by arrival, the first arrival at 0; at most the first `limit` of them.

    `.jsonl` is Mooncake's format (timestamp in ms, input_length, output_length); anything else is CSV with a header
    whose names say what it is (`columns`), with or without arrivals. `.gz` is unpacked. A relative path that does
    not exist is looked for in the folder of shared data. Raises UserError naming file, line, column and the fix.
    """
    if limit is not None:
        require_count("workload.trace.limit", limit, "null for all requests")
    file = locate(path)
    written = file.stat()
    return _read(file, limit, written.st_mtime_ns, written.st_size)


@lru_cache(maxsize=4)  # arrivals and lengths come from one file, and every arm and seed of a study reads it
def _read(file: Path, limit: int | None, written_ns: int, n_bytes: int) -> Trace:
    """A file that was written again is another one."""
    names = _column_names(file)
    columns = find_columns(file.name, names)
    try:
        table = _read_table(file, columns)
        values = {column.role: _values(table, column) for column in columns}
    except _NotReadable as why:
        refuse_file(file, columns, str(why))
    if not len(table):
        raise UserError("workload.trace", str(file), "must hold at least one request", "choose another file")
    return _trace(file.name, values, limit)


def _column_names(file: Path) -> Sequence[str]:
    try:
        with open_text(file) as lines:
            if not is_jsonl(file):
                return next(csv.reader(lines), [])
            first = json.loads(lines.readline() or "{}")
            return list(first) if isinstance(first, dict) else []
    except (*DAMAGE, json.JSONDecodeError) as error:
        raise UserError(
            "workload.trace", str(file), f"its first line cannot be read ({error})", "fetch the file again"
        ) from error


def _read_table(file: Path, columns: tuple[Column, ...]) -> pa.Table:
    import pyarrow as pa  # a tenth of a second, and only traces need it
    import pyarrow.csv
    import pyarrow.json

    kinds = {Kind.DATE: pa.timestamp("ns"), Kind.NANOSECONDS: pa.int64()}
    types = {column.name: kinds.get(column.kind, pa.float64()) for column in columns}
    try:
        if is_jsonl(file):
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
    """As the column's own to_numpy, which imports pandas: a third of a second for every process."""
    return np.from_dlpack(data.combine_chunks())


def _values(table: pa.Table, column: Column) -> NDArray[np.int64]:
    """A column's whole numbers: tokens, or ns from its smallest value. Raises _NotReadable for any bad cell."""
    data = table[column.name]
    if data.null_count:
        raise _NotReadable(f"{column.name} has empty cells")
    if not len(data):
        return np.zeros(0, dtype=np.int64)
    if column.kind in (Kind.DATE, Kind.NANOSECONDS):
        whole: NDArray[np.int64] = _numbers(data.cast("int64")).astype(np.int64)
        first = int(whole.min())
        if first < 0:
            raise _NotReadable(f"{column.name} has values before 0")
        return whole - first
    numbers: NDArray[np.float64] = _numbers(data).astype(np.float64)
    if column.role is Role.ARRIVAL:
        ns_per = _NS_PER[column.kind]
        if not ((numbers >= 0) & (numbers < LATEST_NS / ns_per)).all():  # false for NaN too
            raise _NotReadable(f"{column.name} has values out of range")
        # The offset goes first: seconds since 1970, as ns, are beyond float64's whole numbers.
        numbers = np.rint((numbers - numbers.min()) * ns_per)
    elif not ((numbers >= 1) & (numbers <= LONGEST) & (numbers == np.floor(numbers))).all():
        raise _NotReadable(f"{column.name} has values that are no counts of tokens")
    return numbers.astype(np.int64)


def _trace(source: str, values: dict[Role, NDArray[np.int64]], limit: int | None) -> Trace:
    arrival_ns, prompt, output = values.get(Role.ARRIVAL), values[Role.PROMPT], values[Role.OUTPUT]
    notices = []
    if arrival_ns is not None:
        late = int(np.count_nonzero(np.diff(arrival_ns) < 0))
        if late:
            notices.append(f"{source}: {late} of {len(prompt)} rows arrive before the row above; sorted by arrival")
            order = np.argsort(arrival_ns, kind="stable")
            arrival_ns, prompt, output = arrival_ns[order], prompt[order], output[order]
        arrival_ns = arrival_ns[:limit]
    else:
        notices.append(f"{source}: no arrival column; lengths only")
    for column in (arrival_ns, prompt, output):
        if column is not None:
            column.flags.writeable = False  # shared by every workload that uses the trace
    return Trace(source, arrival_ns, prompt[:limit], output[:limit], tuple(notices))
