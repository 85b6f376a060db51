"""Finds the first bad line of a trace that could not be read, to name it. Knows cells, not requests."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from helios_sim.errors import UserError
from helios_sim.workload.columns import Column, Kind, Role
from helios_sim.workload.ranges import LONGEST
from helios_sim.workload.text_file import DAMAGE, is_jsonl, open_text

_DROP = "correct or remove the line"
_ALLOWED = {
    Kind.TOKENS: f"must be a whole number of tokens, from 1 to {LONGEST}",
    Kind.SECONDS: "must be seconds, at least 0",
    Kind.MILLISECONDS: "must be milliseconds, at least 0",
    Kind.NANOSECONDS: "must be whole nanoseconds, at least 0",
    Kind.DATE: "must be a date and time such as 2023-11-16 18:15:46.680",
}


def refuse_file(file: Path, columns: tuple[Column, ...], why: str) -> NoReturn:
    """Raises the UserError that names file, line and column; without a line where none is bad by itself."""
    try:
        for line, cells in _rows(file):
            for column in columns:
                cell = cells.get(column.name)
                if not _is_good(column, cell):
                    place = f"{file.name}, line {line}, column {column.name}"
                    raise UserError(place, cell, _ALLOWED[column.kind], _DROP)
    except DAMAGE as error:
        why = str(error)
    raise UserError("workload.trace", str(file), f"cannot be read ({why})", "fetch the file again")


def _rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with open_text(file) as lines:
        if is_jsonl(file):
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


def _is_good(column: Column, cell: Any) -> bool:
    if cell is None or isinstance(cell, bool):
        return False
    if column.kind is Kind.DATE:
        return _is_date(str(cell))
    if column.kind is Kind.NANOSECONDS:
        return str(cell).isdecimal()
    try:
        number = float(cell)
    except (TypeError, ValueError):
        return False
    if column.role is Role.ARRIVAL:
        return 0 <= number < math.inf
    return 1 <= number <= LONGEST and number == math.floor(number)


def _is_date(cell: str) -> bool:
    whole, _, fraction = cell.partition(".")  # Python's own parser knows six digits of a second, Azure writes seven
    try:
        datetime.fromisoformat(whole)
    except ValueError:
        return False
    return not fraction or fraction.isdecimal()
