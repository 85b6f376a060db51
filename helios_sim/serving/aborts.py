"""Requests that leave before they are done: cancelled by their user, failed on the device, or out of memory (OOM).

All of it happens between two iterations, and blocks come back at once.
"""

from __future__ import annotations

from helios_sim.serving.handover import abort
from helios_sim.serving.replica import Replica


class Aborts:
    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._asked: dict[int, str] = {}  # request -> reason
        self._alone: tuple[int, int] | None = None  # which request ran out of memory alone, after how many iterations

    def ask(self, request_id: int, reason: str) -> None:
        """The first reason counts. A request that has left already is let be."""
        self._asked.setdefault(request_id, reason)

    def carry_out(self) -> bool:
        """Whether there was anything to do."""
        asked, self._asked = self._asked, {}
        if asked:
            abort(self._replica, asked)
        return bool(asked)

    def give_way(self, reason: str) -> None:
        """An iteration of the whole batch ran out of memory: nothing of it counts.

        All who ran go back to the waiting line, so that their memory is free, and half as many run together from then
        on; each request that completes makes room for one more. A request that runs out of memory twice in a row
        while it runs alone can never be served, and is dropped.
        """
        replica = self._replica
        running = [
            int(replica.requests[int(slot)].request_id)
            for slot in replica.lists.batch[: replica.running_requests]
        ]
        replica.preempt_until(0)
        replica.run_fewer(max(1, len(running) // 2))
        iterations = replica.stats.iterations + int(replica.state.iterations)
        alone = (running[0], iterations) if len(running) == 1 else None
        if alone is not None and alone == self._alone:
            self.ask(running[0], f"out of memory twice in a row while it ran alone: {reason}")
        self._alone = alone
