"""The tables of a replica's prefix cache (`core/prefix.py` describes them), and changes of deployment.

A pool may be far larger than the part that is ever used, so tables grow with the blocks in use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from helios_sim.core import prefix
from helios_sim.core.layout import NEVER, IntArray, Record, Storage
from helios_sim.core.prefix import Prefix
from helios_sim.profile.profile import Profile
from helios_sim.workload.prefixes import SharedPrefixes

_FIELDS = 4  # fields of a block


class PrefixCache:
    """The prefix cache. `seats` is the most requests that hold blocks at once. Empty without `shares`."""

    def __init__(
        self,
        storage: Storage,
        state: Record,
        profiles: Mapping[str, Profile],
        texts: SharedPrefixes | None,
        seats: int,
        shares: bool,
    ) -> None:
        self.shares = shares
        self._storage, self._state = storage, state
        self._profiles, self._texts = profiles, texts
        self._seats = seats if shares else 0
        self._blocks: IntArray = np.zeros((1, _FIELDS), np.int64)
        self._blocks[0, prefix.HASH] = NEVER
        self._rings: IntArray = np.zeros((1, 2), np.int64)
        self._queue: IntArray = np.zeros(2, np.int64)
        self._buckets: IntArray = np.zeros(1, np.int64)
        nothing: IntArray = np.zeros(0, np.int64)
        of_seats: IntArray = np.zeros((self._seats, 3), np.int64)
        of_seats[:, prefix.FREE] = np.arange(self._seats)[::-1]
        self._tables = Prefix(
            self._blocks, self._rings, self._queue, self._buckets, np.zeros((self._seats + 1, 0), np.int64), of_seats,
            nothing if texts is None or not shares else texts.starts, np.zeros((0, 2), np.int64), nothing,
        )  # fmt: skip
        state.free_seats = self._seats
        self._segments: dict[str, IntArray] = {}  # segments by model
        self._model: str | None = None
        self._show()

    def _show(self, **changed: IntArray) -> None:
        """Set the tables that the loop sees."""
        self._tables = self._tables._replace(
            blocks=self._blocks, rings=self._rings, queue=self._queue, buckets=self._buckets, **changed
        )  # fmt: skip
        self.tables = self._storage.group(self._tables)

    def follow(self, model: str, exits: Sequence[int], layers: int) -> None:
        """Follow a deployment: its model, the depths of its exits, and the layers for which KV memory has room."""
        if not self.shares:
            return
        if model != self._model:
            self.forget()
            self._model = model
            if model not in self._segments and self._texts is not None:
                ends = self._profiles[model].model.tokens_of_many(self._texts.end_chars)
                self._segments[model] = np.stack([self._texts.ids, ends], axis=1)
        segments = self._segments.get(model, np.zeros((0, 2), np.int64))
        self._show(segments=segments, exits=np.array(exits, np.int64))
        self.keep_layers(layers)

    def keep_layers(self, layers: int) -> None:
        """Discard what blocks hold above these layers."""
        depths = self._blocks[:, prefix.LAYERS]
        np.minimum(depths, layers, out=depths)

    def free_tokens(self, block_tokens: int) -> int:
        """Tokens with cached K and V that no request holds."""
        if not self.shares:
            return 0
        blocks = self._blocks[1 : int(self._state.made_blocks) + 1]
        cached = (blocks[:, prefix.HASH] != NEVER) & (blocks[:, prefix.HOLDERS] == 0)
        return block_tokens * int(cached.sum())

    def resize(self, total_blocks: int) -> None:
        """Set the size of the pool. The caller has made room first."""
        prefix.shrink(self._state, self.tables, total_blocks)

    def make_room(self) -> None:
        """Make room for blocks taken until the next call: one for each seat, and those of one more request."""
        if not self.shares:
            return
        s, known = self._state, self._tables.table
        widest = int(s.widest_request)
        wanted = int(prefix.most_known(s, self._seats + widest)) + 1
        if len(self._blocks) < wanted:
            more = np.zeros((max(wanted - len(self._blocks), len(self._blocks)), _FIELDS), np.int64)
            self._blocks = np.concatenate([self._blocks, more])
            self._rings = np.concatenate([self._rings, np.zeros((len(more), 2), np.int64)])
            old, self._buckets = self._buckets, np.zeros(1 << len(self._blocks).bit_length(), np.int64)
            places = np.arange(int(s.queue_first), int(s.queue_end))
            queue: IntArray = np.zeros(2 << len(self._blocks).bit_length(), np.int64)
            queue[places & (len(queue) - 1)] = self._queue[places & (len(self._queue) - 1)]
            self._queue = queue
            self._show()
            self._spread(old)
        if known.shape[1] < widest:
            table = np.zeros((self._seats + 1, 2 * widest), np.int64)
            table[:, : known.shape[1]] = known
            self._show(table=table)

    def _spread(self, old: IntArray) -> None:
        """Move known blocks from these buckets into the present ones, in their order."""
        for first in old[old > 0].tolist():
            ring, block = [first], int(self._rings[first, prefix.AFTER])
            while block != first:
                ring.append(block)
                block = int(self._rings[block, prefix.AFTER])
            for block in ring:
                prefix.make_known(self.tables, block, int(self._blocks[block, prefix.HASH]))

    def forget(self) -> None:
        """Discard everything cached. No request may hold a block."""
        s = self._state
        if s.used_blocks:
            raise RuntimeError(f"the prefix cache is emptied while {s.used_blocks} KV blocks are held")
        self._blocks[: int(s.made_blocks) + 1] = 0
        self._blocks[: int(s.made_blocks) + 1, prefix.HASH] = NEVER
        self._buckets[:] = 0
        s.queued_blocks = s.made_blocks = s.spare_block = 0
        s.queue_first = s.queue_end
