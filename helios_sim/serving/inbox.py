"""Requests of one replica that are known and have not started: waiting ones, and those still to arrive.

Requests are numbered in order of arrival. A row is forgotten when all requests up to it have started or left. The
request's tokens are kept in a table of their own for each model that has read it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from helios_sim.core.layout import ARRIVAL, NEVER, TOKENS, IntArray, Kind, Record, Storage, Table, numbers_of
from helios_sim.policy.deployment import ServicePlan
from helios_sim.request import Request, RequestBlock

TokensOf = Callable[[str, IntArray], IntArray]
"""Maps a model and requests (n, 9) to prompt tokens, output tokens, first, start and length in the trace, (n, 5)."""
COLUMNS = (
    "request_id", "arrival_ns", "prompt_chars", "output_chars", "task", "text_start", "priority", "shared", "stream",
)  # fmt: skip
_LEAST_ROOM = 64


class Inbox:
    def __init__(self, storage: Storage, models: tuple[str, ...], tokens_of: TokensOf) -> None:
        self.rows: Table = storage.rows(ARRIVAL, _LEAST_ROOM)
        self.planned = np.zeros(1, np.int64)  # exits of all tokens of a service plan, request after request
        self._storage, self._models, self._tokens_of = storage, models, tokens_of
        self._tokens: dict[int, tuple[Table, int]] = {}  # for each model a table, and how many of its rows are filled
        self._plan: ServicePlan | None = None
        self._coming: IntArray = np.zeros((0, len(COLUMNS)), np.int64)
        self._coming_rows: Table = storage.rows(ARRIVAL, 0)
        self._coming_tokens: dict[int, Table] = {}

    def expect(self, raw: IntArray, rows: Table) -> None:
        """Set the requests (n, 9) that a router may send here. `rows` has the same requests, without a service plan."""
        self._coming, self._coming_rows = raw, rows
        self._coming_tokens.clear()
        if self._plan is not None:
            self._plan_coming()

    def coming(self, model: int) -> tuple[Table, Table]:
        """The requests that a router may send here, and their tokens for this model."""
        found = self._coming_tokens.get(model)
        if found is None:
            columns = np.zeros((5, 0), np.int64)
            if len(self._coming):
                columns = self._tokens_of(self._models[model], self._coming).T
            found = self._coming_tokens[model] = self._storage.of_columns(TOKENS, list(columns))
        return self._coming_rows, found

    def note_routed(self, state: Record, model: int) -> None:
        """Note that the loop has added requests to the rows, and their tokens for this model."""
        if model in self._tokens:
            self._tokens[model] = self._tokens[model][0], int(state.known - state.first_row)

    def tokens(self, state: Record, model: int) -> Table:
        """The tokens of all known requests for this model."""
        known = int(state.known - state.first_row)
        table, filled = self._tokens.get(model, (None, 0))
        if table is not None and filled >= known and len(table) >= len(self.rows):
            return table
        if table is None or len(table) < len(self.rows):
            room = len(self.rows)
            table = self._storage.rows(TOKENS, room) if table is None else self._storage.grown(TOKENS, table, room)
        if filled < known:
            raw = numbers_of(self.rows, slice(filled, known), COLUMNS)
            columns = self._tokens_of(self._models[model], raw).T
            new = self._storage.of_columns(TOKENS, list(columns))
            table[filled:known] = new
        self._tokens[model] = table, max(known, filled)
        return table

    def add_block(self, state: Record, block: RequestBlock) -> None:
        self.add(state, raw_requests(block))

    def insert(self, state: Record, request: Request) -> None:
        """Add a request as the next to arrive, before others that are known already."""
        raw = np.array([[getattr(request, name) for name in COLUMNS]], np.int64)
        place, known = int(state.arrived - state.first_row), int(state.known - state.first_row)
        if place == known:
            self.add(state, raw)
            return
        self.make_room(state, 1)
        self.rows[place + 1 : known + 1] = self.rows[place:known]
        self.rows[place : place + 1] = arrival_rows(self._storage, raw)
        for model, (table, filled) in list(self._tokens.items()):
            if filled > place:
                room = table if len(table) > filled else self._storage.grown(TOKENS, table, len(self.rows))
                room[place + 1 : filled + 1] = room[place:filled]
                read = self._tokens_of(self._models[model], raw)
                room[place : place + 1] = self._storage.of_columns(TOKENS, list(read.T))
                self._tokens[model] = room, filled + 1
        state.known += 1
        if self._plan is not None:
            self._follow(place, place + 1)

    def add(self, state: Record, raw: IntArray) -> None:
        """Add requests (n, 9) that arrive in this order, after all known ones."""
        n, known = len(raw), int(state.known - state.first_row)
        self.make_room(state, n)
        self.rows[known : known + n] = arrival_rows(self._storage, raw)
        state.known += n
        if self._plan is not None:
            self._follow(known, known + n)

    def follow(self, state: Record, plan: ServicePlan | None, exits: Callable[[str], tuple[int, ...]]) -> bool:
        """Take each request's model and the exits of its tokens from the plan. Returns whether the plan is new."""
        if plan is self._plan:
            return False
        self._plan, self._exits = plan, exits
        self.planned = np.zeros(1, np.int64)
        self._follow(0, int(state.known - state.first_row))
        self._plan_coming()
        return True

    def _follow(self, first: int, end: int) -> None:
        self._plan_rows(self.rows, range(first, end))

    def _plan_coming(self) -> None:
        self._coming_rows = arrival_rows(self._storage, self._coming)
        self._plan_rows(self._coming_rows, range(len(self._coming)))

    def _plan_rows(self, rows: Table, numbers: range) -> None:
        parts, at = [self.planned], len(self.planned)
        for row in numbers:
            arrival = rows[row]
            if self._plan is None:
                arrival.planned_model = arrival.planned_first = NEVER
                continue
            model = self._plan.model(int(arrival.request_id))
            leaves = np.searchsorted(self._exits(model), self._plan.layers(int(arrival.request_id)))
            arrival.planned_model, arrival.planned_first = self._models.index(model), at
            parts.append(leaves.astype(np.int64))
            at += len(leaves)
        self.planned = np.concatenate(parts)

    def make_room(self, state: Record, n: int) -> None:
        """Make room for n more rows, by a larger table if need be."""
        known = int(state.known - state.first_row)
        if known + n <= len(self.rows):
            return
        room = max(2 * known, known + n)
        self.rows = self._storage.grown(ARRIVAL, self.rows, room)

    def may_forget(self, state: Record, number: int) -> bool:
        """Whether there are enough rows before this request for it to pay to forget them."""
        return int(number - state.first_row) >= max(_LEAST_ROOM, int(state.known - state.first_row) // 2)

    def forget_before(self, state: Record, number: int) -> None:
        """Forget the rows of requests before this one."""
        if not self.may_forget(state, number):
            return
        gone, known = int(number - state.first_row), int(state.known - state.first_row)
        kept = known - gone
        room = max(_LEAST_ROOM, 2 * kept)
        self.rows = _moved(self._storage, ARRIVAL, self.rows, gone, known, room)
        for model, (table, filled) in list(self._tokens.items()):
            if filled < gone:
                del self._tokens[model]
            else:
                self._tokens[model] = _moved(self._storage, TOKENS, table, gone, filled, room), filled - gone
        state.first_row = number


def arrival_rows(storage: Storage, raw: IntArray) -> Table:
    """Requests (n, 9) as the loop's records."""
    none = np.full(len(raw), NEVER, np.int64)
    return storage.of_columns(ARRIVAL, [*raw.T, none, none, np.zeros(len(raw), np.int64)])


def raw_requests(block: RequestBlock) -> IntArray:
    """The columns of requests side by side, (n, 9)."""
    return np.stack([getattr(block, name) for name in COLUMNS], axis=1).astype(np.int64)


def _moved(storage: Storage, kind: Kind, table: Table, first: int, end: int, room: int) -> Table:
    return storage.joined(kind, table[first:end], storage.rows(kind, room - (end - first)))
