"""Review of the number of drafts, by the acceptance rate since the last review."""

from __future__ import annotations

from collections.abc import Callable

from helios_sim.policy.telemetry import Telemetry

LONGEST_REST = 16  # most reviews without drafts before a single draft is tried again


class DraftReview:
    """The acceptance rate as last measured, and the number of reviews until it is measured again.

    Without drafts there is no acceptance to measure. So after a rest without drafts, which doubles each time up to
    `LONGEST_REST` reviews, a single draft is tried until the next review, but only if drafts would pay were all of them
    accepted.
    """

    def __init__(self, acceptance: float) -> None:
        self.acceptance = acceptance  # as last measured, or as known beforehand
        self._tested = self._accepted = 0  # totals of drafts at the last review
        self._rest, self._next_rest = 0, 1

    def next_drafts(self, telemetry: Telemetry, drafts: int, best: Callable[[float], int]) -> int:
        """The number of drafts until the next review, after a period with `drafts`.

        `best` gives the number that pays most at an acceptance rate, 0 if none does.
        """
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
