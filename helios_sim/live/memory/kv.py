"""The KV cache, and the attention steps that read and write it.

The cache is made of slots, one per request: each layer has K and V of shape (slots, kv_heads, max_tokens, head_dim).
A step is built for one call of the model and passed to every layer, so that everything that depends only
on lengths (rotations, masks, where to write) is computed once per step. `PromptStep` runs a chunk of one prompt,
`DecodeStep` one token each of several requests (see `decodes.py`; several each: `blocks.py`), `MixedStep` several steps
together, and `Packed` whole texts without a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from helios_sim.live.device import ALIGNMENT, aligned, written_block
from helios_sim.live.kernels.interface import TORCH, Kernels
from helios_sim.live.model.architecture import Architecture
from helios_sim.live.model.decoder import Attend, Rotary, Rotation


@dataclass(frozen=True, slots=True)
class CacheShape:
    """KV-cache dimensions of one full model, and how many slots fit into a number of bytes."""

    architecture: Architecture
    layers: int
    slot_tokens: int
    dtype: torch.dtype

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot's K (or V) in one layer."""
        a = self.architecture
        return a.n_kv_heads * self.slot_tokens * a.head_dim * self.dtype.itemsize

    def n_bytes(self, slots: int) -> int:
        """Bytes of all layers with this many slots, every K and V tensor at an aligned offset."""
        return 2 * self.layers * aligned(slots * self.slot_bytes)

    def slots_in(self, n_bytes: int) -> int:
        """The number of slots that fit into `n_bytes`."""
        tensor_bytes = n_bytes // (2 * self.layers)
        return max(0, tensor_bytes // ALIGNMENT * ALIGNMENT // self.slot_bytes)


class KvCache:
    """Preallocated slots for the first `layers` layers.

    With `memory` (uint8, `CacheShape.n_bytes` long) the layers are views of it, one after the other, so that changing
    their number allocates nothing. Without it each layer allocates its own memory.
    """

    def __init__(
        self,
        architecture: Architecture,
        layers: int,
        slots: int,
        max_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        memory: Tensor | None = None,
        kernels: Kernels = TORCH,
    ) -> None:
        self.architecture, self.slots, self.max_tokens = architecture, slots, max_tokens
        self.dtype, self.device, self.kernels = dtype, torch.device(device), kernels
        self.rotary = Rotary(architecture, dtype, device)
        # Cosines and sines of all positions, float32 (max_tokens, head_dim) by layer, for kernels that rotate q and k.
        self.angles = self.rotary.tables(max_tokens) if kernels.any_lengths else []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._memory = memory
        self._views: list[tuple[Tensor, Tensor]] = []  # K and V of all layers in `memory` so far
        self.resize(layers)

    def resize(self, layers: int) -> None:
        """Keep the first `layers` layers: drop those above, add missing ones (their content is undefined)."""
        del self.keys[layers:], self.values[layers:]
        for layer in range(len(self.keys), layers):
            known = layer < len(self._views)  # reused, since captured graphs know tensors by identity
            keys, values = self._views[layer] if known else (self._tensor(2 * layer), self._tensor(2 * layer + 1))
            if self._memory is not None and not known:
                self._views.append((keys, values))
            self.keys.append(keys)
            self.values.append(values)

    @property
    def kv_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def _tensor(self, number: int) -> Tensor:
        """K or V of one layer. The memory has been written before: even a masked NaN would spoil the sum."""
        shape = (self.slots, self.architecture.n_kv_heads, self.max_tokens, self.architecture.head_dim)
        n_bytes = prod(shape) * self.dtype.itemsize
        if self._memory is None:
            memory = written_block(n_bytes, self.device)
        else:
            start = number * aligned(n_bytes)
            memory = self._memory[start : start + n_bytes]
        return memory.view(self.dtype).view(shape)


class PromptStep:
    """A prompt chunk of `tokens` tokens for the request in `slot`, which has `context` tokens in the cache already."""

    def __init__(self, cache: KvCache, slot: int, tokens: int, context: int = 0) -> None:
        self._cache, self._slot, self._start, self._end = cache, slot, context, context + tokens
        check_room(cache, [slot], self._end)
        self.positions = torch.arange(context, context + tokens, device=cache.device)
        self.rotations = cache.rotary.at(self.positions)
        a = cache.architecture
        self._scale = a.attention_scale
        self._masks = _causal_masks(a, tokens, context, cache.dtype, cache.device)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._cache.keys[layer][self._slot, :, self._start : self._end] = k.transpose(0, 1)
        self._cache.values[layer][self._slot, :, self._start : self._end] = v.transpose(0, 1)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.write(layer, k, v)
        keys = self._cache.keys[layer][self._slot : self._slot + 1, :, : self._end]
        values = self._cache.values[layer][self._slot : self._slot + 1, :, : self._end]
        mask = self._masks[layer]
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0), keys, values, attn_mask=mask, is_causal=mask is None, scale=self._scale,
            enable_gqa=True,
        )  # fmt: skip
        return out.squeeze(0).transpose(0, 1).reshape(len(q), -1)


