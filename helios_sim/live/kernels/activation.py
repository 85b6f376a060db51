"""The activation between the two products of an MLP, with its gate, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from helios_sim.live.kernels.launch import launch

BLOCK = 1024
SILU, RELU, GELU, GELU_TANH = range(4)
NUMBER = {"silu": SILU, "relu": RELU, "gelu": GELU, "gelu_tanh": GELU_TANH}


@triton.jit
def activated_values(x, ACT: tl.constexpr):
    """Apply the activation with the number ACT to x, in float32."""
    if ACT == 0:
        x = x / (1.0 + tl.exp(-x))
    elif ACT == 1:
        x = tl.where(x > 0.0, x, x * 0.0)  # NaN stays
    elif ACT == 2:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x / (1.0 + tl.exp(-2.0 * inner))  # 1 + tanh(y) = 2 / (1 + exp(-2 y))
    return x


@triton.jit
def activate_rows(inner, out, width, ACT: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """One program for a part of a row: inner (N, 2 width), gate first, or (N, width) -> out (N, width)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    of = inner + row * (2 * width if GATED else width) + c
    dtype: tl.constexpr = inner.dtype.element_ty
    x = activated_values(tl.load(of, mask=inside, other=0.0).to(tl.float32), ACT)
    if GATED:
        x *= tl.load(of + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + c, x.to(dtype), mask=inside)


def activate(inner: Tensor, activation: str, gated: bool) -> Tensor:
    """Activate inner (N, 2 width), gate first, or (N, width) without a gate -> (N, width), rounded once."""
    rows, width = inner.shape[0], inner.shape[1] // (2 if gated else 1)
    out = torch.empty((rows, width), dtype=inner.dtype, device=inner.device)
    launch(
        activate_rows, (rows, -(-width // BLOCK)), inner, out, width, ACT=NUMBER[activation], GATED=gated, BLOCK=BLOCK
    )
    return out
