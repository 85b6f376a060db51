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


def decode_iterations_that_fit(context_tokens: NDArray[np.int64], free_blocks: int, block_tokens: int) -> int:
    """How many decode iterations of the whole batch fit into the free blocks.

    In iteration j (from 0) a request with c tokens in the cache needs a new block when (c + j) is a multiple of
    the block size, so demand repeats with that period and has a closed form.
    """
    batch = len(context_tokens)
    first_need = np.bincount((-context_tokens) % block_tokens, minlength=block_tokens)
    periods, rest = divmod(free_blocks, batch)
    within_period = int(np.searchsorted(np.cumsum(first_need), rest, side="right"))
    return periods * block_tokens + within_period


def new_blocks(context_tokens: NDArray[np.int64], iterations: int, block_tokens: int) -> NDArray[np.int64]:
    """Blocks that each request adds while its cache grows by that many tokens. Shape of `context_tokens`."""
    return -(-(context_tokens + iterations) // block_tokens) + (-context_tokens // block_tokens)
