"""KV memory of one replica, in blocks of tokens. Knows counts, not bytes and not which block holds what."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def blocks_for(tokens: int, block_tokens: int) -> int:
    return -(-tokens // block_tokens)


class KvPool:
    """Counts used blocks against the pool's size. The pool is never exceeded: `take` refuses."""

    __slots__ = ("block_tokens", "total_blocks", "used_blocks")

    def __init__(self, total_blocks: int, block_tokens: int) -> None:
        self.total_blocks = total_blocks
        self.block_tokens = block_tokens
        self.used_blocks = 0

    @property
    def free_blocks(self) -> int:
        return self.total_blocks - self.used_blocks

    def take(self, blocks: int) -> None:
        if blocks > self.free_blocks:
            raise RuntimeError(f"KV pool exceeded: {blocks} blocks wanted, {self.free_blocks} free")
        self.used_blocks += blocks

    def give(self, blocks: int) -> None:
        if blocks > self.used_blocks:
            raise RuntimeError(f"KV blocks returned twice: {blocks} returned, {self.used_blocks} used")
        self.used_blocks -= blocks

    def resize(self, total_blocks: int) -> None:
        """A new size; the caller has made room first."""
        if total_blocks < self.used_blocks:
            raise RuntimeError(f"KV pool of {total_blocks} blocks while {self.used_blocks} are used")
        self.total_blocks = total_blocks


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