class DecodeStep:
    """One token for each of B requests: request b is in slots[b] and has lengths[b] tokens in the cache.

    Contiguous slots (first, first + 1, ...) are read in place; others are gathered. With `span`, that many tokens
    of context are read with a mask. Without it the longest request decides.
    """

    def __init__(self, cache: KvCache, slots: Sequence[int], lengths: Sequence[int], span: int | None = None) -> None:
        longest = max(lengths) + 1
        check_room(cache, slots, max(longest, span or 0))
        in_row = list(slots) == list(range(slots[0], slots[0] + len(slots)))
        self._set(
            cache,
            torch.tensor(slots, device=cache.device),
            torch.tensor(lengths, device=cache.device),
            longest if span is None else span,
            slots[0] if in_row else None,
            even=span is None and min(lengths) + 1 == longest,
        )

    @classmethod
    def on_device(cls, cache: KvCache, slots: Tensor, positions: Tensor, span: int, first: int | None) -> DecodeStep:
        """Build a step from tensors (B,) on the device without reading them on the host, as a captured graph must.

        `first`: slots are first, first + 1, ...; None if they are gathered. Positions past the span are written but not
        read.
        """
        step = cls.__new__(cls)
        step._set(cache, slots, positions, span, first, even=False)
        return step

    def _set(self, cache: KvCache, slots: Tensor, positions: Tensor, span: int, first: int | None, even: bool) -> None:
        a, batch = cache.architecture, len(slots)
        self._cache, self._span, self._first, self._batch = cache, span, first, batch
        self._scale = a.attention_scale
        self._shape = (batch, a.n_kv_heads, a.n_heads // a.n_kv_heads, a.head_dim)
        self.slots, self.positions = slots, positions
        self.rotations: list[Rotation | None] = cache.rotary.at(positions)
        self._rows = rows_of(cache, slots, positions)
        self._masks = _decode_masks(a, positions, span, even, cache.dtype)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        write_rows(self._cache, layer, self._rows, k, v)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.write(layer, k, v)
        keys, values = self._read(self._cache.keys[layer]), self._read(self._cache.values[layer])
        # Query heads that share a KV head are passed as query tokens, so that K and V are not repeated.
        out = F.scaled_dot_product_attention(
            q.view(self._shape), keys, values, attn_mask=self._masks[layer], scale=self._scale
        )
        return out.reshape(self._batch, -1)

    def _read(self, tensor: Tensor) -> Tensor:
        spanned = tensor[:, :, : self._span]
        if self._first is not None:
            return spanned[self._first : self._first + self._batch]
        return spanned.index_select(0, self.slots)


def rows_of(cache: KvCache, slots: Tensor, positions: Tensor) -> Tensor:
    """Rows of one token of each request in the cache viewed as (slots x kv_heads x max_tokens, head_dim)."""
    heads = torch.arange(cache.architecture.n_kv_heads, device=cache.device)
    rows = (slots[:, None] * len(heads) + heads) * cache.max_tokens + positions[:, None]
    return rows.flatten()


def write_rows(cache: KvCache, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
    """Store k and v (N, kv_heads, head_dim) in the rows that `rows_of` names."""
    width = k.shape[-1]
    cache.keys[layer].view(-1, width).index_copy_(0, rows, k.reshape(-1, width))
    cache.values[layer].view(-1, width).index_copy_(0, rows, v.reshape(-1, width))


class Packed:
    """B whole texts of T tokens without a cache: token t of text b is row b T + t.

    Shorter texts are padded at the end. No token sees a later one, so the padding changes nothing before it.
    """

    def __init__(
        self,
        architecture: Architecture,
        batch: int,
        tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._batch, self._tokens, self._scale = batch, tokens, architecture.attention_scale
        self.positions = torch.arange(tokens, device=device).repeat(batch)
        self.rotations = Rotary(architecture, dtype, device).at(self.positions)
        self._masks = _causal_masks(architecture, tokens, 0, dtype, device)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Do nothing, since there is no cache."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = self._masks[layer]
        q, k, v = (x.view(self._batch, self._tokens, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self._scale, enable_gqa=True
        )
        return out.transpose(1, 2).reshape(self._batch * self._tokens, -1)


def check_room(cache: KvCache, slots: Sequence[int], tokens: int) -> None:
    """Raise ValueError for a write past a slot's end, which would land in its neighbour."""
    if tokens > cache.max_tokens or not all(0 <= slot < cache.slots for slot in slots):
        raise ValueError(f"{tokens} tokens in slots {list(slots)}: {cache.slots} slots of {cache.max_tokens} tokens")


def _causal_masks(
    a: Architecture, tokens: int, context: int, dtype: torch.dtype, device: torch.device | str
) -> list[Tensor | None]:
    """One mask per layer, (tokens, context + tokens): 0 where a token sees, -inf elsewhere. None if plain causal.

    On a card the mask is given by its shape alone, so that flash attention can run, also with grouped heads.
    """
    end = context + tokens
    slides = a.window_tokens is not None and any(a.sliding) and end > a.window_tokens
    if not slides and context == 0:
        return [None] * a.n_layers
    if not slides and torch.device(device).type != "cpu":
        from torch.nn.attention.bias import causal_lower_right  # loads much that a CPU does not need

        return [causal_lower_right(tokens, end)] * a.n_layers
    query = torch.arange(context, end, device=device)[:, None]
    key = torch.arange(end, device=device)
    return _masks(a, query, key, None if context == 0 else key <= query, dtype, slides)


def _decode_masks(a: Architecture, positions: Tensor, span: int, even: bool, dtype: torch.dtype) -> list[Tensor | None]:
    """One mask per layer, (B, 1, 1, span); None if every request sees the whole span."""
    slides = a.window_tokens is not None and any(a.sliding) and span > a.window_tokens
    if even and not slides:
        return [None] * a.n_layers
    query, key = positions[:, None, None, None], torch.arange(span, device=positions.device)
    return _masks(a, query, key, None if even else key <= query, dtype, slides)


def block_masks(a: Architecture, positions: Tensor, span: int, dtype: torch.dtype) -> list[Tensor | None]:
    """One mask per layer, (B, 1, R, span), for R rows each of B requests at these positions (B, R)."""
    slides = a.window_tokens is not None and any(a.sliding) and span > a.window_tokens
    query, key = positions[:, None, :, None], torch.arange(span, device=positions.device)
    return _masks(a, query, key, key <= query, dtype, slides)


def _masks(
    a: Architecture, query: Tensor, key: Tensor, sees: Tensor | None, dtype: torch.dtype, slides: bool
) -> list[Tensor | None]:
    whole = None if sees is None else _additive(sees, dtype)
    if not slides:
        return [whole] * a.n_layers
    near = _additive((key <= query) & (key > query - a.window_tokens), dtype)
    return [near if a.slides(layer) else whole for layer in range(a.n_layers)]


def _additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, float("-inf"))


class MixedStep:
    """Several steps in one call of the model: the first `rows[0]` rows belong to the first step, and so on."""

    def __init__(self, steps: Sequence[Attend], rows: Sequence[int]) -> None:
        self._steps, self._rows = list(steps), list(rows)
        self.rotations: list[Rotation | None] = []
        known: dict[tuple[int, ...], Rotation | None] = {}  # shared by layers of a kind
        for of_layer in zip(*(step.rotations for step in steps), strict=True):
            key = tuple(map(id, of_layer))
            if key not in known:
                known[key] = _joined(of_layer)
            self.rotations.append(known[key])

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(self._steps, q.split(self._rows), k.split(self._rows), v.split(self._rows), strict=True)
        return torch.cat([step(layer, *qkv) for step, *qkv in parts])

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        for step, part_k, part_v in zip(self._steps, k.split(self._rows), v.split(self._rows), strict=True):
            step.write(layer, part_k, part_v)


def _joined(rotations: Sequence[Rotation | None]) -> Rotation | None:
    known = [rotation for rotation in rotations if rotation is not None]
    return (torch.cat([cos for cos, _ in known]), torch.cat([sin for _, sin in known])) if known else None
