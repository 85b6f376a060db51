"""What a server does when its device has run out of memory in an iteration. Knows its replica, no device.

Nothing of such an iteration counts. Everybody who ran goes back to the queue, so that all their memory is free, and
half as many run together from then on; each request that completes makes room for one more. Whoever runs out of memory
twice in a row alone can never be served, and leaves.
"""

from __future__ import annotations

from helios_sim.serving.replica import Replica
from helios_sim.serving.withdrawal import Withdrawals


class Shortage:
    def __init__(self, replica: Replica, withdrawals: Withdrawals) -> None:
        self._replica = replica
        self._withdrawals = withdrawals
        self._alone: tuple[int, int] | None = None  # who failed alone latest, and after how many iterations

    def give_way(self, reason: str) -> None:
        """An iteration of the whole batch could not run, for this reason."""
        replica = self._replica
        running = [sequence.request.request_id for sequence in replica.batch.members]
        replica.preempt_until(0)
        replica.run_fewer(max(1, len(running) // 2))
        alone = (running[0], replica.stats.iterations) if len(running) == 1 else None
        if alone is not None and alone == self._alone:
            self._withdrawals.ask(running[0], f"out of memory twice in a row while it ran alone: {reason}")
        self._alone = alone
