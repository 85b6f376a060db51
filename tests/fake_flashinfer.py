"""FlashInfer's wrapper for paged decodes by torch's operations, as strict as version 0.7.4 in what is asked of it here.

It refuses what the real one refuses: plans within a capture, batches of another size than its buffers', more pages than
they hold, other types than were planned, K and V whose strides differ, a step without a plan. As the real one it
writes a plan to page-locked memory that it uses again, and copies it to the card without waiting.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import exact_torch
from helios_sim.live.cuda import page_locked
from helios_sim.live.kernels import turn
from helios_sim.live.memory import paged
from strict_cuda import StrictCuda

PAGE = 16


class ExactPaged(exact_torch.ExactTorch):
    """torch's operations, but for attention of captured decodes."""

    page_tokens = PAGE


class BatchDecodeWithPagedKVCacheWrapper:
    cuda: StrictCuda
    widths: tuple[int, ...] = (64, 128, 256)
    types: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    plans = 0

    def __init__(
        self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False,
        use_tensor_cores: bool = False, paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None, paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
    ) -> None:  # fmt: skip
        assert self.cuda.capturing is None, "memory of a wrapper must not be of a capture"
        assert (kv_layout, use_cuda_graph, use_tensor_cores, backend) == ("HND", True, True, "fa2")
        assert float_workspace_buffer.data_ptr() % 16 == 0
        buffers = paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer
        for buffer in buffers:
            assert buffer is not None
            assert buffer.dtype is torch.int32
        self._indptr, self._indices, self._last = buffers
        self._batch = len(self._last)
        assert len(self._indptr) == self._batch + 1
        self._float, self._page = float_workspace_buffer, 0
        self._locked = page_locked(4 * (2 * self._batch + 1), self.cuda).view(torch.int32)
        self._int = torch.zeros(2 * self._batch + 1, dtype=torch.int32)

    def plan(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int,
        head_dim: int, page_size: int, *, pos_encoding_mode: str = "NONE", q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None, sm_scale: float | None = None,
    ) -> None:  # fmt: skip
        type(self).plans += 1
        assert self.cuda.capturing is None, "plan() cannot be captured"
        assert {part.dtype for part in (indptr, indices, last_page_len)} == {torch.int32}
        if len(last_page_len) != self._batch:
            raise ValueError("The batch size should be fixed in cudagraph mode")
        if len(indices) > len(self._indices):
            raise ValueError("The size of indices should be less than or equal to the allocated buffer")
        if self._float.numel() < self.needed(num_qo_heads, num_kv_heads, head_dim):
            raise RuntimeError("Buffer overflow when allocating memory for batch_prefill_tmp_v")
        if head_dim not in self.widths or q_data_type not in self.types or num_qo_heads % num_kv_heads:
            raise RuntimeError("no kernel for this")
        assert len(indptr) == self._batch + 1
        assert int(indptr[-1]) == len(indices)
        assert bool((indptr[1:] > indptr[:-1]).all())
        assert bool(((last_page_len > 0) & (last_page_len <= page_size)).all())
        self._heads, self._page, self._scale = (num_qo_heads, num_kv_heads, head_dim), page_size, sm_scale
        self._types = q_data_type, kv_data_type or q_data_type
        for own, given in ((self._indptr, indptr), (self._last, last_page_len), (self._indices, indices)):
            own[: len(given)].copy_(given)
        self._locked.numpy()[:] = torch.cat((indptr, last_page_len)).numpy()
        self._int.copy_(self._locked, non_blocking=True)

    def needed(self, heads: int, kv_heads: int, width: int) -> int:
        """As `PrefillPlanImpl` of scheduler.cuh, with one row of each request, on a card of 132 cores."""
        tile, rows = 16 if heads // kv_heads <= 16 else 64, self._batch
        padded = max(2 * 132 // kv_heads, -(-rows * (heads // kv_heads) // tile) + rows - 1)
        return 4 * heads * padded * tile * (width + 1)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        keys, values = paged_kv_cache
        assert self._page, "plan info is not initialized"
        heads, kv_heads, width = self._heads
        assert (q.dtype, keys.dtype, values.dtype) == (self._types[0], self._types[1], self._types[1])
        assert q.shape == (self._batch, heads, width)
        assert q.stride(-1) == keys.stride(-1) == 1
        assert keys.stride() == values.stride()
        assert keys.shape == values.shape
        assert keys.shape[1:] == (kv_heads, self._page, width)
        most = len(self._indices) // self._batch
        starts, last = self._int[: self._batch + 1].long(), self._int[self._batch + 1 :].long()
        at = (starts[:-1, None] + torch.arange(most)).clamp(max=len(self._indices) - 1)
        read = self._indices.index_select(0, at.flatten()).long()
        lengths = (starts[1:] - starts[:-1] - 1) * self._page + last
        sees = torch.arange(most * self._page) < lengths[:, None]
        shape = (self._batch, most, kv_heads, self._page, width)
        k, v = (x[read].view(shape).transpose(1, 2).flatten(2, 3) for x in (keys, values))
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        scores = torch.einsum("nhd,nhtd->nht", q, k) * self._scale
        shares = scores.masked_fill(~sees[:, None], -1e30).softmax(-1)
        return torch.einsum("nht,nhtd->nhd", shares, v.nan_to_num())


@contextmanager
def installed(cuda: StrictCuda, **more: Any) -> Iterator[type[BatchDecodeWithPagedKVCacheWrapper]]:
    """The package, on this card. `more`: what the wrapper has kernels for."""
    wrapper = type("Wrapper", (BatchDecodeWithPagedKVCacheWrapper,), {"cuda": cuda, **more})
    package: Any = ModuleType("flashinfer")
    package.BatchDecodeWithPagedKVCacheWrapper, package.__version__ = wrapper, "0.7.4"
    package.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)
    with pytest.MonkeyPatch.context() as patch, exact_torch.exact():
        patch.setitem(sys.modules, "flashinfer", package)
        patch.setattr(turn, "turn_and_write", exact_torch.turn_and_write)
        patch.setattr(paged, "WORKSPACE_BYTES", 1)  # no more than is needed
        yield wrapper
