"""Steps before attention by another library: q and k are rotated (RoPE), and k and v are written into the cache.

k and v alone are written for tokens that left early, in the layers above, and before rows of one request attend.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from helios_sim.live.kernels.launch import launch, power_of_two


@triton.jit
def turned_rows(
    x, partner, weight, turned_weight, angles, position, d, eps, HALF: tl.constexpr, NORM: tl.constexpr,
    ROPE: tl.constexpr, to: tl.constexpr,
):  # fmt: skip
    """Norm rows of heads (…, D) in float32 and rotate them to a position; the result has dtype `to`.

    `partner` holds for each dimension the other one of its pair.
    """
    if NORM:
        shrink = tl.rsqrt(tl.sum(x * x, 1)[:, None] / (2 * HALF) + eps)
        x = (x * shrink * weight[None, :]).to(to).to(tl.float32)
        partner = (partner * shrink * turned_weight[None, :]).to(to).to(tl.float32)
    if ROPE:
        at = angles + position * (2 * HALF) + d % HALF
        inside = d < 2 * HALF
        cos = tl.load(at, mask=inside, other=0.0)
        sin = tl.load(at + HALF, mask=inside, other=0.0)
        x = x * cos[None, :] + partner * tl.where(d < HALF, -sin, sin)[None, :]
    return x.to(to)


@triton.jit
def turn_write(
    q, k, v, q_norm, k_norm, angles, slots, positions, keys, values, out, eps, q_row, k_row, v_row,
    slot_stride, head_stride, HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    GROUP: tl.constexpr, ROPE: tl.constexpr, NORM: tl.constexpr, ASKS: tl.constexpr,
):  # fmt: skip
    """One program for a request and a KV head; shapes as in `attention.decode_split`, `out` (N, HEADS, D).

    ASKS: there are queries.
    """
    row, kv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    G: tl.constexpr = HEADS // KV
    HALF: tl.constexpr = D // 2
    dtype: tl.constexpr = keys.dtype.element_ty
    given = tl.load(slots + row).to(tl.int64)
    slot = tl.where(given >= -1, given, -2 - given)
    position = tl.where(slot >= 0, tl.load(positions + row), 0).to(tl.int32)
    d, g = tl.arange(0, DP), tl.arange(0, GROUP)
    inside = d < D
    pair = tl.where(d < HALF, d + HALF, d - HALF)
    q_weight, q_turned, k_weight, k_turned = d.to(tl.float32), d.to(tl.float32), d.to(tl.float32), d.to(tl.float32)
    if NORM:
        q_weight = tl.load(q_norm + d, mask=inside, other=0.0).to(tl.float32)
        q_turned = tl.load(q_norm + pair, mask=inside, other=0.0).to(tl.float32)
        k_weight = tl.load(k_norm + d, mask=inside, other=0.0).to(tl.float32)
        k_turned = tl.load(k_norm + pair, mask=inside, other=0.0).to(tl.float32)
    if ASKS:
        of_q = q + row * q_row + (kv * G + g)[:, None] * D
        some = (g[:, None] < G) & inside[None, :]
        query = tl.load(of_q + d[None, :], mask=some, other=0.0).to(tl.float32)
        partner = tl.load(of_q + pair[None, :], mask=some, other=0.0).to(tl.float32)
        query = turned_rows(query, partner, q_weight, q_turned, angles, position, d, eps, HALF, NORM, ROPE, dtype)
        tl.store(out + (row * HEADS + kv * G + g)[:, None] * D + d[None, :], query, mask=some)
    if slot >= 0:
        of_k, of_v = k + row * k_row + kv * D, v + row * v_row + kv * D
        key = tl.load(of_k + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        partner_key = tl.load(of_k + pair, mask=inside, other=0.0).to(tl.float32)[None, :]
        key = turned_rows(key, partner_key, k_weight, k_turned, angles, position, d, eps, HALF, NORM, ROPE, dtype)
        value = tl.load(of_v + d, mask=inside, other=0.0)[None, :]
        to = slot * slot_stride + kv * head_stride + position * D + d
        tl.store(keys + to[None, :], key, mask=inside[None, :])
        tl.store(values + to[None, :], value, mask=inside[None, :])


def turn_and_write(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor,
    angles: Tensor | None = None, norms: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:  # fmt: skip
    """Norm and rotate q (N, heads, D), and return it. Write k and v (N, kv_heads, D) as `attention.decode` does.

    The arguments are those of `attention.decode`; slot -1 is padding, and -2 - s is slot s here too.
    """
    rows, heads, width = q.shape
    kv_heads = keys.shape[1]
    out = q.new_empty((rows, heads, width))
    q_norm, k_norm, eps = norms or (q, q, 0.0)
    launch(
        turn_write, (rows, kv_heads), q, k, v, q_norm, k_norm, out if angles is None else angles, slots, positions,
        keys, values, out, eps, q.stride(0), k.stride(0), v.stride(0), keys.stride(0), keys.stride(1), HEADS=heads,
        KV=kv_heads, D=width, DP=power_of_two(width), GROUP=power_of_two(heads // kv_heads), ROPE=angles is not None,
        NORM=norms is not None, ASKS=True,
    )  # fmt: skip
    return out


def write(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, angles: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
) -> None:  # fmt: skip
    """Write v, and k (N, kv_heads, D) normed and rotated, as `turn_and_write` does. `norm`: k's weights, and eps."""
    rows, heads, width = k.shape
    of_k, eps = norm or (k, 0.0)
    launch(
        turn_write, (rows, heads), k, k, v, of_k, of_k, k if angles is None else angles, slots, positions, keys,
        values, k, eps, k.stride(0), k.stride(0), v.stride(0), keys.stride(0), keys.stride(1), HEADS=heads, KV=heads,
        D=width, DP=power_of_two(width), GROUP=1, ROPE=angles is not None, NORM=norm is not None, ASKS=False,
    )  # fmt: skip
