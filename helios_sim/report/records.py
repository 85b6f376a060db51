"""Request records as columns. Knows what one request experienced, nothing about arms or statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.exits.trace import MICROBITS
from helios_sim.request import RequestRecord, Status

if TYPE_CHECKING:
    import pyarrow

IntColumn = NDArray[np.int64]
BoolColumn = NDArray[np.bool_]

_INTEGERS = (
    "request_id",
    "replica",
    "task",
    "arrival_ns",
    "prompt_tokens",
    "output_tokens",
    "prompt_chars",
    "output_chars",
    "layers_run",
    "early_tokens",
    "breach_tokens",
    "agreed_tokens",
    "evaluated_tokens",
    "preemptions",
)
_MOMENTS = ("scheduled_ns", "first_token_ns", "last_token_ns")


@dataclass(frozen=True, slots=True)
class Moments:
    """Times in ns, shape (n,), that may not have happened: where `present` is false, `ns` means nothing."""

    ns: IntColumn
    present: BoolColumn

    @classmethod
    def of(cls, times: Sequence[int | None]) -> Moments:
        present = np.array([time is not None for time in times], dtype=np.bool_)
        return cls(np.array([0 if time is None else time for time in times], dtype=np.int64), present)


@dataclass(frozen=True, slots=True)
class Amounts:
    """Whole numbers, shape (n,), that may not be known: where `present` is false, `values` mean nothing."""

    values: IntColumn
    present: BoolColumn

    @classmethod
    def of(cls, amounts: Sequence[int | None]) -> Amounts:
        present = np.array([amount is not None for amount in amounts], dtype=np.bool_)
        return cls(np.array([0 if amount is None else amount for amount in amounts], dtype=np.int64), present)


@dataclass(frozen=True, slots=True)
class Records:
    """Columns of RequestRecord, each of shape (n,), in order of request id."""

    request_id: IntColumn
    replica: IntColumn
    task: IntColumn
    arrival_ns: IntColumn
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
    scheduled_ns: Moments
    first_token_ns: Moments
    last_token_ns: Moments
    microbits: Amounts
    model: tuple[str, ...]
    status: tuple[Status, ...]
    drop_reason: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.request_id)

    @classmethod
    def of(cls, records: Iterable[RequestRecord]) -> Records:
        """Columns of these records, sorted by request id so that arms can be paired row by row."""
        rows = sorted(records, key=attrgetter("request_id"))
        integers: dict[str, Any] = {
            name: np.array([getattr(row, name) for row in rows], dtype=np.int64) for name in _INTEGERS
        }
        moments: dict[str, Any] = {name: Moments.of([getattr(row, name) for row in rows]) for name in _MOMENTS}
        return cls(
            **integers,
            **moments,
            microbits=Amounts.of([row.microbits for row in rows]),
            model=tuple(row.model for row in rows),
            status=tuple(row.status for row in rows),
            drop_reason=tuple(row.drop_reason for row in rows),
        )

    def has_status(self, status: Status) -> BoolColumn:
        return np.array([s is status for s in self.status], dtype=np.bool_)

    @property
    def completed(self) -> BoolColumn:
        return self.has_status(Status.COMPLETED)

    def queue_ns(self) -> IntColumn:
        """First scheduled - arrival, of completed requests."""
        return (self.scheduled_ns.ns - self.arrival_ns)[self.completed]

    def ttft_ns(self) -> IntColumn:
        """Time to first token: first token - arrival, of completed requests."""
        return (self.first_token_ns.ns - self.arrival_ns)[self.completed]

    def e2e_ns(self) -> IntColumn:
        """End to end: last token - arrival, of completed requests."""
        return (self.last_token_ns.ns - self.arrival_ns)[self.completed]

    def tpot_ns(self) -> tuple[NDArray[np.float64], BoolColumn]:
        """Time per output token, (E2E - TTFT) / (n - 1), of completed requests, and where it is defined (n > 1)."""
        gaps = (self.output_tokens - 1)[self.completed]
        decode_ns = (self.last_token_ns.ns - self.first_token_ns.ns)[self.completed]
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
        span = int(self.last_token_ns.ns[done].max()) - int(self.arrival_ns.min())
        return span if span > 0 else None

    def to_table(self, arm: str, seed: int) -> pyarrow.Table:
        """The columns with their RequestRecord names and `bits`, nulls where a time did not happen or bits are not
        known, plus `arm` and `seed`."""
        import pyarrow as pa

        n = len(self)
        columns = {
            "arm": pa.array([arm] * n, pa.dictionary(pa.int32(), pa.string())),
            "seed": pa.array(np.full(n, seed, dtype=np.int64)),
            "model": pa.array(self.model, pa.string()).dictionary_encode(),
            "status": pa.array([str(s) for s in self.status], pa.string()).dictionary_encode(),
            "drop_reason": pa.array(self.drop_reason, pa.string()).dictionary_encode(),
        }
        columns |= {name: pa.array(getattr(self, name)) for name in _INTEGERS}
        for name in _MOMENTS:
            moments: Moments = getattr(self, name)
            columns[name] = pa.array(moments.ns, mask=~moments.present)
        columns["bits"] = pa.array(self.microbits.values / MICROBITS, mask=~self.microbits.present)
        return pa.table(columns)
