"""Aborts requests before they are done: cancelled by the user, failed on the device, or out of memory (OOM).

Requests are aborted between two iterations, and their blocks are freed at once.
"""

from __future__ import annotations

from helios_sim.serving.handover import abort
from helios_sim.serving.replica import Replica


class Aborts:
    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._asked: dict[int, str] = {}  # request -> reason
        self._alone: tuple[int, int] | None = None  # request that ran out of memory alone, and iterations by then

    def ask(self, request_id: int, reason: str) -> None:
        """Ask for a request to be aborted. The first reason counts; a request that has left already is ignored."""
        self._asked.setdefault(request_id, reason)

    def carry_out(self) -> bool:
        """Abort the requests that were asked for. Returns whether there were any."""
        asked, self._asked = self._asked, {}
        if asked:
            abort(self._replica, asked)
        return bool(asked)

    def give_way(self, reason: str) -> None:
        """Handle an iteration of the whole batch that ran out of memory: nothing of it counts.

        All running requests go back to the waiting line, so that their memory is free, and half as many may run
        together from then on; each request that completes raises that limit by one. A request that runs out of memory
        twice in a row while it runs alone can never be served, and is dropped.
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
