"""Memory for weights and caches, on large pages where the system has them. Knows bytes, no tensor's meaning.

A decode reads every weight once and comes back to it a token later: on pages of 4 KiB a CPU looks up a page for every
64 cache lines of that. A card has pages of its own.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes: what a card's loads want, and more than a cache line
LARGE_PAGE_BYTES = 2 << 20


def block(n_bytes: int, device: torch.device) -> Tensor:
    """(n_bytes,) uint8, its content undefined. MemoryError or torch's RuntimeError where there is no room."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux
    whole_pages = n_bytes // LARGE_PAGE_BYTES
    if device.type != "cpu" or advice is None or not whole_pages:
        return torch.empty(n_bytes, dtype=torch.uint8, device=device)
    try:
        mapped = mmap.mmap(-1, n_bytes + LARGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{n_bytes} bytes: {error.strerror}") from error
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    start = -memory.data_ptr() % LARGE_PAGE_BYTES
    with suppress(OSError):  # a kernel without them
        mapped.madvise(advice, start, whole_pages * LARGE_PAGE_BYTES)
    return memory[start : start + n_bytes]


def written_block(n_bytes: int, device: torch.device) -> Tensor:
    """The same full of zeros that were written, not promised: nobody waits for pages when it is used."""
    return block(n_bytes, device).zero_()


def aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT
