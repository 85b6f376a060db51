"""A layer's sum with the residual stream and the norm that follows, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from helios_sim.live.kernels.launch import launch, power_of_two


@triton.jit
def normed_rows(x, weight, bias, eps, width, inside, LAYER: tl.constexpr):
    """Rows x (R, W) in float32, of which `width` values count, through RMSNorm or LayerNorm: float32."""
    if LAYER:
        x = tl.where(inside, x - tl.sum(x, 1)[:, None] / width, 0.0)
    x = x * tl.rsqrt(tl.sum(x * x, 1)[:, None] / width + eps) * weight
    if LAYER:
        x += bias
    return x


@triton.jit
def add_norm_rows(
    hidden, delta, post, weight, bias, slots, total, normed, eps, width,
    ADD: tl.constexpr, POST: tl.constexpr, NORM: tl.constexpr, LAYER: tl.constexpr, FROZEN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for a row: total = hidden + (norm of) delta, normed = norm(total), all (N, width).

    FROZEN: in rows with a slot (N,) below 0, total is hidden.
    """
    row = tl.program_id(0).to(tl.int64) * width
    c = tl.arange(0, BLOCK)[None, :]
    inside = c < width
    dtype: tl.constexpr = hidden.dtype.element_ty
    x = tl.load(hidden + row + c, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        more = tl.load(delta + row + c, mask=inside, other=0.0).to(tl.float32)
        if POST:
            weight_after = tl.load(post + c, mask=inside, other=0.0).to(tl.float32)
            more = normed_rows(more, weight_after, 0.0, eps, width, inside, False).to(dtype).to(tl.float32)
        before, x = x, (x + more).to(dtype).to(tl.float32)
        if FROZEN:
            x = tl.where(tl.load(slots + tl.program_id(0)) >= 0, x, before)
        tl.store(total + row + c, x.to(dtype), mask=inside)
    if NORM:
        weights = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
        biases = weights
        if LAYER:
            biases = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
        x = normed_rows(x, weights, biases, eps, width, inside, LAYER)
        tl.store(normed + row + c, x.to(dtype), mask=inside)


def add_norm(
    hidden: Tensor, delta: Tensor | None, post: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return hidden + delta, and its norm, both (N, width); either alone if `weight` or `delta` is None.

    `post`: weights of an RMSNorm of delta before the sum. `bias`: the norm is LayerNorm. The sum is rounded to the
    dtype before it is normed, as the residual stream is. `slots` (N,): rows with a slot below 0 get no delta.
    """
    rows, width = hidden.shape
    total = hidden if delta is None else torch.empty_like(hidden)
    normed = total if weight is None else torch.empty_like(hidden)
    block = power_of_two(width)
    launch(
        add_norm_rows, (rows,), hidden, hidden if delta is None else delta, hidden if post is None else post,
        hidden if weight is None else weight, hidden if bias is None else bias, hidden if slots is None else slots,
        total, normed, eps, width, ADD=delta is not None, POST=post is not None, NORM=weight is not None,
        LAYER=bias is not None, FROZEN=slots is not None, BLOCK=block, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return total, normed
