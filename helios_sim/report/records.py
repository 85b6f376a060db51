"""Records of requests as columns: collected while they leave, read by metrics, written as a table.

Records of a long run are on disk (`on_disk`). Code that goes over all requests takes `parts`, of which there is one if
the records fit into memory, or uses `sums`, `counts` and `series`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from helios_sim import on_disk
from helios_sim.exits.trace import MICROBITS
from helios_sim.files import numbers, texts
from helios_sim.report.columns import (
    BoolColumn,
    IntColumn,
    Labels,
    Maybe,
    TimeColumn,
    copied,
    narrow,
    numbers_and_none,
)
from helios_sim.report.series import Series
from helios_sim.request import NS_PER_S, RecordBlock, RequestRecord, Status

if TYPE_CHECKING:
    import pyarrow

# Whole numbers and their widths; a number that does not fit raises OverflowError.
INTEGERS: dict[str, type[np.signedinteger[Any]]] = {
    "request_id": np.int32,
    "replica": np.int32,
    "task": np.int32,
    "arrival_ns": np.int64,
    "prompt_tokens": np.int32,
    "output_tokens": np.int32,
    "prompt_chars": np.int32,
    "output_chars": np.int32,
    "layers_run": np.int32,
    "early_tokens": np.int32,
    "breach_tokens": np.int32,
    "agreed_tokens": np.int32,
    "evaluated_tokens": np.int32,
    "preemptions": np.int32,
}
MOMENTS = ("scheduled_ns", "first_token_ns", "last_token_ns")
LABELS = ("model", "status", "drop_reason")
DERIVED = ("queue_s", "ttft_s", "tpot_s", "e2e_s", "task_name")  # columns of a table that follow from others
BLOCK_ROWS = on_disk.SPAN_ROWS  # rows of a table that are written at once


@dataclass(frozen=True, slots=True)
class Records:
    """Columns of RequestRecord, each of shape (n,), in order of request id: about 90 bytes a request."""

    request_id: IntColumn
    replica: IntColumn
    task: IntColumn
    arrival_ns: TimeColumn
    prompt_tokens: IntColumn
    output_tokens: IntColumn
    prompt_chars: IntColumn
    output_chars: IntColumn
    layers_run: IntColumn
    early_tokens: IntColumn
    breach_tokens: IntColumn
    agreed_tokens: IntColumn
    evaluated_tokens: IntColumn
    preemptions: IntColumn
    scheduled_ns: Maybe
    first_token_ns: Maybe
    last_token_ns: Maybe
    microbits: Maybe
    cached_tokens: Maybe
    model: Labels
    status: Labels
    drop_reason: Labels

    def __len__(self) -> int:
        return len(self.request_id)

    @classmethod
    def of(cls, records: Iterable[RequestRecord]) -> Records:
        """Make columns from records, sorted by request id so that arms can be paired row by row."""
        log = RecordLog()
        for record in records:
            log.add(record)
        return log.records()

    def __setstate__(self, columns: Sequence[Any]) -> None:
        """Unpickle. Records of a long run come from another process through memory, and are put on disk again."""
        for f, column in zip(fields(self), copied(columns), strict=True):
            object.__setattr__(self, f.name, column)

    def part(self, rows: slice | NDArray[Any]) -> Records:
        return Records(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def parts(self) -> Iterator[Records]:
        """All records in order, in parts that fit into memory."""
        if not self.on_disk:
            yield self
            return
        for rows in on_disk.spans(self.request_id):
            yield self.part(rows)

    @property
    def on_disk(self) -> bool:
        """Whether there are too many records for memory."""
        return on_disk.is_on_disk(self.request_id)

    def sums(self, columns: Sequence[str], chosen: Chosen | None = None) -> list[int]:
        """The sum of each of these columns of whole numbers over the chosen completed requests."""
        found = [0] * len(columns)
        for part in self.parts():
            rows = part.done(chosen)
            for place, name in enumerate(columns):
                found[place] += int(getattr(part, name)[rows].sum())
        return found

    @property
    def n_completed(self) -> int:
        return self.counts("status").get(Status.COMPLETED, 0)

    def counts(self, label: str, chosen: Chosen | None = None) -> dict[str | None, int]:
        """The number of times that each text of a column occurs among the chosen requests."""
        found: Counter[str | None] = Counter()
        for part in self.parts():
            labels: Labels = getattr(part, label)
            found.update(labels.counts() if chosen is None else labels.counts(chosen(part)))
        return dict(found)

    def series(self, of: Callable[[Records], NDArray[Any]]) -> Series:
        """The results of `of` for all parts, one after the other."""
        return series_of_all([self], of)

    def has_status(self, status: Status) -> BoolColumn:
        return self.status.equals(status)

    @property
    def completed(self) -> BoolColumn:
        return self.has_status(Status.COMPLETED)

    def done(self, chosen: Chosen | None = None) -> BoolColumn:
        """Whether each request is chosen and was completed."""
        return self.completed if chosen is None else self.completed & chosen(self)

    def queue_ns(self) -> TimeColumn:
        """First scheduled - arrival, of completed requests."""
        return (self.scheduled_ns.values - self.arrival_ns)[self.completed]

    def ttft_ns(self) -> TimeColumn:
        """Time to first token: first token - arrival, of completed requests."""
        return (self.first_token_ns.values - self.arrival_ns)[self.completed]

    def e2e_ns(self) -> TimeColumn:
        """End to end: last token - arrival, of completed requests."""
        return (self.last_token_ns.values - self.arrival_ns)[self.completed]

    def tpot_ns(self) -> tuple[NDArray[np.float64], BoolColumn]:
        """Time per output token, (E2E - TTFT) / (n - 1), of completed requests, and whether it is defined (n > 1)."""
        gaps = (self.output_tokens - 1)[self.completed]
        decode_ns = (self.last_token_ns.values - self.first_token_ns.values)[self.completed]
        return decode_ns / np.maximum(gaps, 1), gaps > 0

    def defined_tpot_ns(self) -> NDArray[np.float64]:
        """Time per output token of the completed requests that have one."""
        times_ns, defined = self.tpot_ns()
        return times_ns[defined]

    def bits_per_char(self, chosen: Chosen | None = None) -> float | None:
        """Bits per character of the chosen completed requests; None without any, or if the bits of one are unknown."""
        chars = microbits = 0
        for part in self.parts():
            rows = part.done(chosen)
            if not part.microbits.present[rows].all():
                return None
            chars += int(part.output_chars[rows].sum())
            microbits += int(part.microbits.values[rows].sum())
        return microbits / MICROBITS / chars if chars else None

    def span_ns(self) -> int | None:
        """First arrival to last completion; None when nothing was completed or all happened at once."""
        ends = self.ends_ns()
        return None if ends is None else ends[1] - ends[0] or None

    def ends_ns(self) -> tuple[int, int] | None:
        """First arrival and last completion; None when nothing was completed."""
        first_ns: list[int] = []
        last_ns: list[int] = []
        for part in self.parts() if len(self) else ():
            ended_ns = part.last_token_ns.values[part.completed]
            first_ns.append(int(part.arrival_ns.min()))
            last_ns += [int(ended_ns.max())] if len(ended_ns) else []
        return (min(first_ns), max(last_ns)) if last_ns else None

    def tables(
        self, arm: str, seed: int, tasks: Sequence[str] = (), cached: bool = False
    ) -> Iterator[pyarrow.Table]:  # fmt: skip
        """The tables of `to_table` for parts of at most BLOCK_ROWS rows."""
        for part in self.parts():
            for first in range(0, max(len(part), 1), BLOCK_ROWS):
                yield part.part(slice(first, first + BLOCK_ROWS)).to_table(arm, seed, tasks, cached)

    def to_table(self, arm: str, seed: int, tasks: Sequence[str] = (), cached: bool = False) -> pyarrow.Table:
        """The columns under the names of RequestRecord, `bits`, `arm` and `seed`, with null for missing times and bits.

        Derived columns follow (`DERIVED`): times of completed requests in seconds, and the task's name if `tasks` has
        names; then `cached_tokens` if they are asked for."""
        import pyarrow as pa

        n, done = len(self), self.completed
        columns = {"arm": _texts(Labels(np.zeros(n, np.int16), (arm,))), "seed": numbers(np.full(n, seed, np.int64))}
        columns |= {name: _texts(getattr(self, name)) for name in LABELS}
        columns |= {name: numbers(getattr(self, name).astype(np.int64)) for name in INTEGERS}
        for name in MOMENTS:
            moments: Maybe = getattr(self, name)
            columns[name] = numbers(moments.values, moments.present)
        columns["bits"] = numbers(self.microbits.values / MICROBITS, self.microbits.present)
        tpot_ns, defined = self.tpot_ns()
        for name, of_completed, present in (
            ("queue_s", self.queue_ns(), None), ("ttft_s", self.ttft_ns(), None), ("tpot_s", tpot_ns, defined),
            ("e2e_s", self.e2e_ns(), None),
        ):  # fmt: skip
            values, known = np.zeros(n), done.copy()
            values[done] = of_completed / NS_PER_S
            if present is not None:
                known[done] = present
            columns[name] = numbers(values, known)
        if cached:
            columns["cached_tokens"] = numbers(self.cached_tokens.values, self.cached_tokens.present)
        if tasks:
            columns["task_name"] = _texts(Labels(self.task.astype(np.int16), tuple(tasks)))
        return pa.table(columns)


def series_of_all(runs: Sequence[Records], of: Callable[[Records], NDArray[Any]]) -> Series:
    """The results of `of` for the requests of one or more runs, one run after the other."""
    return Series(lambda: (of(part) for records in runs for part in records.parts()))


Chosen = Callable[[Records], BoolColumn]
"""Chooses requests: maps records to a boolean for each, (n,). None chooses all."""


def _texts(labels: Labels) -> pyarrow.Array:
    import pyarrow as pa

    known = [name for name in labels.names if name is not None]
    place_of = np.array([0 if name is None else known.index(name) for name in labels.names], np.int32)
    missing = np.array([name is None for name in labels.names], np.bool_)
    codes = numbers(place_of[labels.codes], ~missing[labels.codes])
    return pa.DictionaryArray.from_arrays(codes, texts([str(name) for name in known]))


BLOCK_RECORDS = 4096

_MAYBE = (*MOMENTS, "microbits", "cached_tokens")
_NAMES = (*INTEGERS, *_MAYBE, *LABELS)
_KINDS = INTEGERS | dict.fromkeys(_MAYBE, np.int64) | dict.fromkeys(LABELS, np.int16)
ROW_BYTES = sum(np.dtype(kind).itemsize for kind in _KINDS.values()) + len(_MAYBE)  # bytes of all columns of a request
_row = attrgetter(*_NAMES)
_PRESENT, _NO_ID = "present ", -1  # on disk: prefix of columns that say what is present; id of an empty row


class RecordLog:
    """Collects records as requests leave; `records` ends it.

    An object for each record takes several times the memory of its row, so objects are kept only until a block is
    full. Columns in memory grow in place: an array for each block would fragment the memory of the process. Those of
    many requests are on disk, where each record is put into the row of its id.
    """

    def __init__(self, requests: int | None = None) -> None:
        """`requests` is the number of requests, with ids from 0; None if it is not known."""
        self._waiting: list[RequestRecord] = []
        columns = None if requests is None or requests < on_disk.WORTH_A_FILE else _on_disk(requests)
        self._on_disk, self._at_home = columns is not None, 0  # rows that may still be in memory
        self._columns: dict[str, NDArray[Any]] = columns or {name: np.zeros(0, _KINDS[name]) for name in _NAMES}
        self._present: dict[str, NDArray[np.bool_]] = {
            name: self._columns.pop(_PRESENT + name, np.zeros(0, np.bool_)) for name in _MAYBE
        }
        self._missing = {*_MAYBE}  # columns that have no number yet, and so do not exist
        self._codes: dict[str, dict[str | None, int]] = {name: {} for name in LABELS}
        self._rows = 0  # filled rows

    def add(self, record: RequestRecord) -> None:
        self._waiting.append(record)
        if len(self._waiting) == BLOCK_RECORDS:
            self._flush()

    def add_block(self, block: RecordBlock) -> None:
        """Append records. Raises OverflowError if a number does not fit its column."""
        self._flush()
        rows = self._rows_of(block.numbers["request_id"])
        for name, values in block.numbers.items():
            self._columns[name][rows] = narrow(values, _KINDS[name])
        for name, (values, present) in block.maybe.items():
            self._put_maybe(name, rows, values, present)
        for name, (codes, names) in block.labels.items():
            own = self._codes[name]
            seen, first = np.unique(codes, return_index=True)
            for code in seen[np.argsort(first)].tolist():
                own.setdefault(names[code], len(own))
            code_of = np.array([own.get(text, 0) for text in names], np.int16)
            self._columns[name][rows] = code_of[codes]

    def records(self) -> Records:
        """All added records in order of request id. They take over the log's memory, so the log ends."""
        self._flush()
        ids = self._columns["request_id"]
        if not self._on_disk:
            order: Any = np.argsort(ids[: self._rows], kind="stable")
        else:
            on_disk.let_go(ids)
            on_disk.expect_reading(ids)
            order = slice(None) if self._rows == len(ids) else np.flatnonzero(ids != _NO_ID)
        found: dict[str, Any] = {}
        for name in _NAMES:  # one by one, so that only one column exists twice at any time
            if name in self._missing:
                none = np.broadcast_to(np.int64(0), self._rows), np.broadcast_to(np.bool_(False), self._rows)
                found[name] = Maybe(*none)
                continue
            column = self._columns.pop(name)[order]
            if name in _MAYBE:
                found[name] = Maybe(column, self._present.pop(name)[order])
            elif name in LABELS:
                found[name] = Labels(column, tuple(self._codes[name]))
            else:
                found[name] = column
        return Records(**found)

    def _flush(self) -> None:
        if not self._waiting:
            return
        rows = self._rows_of(np.array([record.request_id for record in self._waiting], np.int64))
        for name, values in zip(_NAMES, zip(*map(_row, self._waiting), strict=True), strict=True):
            if name in LABELS:
                codes = self._codes[name]
                column: NDArray[Any] = np.array([codes.setdefault(value, len(codes)) for value in values], np.int16)
            elif name in _MAYBE:
                self._put_maybe(name, rows, *numbers_and_none(values))
                continue
            else:
                column = np.array(values, _KINDS[name])  # raises OverflowError if one does not fit
            self._columns[name][rows] = column
        self._waiting.clear()

    def _rows_of(self, ids: NDArray[np.int64]) -> slice | NDArray[np.int64]:
        """The rows for the next records, which have these ids."""
        self._rows += len(ids)
        if not self._on_disk:
            self._make_room(self._rows)
            return slice(self._rows - len(ids), self._rows)
        self._at_home += len(ids)
        if self._at_home >= on_disk.SPAN_ROWS:
            on_disk.let_go(self._columns["request_id"])
            self._at_home = len(ids)
        return ids

    def _put_maybe(
        self, name: str, rows: slice | NDArray[np.int64], values: NDArray[np.int64], present: BoolColumn
    ) -> None:
        if name in self._missing:
            if not present.any():
                return
            self._missing.remove(name)
            if not self._on_disk:
                for column in (self._columns[name], self._present[name]):
                    column.resize(len(self._columns["request_id"]), refcheck=False)
        self._columns[name][rows] = np.where(present, values, 0)
        self._present[name][rows] = present

    def _make_room(self, rows: int) -> None:
        if rows > len(self._columns["request_id"]):
            for columns in (self._columns, self._present):
                for name in columns.keys() - self._missing:
                    columns[name].resize(rows + rows // 8, refcheck=False)  # no view of it exists outside


def _on_disk(requests: int) -> dict[str, NDArray[Any]] | None:
    """Empty columns on disk for all requests; None if there is no room for them."""
    try:
        columns = on_disk.zeros(_KINDS | {_PRESENT + name: np.bool_ for name in _MAYBE}, requests)
    except OSError as error:
        told = f"records of {requests:,} requests stay in memory, since there is no file for them in TMPDIR or /var/tmp"
        print(f"helios_sim: {told}: {error.strerror or error}", file=sys.stderr)
        return None
    for rows in on_disk.spans(columns["request_id"]):
        columns["request_id"][rows] = _NO_ID
    return columns
