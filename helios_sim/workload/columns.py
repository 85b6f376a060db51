"""Names and units of the columns of request traces: what each column means, and when the unit of a number is in doubt.

Names are compared in lower case with words joined by `_`, so ContextTokens is context_tokens. A column of arrivals
states its unit by its name, or by holding dates or numbers that can only be counted from 1970. If it states none, the
usual unit is taken if the arrivals come out plausible; if they do not, the message asks for a setting.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.request import LATEST_NS, LONGEST, NS_PER_S


class Role(StrEnum):
    """The fact about a request that a column holds."""

    ARRIVAL = "arrival"
    PROMPT = "prompt length"
    OUTPUT = "output length"
    TOTAL = "total length"  # must equal prompt plus output length
    PRIORITY = "priority"


class CellFormat(StrEnum):
    """How a cell is written."""

    TOKENS = "tokens"
    WHOLE = "whole number"
    SECONDS = "s"
    MILLISECONDS = "ms"
    MICROSECONDS = "us"
    NANOSECONDS = "ns"
    DATE = "date"


UNITS = (CellFormat.SECONDS, CellFormat.MILLISECONDS, CellFormat.MICROSECONDS, CellFormat.NANOSECONDS)
NS_PER = {
    CellFormat.SECONDS: NS_PER_S, CellFormat.MILLISECONDS: 1_000_000, CellFormat.MICROSECONDS: 1_000,
    CellFormat.NANOSECONDS: 1,
}  # fmt: skip
ALLOWED = {
    CellFormat.TOKENS: f"must be a whole number of tokens, from 1 to {LONGEST}",
    CellFormat.SECONDS: "must be seconds, at least 0",
    CellFormat.MILLISECONDS: "must be milliseconds, at least 0",
    CellFormat.MICROSECONDS: "must be microseconds, at least 0",
    CellFormat.NANOSECONDS: "must be whole nanoseconds, at least 0",
    CellFormat.WHOLE: f"must be a whole number of at most {LONGEST}",
    CellFormat.DATE: "must be a date and time such as 2023-11-16 18:15:46.680 or 2024-05-10T00:00:00Z, all alike",
}
_NAMES = {
    Role.PROMPT: "prompt_tokens prefill_tokens num_prefill_tokens input_tokens context_tokens request_tokens "
    "num_prompt_tokens num_input_tokens input_toks prompt_toks input_length prompt_length input_len prompt_len",
    Role.OUTPUT: "output_tokens decode_tokens num_decode_tokens completion_tokens generated_tokens response_tokens "
    "num_output_tokens num_completion_tokens num_generated_tokens generation_tokens output_toks completion_toks "
    "output_length completion_length response_length generation_length output_len completion_len",
    Role.TOTAL: "total_tokens num_total_tokens total_length",
    Role.PRIORITY: "priority",
}
_ARRIVALS = ("arrival", "arrival_time", "arrived_at", "timestamp", "request_time", "arrival_timestamp")
_SUFFIXES = {
    CellFormat.SECONDS: ("s", "sec", "secs", "second", "seconds"),
    CellFormat.MILLISECONDS: ("ms", "msec", "msecs", "milli", "millis", "millisecond", "milliseconds"),
    CellFormat.MICROSECONDS: ("us", "usec", "usecs", "micro", "micros", "microsecond", "microseconds"),
    CellFormat.NANOSECONDS: ("ns", "nsec", "nsecs", "nano", "nanos", "nanosecond", "nanoseconds"),
}  # fmt: skip
REQUEST_IDS = ("request_id", "req_id")  # columns in which each request has its own id
_OF_NO_MATTER = {"", "id", *REQUEST_IDS, "index", "user", "user_id", "pd_ratio"}
HASH_IDS = ("hash_ids", "block_hash_ids")
_EFFECTS = dict.fromkeys(HASH_IDS, "prefixes that requests share are computed anew for each") | dict.fromkeys(
    ("session_id", "conversation_id", "chat_id"), "what the turns of a session share is computed anew for each"
) | dict.fromkeys(
    ("status", "status_code", "http_status", "http_code", "response_code", "success", "is_success", "succeeded",
     "failed", "is_failed", "error", "error_code", "error_type", "error_message", "result", "cancelled"),
    "a request that failed is replayed as if it had been answered",
) | dict.fromkeys(
    ("batch_size", "n", "best_of", "count", "num_requests", "request_count", "num_model_requests"),
    "each row is one request with one answer",
)  # fmt: skip
_EPOCH_S = 8e8  # numbers above this count from 1970, in seconds or a smaller unit; 8e8 s is in 1995
MOST_PER_S, LEAST_PER_S = 100.0, 1 / 60  # requests/s; a rate outside puts a unit that no name states in doubt


@dataclass(frozen=True, slots=True)
class TraceColumn:
    """A column that a workload reads, by its name in the header."""

    name: str
    role: Role
    format: CellFormat
    stated: bool = True  # the name, or a setting, says the unit
    usual: bool = True  # there is a usual unit, to be taken if none is stated


def known_names(role: Role) -> str:
    """The names under which a role is known, for messages."""
    if role is Role.ARRIVAL:
        return f"{', '.join(_ARRIVALS)}, with or without a unit such as _s, _ms or _ns"
    return ", ".join(_NAMES[role].split())


def column_of(name: str) -> TraceColumn | None:
    """The column of this name; None if the name is not known."""
    plain = plain_name(name)
    for role, names in _NAMES.items():
        if plain in names.split():
            return TraceColumn(name, role, CellFormat.WHOLE if role is Role.PRIORITY else CellFormat.TOKENS)
    if plain in _ARRIVALS:
        return TraceColumn(name, Role.ARRIVAL, CellFormat.SECONDS, stated=False)
    for unit, suffixes in _SUFFIXES.items():
        stem, _, suffix = plain.rpartition("_")
        if suffix in suffixes and stem in _ARRIVALS:
            return TraceColumn(name, Role.ARRIVAL, unit)
    return None


def plain_name(name: str) -> str:
    """The name in lower case, its words joined by `_`. The micro sign becomes u; letters of other scripts stay."""
    plain = unicodedata.normalize("NFKC", name).replace("\u03bc", "u")
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", plain)
    return re.sub(r"[\W_]+", "_", parted.lower()).strip("_")


def find_columns(source: str, names: Sequence[str]) -> tuple[TraceColumn, ...]:
    """The columns of a file that a workload needs, one for each role; arrival, total and priority may be missing.

    UserError if a length is missing or two columns have the same role.
    """
    found = tuple(column for name in names if (column := column_of(name)) is not None)
    for role in Role:
        mine = [column.name for column in found if column.role is role]
        if len(mine) > 1:
            raise UserError(f"{source}, {role} column", mine, "there must be one", "remove or rename the others")
        if not mine and role in (Role.PROMPT, Role.OUTPUT):
            allowed = f"the {role} column is called one of: {known_names(role)}"
            raise UserError(f"{source}, columns", list(names)[:30], allowed, _how_to_name(names))
    return found


def _how_to_name(names: Sequence[str]) -> str:
    """The fix to suggest if a file's column names are unknown: it may have no header, or other separators."""
    if all(_number(name) is not None for name in names):
        return "write a first line with the names of the columns"
    if names[0].startswith(("#", "//")):
        return "remove what stands before the line with the names of the columns"
    if len(names) == 1 and any(column_of(name) is not None for name in re.split(r"[;|]", names[0])):
        return "separate the cells by commas or tabs"
    of_many = re.compile(r"(total|sum|mean|avg|average|p\d+)_|.*_total$")
    single = [plain_name(name) for name in names if not of_many.match(plain_name(name))]
    if sum(bool(re.search(r"tok|len|prompt|input|output|size", name)) for name in single) < 2:
        return "take a file with a row for each request, or the log of a tool that is read (README)"
    return "rename a column"


