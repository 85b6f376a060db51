"""Steps for one token each of several requests, by the kernels of the cache that they read.

torch's operations read all requests as far as the longest goes (`DecodeStep`). The project's own kernels read each as
long as it is, wherever its slot lies (`ExactStep`, and `RepeatedStep` for several tokens of one request).
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

    Both are tensors (B,) on the device, and a captured graph reads them there. A slot of -1 is padding: nothing of it
    is read or written, and what comes out for it is zeros. Of `written_only` slots K and V are written alone.
    """

    def __init__(
        self, cache: KvCache, slots: Tensor, positions: Tensor, whole: bool = False, frozen: bool = False
    ) -> None:
        """`whole`: contexts are not divided among programs, as where none is read.

        `frozen`: rows that are padding or only written keep their hidden states.
        """
        from helios_sim.live.kernels.attention import decode  # which imports Triton

        self._whole, self.frozen = whole, slots if frozen else None
        self.cache, self.slots, self.positions, self._decode = cache, slots, positions, decode

    def fused(self, layer: int, qkv: Tensor, w: LayerWeights) -> Tensor:
        cache, a = self.cache, self.cache.architecture
        norms = None if w.q_norm is None or w.k_norm is None else (w.q_norm, w.k_norm, a.norm_eps)
        q, k, v = qkv.split((a.n_heads, a.n_kv_heads, a.n_kv_heads), 1)
        return self._decode(
            q, k, v, cache.keys[layer], cache.values[layer], self.slots, self.positions, a.attention_scale,
            cache.angles[layer], norms, a.window_tokens if a.slides(layer) else None, whole=self._whole,
        )  # fmt: skip

    @cached_property
    def rotations(self) -> list[Rotation | None]:
        """For q and k that are turned outside, as where prompts run in the same call."""
        return self.cache.rotary.at(self.positions)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache, a = self.cache, self.cache.architecture
        return self._decode(
            q, k, v, cache.keys[layer], cache.values[layer], self.slots, self.positions, a.attention_scale,
            window=a.window_tokens if a.slides(layer) else None, whole=self._whole,
        )  # fmt: skip

    @cached_property
    def _rows(self) -> Tensor:
        return rows_of(self.cache, self.slots, self.positions)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        write_rows(self.cache, layer, self._rows, k, v)


class RepeatedStep(FusedAttend):
    """The same for several tokens of a request, of which later ones see earlier ones.

    K and V of all are written before any attends, in a launch of its own: the kernel's programs run in any order.
    """

    def __init__(self, step: ExactStep) -> None:
        self._step, self.positions = step, step.positions
        self._writing = ExactStep(step.cache, written_only(step.slots), step.positions, whole=True)

    @property
    def rotations(self) -> list[Rotation | None]:
        return self._step.rotations

    def fused(self, layer: int, qkv: Tensor, w: LayerWeights) -> Tensor:
        self._writing.fused(layer, qkv, w)
        return self._step.fused(layer, qkv, w)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._writing(layer, q, k, v)
        return self._step(layer, q, k, v)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._step.write(layer, k, v)


def written_only(slots: Tensor) -> Tensor:
    """The slots (N,) as those of rows whose K and V are written, and which attend to nothing. Padding stays so."""
    return torch.where(slots >= 0, -2 - slots, slots)


Decodes = DecodeStep | ExactStep | RepeatedStep


def decode_step(cache: KvCache, slots: Sequence[int], lengths: Sequence[int], span: int | None = None) -> Decodes:
    """A step for one token each of the requests in these slots, which have so many tokens in the cache.

    `span`: as many tokens are read of each, where the kernels do not go by the lengths.
    """
    if not cache.kernels.any_lengths:
        return DecodeStep(cache, slots, lengths, span)
    check_room(cache, slots, max(lengths) + 1)
    step = ExactStep(cache, torch.tensor(slots, device=cache.device), torch.tensor(lengths, device=cache.device))
    return step if len(set(slots)) == len(slots) else RepeatedStep(step)


def decode_step_on_device(
    cache: KvCache, slots: Tensor, positions: Tensor, span: int, in_row: bool, repeated: bool = False
) -> Decodes:
    """The step that a captured graph makes of numbers (B,) on the device. `span` 0: each is read as long as it is.

    `in_row`: the slots are 0, 1, ... `repeated`: several of the tokens may be of one request.
    """
    if not span:
        step = ExactStep(cache, slots, positions)
        return RepeatedStep(step) if repeated else step
    return DecodeStep.on_device(cache, slots, positions, span, 0 if in_row else None)
