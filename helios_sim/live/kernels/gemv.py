"""Products of 1 to 4 rows with a weight matrix, with the norm before or the activation after in the same launch.

With so few rows, the time of a product is the time to read its weights, and during any other launch none are read.
Every program of `norm_gemv` computes the sum and the norm of the whole rows anew, from the second-level cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from helios_sim.live.kernels.activation import NUMBER, activated_values
from helios_sim.live.kernels.launch import MOST_ROWS, cores, launch, power_of_two
from helios_sim.live.kernels.norms import normed_rows

MOST_VALUES = 16384  # of all rows together; each program of `norm_gemv` holds them in registers
MOST_WIDTH = 4096  # of several rows: beyond it registers spill on an A100
MOST_REGISTERS = 128  # of a thread; without it ptxas takes fewer for an A100, and spills a few
NORMED_OUTPUTS = 16  # most of one program of `norm_gemv`, since each computes the norm of all rows
SUMMED = 8192  # weights that a program of `gemv` multiplies at a time, divided by the rows
OUTPUTS = 4  # of one program of `gemv`, and least of one of `norm_gemv`
PROGRAMS_PER_CORE = 2  # wanted of `norm_gemv`, as long as a program has more outputs than the least


@triton.jit
def norm_gemv(
    hidden, delta, post, norm, norm_bias, weight, bias, slots, total, out, eps, width, outputs,
    ROWS: tl.constexpr, N: tl.constexpr, ADD: tl.constexpr, POST: tl.constexpr, LAYER: tl.constexpr,
    BIAS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, FROZEN: tl.constexpr, NEEDED: tl.constexpr,
    OUTPUTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """total = hidden + (norm of) delta (N, width); out = act(norm(total) weight^T + bias) (N, outputs).

    weight (outputs, width); GATED: (2 outputs, width), gate first, and out is act(gate) * up. ACT below 0: none.
    FROZEN: in rows with a slot (N,) below 0, total is hidden; if all rows are such, out is not computed unless NEEDED.
    """
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (r < N) & (c < width)
    at = r * width + c
    dtype: tl.constexpr = hidden.dtype.element_ty
    x = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        more = tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        if POST:
            weight_after = tl.load(post + c, mask=c < width, other=0.0).to(tl.float32)
            more = normed_rows(more, weight_after, 0.0, eps, width, inside, False).to(dtype).to(tl.float32)
        before, x = x, (x + more).to(dtype).to(tl.float32)
        if FROZEN:
            x = tl.where(tl.load(slots + r, mask=r < N, other=-1) >= 0, x, before)
        tl.store(total + at, x.to(dtype), mask=inside & (tl.program_id(0) == 0))
    norms = tl.load(norm + c, mask=c < width, other=0.0).to(tl.float32)
    biases = norms
    if LAYER:
        biases = tl.load(norm_bias + c, mask=c < width, other=0.0).to(tl.float32)
    x = tl.where(inside, normed_rows(x, norms, biases, eps, width, inside, LAYER), 0.0)
    first = tl.program_id(0).to(tl.int64) * OUTPUTS
    rows = tl.arange(0, ROWS)
    count = tl.minimum(OUTPUTS, outputs - first)
    if FROZEN and not NEEDED:
        count = tl.where(tl.max(tl.load(slots + rows, mask=rows < N, other=-1), 0) >= 0, count, 0)
    for i in range(count):
        m = first + i
        of = tl.load(weight + m * width + c, mask=c < width, other=0.0).to(tl.float32)
        y = tl.sum(x * of, 1)
        if BIAS:
            y += tl.load(bias + m).to(tl.float32)
        if ACT >= 0:
            y = activated_values(y, ACT)
        if GATED:
            of = tl.load(weight + (m + outputs) * width + c, mask=c < width, other=0.0).to(tl.float32)
            y *= tl.sum(x * of, 1)
        tl.store(out + rows * outputs + m, y.to(dtype), mask=rows < N)


@triton.jit
def gemv(
    x, weight, bias, slots, out, width, outputs, x_row,
    ROWS: tl.constexpr, N: tl.constexpr, BIAS: tl.constexpr, FROZEN: tl.constexpr, OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out = x weight^T + bias: x (N, width), rows `x_row` apart, weight (outputs, width), out (N, outputs).

    FROZEN: if all rows have a slot (N,) below 0, no weight is read.
    """
    m = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    r, c = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    dtype: tl.constexpr = x.dtype.element_ty
    acc = tl.zeros((ROWS, OUTPUTS, BLOCK), tl.float32)
    until = width
    if FROZEN:
        until = tl.where(tl.max(tl.load(slots + r, mask=r < N, other=-1), 0) >= 0, width, 0)
    for start in range(0, until, BLOCK):
        k = start + c
        of_w = weight + m.to(tl.int64)[:, None] * width + k[None, :]
        w = tl.load(of_w, mask=(m < outputs)[:, None] & (k < width)[None, :], other=0.0)
        xs = tl.load(x + r[:, None] * x_row + k[None, :], mask=(r < N)[:, None] & (k < width)[None, :], other=0.0)
        acc += xs.to(tl.float32)[:, None, :] * w.to(tl.float32)[None, :, :]
    y = tl.sum(acc, 2)
    if BIAS:
        y += tl.load(bias + m, mask=m < outputs, other=0.0).to(tl.float32)[None, :]
    tl.store(out + r[:, None] * outputs + m[None, :], y.to(dtype), mask=(r < N)[:, None] & (m < outputs)[None, :])


