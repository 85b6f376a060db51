"""Requests of one replica that are known and have not started: those that wait, and those that are still to come.

Each has a number, in order of arrival; its row is forgotten when all requests up to it have started or left. What a
model makes of a request (its tokens) stands beside, for each model that has been asked.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from helios_sim.core.layout import ARRIVAL, NEVER, TOKENS, IntArray, Kind, Record, Storage, Table
from helios_sim.policy.deployment import ServicePlan
from helios_sim.request import Request, RequestBlock

TokensOf = Callable[[str, IntArray], IntArray]
"""A model and n requests (n, 7) -> prompt tokens, output tokens, first, start and length in the trace, (n, 5)."""
COLUMNS = ("request_id", "arrival_ns", "prompt_chars", "output_chars", "task", "text_start", "priority")
_LEAST_ROOM = 64


class Inbox:
    def __init__(self, storage: Storage, models: tuple[str, ...], tokens_of: TokensOf) -> None:
        self.rows: Table = storage.rows(ARRIVAL, _LEAST_ROOM)
        self.planned = np.zeros(1, np.int64)  # exits of the tokens that a service plan names, request after request
        self._storage, self._models, self._tokens_of = storage, models, tokens_of
        self._raw = np.zeros((_LEAST_ROOM, len(COLUMNS)), np.int64)
        self._tokens: dict[int, tuple[Table, int]] = {}  # by model: a table, and how many of its rows are filled
        self._plan: ServicePlan | None = None

    def tokens(self, state: Record, model: int) -> Table:
        """The tokens of all known requests, as that model reads them."""
        known = int(state.known - state.first_row)
        table, filled = self._tokens.get(model, (None, 0))
        if table is None or len(table) < len(self.rows):
            room = len(self.rows)
            table = self._storage.rows(TOKENS, room) if table is None else self._storage.grown(TOKENS, table, room)
        if filled < known:
            columns = self._tokens_of(self._models[model], self._raw[filled:known]).T
            new = self._storage.of_columns(TOKENS, list(columns))
            table[filled:known] = new
        self._tokens[model] = table, max(known, filled)
        return table

    def add_block(self, state: Record, block: RequestBlock) -> None:
        columns = [getattr(block, name) for name in COLUMNS]
        self.add(state, np.stack(columns, axis=1).astype(np.int64))

    def add_request(self, state: Record, request: Request) -> None:
        self.add(state, np.array([[getattr(request, name) for name in COLUMNS]], np.int64))

    def add(self, state: Record, raw: IntArray) -> None:
        """Requests (n, 7) become known: they arrive in this order, after all that are known."""
        n, known = len(raw), int(state.known - state.first_row)
        self._make_room(state, n)
        known = int(state.known - state.first_row)
        none = np.full(n, NEVER, np.int64)
        columns = [*raw.T, none, none, np.zeros(n, np.int64)]
        self.rows[known : known + n] = self._storage.of_columns(ARRIVAL, columns)
        self._raw[known : known + n] = raw
        state.known += n
        if self._plan is not None:
            self._follow(known, known + n)

    def follow(self, state: Record, plan: ServicePlan | None, exits: Callable[[str], tuple[int, ...]]) -> bool:
        """From now on each request's model and the exits of its tokens are those of the plan. True: that is new."""
        if plan is self._plan:
            return False
        self._plan, self._exits = plan, exits
        self.planned = np.zeros(1, np.int64)
        self._follow(0, int(state.known - state.first_row))
        return True

    def _follow(self, first: int, end: int) -> None:
        parts, at = [self.planned], len(self.planned)
        for row in range(first, end):
            arrival = self.rows[row]
            if self._plan is None:
                arrival.planned_model = arrival.planned_first = NEVER
                continue
            model = self._plan.model(int(arrival.request_id))
            leaves = np.searchsorted(self._exits(model), self._plan.layers(int(arrival.request_id)))
            arrival.planned_model, arrival.planned_first = self._models.index(model), at
            parts.append(leaves.astype(np.int64))
            at += len(leaves)
        self.planned = np.concatenate(parts)

    def _make_room(self, state: Record, n: int) -> None:
        """Room for n more rows: forgets those before the first that is still needed, or makes the table larger."""
        known = int(state.known - state.first_row)
        if known + n <= len(self.rows):
            return
        room = max(2 * known, known + n)
        self.rows = self._storage.grown(ARRIVAL, self.rows, room)
        self._raw = np.concatenate([self._raw, np.zeros((room - len(self._raw), self._raw.shape[1]), np.int64)])

    def forget_before(self, state: Record, number: int) -> None:
        """Rows of requests before this one are not needed any more."""
        gone, known = int(number - state.first_row), int(state.known - state.first_row)
        if gone < max(_LEAST_ROOM, known // 2):
            return
        kept = known - gone
        room = max(_LEAST_ROOM, 2 * kept)
        self.rows = _moved(self._storage, ARRIVAL, self.rows, gone, known, room)
        raw = np.zeros((room, self._raw.shape[1]), np.int64)
        raw[:kept] = self._raw[gone:known]
        self._raw = raw
        for model, (table, filled) in list(self._tokens.items()):
            if filled < gone:
                del self._tokens[model]
            else:
                self._tokens[model] = _moved(self._storage, TOKENS, table, gone, filled, room), filled - gone
        state.first_row = number


def _moved(storage: Storage, kind: Kind, table: Table, first: int, end: int, room: int) -> Table:
    return storage.joined(kind, table[first:end], storage.rows(kind, room - (end - first)))
