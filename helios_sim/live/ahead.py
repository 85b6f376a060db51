"""Decode steps that are launched before the host has read the tokens of the step before.

The host knows beforehand which requests go on and where their next tokens lie. The tokens themselves stay on the card,
where the next step reads them, so the server plans an iteration while the card runs it. The plan is then compared with
what was launched: it fits if it has the same slots, positions and tokens, or fewer of them because an answer has ended
or left. Any other plan runs anew. K and V that were written in vain lie beyond the tokens of their request, where they
are overwritten before they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from helios_sim.exits.rule import Confidence
from helios_sim.live.device import Device, Mark
from helios_sim.live.exits import ExitReader, HeadOutput, Row
from helios_sim.live.graphs import GraphedDecodes

ROOMS = 2  # for results on the host: one is read while the next is written


@dataclass(slots=True)
class _Launched:
    """A launched step through `end` layers. Its head output is on its way to the host."""

    rows: list[tuple[int, int]]  # slot and position
    end: int
    measure: Confidence | None
    exits: ExitReader
    reads: tuple[object, ...]  # the weights that the step reads
    size: int
    room: Tensor  # host memory (3, size): tokens, largest logits, confidences
    arrived: Mark
    tokens: list[int] = field(default_factory=list)  # input tokens of the rows, once the host knows them

    def places(self, rows: Sequence[Row]) -> list[int] | None:
        """Indices of these rows among the launched rows; None if a row was not launched."""
        there = {(slot, at, token): i for i, ((slot, at), token) in enumerate(zip(self.rows, self.tokens, strict=True))}
        found = [there.get((row.slot, row.position, row.token)) for row in rows]
        known = [place for place in found if place is not None]
        return known if len(known) == len(found) else None


class RunAhead:
    """Runs decode steps, and launches the step after each one before the host has read its tokens."""

    def __init__(self, graphs: GraphedDecodes, device: Device) -> None:
        self._graphs, self._device = graphs, device
        memory = [device.host_empty(3 * 8 * graphs.most_rows).view(torch.float64) for _ in range(ROOMS)]
        self._rooms, self._turn = memory, 0
        self._next: _Launched | None = None
        self._latest: Mark | None = None  # of the latest launch, even if it is forgotten

    @property
    def goes_on(self) -> bool:
        """Whether a step runs that no plan has asked for yet."""
        return self._next is not None

    def forget(self) -> None:
        """Discard the step that was launched ahead, since something else runs next."""
        self._next = None

    def close(self) -> None:
        """Wait until all results have been written to the host."""
        if self._latest is not None:
            self._latest.synchronize()
        self._next = self._latest = None

    def knows(self, rows: Sequence[Row], end: int, measure: Confidence | None, exits: ExitReader) -> bool:
        """Whether the next tokens of these rows are already being computed."""
        return self._matching(rows, end, measure, exits) is not None

    @torch.inference_mode()
    def run(
        self, exits: ExitReader, rows: Sequence[Row], end: int, measure: Confidence | None, go_on: bool
    ) -> HeadOutput:
        """Return the rows' next tokens after `end` layers.

        `go_on`: also launch the step after this one, for rows with `more` tokens to come.
        """
        known = self._matching(rows, end, measure, exits)
        if known is None:
            size, _ = self._graphs.stage(rows)
            known = self._launched(size, [(row.slot, row.position) for row in rows], end, measure, exits)
            known.tokens = [row.token for row in rows]
        places = known.places(rows)
        assert places is not None
        following = [(place, row) for place, row in zip(places, rows, strict=True) if row.more] if go_on else []
        self._next = self._after(known, following) if following else None
        known.arrived.synchronize()
        # A copy: the room is written again two steps later.
        tokens, best, sure = known.room.numpy().T[places].T.tolist()
        chosen = [int(token) for token in tokens]
        if self._next is not None:
            of = dict(zip(places, chosen, strict=True))
            self._next.tokens = [of[place] for place, _ in following]
        finite = [value - value == 0.0 for value in best]
        return HeadOutput(chosen, None if measure is None else sure, finite, torch.empty(0))

    def _matching(
        self, rows: Sequence[Row], end: int, measure: Confidence | None, exits: ExitReader
    ) -> _Launched | None:
        known = self._next
        if known is None or (known.end, known.measure) != (end, measure) or known.exits is not exits:
            return None
        same = all(a is b for a, b in zip(known.reads, self._reads(end), strict=True))
        return known if same and known.places(rows) is not None else None

    def _reads(self, end: int) -> tuple[object, ...]:
        return (*self._graphs.model.layers[:end], self._graphs.model.outer)

    def _after(self, before: _Launched, following: Sequence[tuple[int, Row]]) -> _Launched:
        """Launch the step after `before`, with the tokens that `before` chooses for the rows at these places."""
        graphs = self._graphs
        size, _ = graphs.stage([Row(row.slot, row.position + 1, place, row.last_layer) for place, row in following])
        ids = graphs.numbers[size][0]
        chosen = graphs.said[before.size][0].index_select(0, ids)
        # A row with NaN logits has no token; its request fails when the host sees that.
        ids.copy_(chosen.clamp_(0, graphs.model.architecture.vocab_size - 1))
        rows = [(row.slot, row.position + 1) for _, row in following]
        return self._launched(size, rows, before.end, before.measure, before.exits)

    def _launched(
        self, size: int, rows: list[tuple[int, int]], end: int, measure: Confidence | None, exits: ExitReader
    ) -> _Launched:
        """Launch the step that is staged on the card, and the transfer of its results to the host."""
        self._graphs.launch(size, end, exits, measure)
        self._turn = (self._turn + 1) % ROOMS
        room = self._rooms[self._turn][: 3 * size].view(3, size)
        room.copy_(self._graphs.said[size], non_blocking=True)
        self._latest = arrived = self._device.mark()
        return _Launched(rows, end, measure, exits, self._reads(end), size, room, arrived)