def not_read(source: str, names: Sequence[str], columns: Sequence[TraceColumn]) -> list[str]:
    """Notices on unread columns: one for each column that would change a result, and one that lists the others."""
    read = {column.name for column in columns}
    left = [name for name in dict.fromkeys(names) if name not in read and plain_name(name) not in _OF_NO_MATTER]
    said = [
        f"{source}: column {name} is not read: {_EFFECTS[plain_name(name)]}"
        for name in left if plain_name(name) in _EFFECTS
    ]  # fmt: skip
    others = [name for name in left if plain_name(name) not in _EFFECTS]
    if others:
        shown = ", ".join(others[:12]) + (f" and {len(others) - 12} more" if len(others) > 12 else "")
        said.append(f"{source}: not read: {shown}")
    return said


def with_unit(
    source: str, column: TraceColumn, unit: str | None, first: Mapping[str, Any], names: Sequence[str]
) -> TraceColumn:
    """The arrival column with its format: dates if its cell in the `first` row is no number, else numbers in a unit.

    Other columns are returned unchanged. UserError if the setting `unit` contradicts what the file says of itself.
    """
    if column.role is not Role.ARRIVAL:
        return column
    key, named = f"{source}, column {column.name}", [str(u) for u in UNITS]
    if unit is not None and unit not in named:
        raise UserError("workload.arrivals.time_unit", unit, f"null or one of {', '.join(named)}", "choose one")
    cell = first.get(column.name)
    number = _number(cell)
    if number is None and not column.stated and cell is not None:
        if unit is not None:
            raise UserError(key, cell, f"numbers in {unit}, as workload.arrivals.time_unit says", "leave it null")
        return replace(column, format=CellFormat.DATE, stated=True)
    if unit is None:
        return column if column.stated or number is None else _usual(column, number, {plain_name(n) for n in names})
    if column.stated and unit != column.format:
        raise UserError("workload.arrivals.time_unit", unit, f"{column.name} is in {column.format}", "leave it null")
    return replace(column, format=CellFormat(unit), stated=True)


