"""The requests that are running, as columns, so that many iterations can be computed at once.

Knows what a request has done so far; knows neither time nor memory sizes.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from helios_sim.exits.trace import TokenSpan
from helios_sim.request import Request


@dataclass(slots=True)
class Sequence:
    """A request in the system, with what it needs to be started, preempted and recorded."""

    request: Request
    model: str
    prompt_tokens: int
    output_tokens: int
    span: TokenSpan
    generated: int = 0  # output tokens produced so far
    scheduled_ns: int | None = None
    first_token_ns: int | None = None
    last_token_ns: int | None = None
    layers_run: int = 0
    early_tokens: int = 0
    breach_tokens: int = 0
    agreed_tokens: int = 0
    evaluated_tokens: int = 0
    microbits: int = 0  # 0 where nothing was recorded
    preemptions: int = 0
    started: bool = False  # counted against the deployment's admission limit
    earlier_chars: int = 0  # answer already given by another model, before a migration
    earlier_tokens: int = 0
    cached_tokens: int = 0  # whose K and V were in the cache when it last lost its place
    admitted: int = 0  # how many had been admitted to the batch when it last was, itself included

    @property
    def prefill_tokens(self) -> int:
        """Tokens to prefill when it enters the batch: the prompt and whatever was generated before a preemption."""
        return self.prompt_tokens + self.generated


class Column(IntEnum):
    CONTEXT = 0  # tokens whose K and V are in the cache
    PREFILL_LEFT = 1  # tokens still to prefill; 0 while decoding
    REMAINING = 2  # output tokens still to produce
    GENERATED = 3  # output tokens produced, also the index of the next one
    FIRST = 4  # where the answer's tokens lie in the exit trace: FIRST + (START + index) % LENGTH
    START = 5
    LENGTH = 6
    LAYERS_RUN = 7
    EARLY = 8
    BREACH = 9
    AGREED = 10
    EVALUATED = 11
    MICROBITS = 12
    LAST_TOKEN_NS = 13  # when its latest token was produced; -1 before the first, since a table has no None


def batch_row(sequence: Sequence, cached_tokens: int) -> tuple[int, ...]:
    """The columns of a request that enters the batch, with so many of its first tokens in the cache."""
    span = sequence.span
    return (
        cached_tokens,
        sequence.prefill_tokens - cached_tokens,
        sequence.output_tokens - sequence.generated,
        sequence.generated,
        span.first,
        span.start,
        span.length,
        sequence.layers_run,
        sequence.early_tokens,
        sequence.breach_tokens,
        sequence.agreed_tokens,
        sequence.evaluated_tokens,
        sequence.microbits,
        -1 if sequence.last_token_ns is None else sequence.last_token_ns,
    )


def take_row(sequence: Sequence, row: SequenceOf[int]) -> None:
    """What has happened since `batch_row` laid the request out; `row` may go on beyond those columns."""
    sequence.generated = row[Column.GENERATED]
    sequence.layers_run = row[Column.LAYERS_RUN]
    sequence.early_tokens = row[Column.EARLY]
    sequence.breach_tokens = row[Column.BREACH]
    sequence.agreed_tokens = row[Column.AGREED]
    sequence.evaluated_tokens = row[Column.EVALUATED]
    sequence.microbits = row[Column.MICROBITS]
    if row[Column.LAST_TOKEN_NS] >= 0:
        sequence.last_token_ns = row[Column.LAST_TOKEN_NS]


class RunningBatch:
    """Running requests in the order of their admission; the last one is the newest.

    Prompts are prefilled in that order too, so the requests that decode are always the first ones.
    """

    def __init__(self, capacity: int = 64) -> None:
        self.members: list[Sequence] = []
        self.admitted = 0  # requests ever appended
        self.decoding = 0  # how many of the members decode; the others still prefill
        self._table = np.zeros((len(Column), capacity), np.int64)
        # Tokens that left above band s and whose K and V there are still to be computed (KvRule.RECOMPUTE).
        self.kv_debt = np.zeros((0, capacity), np.int64)

    def __len__(self) -> int:
        return len(self.members)

    def column(self, column: Column) -> NDArray[np.int64]:
        """A writable view of one column, shape (len(self),)."""
        return self._table[column, : len(self.members)]

    def decoding_column(self, column: Column) -> NDArray[np.int64]:
        """A writable view of one column of the requests that decode, shape (self.decoding,)."""
        return self._table[column, : self.decoding]

    def add(self, rows: slice, changes: list[int]) -> None:
        """Adds to the columns of these requests, to each the same for all of them; one change a column."""
        self._table[:, rows] += np.array(changes, np.int64)[:, None]

    def kv_debt_of_decoding(self, bands: int) -> NDArray[np.int64]:
        """What the requests that decode owe each band, a view of shape (self.decoding, bands)."""
        if len(self.kv_debt) != bands:
            self.kv_debt = np.zeros((bands, self._table.shape[1]), np.int64)
        return self.kv_debt[:, : self.decoding].T

    def settle_kv_debt(self, layers: NDArray[np.int64], bounds: tuple[int, ...]) -> None:
        """Decoded tokens ran to `layers`, (k, D): bands that they ran are paid up, the others owe a token more each."""
        k = len(layers)
        starts = np.array((0, *bounds[:-1]))
        runs = layers[:, :, None] > starts
        steps = np.arange(1, k + 1)[:, None, None]
        last_run = np.where(runs, steps, 0).max(axis=0)  # (D, S), 0: not once
        debt = self.kv_debt_of_decoding(len(bounds))
        debt[:] = np.where(last_run > 0, k - last_run, debt + k)

    def append(self, sequence: Sequence, cached_tokens: int = 0) -> None:
        """`cached_tokens`: so many of its first tokens are in the cache already."""
        self.admitted += 1
        sequence.admitted = self.admitted
        n = len(self.members)
        if n == self._table.shape[1]:
            self._table = np.concatenate([self._table, np.zeros_like(self._table)], axis=1)
            self.kv_debt = np.concatenate([self.kv_debt, np.zeros_like(self.kv_debt)], axis=1)
        self._table[:, n] = batch_row(sequence, cached_tokens)
        self.kv_debt[:, n] = 0
        self.members.append(sequence)

    def rows(self) -> NDArray[np.int64]:
        """All columns of all members, a copy of shape (len(self), columns)."""
        return self._table[:, : len(self.members)].T.copy()

    def replace(
        self, members: list[Sequence], rows: NDArray[np.int64], kv_debt: NDArray[np.int64], decoding: int
    ) -> None:
        """Other members, with their columns (n, columns) and what they owe each band (n, bands)."""
        n = len(members)
        capacity = max(n, self._table.shape[1])
        self._table = np.zeros((len(Column), capacity), np.int64)
        self._table[:, :n] = rows.T
        self.kv_debt = np.zeros((kv_debt.shape[1], capacity), np.int64)
        self.kv_debt[:, :n] = kv_debt.T
        self.members, self.decoding = members, decoding

    def pop_newest(self) -> tuple[Sequence, int]:
        """Takes the newest request out, for a preemption. Returns it and the tokens whose KV it had reserved."""
        index = len(self.members) - 1
        reserved_tokens = self._write_back(index)
        self.decoding = min(self.decoding, index)
        return self.members.pop(), reserved_tokens

    def remove(self, indices: list[int]) -> list[tuple[Sequence, int]]:
        """Takes requests that decode out, in the order of `indices` (ascending).

        Returns each with the tokens whose KV it had reserved.
        """
        taken = [(self.members[i], self._write_back(i)) for i in indices]
        for index in reversed(indices):
            n = len(self.members)
            self._table[:, index : n - 1] = self._table[:, index + 1 : n]
            self.kv_debt[:, index : n - 1] = self.kv_debt[:, index + 1 : n]
            del self.members[index]
        self.decoding -= len(indices)
        return taken

    def _write_back(self, index: int) -> int:
        """Moves what happened in the batch into the sequence. Returns the tokens whose KV it has reserved."""
        sequence = self.members[index]
        row = self._table[:, index].tolist()
        take_row(sequence, row)
        sequence.cached_tokens = row[Column.CONTEXT]
        reserved_tokens: int = row[Column.CONTEXT] + row[Column.PREFILL_LEFT]
        return reserved_tokens
