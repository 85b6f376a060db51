"""KV memory of one replica, in blocks of tokens. Knows counts and who held what was freed, not bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def blocks_for(tokens: int, block_tokens: int) -> int:
    return -(-tokens // block_tokens)


@dataclass(slots=True)
class _Freed:
    owner: Hashable
    blocks: int


class KvPool:
    """Counts used blocks against the pool's size. The pool is never exceeded: `take` refuses.

    With `remember`, freed blocks keep what they hold until they are taken again, the longest free first and of one
    owner its last ones first, as in vLLM's prefix cache: an owner may get the rest back.
    """

    __slots__ = ("_freed", "block_tokens", "total_blocks", "used_blocks")

    def __init__(self, total_blocks: int, block_tokens: int, remember: bool = False) -> None:
        self.total_blocks = total_blocks
        self.block_tokens = block_tokens
        self.used_blocks = 0
        self._freed: deque[_Freed] | None = deque([_Freed(None, total_blocks)]) if remember else None

    @property
    def free_blocks(self) -> int:
        return self.total_blocks - self.used_blocks

    def take(self, blocks: int) -> None:
        if blocks > self.free_blocks:
            raise RuntimeError(f"KV pool exceeded: {blocks} blocks wanted, {self.free_blocks} free")
        self.used_blocks += blocks
        self._forget(blocks)

    def give(self, blocks: int, owner: Hashable = None) -> None:
        """Blocks become free; those of an `owner` are remembered as its first ones."""
        if blocks > self.used_blocks:
            raise RuntimeError(f"KV blocks returned twice: {blocks} returned, {self.used_blocks} used")
        self.used_blocks -= blocks
        if self._freed is not None and blocks:
            self._freed.append(_Freed(owner, blocks))

    def kept(self, owner: Hashable) -> int:
        """How many of an owner's freed blocks, counted from its first, still hold what they held."""
        return next((freed.blocks for freed in self._freed or () if freed.owner == owner), 0)

    def take_back(self, owner: Hashable, blocks: int) -> None:
        """An owner gets its first blocks back as they are; what else was kept of it is forgotten."""
        if blocks > self.kept(owner):
            raise RuntimeError(f"{blocks} KV blocks wanted back, {self.kept(owner)} kept")
        self.used_blocks += blocks
        for freed in self._freed or ():
            if freed.owner == owner:
                freed.owner, freed.blocks = None, freed.blocks - blocks
                return

    def resize(self, total_blocks: int) -> None:
        """A new size; the caller has made room first."""
        if total_blocks < self.used_blocks:
            raise RuntimeError(f"KV pool of {total_blocks} blocks while {self.used_blocks} are used")
        grown = total_blocks - self.total_blocks
        self.total_blocks = total_blocks
        if grown < 0:
            self._forget(-grown)
        elif self._freed is not None and grown:
            self._freed.append(_Freed(None, grown))

    def _forget(self, blocks: int) -> None:
        freed = self._freed
        while freed and blocks:
            gone = min(freed[0].blocks, blocks)
            freed[0].blocks -= gone
            blocks -= gone
            if not freed[0].blocks:
                freed.popleft()


class BlockDemand:
    """Blocks that a batch of D decoding requests will need, D >= 0.

    In iteration j (from 0) a request with c tokens in the cache needs a new block when (c + j) is a multiple of
    the block size, so demand repeats with that period and has a closed form.
    """

    __slots__ = ("_period", "_within_period")

    def __init__(self, context_tokens: NDArray[np.int64], block_tokens: int) -> None:
        self._period = block_tokens
        self._within_period = np.bincount(-context_tokens % block_tokens, minlength=block_tokens).cumsum()

    @property
    def next_iteration(self) -> int:
        return int(self._within_period[0])

    def iterations_that_fit(self, free_blocks: int) -> int:
        """How many decode iterations of the whole batch (D > 0) fit into the free blocks."""
        periods, rest = divmod(free_blocks, int(self._within_period[-1]))
        return periods * self._period + int(self._within_period.searchsorted(rest, side="right"))

    def after(self, iterations: int) -> NDArray[np.int64]:
        """New blocks by the end of each of the next iterations, shape (iterations,)."""
        if iterations <= self._period:
            return self._within_period[:iterations]
        periods, steps = np.divmod(np.arange(iterations), self._period)
        blocks: NDArray[np.int64] = periods * self._within_period[-1] + self._within_period[steps]
        return blocks
