"""The cheap check of an exit, in the few operations that one token can afford. Knows no training and no threshold.

At batch 1 the check costs what its operations cost to start, not what they compute, so all that can be folded into
the weights is: the scale of the dimensions, the square root of their number, and the share of risk_scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np

if TYPE_CHECKING:
    import torch

FEW_ROWS = 16  # with more, torch's threads are worth what it takes to start them


@dataclass(frozen=True, slots=True, eq=False)
class FoldedCheck:
    """1 - (1 - p) x risk_scale with p = sigmoid(v . silu(A (h / rms(h) * scale) + a) + c), on float32 weights.

    Float32 everywhere: a product with one row is faster in it than in bfloat16 on a CPU, and these are small. A CPU
    takes a few rows through one compiled function.
    """

    weight: torch.Tensor  # (width, d): A x scale x sqrt(d)
    bias: torch.Tensor  # (width,)
    out: torch.Tensor  # (width,)
    offset: torch.Tensor  # ()
    risk_scale: float
    _arrays: tuple[Any, ...] | None = field(init=False, repr=False)  # for `check_rows`; None where not on a CPU

    def __post_init__(self) -> None:
        arrays = None
        if self.weight.device.type == "cpu":
            tensors = (self.weight, self.bias, self.out)
            scalars = (np.float32(self.offset.item()), np.float32(self.risk_scale))
            arrays = (*(tensor.detach().numpy() for tensor in tensors), *scalars)
        object.__setattr__(self, "_arrays", arrays)

    @classmethod
    def fold(cls, tensors: Mapping[str, torch.Tensor], risk_scale: float) -> Self:
        """From a head's tensors `scale`, `check_in`, `check_bias`, `check_out` and `check_offset`."""
        scale = tensors["scale"].float()
        return cls(
            (tensors["check_in"].float() * scale * scale.numel() ** 0.5).contiguous(),
            tensors["check_bias"].float(),
            tensors["check_out"].float(),
            tensors["check_offset"].float(),
            risk_scale,
        )

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., d) of any float type -> (...,) in float32. Not a number, and so never sure, for a state of zeros."""
        import torch
        import torch.nn.functional as F

        if hidden.dim() != 2:
            return self(hidden.reshape(-1, hidden.shape[-1])).reshape(hidden.shape[:-1])
        if len(hidden) <= FEW_ROWS and self._arrays is not None:
            from helios_sim.live.check_rows import check_rows  # numba, which those without a check do not need

            found = np.empty(len(hidden), np.float32)
            weight, bias, out, offset, risk_scale = self._arrays
            check_rows(hidden.detach().float().contiguous().numpy(), weight, bias, out, offset, risk_scale, found)
            return torch.from_numpy(found)
        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
        inside = F.linear(hidden / norm, self.weight, self.bias)  # float32, as the norm is
        sure = torch.addmv(self.offset, F.silu(inside), self.out).sigmoid_()
        return sure if self.risk_scale == 1 else torch.add(1 - self.risk_scale, sure, alpha=self.risk_scale)
