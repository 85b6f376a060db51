"""Attention of captured decodes by FlashInfer (`live.kernels=flashinfer`), over the slots of the cache as pages.

K and V of a layer, (slots, kv_heads, max_tokens, head_dim), are pages of 16 tokens without a copy: seen with strides
(page, head, token, 1) of (16 head_dim, max_tokens head_dim, head_dim, 1), pages of one head follow each other, and page
p of slot s has the number s kv_heads max_tokens / 16 + p. `Plans` keeps one wrapper for each batch size. It is planned
on the host before each launch, and run once a layer within the captured graph, which reads the wrapper's buffers. A
kernel of the project rotates q and k, and writes k and v. Decodes beside prompts are not captured, and run by Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helios_sim.errors import UserError
from helios_sim.live.device import Device
from helios_sim.live.kernels.launch import cores
from helios_sim.live.memory.kv import KvCache
from helios_sim.live.model.architecture import Architecture
from helios_sim.live.model.decoder import FusedAttend
from helios_sim.live.model.weights import LayerWeights

WIDTHS = (64, 128, 256)  # head_dim that FlashInfer's kernels support
DTYPE = torch.bfloat16
WORKSPACE_BYTES = 128 << 20  # for parts of divided contexts, as FlashInfer advises; large batches take more
PLAN_BYTES = 8 << 20  # of each wrapper's plan on the card, and as much on the host


def paged_tokens(a: Architecture, name: str, dtype: torch.dtype, slot_tokens: int, page: int) -> int:
    """Tokens of a slot of at least `slot_tokens` in whole pages. Raises UserError for what FlashInfer cannot run."""
    tokens = -(-slot_tokens // page) * page
    if tokens > a.max_context_tokens:
        tokens = a.max_context_tokens
    lacking = {
        "heads of 64, 128 or 256 values": a.head_dim in WIDTHS,
        "no sliding windows: one plan is for all layers": not any(a.sliding),
        "weights in bfloat16": dtype is DTYPE,
        f"a longest context of whole pages of {page} tokens": tokens % page == 0,
    }
    for needed, there in lacking.items():
        if not there:
            raise UserError("live.kernels", "flashinfer", f"for {name} triton or torch; flashinfer needs {needed}",
                            "set live.kernels=triton, or leave it out")  # fmt: skip
    return tokens


def workspace_bytes(a: Architecture, rows: int, on_cores: int) -> int:
    """Most bytes that parts of contexts take in a captured step of so many rows (`PrefillPlan` of version 0.6.18).

    In a graph every context may be divided: into at most two parts per core, or else one part per tile of queries.
    """
    shared = a.n_heads // a.n_kv_heads
    tile = 16 if shared <= 16 else 64 if shared <= 64 or a.head_dim >= 256 else 128
    parts = max(2 * on_cores // a.n_kv_heads, -(-rows * shared // tile) + rows - 1)
    return max(WORKSPACE_BYTES, a.n_heads * parts * tile * (a.head_dim + 1) * 4 + 32)


def plans_bytes(a: Architecture, sizes: Sequence[int], slot_tokens: int, page: int, on_cores: int) -> int:
    """Bytes on the card that `Plans` take for steps of these sizes, beside the cache."""
    numbers = sum(4 * (size * (slot_tokens // page) + 2 * size + 1) for size in sizes)
    return workspace_bytes(a, max(sizes), on_cores) + len(sizes) * PLAN_BYTES + numbers


def pages(tensor: Tensor, page: int) -> Tensor:
    """K or V of a layer, (slots, kv_heads, max_tokens, D), as pages (n, kv_heads, page, D). No bytes are copied."""
    slots, heads, tokens, width = tensor.shape
    each = tokens // page
    n = ((slots - 1) * heads + 1) * each
    return tensor.as_strided((n, heads, page, width), (page * width, tokens * width, width, 1))


class PagedStep(FusedAttend):
    """One token for each of B requests, as in `ExactStep`, by a plan. Padding attends to the first token of slot 0."""

    def __init__(self, plan: Any, cache: KvCache, slots: Tensor, positions: Tensor, frozen: bool = False) -> None:
        from helios_sim.live.kernels import turn  # imports Triton

        self._turn, self._write, self._plan, self._cache = turn.turn_and_write, turn.write, plan, cache
        self._slots, self._positions, self.frozen = slots, positions, slots if frozen else None

    def fused(self, layer: int, qkv: Tensor, w: LayerWeights) -> Tensor:
        cache, a, page = self._cache, self._cache.architecture, self._cache.kernels.page_tokens
        norms = None if w.q_norm is None or w.k_norm is None else (w.q_norm, w.k_norm, a.norm_eps)
        q, k, v = qkv.split((a.n_heads, a.n_kv_heads, a.n_kv_heads), 1)
        keys, values = cache.keys[layer], cache.values[layer]
        q = self._turn(q, k, v, keys, values, self._slots, self._positions, cache.angles[layer], norms)
        out: Tensor = self._plan.run(q, (pages(keys, page), pages(values, page)))
        return out.flatten(1)

    def fused_write(self, layer: int, kv: Tensor, w: LayerWeights) -> None:
        cache, a = self._cache, self._cache.architecture
        norm = None if w.k_norm is None else (w.k_norm, a.norm_eps)
        k, v = kv.split(a.n_kv_heads, 1)
        to = cache.keys[layer], cache.values[layer]
        self._write(k, v, *to, self._slots, self._positions, cache.angles[layer], norm)


class Plans:
    """FlashInfer's plans by batch size: which pages each row of a captured step reads."""

    def __init__(self, cache: KvCache, device: Device, most_rows: int) -> None:
        self._cache, self._device, self._page = cache, device, cache.kernels.page_tokens
        self._plans: dict[int, Any] = {}
        n_bytes = workspace_bytes(cache.architecture, most_rows, cores(cache.device))
        self._workspace = torch.zeros(n_bytes, dtype=torch.uint8, device=cache.device)
        self._read = device.mark()  # when the device has read the latest plan

    def ready(self, size: int) -> None:
        """Make the wrapper of this size, which must exist before a step is captured."""
        if size not in self._plans:
            self._plans[size] = self._wrapper(size)
            self.plan(size, [], [])

    def step(self, size: int, slots: Tensor, positions: Tensor, frozen: bool = False) -> PagedStep:
        """The step for the latest plan of this size. `frozen`: as in `ExactStep`."""
        return PagedStep(self._plans[size], self._cache, slots, positions, frozen)

    def plan(self, size: int, slots: Sequence[int], positions: Sequence[int]) -> None:
        """Plan the next step of this size for rows in these slots, with so many tokens before; others are padding."""
        if size not in self._plans:
            self.ready(size)
        a, cache, page = self._cache.architecture, self._cache, self._page
        at = np.zeros((2, size), np.int64)
        at[:, : len(slots)] = slots, positions
        counts = at[1] // page + 1
        starts = np.concatenate(([0], counts.cumsum()))
        first = at[0] * (a.n_kv_heads * cache.max_tokens // page)
        numbers = np.arange(starts[-1]) + np.repeat(first - starts[:-1], counts)
        self._read.synchronize()  # the host's copy of the plan before may still be on its way
        self._plans[size].plan(
            *(torch.from_numpy(part.astype(np.int32)) for part in (starts, numbers, at[1] % page + 1)),
            a.n_heads, a.n_kv_heads, a.head_dim, page, pos_encoding_mode="NONE", q_data_type=cache.dtype,
            kv_data_type=cache.dtype, sm_scale=a.attention_scale,
        )  # fmt: skip
        self._read = self._device.mark()

    def _wrapper(self, size: int) -> Any:
        """Make a wrapper that uses tensor cores, since their kernels take any number of heads per KV head."""
        cache = self._cache
        n = size * (cache.max_tokens // self._page)

        def numbers(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int32, device=cache.device)

        return import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, "HND", use_cuda_graph=True, use_tensor_cores=True, backend="fa2",
            paged_kv_indptr_buffer=numbers(size + 1), paged_kv_indices_buffer=numbers(n),
            paged_kv_last_page_len_buffer=numbers(size),
        )  # fmt: skip
