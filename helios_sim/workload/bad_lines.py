"""Row-by-row reading of a bad trace, to name the wrong line and column after the reader of whole tables has failed."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from helios_sim.errors import UserError
from helios_sim.request import LATEST_NS
from helios_sim.untrusted import in_short, parse_json, shortened
from helios_sim.workload.columns import ALLOWED, NS_PER, CellFormat, Role, TraceColumn, is_good

DROP = "correct or remove the line"
_UNANSWERED = "take a trace in which some request got an answer"
OTHER_FILE = "correct the file, or choose another one"
_OFFSET = re.compile(r"(Z|[+-]\d\d:?(\d\d)?)$")  # a date's offset from UTC


class TraceFileError(UserError):
    """A file that is missing, or is no trace at all. Its key is one of several settings that can name such a file."""


@dataclass(frozen=True, slots=True)
class TraceText:
    """The text of a trace: JSON lines, or a table with this separator."""

    name: str
    content: bytes
    separator: str | None  # None if each line is a JSON object

    @property
    def lines(self) -> io.TextIOWrapper:
        return io.TextIOWrapper(io.BytesIO(self.content), encoding="utf-8", newline="")


def refuse(path: Path, file: TraceText, columns: tuple[TraceColumn, ...], listed: str | None, why: str) -> NoReturn:
    """Raises a UserError that names file, line and column, or the file alone if no single line is bad."""
    refuse_bad(file, columns)
    for column in columns:
        if column.role is Role.ARRIVAL:
            _refuse_others(file, column)
    if listed is not None:
        refuse_texts(file, listed)
    for line, text in enumerate(file.lines if "surrogate" in why else (), start=1):
        try:
            json.dumps(json.loads(text), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            allowed = r"texts without a single \ud800 to \udfff"
            raise UserError(f"{file.name}, line {line}", "half of a sign", allowed, DROP) from None
    raise TraceFileError("workload.trace", str(path), f"cannot be read ({why[:160].partition(chr(10))[0]})", OTHER_FILE)


def refuse_bad(file: TraceText, columns: tuple[TraceColumn, ...]) -> None:
    """Raises UserError for the first cell that does not hold what its column needs."""
    for line, cells in rows_of(file):
        for column in columns:
            cell = cells.get(column.name)
            if not is_good(column, cell):
                place = f"{file.name}, line {line}, column {column.name}"
                unanswered = column.role is Role.OUTPUT and str(cell) in ("0", "0.0")
                in_quotes = file.separator is None and str(cell).startswith('"') and column.format in NS_PER
                fix = _UNANSWERED if unanswered else "write it as a number, without quotes" if in_quotes else DROP
                raise UserError(place, shortened(cell), ALLOWED[column.format], fix)


def _refuse_others(file: TraceText, column: TraceColumn) -> None:
    """Raises UserError for the first arrival that is far from the first row's, or a date in another form."""
    first = None
    for line, cells in rows_of(file):
        cell = str(cells[column.name]).strip('"')
        first = cell if first is None else first
        if column.format is CellFormat.DATE:
            alike = bool(_OFFSET.search(cell)) == bool(_OFFSET.search(first))
            allowed = "with an offset from UTC in every line, or in none"
        else:
            alike = abs(float(cell) - float(first)) * NS_PER[column.format] <= LATEST_NS
            allowed = f"within {LATEST_NS / NS_PER[column.format]:.3g} {column.format} of the first line's, {first}"
        if not alike:
            raise UserError(f"{file.name}, line {line}, column {column.name}", shortened(cell), allowed, DROP)


def refuse_texts(file: TraceText, name: str) -> None:
    """Raises UserError for the first line in which the ids of the prompt's parts are not 64-bit whole numbers."""
    first = dict[str, int]()  # first line with a negative id, and with one from 2^63: no 64-bit type holds both
    for line, cells in rows_of(file):
        ids, place = cells.get(name), f"{file.name}, line {line}, column {name}"
        if not isinstance(ids, list) or not all(type(part) is int and -(1 << 63) <= part < 1 << 64 for part in ids):
            allowed = "a list of whole numbers below 2^64 in every line, or no such column"
            raise UserError(place, shortened(ids), allowed, DROP)
        signs = {"below 0": min(ids, default=0) < 0, "from 2^63": max(ids, default=0) >= 1 << 63}
        first |= {sign: first.get(sign, line) for sign, there in signs.items() if there}
        if len(first) == 2:
            allowed = f"ids of 64 bits all with a sign or all without; line {min(first.values())} has some of the other"
            raise UserError(place, shortened(ids), allowed, "write them all in one way")


def rows_of(file: TraceText) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if file.separator is None:
        yield from _json_rows(file)
        return
    reader = csv.reader(file.lines, delimiter=file.separator)
    names = next(reader)
    for cells in reader:
        if cells and len(cells) != len(names):
            place = f"{file.name}, line {reader.line_num}"
            line = shortened(file.separator.join(cells))
            raise UserError(place, line, f"must have {len(names)} cells like the header", DROP)
        if cells:
            yield reader.line_num, dict(zip(names, cells, strict=True))


def _json_rows(file: TraceText) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(file.lines, start=1):
        if not line.strip():
            continue
        place = f"{file.name}, line {number}"
        try:
            row = parse_json(line)
        except (ValueError, RecursionError) as error:
            raise UserError(place, line.strip()[:80], f"must be a JSON object ({in_short(error)})", DROP) from error
        if not isinstance(row, dict):
            raise UserError(place, line.strip()[:80], "must be a JSON object", DROP)
        # Text in place of a number keeps its quotes, so that the checks recognise it as text.
        yield number, {name: json.dumps(cell) if isinstance(cell, str) else cell for name, cell in row.items()}
