"""The operations of a layer by Triton kernels, on a card. Large products are left to torch's libraries.

Kernels have no gradients, so training goes through torch's operations.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from helios_sim.live.kernels.activation import activate
from helios_sim.live.kernels.gemv import fits, normed_product, product
from helios_sim.live.kernels.head import MEASURES, look_at
from helios_sim.live.kernels.interface import TORCH, Inside
from helios_sim.live.kernels.launch import MOST_ROWS
from helios_sim.live.kernels.leave import leave
from helios_sim.live.kernels.norms import add_norm
from helios_sim.live.model.architecture import Architecture


class TritonKernels:
    """One Triton kernel per operation; for up to 4 rows, one for sum, norm, product and activation together."""

    name = "triton"
    any_lengths = True
    page_tokens = 0

    def enter(
        self, a: Architecture, hidden: Tensor, delta: Tensor | None, post: Tensor | None, norm: Tensor,
        norm_bias: Tensor | None, weight: Tensor, bias: Tensor | None, mlp: bool, slots: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if hidden.requires_grad or norm.requires_grad or weight.requires_grad or hidden.dim() != 2:
            return TORCH.enter(a, hidden, delta, post, norm, norm_bias, weight, bias, mlp, slots)
        hidden, gated = hidden.contiguous(), mlp and a.gated_mlp
        if fits(*hidden.shape):
            activation = a.activation if mlp else None
            given = hidden, delta, post, norm, norm_bias, a.norm_eps, weight, bias, activation, gated
            return normed_product(*given, slots, needed=not mlp)
        hidden, normed = add_norm(hidden, delta, post, norm, norm_bias, a.norm_eps, slots)
        inner = F.linear(normed, weight, bias)
        return hidden, activate(inner, a.activation, gated) if mlp else inner

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, slots: Tensor | None = None) -> Tensor:
        few = len(x) <= MOST_ROWS and not (x.requires_grad or weight.requires_grad)
        return product(x, weight, bias, slots) if few else F.linear(x, weight, bias)

    def add(
        self, a: Architecture, hidden: Tensor, delta: Tensor, post: Tensor | None, slots: Tensor | None = None
    ) -> Tensor:
        if hidden.requires_grad or delta.requires_grad:
            return TORCH.add(a, hidden, delta, post, slots)
        return add_norm(hidden.contiguous(), delta, post, None, None, a.norm_eps, slots)[0]

    def logits(self, a: Architecture, hidden: Tensor, norm: Tensor, norm_bias: Tensor | None, head: Tensor) -> Tensor:
        return self.enter(a, hidden, None, None, norm, norm_bias, head, None, mlp=False)[1]

    def look_at(self, logits: Tensor, measure: str | None, temperature: float) -> tuple[Tensor, Tensor, Tensor] | None:
        number = 0 if measure is None else MEASURES.get(measure)
        if number is None or logits.requires_grad or logits.dim() != 2:
            return None
        return look_at(logits.contiguous(), number, temperature)

    def leave(
        self, rows: Inside, depth: int, sure: Tensor | None, look: tuple[Tensor, Tensor] | None, threshold: Tensor,
        recorded: Tensor, lazy: bool, last: bool,
    ) -> None:  # fmt: skip
        leave(rows, depth, sure, look, threshold, recorded, lazy, last)


class FlashInferKernels(TritonKernels):
    """Triton kernels, with FlashInfer for the attention of captured decodes."""

    name = "flashinfer"
    page_tokens = 16


TRITON, FLASHINFER = TritonKernels(), FlashInferKernels()
