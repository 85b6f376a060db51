"""Request records as columns. Knows what one request experienced, nothing about arms or statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.exits.trace import MICROBITS
from helios_sim.report.arrow_columns import numbers, texts
from helios_sim.request import RequestRecord, Status

if TYPE_CHECKING:
    import pyarrow

TimeColumn = NDArray[np.int64]  # ns
IntColumn = NDArray[np.int32]
BoolColumn = NDArray[np.bool_]

# Whole numbers and how wide they are kept; what does not fit raises an OverflowError.
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
BLOCK_ROWS = 65_536  # of a table that is written in parts


@dataclass(frozen=True, slots=True)
class Maybe:
    """Whole numbers, shape (n,), that may not be there: where `present` is false, `values` mean nothing."""

    values: NDArray[np.int64]
    present: BoolColumn

    def __getitem__(self, rows: slice | NDArray[Any]) -> Maybe:
        return Maybe(self.values[rows], self.present[rows])


@dataclass(frozen=True, slots=True)
class Labels:
    """Texts, shape (n,), of which there are few: each is a number into `names`."""

    codes: NDArray[np.int16]
    names: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.codes)

    def __iter__(self) -> Iterator[str | None]:
        return (self.names[code] for code in self.codes.tolist())

    def __getitem__(self, rows: slice | NDArray[Any]) -> Labels:
        return Labels(self.codes[rows], self.names)

    def equals(self, name: str | None) -> BoolColumn:
        """Where this text stands; nowhere if there is none of it."""
        if name not in self.names:
            return np.zeros(len(self.codes), np.bool_)
        return np.asarray(self.codes == self.names.index(name))

    def counts(self, rows: BoolColumn | slice = slice(None)) -> dict[str | None, int]:
        """How often each text stands among `rows`; those that do not are left out."""
        found = np.bincount(self.codes[rows], minlength=len(self.names)).tolist()
        return {name: count for name, count in zip(self.names, found, strict=True) if count}


@dataclass(frozen=True, slots=True)
class Records:
    """Columns of RequestRecord, each of shape (n,), in order of request id: about 100 bytes a request."""

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
    model: Labels
    status: Labels
    drop_reason: Labels

    def __len__(self) -> int:
        return len(self.request_id)

    @classmethod
    def of(cls, records: Iterable[RequestRecord]) -> Records:
        """Columns of these records, sorted by request id so that arms can be paired row by row."""
        from helios_sim.report.record_log import RecordLog

        log = RecordLog()
        for record in records:
            log.add(record)
        return log.records()

    def part(self, rows: slice | NDArray[Any]) -> Records:
        return Records(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def has_status(self, status: Status) -> BoolColumn:
        return self.status.equals(status)

    @property
    def completed(self) -> BoolColumn:
        return self.has_status(Status.COMPLETED)

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
        """Time per output token, (E2E - TTFT) / (n - 1), of completed requests, and where it is defined (n > 1)."""
        gaps = (self.output_tokens - 1)[self.completed]
        decode_ns = (self.last_token_ns.values - self.first_token_ns.values)[self.completed]
        return decode_ns / np.maximum(gaps, 1), gaps > 0

    def bits_per_char(self, rows: BoolColumn) -> float | None:
        """Of the completed requests among `rows`; None where bits of any of them are not known, or there is none."""
        rows = rows & self.completed
        chars = int(self.output_chars[rows].sum())
        if not chars or not self.microbits.present[rows].all():
            return None
        return int(self.microbits.values[rows].sum()) / MICROBITS / chars

    def span_ns(self) -> int | None:
        """First arrival to last completion; None when nothing was completed or all happened at once."""
        done = self.completed
        if not done.any():
            return None
        span = int(self.last_token_ns.values[done].max()) - int(self.arrival_ns.min())
        return span if span > 0 else None

    def tables(self, arm: str, seed: int) -> Iterator[pyarrow.Table]:
        """`to_table` in parts of at most BLOCK_ROWS rows."""
        for first in range(0, max(len(self), 1), BLOCK_ROWS):
            yield self.part(slice(first, first + BLOCK_ROWS)).to_table(arm, seed)

    def to_table(self, arm: str, seed: int) -> pyarrow.Table:
        """The columns with their RequestRecord names and `bits`, nulls where a time did not happen or bits are not
        known, plus `arm` and `seed`."""
        import pyarrow as pa

        n = len(self)
        columns = {"arm": _texts(Labels(np.zeros(n, np.int16), (arm,))), "seed": numbers(np.full(n, seed, np.int64))}
        columns |= {name: _texts(getattr(self, name)) for name in LABELS}
        columns |= {name: numbers(getattr(self, name).astype(np.int64)) for name in INTEGERS}
        for name in MOMENTS:
            moments: Maybe = getattr(self, name)
            columns[name] = numbers(moments.values, moments.present)
        columns["bits"] = numbers(self.microbits.values / MICROBITS, self.microbits.present)
        return pa.table(columns)


def _texts(labels: Labels) -> pyarrow.Array:
    import pyarrow as pa

    known = [name for name in labels.names if name is not None]
    place_of = np.array([0 if name is None else known.index(name) for name in labels.names], np.int32)
    missing = np.array([name is None for name in labels.names], np.bool_)
    codes = numbers(place_of[labels.codes], ~missing[labels.codes])
    return pa.DictionaryArray.from_arrays(codes, texts([str(name) for name in known]))
