"""Takes requests out of a replica for a reason of their own: cancelled by their user, or failed on the device.

It happens between two iterations; blocks come back at once, and whoever has left already is let be.
"""

from __future__ import annotations

from helios_sim.request import Status
from helios_sim.serving.kv import blocks_for
from helios_sim.serving.replica import Replica


class Withdrawals:
    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._asked: dict[int, str] = {}  # request -> reason

    def ask(self, request_id: int, reason: str) -> None:
        """The first reason counts."""
        self._asked.setdefault(request_id, reason)

    def carry_out(self) -> None:
        if not self._asked:
            return
        self._from_batch()
        self._from_queue()
        self._asked.clear()

    def _from_batch(self) -> None:
        replica, batch = self._replica, self._replica.batch
        for index in reversed(range(len(batch))):
            reason = self._asked.get(batch.members[index].request.request_id)
            if reason is None:
                continue
            decoding = batch.decoding
            ((sequence, reserved_tokens),) = batch.remove([index])
            if index >= decoding:  # it was still reading its prompt
                batch.decoding = decoding
            replica.pool.give(blocks_for(reserved_tokens, replica.pool.block_tokens))
            replica.leave(sequence, Status.DROPPED, reason)

    def _from_queue(self) -> None:
        waiting = self._replica.waiting
        for _ in range(len(waiting)):
            sequence = waiting.popleft()
            reason = self._asked.get(sequence.request.request_id)
            if reason is None:
                waiting.append(sequence)
            else:
                self._replica.leave(sequence, Status.DROPPED, reason)