def _usual(column: TraceColumn, number: float, names: set[str]) -> TraceColumn:
    """The column with the unit that follows from the size of its numbers or from the file's other columns."""
    if number > _EPOCH_S:  # counted from 1970
        power = min(int(math.log10(number / _EPOCH_S)) // 3, 3)
        return replace(column, format=UNITS[power], stated=True)
    if plain_name(column.name) != "timestamp":
        return column
    if "input_length" in names:  # Mooncake
        return replace(column, format=CellFormat.MILLISECONDS)
    if "request_tokens" in names:  # BurstGPT
        return replace(column, stated=True)
    return replace(column, usual=False)


def check_unit(source: str, column: TraceColumn, numbers: NDArray[np.float64]) -> None:
    """Raises UserError if a column states one unit, but its numbers are times since 1970 in another."""
    if column.role is not Role.ARRIVAL or column.format not in NS_PER or not column.stated or len(numbers) < 2:
        return
    first, last = float(numbers.min()), float(numbers.max())
    other = next((unit for unit in UNITS if _is_since_1970(first, unit) and _is_since_1970(last, unit)), None)
    if other is None or other is column.format or _is_since_1970(first, column.format):
        return
    span_s = (last - first) * NS_PER[column.format] / NS_PER_S
    at_once, for_ages = (len(numbers) - 1) > MOST_PER_S * span_s, first * NS_PER[column.format] > LATEST_NS
    if at_once or for_ages:  # else the clock may count from another start, such as the machine's boot
        allowed = f"numbers in {column.format}, as its name or a setting says; these are {other} since 1970"
        raise UserError(f"{source}, column {column.name}", first, allowed, "correct the name or the setting")


def check_dates(source: str, column: TraceColumn, numbers: NDArray[Any]) -> str | None:
    """A notice if dates are in whole minutes, so that all requests of one minute arrive at once; None if they are not.

    UserError for dates without a time of day.
    """
    if column.format is not CellFormat.DATE or len(numbers) < 2:
        return None
    if not (numbers % (86_400 * NS_PER_S)).any():
        allowed = "dates with a time of day: all requests of a day would come at once"
        raise UserError(f"{source}, column {column.name}", "days alone", allowed, "take a trace with times")
    if len(np.unique(numbers)) == len(numbers):
        return None
    if (numbers % (60 * NS_PER_S)).any():
        return None
    return f"{source}: {column.name} is in whole minutes: requests of one minute come at once"


def _is_since_1970(number: float, unit: CellFormat) -> bool:
    """Whether the number, read in this unit, is a time between 2001 and 2096."""
    return 1e9 <= number * NS_PER[unit] / NS_PER_S <= 4e9


def doubt(column: TraceColumn, numbers: NDArray[np.float64]) -> str | None:
    """The reason to doubt the unit taken for a column's numbers; None if there is no reason, or the unit is stated."""
    if column.stated or column.role is not Role.ARRIVAL or len(numbers) < 2:
        return None
    if not np.isfinite(numbers).all():
        return None
    if not column.usual:
        return f"the unit of {column.name} is not known"
    taken = f"{column.name} was taken to be in {column.format}, which its name does not say"
    if column.format is CellFormat.MILLISECONDS and (numbers != np.floor(numbers)).any():
        return f"{taken}, and it has fractions"
    span_s = float(numbers.max() - numbers.min()) * NS_PER[column.format] / NS_PER_S
    if span_s <= 0 or len(numbers) < 3:
        return None
    rate = (len(numbers) - 1) / span_s
    if LEAST_PER_S <= rate <= MOST_PER_S:
        return None
    return f"{taken}, and {rate:.3g} requests/s are not between {LEAST_PER_S:.2g} and {MOST_PER_S:g}"


def is_good(column: TraceColumn, cell: Any) -> bool:
    """Whether a cell holds what its column needs."""
    if cell is None or isinstance(cell, bool):
        return False
    if column.format is CellFormat.DATE:
        return _is_date(str(cell))
    if column.format is CellFormat.NANOSECONDS:
        return str(cell).isdecimal()
    number = _number(cell)
    if number is None:
        return False
    if column.role is Role.ARRIVAL:
        return 0 <= number < math.inf
    if column.format is CellFormat.WHOLE:
        return abs(number) <= LONGEST and number == math.floor(number)
    most = 2 * LONGEST if column.role is Role.TOTAL else LONGEST
    return 1 <= number <= most and number == math.floor(number)


def _number(cell: Any) -> float | None:
    """The number in a cell as JSON and Arrow read it; None if it is none. Digits of other scripts, and `_` between
    digits, are refused, since Python alone accepts them."""
    if isinstance(cell, str) and (not cell.isascii() or "_" in cell):
        return None
    try:
        return float(cell)
    except (TypeError, ValueError, OverflowError):
        return None


_DATE = re.compile(r"(\d{4})-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?(Z|[+-]\d\d(:?\d\d)?)?")


def _is_date(cell: str) -> bool:
    """Whether the cell is a date that the table reader accepts: it keeps 64-bit nanoseconds since 1970, up to 2262.

    Python's own parser, which reads six decimals of a second, tells whether that day and time exist.
    """
    text = cell.strip('"')
    found = _DATE.fullmatch(text)
    if found is None or not 1678 <= int(found[1]) <= 2261:
        return False
    try:
        datetime.fromisoformat(re.sub(r"(\.\d{6})\d{1,3}(?!\d)", r"\1", text))
    except ValueError:
        return False
    return True
