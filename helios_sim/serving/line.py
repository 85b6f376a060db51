"""The queue of a replica, first come first served. Knows who waits, not for what.

Requests that were never started wait as rows of the intake where there is one; they become objects when their turn
comes. Whoever has lost a place in the batch is an object and stands before all of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from helios_sim.request import Request
from helios_sim.serving.batch import Sequence
from helios_sim.serving.intake import Intake


class WaitingLine:
    def __init__(self) -> None:
        self.intake: Intake | None = None
        self._known: deque[Sequence] = deque()
        self._make: Callable[[Request, int], Sequence]

    def take_in(self, intake: Intake, make: Callable[[Request, int], Sequence]) -> None:
        """From now on new requests wait in the intake. `make` gets a request and the model's number at its arrival."""
        self.intake, self._make = intake, make
        intake.holds = True

    def __len__(self) -> int:
        return len(self._known) + (0 if self.intake is None else self.intake.waiting)

    def __getitem__(self, index: int) -> Sequence:
        """Only the first one can be looked at: index 0."""
        if not self._known and self.intake is not None and self.intake.waiting:
            self._known.append(self._make(*self.intake.pull()))
        return self._known[index]

    def known(self) -> Iterator[Sequence]:
        """Those who are objects, from the head of the queue on: all who have started are among them."""
        return iter(self._known)

    def append(self, sequence: Sequence) -> None:
        self._known.append(sequence)

    def appendleft(self, sequence: Sequence) -> None:
        self._known.appendleft(sequence)

    def popleft(self) -> Sequence:
        first = self[0]
        self._known.popleft()
        return first

    def replace_known(self, sequences: list[Sequence]) -> None:
        self._known = deque(sequences)
