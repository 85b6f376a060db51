"""The texts of whoever may still be asked about. Knows requests by their numbers, no server and no slot."""

from __future__ import annotations

from collections import deque

from helios_sim.live.answer import Answer


class Answers(dict[int, Answer]):
    """By the request's number: of everybody in the system, and of the latest `kept` who have completed and left.

    None: of everybody who ever ran.
    """

    def __init__(self, kept: int | None) -> None:
        super().__init__()
        self._kept = kept
        self._left: deque[int] = deque()

    def note_left(self, request_id: int) -> None:
        """The request has left the system. Only complete answers can be asked for after that."""
        if self._kept is None:
            return
        if self[request_id].complete:
            self._left.append(request_id)
        else:
            del self[request_id]
        while len(self._left) > self._kept:
            del self[self._left.popleft()]
