"""Requests that are known before they arrive, as columns. Knows neither a server nor a clock.

What has arrived and was never started waits here, as a range of rows, so a long queue costs no objects. Rows are read
block by block and forgotten when their requests have started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from helios_sim.profile.composition import IntArray
from helios_sim.request import Request, RequestBlock
from helios_sim.serving.ahead.layout import (
    ARRIVAL_COLUMNS,
    ARRIVES_NS,
    ID,
    LEFT_AT_ONCE,
    MODEL_THEN,
    OF_TASK,
    OUTPUT,
    PROMPT,
    TEXT,
    TOKENS_COLUMNS,
)

TokensOf = Callable[[str, IntArray], IntArray]  # a model and n arrivals -> what it makes of them, (n, TOKENS_COLUMNS)


class Intake:
    """Rows `head` to `arrived` have arrived; `waiting` of them wait, the others left as they came."""

    def __init__(self, blocks: Iterator[RequestBlock], closed_loop: bool) -> None:
        self.closed_loop = closed_loop  # requests come as others leave, whatever their rows say
        self.rows: IntArray = np.zeros((0, ARRIVAL_COLUMNS), np.int64)
        self.head = self.arrived = self.waiting = 0
        self.exhausted = False
        self.holds = False  # whether requests wait here when they have arrived
        self._blocks = blocks
        self._tokens: dict[str, IntArray] = {}

    def read_on(self) -> None:
        """Reads the next block and forgets the rows before `head`."""
        block = next(self._blocks, None)
        if block is None:
            self.exhausted = True
            return
        columns = (block.request_id, block.arrival_ns, block.prompt_chars, block.output_chars, block.task)
        new = np.zeros((len(block), ARRIVAL_COLUMNS), np.int64)
        new[:, :LEFT_AT_ONCE] = np.stack((*columns, block.text_start), axis=1)
        self.rows = np.concatenate([self.rows[self.head :], new])
        self._tokens = {model: tokens[self.head :] for model, tokens in self._tokens.items()}
        self.arrived -= self.head
        self.head = 0

    def tokens(self, model: str, tokens_of: TokensOf) -> IntArray:
        """What the model makes of each row, shape (rows, TOKENS_COLUMNS)."""
        known = self._tokens.get(model, np.zeros((0, TOKENS_COLUMNS), np.int64))
        if len(known) < len(self.rows):
            known = np.concatenate([known, tokens_of(model, self.rows[len(known) :])])
            self._tokens[model] = known
        return known

    @property
    def next_arrival_ns(self) -> int | None:
        """None: nobody comes any more."""
        while self.arrived == len(self.rows) and not self.exhausted:
            self.read_on()
        return None if self.arrived == len(self.rows) else int(self.rows[self.arrived, ARRIVES_NS])

    def take(self, now_ns: int) -> Request | None:
        """The next request arrives now; None if there is none. Where requests wait here, `keep` or `let_go` follows."""
        if self.next_arrival_ns is None:
            return None
        self.rows[self.arrived, ARRIVES_NS] = now_ns
        self.arrived += 1
        if not self.holds:
            self.head = self.arrived
        return self._request(self.arrived - 1)

    def keep(self, model: int) -> None:
        """The request that arrived last waits; `model` is the number of the model that is active."""
        self.rows[self.arrived - 1, MODEL_THEN] = model
        self.waiting += 1

    def let_go(self) -> None:
        """The request that arrived last left at once."""
        self.rows[self.arrived - 1, LEFT_AT_ONCE] = 1

    def pull(self) -> tuple[Request, int]:
        """The one that waits longest leaves the range. Returns it with the model that was active when it arrived."""
        while self.rows[self.head, LEFT_AT_ONCE]:
            self.head += 1
        self.head += 1
        self.waiting -= 1
        return self._request(self.head - 1), int(self.rows[self.head - 1, MODEL_THEN])

    def _request(self, row: int) -> Request:
        values = self.rows[row].tolist()
        return Request(
            request_id=values[ID],
            arrival_ns=values[ARRIVES_NS],
            prompt_chars=values[PROMPT],
            output_chars=values[OUTPUT],
            task=values[OF_TASK],
            text_start=values[TEXT],
        )
