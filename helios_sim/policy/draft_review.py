"""How many tokens to draft until the next review, by what was accepted since the last one."""

from __future__ import annotations

from collections.abc import Callable

from helios_sim.policy.telemetry import Telemetry

LONGEST_REST = 16  # reviews without drafts before one period listens again


class DraftReview:
    """What was heard, and when to listen again.

    Without drafts nothing is heard, so after a rest, which doubles each time up to `LONGEST_REST` reviews, one period
    listens with a single draft, but only where drafts that are all accepted would pay.
    """

    def __init__(self, acceptance: float) -> None:
        self.acceptance = acceptance  # as last heard, or as known beforehand
        self._tested = self._accepted = 0  # drafts at the last review
        self._rest, self._next_rest = 0, 1

    def next_drafts(self, telemetry: Telemetry, drafts: int, best: Callable[[float], int]) -> int:
        """After so many `drafts`; `best`: the number that pays most at an acceptance, 0 where none does."""
        tested, accepted = telemetry.tested_drafts - self._tested, telemetry.accepted_drafts - self._accepted
        self._tested, self._accepted = telemetry.tested_drafts, telemetry.accepted_drafts
        if tested:
            self.acceptance = accepted / tested
        found = best(self.acceptance)
        if found:
            self._next_rest = 1
        elif drafts:
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, LONGEST_REST)
        elif self._rest > 1 or not best(1.0):
            self._rest = max(1, self._rest - 1)
        else:
            found = 1
        return found
