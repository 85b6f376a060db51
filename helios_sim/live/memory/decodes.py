"""Attention steps for one token each of several requests, chosen by the kernels of the cache.

torch's operations read all requests up to the length of the longest (`DecodeStep`). The project's own kernels read each
request up to its own length, wherever its slot lies (`ExactStep`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from helios_sim.live.memory.kv import DecodeStep, KvCache, check_room, rows_of, write_rows
from helios_sim.live.model.decoder import FusedAttend, Rotation
from helios_sim.live.model.weights import LayerWeights


class ExactStep(FusedAttend):
    """One token for each of B requests: request b is in slots[b] and has positions[b] tokens in the cache.

    Both are tensors (B,) on the device, and a captured graph reads them there. A slot of -1 is padding: it is neither
    read nor written, and its output is zeros. A row with -2 - s instead of slot s only writes its K and V.
    """

    def __init__(
        self, cache: KvCache, slots: Tensor, positions: Tensor, frozen: bool = False, repeated: bool = False
    ) -> None:
        """`frozen`: rows that are padding or only write keep their hidden states.

        `repeated`: several rows may be tokens of one request; later tokens see earlier ones.
        """
        from helios_sim.live.kernels.attention import decode  # imports Triton
        from helios_sim.live.kernels.turn import write

        self.frozen = slots if frozen else None
        self.cache, self.slots, self.positions, self._decode, self._write = cache, slots, positions, decode, write
        self._firsts = first_positions(slots, positions) if repeated else None

    def fused(self, layer: int, qkv: Tensor, w: LayerWeights) -> Tensor:
        a = self.cache.architecture
        norms = None if w.q_norm is None or w.k_norm is None else (w.q_norm, w.k_norm, a.norm_eps)
        q, k, v = qkv.split((a.n_heads, a.n_kv_heads, a.n_kv_heads), 1)
        return self._attend(layer, q, k, v, self.cache.angles[layer], norms)

    def fused_write(self, layer: int, kv: Tensor, w: LayerWeights) -> None:
        cache, a = self.cache, self.cache.architecture
        norm = None if w.k_norm is None else (w.k_norm, a.norm_eps)
        k, v = kv.split(a.n_kv_heads, 1)
        to = cache.keys[layer], cache.values[layer]
        self._write(k, v, *to, self.slots, self.positions, cache.angles[layer], norm)

    @cached_property
    def rotations(self) -> list[Rotation | None]:
        """Rotations of q and k outside of the kernel, used if prompts run in the same call."""
        return self.cache.rotary.at(self.positions)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attend(layer, q, k, v)

    def _attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, angles: Tensor | None = None,
        norms: tuple[Tensor, Tensor, float] | None = None,
    ) -> Tensor:  # fmt: skip
        cache, a = self.cache, self.cache.architecture
        return self._decode(
            q, k, v, cache.keys[layer], cache.values[layer], self.slots, self.positions, a.attention_scale, angles,
            norms, a.window_tokens if a.slides(layer) else None, firsts=self._firsts,
        )  # fmt: skip

    @cached_property
    def _rows(self) -> Tensor:
        return rows_of(self.cache, self.slots, self.positions)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        write_rows(self.cache, layer, self._rows, k, v)


def first_positions(slots: Tensor, positions: Tensor) -> Tensor:
    """The first position among the rows in a row's slot, for each row (N,). Nothing is copied from the host."""
    n = len(slots)
    return positions.expand(n, n).masked_fill(slots[:, None] != slots, torch.iinfo(positions.dtype).max).amin(1)


Decodes = DecodeStep | ExactStep


def decode_step(cache: KvCache, slots: Sequence[int], lengths: Sequence[int], span: int | None = None) -> Decodes:
    """Build the step for one token each of the requests in these slots, with so many tokens each in the cache.

    `span`: how many tokens are read of each request, by kernels that need one length for all.
    """
    if not cache.kernels.any_lengths:
        return DecodeStep(cache, slots, lengths, span)
    check_room(cache, slots, max(lengths) + 1)
    repeated = len(set(slots)) < len(slots)
    on = cache.device
    return ExactStep(cache, torch.tensor(slots, device=on), torch.tensor(lengths, device=on), repeated=repeated)


def decode_step_on_device(
    cache: KvCache, slots: Tensor, positions: Tensor, span: int, in_row: bool, repeated: bool = False
) -> Decodes:
    """Build the step from tensors (B,) on the device, as a captured graph must.

    `span`: how many tokens are read of each request; 0 if each is read up to its own length. `in_row`: the slots are 0,
    1, ... `repeated`: several of the tokens may be of one request.
    """
    if not span:
        return ExactStep(cache, slots, positions, repeated=repeated)
    return DecodeStep.on_device(cache, slots, positions, span, 0 if in_row else None)
