"""The operations of a layer by Triton kernels, on a card. Large products are the libraries' of torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from helios_sim.live.kernels.activation import activate
from helios_sim.live.kernels.gemv import MOST_ROWS, fits, normed_product, product
from helios_sim.live.kernels.norms import add_norm
from helios_sim.live.model.architecture import Architecture


class TritonKernels:
    """Each operation by a kernel of its own; up to 4 rows, sum, norm, product and activation together."""

    name = "triton"
    any_lengths = True

    def enter(
        self, a: Architecture, hidden: Tensor, delta: Tensor | None, post: Tensor | None, norm: Tensor,
        norm_bias: Tensor | None, weight: Tensor, bias: Tensor | None, mlp: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        gated = mlp and a.gated_mlp
        if fits(*hidden.shape):
            activation = a.activation if mlp else None
            return normed_product(
                hidden, delta, post, norm, norm_bias, a.norm_eps, weight, bias, activation, gated
            )
        hidden, normed = add_norm(hidden, delta, post, norm, norm_bias, a.norm_eps)
        inner = F.linear(normed, weight, bias)
        return hidden, activate(inner, a.activation, gated) if mlp else inner

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(x, weight, bias) if len(x) <= MOST_ROWS else F.linear(x, weight, bias)

    def add(self, a: Architecture, hidden: Tensor, delta: Tensor, post: Tensor | None) -> Tensor:
        return add_norm(hidden, delta, post, None, None, a.norm_eps)[0]


TRITON = TritonKernels()
