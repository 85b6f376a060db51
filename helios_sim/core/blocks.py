"""KV blocks of one replica: counts against the pool's size, and what freed blocks still hold.

With `rules.refinds` freed blocks keep their content until they are taken again. Blocks are taken in the order in which
they became free, and of one request its last blocks first, as in vLLM's prefix cache (vllm/v1/core/block_pool.py,
0.19). So a preempted request may get its first blocks back. `freed` is a ring of (owner, blocks), the longest free
first; `freed_first` and `freed_end` count entries since the run began, so a request finds its own entry by number.
"""

from __future__ import annotations

from helios_sim.core.layout import NEVER, Record, Table


def blocks_for(tokens: int, block_tokens: int) -> int:
    return -(-tokens // block_tokens)


def free_blocks(s: Record) -> int:
    return s.total_blocks - s.used_blocks


def take_blocks(s: Record, r: Record, freed: Table, blocks: int) -> None:
    """Take blocks from the pool. The scheduler has checked that they are free."""
    s.used_blocks += blocks
    if r.refinds:
        forget_blocks(s, freed, blocks)


def give_blocks(s: Record, r: Record, freed: Table, blocks: int, owner: int) -> int:
    """Free blocks. Returns the entry of `freed` that remembers them for the owner, or NEVER if there is none."""
    s.used_blocks -= blocks
    if not r.refinds or blocks == 0:
        return NEVER
    return _remember(s, freed, blocks, owner)


def kept_blocks(s: Record, freed: Table, entry: int, owner: int) -> int:
    """How many of a request's freed blocks, counted from its first, still hold their content."""
    if entry < s.freed_first or entry >= s.freed_end:
        return 0
    found = freed[entry % len(freed)]
    return found.blocks if found.owner == owner else 0


def take_back(s: Record, freed: Table, entry: int, blocks: int) -> None:
    """Give a request its first blocks back with their content, and forget its other blocks."""
    s.used_blocks += blocks
    found = freed[entry % len(freed)]
    found.owner = NEVER
    found.blocks -= blocks


def resize_pool(s: Record, r: Record, freed: Table, total_blocks: int) -> None:
    """Set the size of the pool. The caller has made room first."""
    grown = total_blocks - s.total_blocks
    s.total_blocks = total_blocks
    if r.refinds and grown < 0:
        forget_blocks(s, freed, -grown)
    elif r.refinds and grown > 0:
        _remember(s, freed, grown, NEVER)


def forget_blocks(s: Record, freed: Table, blocks: int) -> None:
    """Discard the content of so many blocks, the longest free first."""
    while blocks > 0 and s.freed_first < s.freed_end:
        oldest = freed[s.freed_first % len(freed)]
        gone = min(oldest.blocks, blocks)
        oldest.blocks -= gone
        blocks -= gone
        if oldest.blocks == 0:
            s.freed_first += 1


def _remember(s: Record, freed: Table, blocks: int, owner: int) -> int:
    if owner == NEVER and s.freed_first < s.freed_end:
        latest = freed[(s.freed_end - 1) % len(freed)]
        if latest.owner == NEVER:
            latest.blocks += blocks
            return NEVER
    if s.freed_end - s.freed_first == len(freed):
        # The ring is full: merge its two oldest entries, which lose their owner. That takes as many preempted requests
        # as the ring has entries, and the server makes it larger than the number of requests that can be preempted.
        oldest, following = freed[s.freed_first % len(freed)], freed[(s.freed_first + 1) % len(freed)]
        following.blocks += oldest.blocks
        following.owner = NEVER
        s.freed_first += 1
    entry = s.freed_end
    added = freed[entry % len(freed)]
    added.owner, added.blocks = owner, blocks
    s.freed_end += 1
    return entry