def outputs_each(outputs: int, on_cores: int) -> int:
    """How many outputs a program of `norm_gemv` computes.

    A narrow model is divided by its outputs and not along a sum, so no second launch has to join parts, and no order of
    additions depends on which program comes first.
    """
    each = NORMED_OUTPUTS
    while each > OUTPUTS and -(-outputs // each) < PROGRAMS_PER_CORE * on_cores:
        each //= 2
    return each


def fits(rows: int, width: int) -> bool:
    """Whether `normed_product` takes so many rows of this width."""
    few, wide = power_of_two(rows), power_of_two(width)
    return rows <= MOST_ROWS and few * wide <= MOST_VALUES and (few == 1 or wide <= MOST_WIDTH)


def normed_product(
    hidden: Tensor, delta: Tensor | None, post: Tensor | None, norm: Tensor, norm_bias: Tensor | None, eps: float,
    weight: Tensor, bias: Tensor | None, activation: str | None, gated: bool, slots: Tensor | None = None,
    needed: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return hidden + delta (N, width), and its norm times weight^T, through the activation if any (N, outputs).

    `slots` (N,): rows with a slot below 0 get no delta; if all rows are such, nothing is multiplied unless `needed`.
    """
    rows, width = hidden.shape
    outputs = weight.shape[0] // (2 if gated else 1)
    total = hidden if delta is None else torch.empty_like(hidden)
    out = torch.empty((rows, outputs), dtype=hidden.dtype, device=hidden.device)
    padded, block = power_of_two(rows), power_of_two(width)
    each = outputs_each(outputs, cores(hidden.device))
    launch(
        norm_gemv, (-(-outputs // each),), hidden, hidden if delta is None else delta,
        hidden if post is None else post, norm, norm if norm_bias is None else norm_bias, weight,
        weight if bias is None else bias, hidden if slots is None else slots, total, out, eps, width, outputs,
        ROWS=padded, N=rows, ADD=delta is not None, POST=post is not None, LAYER=norm_bias is not None,
        BIAS=bias is not None, ACT=-1 if activation is None else NUMBER[activation], GATED=gated,
        FROZEN=slots is not None, NEEDED=needed, OUTPUTS=each, BLOCK=block,
        num_warps=min(16, max(4, padded * block // 1024)), maxnreg=MOST_REGISTERS,
    )  # fmt: skip
    return total, out


def product(x: Tensor, weight: Tensor, bias: Tensor | None, slots: Tensor | None = None) -> Tensor:
    """Return x (N, width) times weight^T, plus the bias -> (N, outputs), for at most `MOST_ROWS` rows.

    `slots` (N,): if all rows have a slot below 0, nothing is multiplied.
    """
    rows, width = x.shape
    outputs = weight.shape[0]
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    padded = power_of_two(rows)
    launch(
        gemv, (-(-outputs // OUTPUTS),), x, weight, weight if bias is None else bias, x if slots is None else slots,
        out, width, outputs, x.stride(0), ROWS=padded, N=rows, BIAS=bias is not None, FROZEN=slots is not None,
        OUTPUTS=OUTPUTS, BLOCK=min(power_of_two(width), SUMMED // (OUTPUTS * padded)), num_warps=4,
    )  # fmt: skip
    return out
