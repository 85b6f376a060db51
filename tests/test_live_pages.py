"""Blocks of memory: as large as asked, on large pages where they fill them, given back when nobody holds them."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from helios_sim.live.device import ALIGNMENT, LARGE_PAGE_BYTES, aligned, block, written_block

CPU = torch.device("cpu")
SIZES = (1, LARGE_PAGE_BYTES - 1, LARGE_PAGE_BYTES, 3 * LARGE_PAGE_BYTES + 5000)


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


@pytest.mark.parametrize("n_bytes", SIZES)
def test_a_block_is_zeros_of_the_size_asked_for_and_can_be_written(n_bytes: int) -> None:
    memory = written_block(n_bytes, CPU)
    assert (memory.shape, memory.dtype) == ((n_bytes,), torch.uint8)
    assert not memory.any()
    memory.fill_(255)
    assert int(memory.sum(dtype=torch.int64)) == 255 * n_bytes
    assert memory.data_ptr() % 64 == 0


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no large pages")
def test_a_large_block_begins_on_a_large_page_and_takes_no_more_memory_than_it_has() -> None:
    n_bytes = 32 * LARGE_PAGE_BYTES + 100_000
    before = resident_bytes()
    memory = written_block(n_bytes, CPU)
    taken = resident_bytes() - before
    assert memory.data_ptr() % LARGE_PAGE_BYTES == 0
    assert n_bytes <= taken < n_bytes + LARGE_PAGE_BYTES // 2
    del memory
    assert resident_bytes() - before < LARGE_PAGE_BYTES


def test_views_keep_a_block_alive() -> None:
    view = written_block(4 * LARGE_PAGE_BYTES, CPU)[LARGE_PAGE_BYTES:].view(torch.float32)
    other = block(4 * LARGE_PAGE_BYTES, CPU).fill_(1)
    assert not view.any()
    assert other.all()


def test_no_room_is_a_memory_error() -> None:
    with pytest.raises((MemoryError, RuntimeError)):
        written_block(1 << 60, CPU)


def test_places_are_aligned() -> None:
    assert [aligned(n) for n in (0, 1, ALIGNMENT, ALIGNMENT + 1)] == [0, ALIGNMENT, ALIGNMENT, 2 * ALIGNMENT]
