"""The cheap check of an exit, in the few operations that one token can afford. Knows no training and no threshold.

At batch 1 the check costs what its operations cost to start, not what they compute, so all that can be folded into
the weights is: the scale of the dimensions, the square root of their number, and the share of risk_scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import torch

TINY = 1e-12  # keeps a hidden state of zeros defined, far below any real norm


@dataclass(frozen=True, slots=True, eq=False)
class FoldedCheck:
    """1 - (1 - p) x risk_scale with p = sigmoid(v . silu(A (h / rms(h) * scale) + a) + c), on float32 weights.

    Float32 everywhere: a product with one row is faster in it than in bfloat16 on a CPU, and these are small.
    """

    weight: torch.Tensor  # (width, d): A x scale x sqrt(d)
    bias: torch.Tensor  # (width,)
    out: torch.Tensor  # (1, width)
    offset: torch.Tensor  # (1,)
    risk_scale: float

    @classmethod
    def fold(cls, tensors: Mapping[str, torch.Tensor], risk_scale: float) -> Self:
        """From a head's tensors `scale`, `check_in`, `check_bias`, `check_out` and `check_offset`."""
        scale = tensors["scale"].float()
        return cls(
            (tensors["check_in"].float() * scale * scale.numel() ** 0.5).contiguous(),
            tensors["check_bias"].float(),
            tensors["check_out"].float().reshape(1, -1),
            tensors["check_offset"].float().reshape(1),
            risk_scale,
        )

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., d) of any float type -> (...,) in float32."""
        import torch
        import torch.nn.functional as F

        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32).add_(TINY)
        inside = F.linear(hidden / norm, self.weight, self.bias)  # float32, as the norm is
        sure = F.linear(F.silu(inside), self.out, self.offset).sigmoid_().squeeze(-1)
        return sure if self.risk_scale == 1 else torch.add(1 - self.risk_scale, sure, alpha=self.risk_scale)
