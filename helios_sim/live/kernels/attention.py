"""Attention of one new token for each of N requests over the slots of a KV cache, each up to its own length.

The context of a request is divided into splits, which different programs read at the same time (split KV, as in
FlashDecoding); `decode_merge` joins their results. A program of the first split also rotates the new key to its
position, writes the new K and V into the cache, and uses them from its registers. Lengths are read on the card, so one
captured graph serves all lengths, and only K and V of the request's own tokens are read.

Several rows may be tokens of one request. Later tokens see earlier ones, but programs run in any order. If contexts are
divided, the first launch reads the tokens before the request's first row, and `merge_later` reads the rest, when K and
V of all rows are written. If contexts are not divided, an earlier launch writes K and V.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from helios_sim.live.kernels.launch import cores, launch, power_of_two
from helios_sim.live.kernels.turn import turned_rows, write

MOST_SPLITS = 32
MOST_REGISTERS = 128  # of a thread; by default ptxas takes fewer, and spills a few
PROGRAMS_PER_CORE = 4  # wanted at once, to keep enough bytes in flight
TILE = 16  # the least rows of a product on tensor cores
LATER = 8  # tokens that a program of `merge_later` reads at a time; few are left for it


@triton.jit
def decode_split(
    q, k, v, q_norm, k_norm, angles, slots, positions, firsts, keys, values, part, sums, out,
    scale, eps, window, q_row, k_row, v_row, slot_stride, head_stride,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, DIRECT: tl.constexpr, ROPE: tl.constexpr, NORM: tl.constexpr, WINDOW: tl.constexpr,
    LATER: tl.constexpr,
):  # fmt: skip
    """One program for a request, a KV head and a split. Slot -1 is padding: nothing is read or written. A slot s given
    as -2 - s is only written: no token is read, and the output is zeros.

    q (N, HEADS, D), k and v (N, KV, D), with rows that may be apart; angles (tokens, D): cosines, then sines;
    keys and values (slots, KV, tokens, D); part (N, HEADS, splits, D) and sums (N, HEADS, splits, 2) in float32: the
    weighted sum of values, the largest score and the sum of weights. DIRECT: there is one split, and `out`
    (N, HEADS, D) is written in their place. LATER: the request's tokens from firsts (N,) on, except the row's own, are
    left to `merge_later`, and `out` gets the rotated query.
    """
    row, kv, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(2)
    G: tl.constexpr = HEADS // KV
    HALF: tl.constexpr = D // 2
    dtype: tl.constexpr = keys.dtype.element_ty
    given = tl.load(slots + row).to(tl.int64)
    slot = tl.where(given >= -1, given, -2 - given)
    position = tl.where(slot >= 0, tl.load(positions + row), 0).to(tl.int32)
    past = tl.where(given >= 0, position, 0)  # tokens that are read
    if LATER:
        past = tl.minimum(past, tl.load(firsts + row).to(tl.int32))
    d, g, n = tl.arange(0, DP), tl.arange(0, GROUP), tl.arange(0, BLOCK)
    inside = d < D
    pair = tl.where(d < HALF, d + HALF, d - HALF)
    q_weight, q_turned, k_weight, k_turned = d.to(tl.float32), d.to(tl.float32), d.to(tl.float32), d.to(tl.float32)
    if NORM:
        q_weight = tl.load(q_norm + d, mask=inside, other=0.0).to(tl.float32)
        q_turned = tl.load(q_norm + pair, mask=inside, other=0.0).to(tl.float32)
        k_weight = tl.load(k_norm + d, mask=inside, other=0.0).to(tl.float32)
        k_turned = tl.load(k_norm + pair, mask=inside, other=0.0).to(tl.float32)
    of_q = q + row * q_row + (kv * G + g)[:, None] * D
    some = (g[:, None] < G) & inside[None, :]
    query = tl.load(of_q + d[None, :], mask=some, other=0.0).to(tl.float32)
    partner = tl.load(of_q + pair[None, :], mask=some, other=0.0).to(tl.float32)
    query = turned_rows(query, partner, q_weight, q_turned, angles, position, d, eps, HALF, NORM, ROPE, dtype)
    scale = scale * 1.4426950408889634  # so that weights are powers of two
    base = slot * slot_stride + kv * head_stride
    most = tl.full((GROUP,), -float("inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    acc = tl.zeros((GROUP, DP), tl.float32)
    if split == 0:
        if slot >= 0:
            of_k, of_v = k + row * k_row + kv * D, v + row * v_row + kv * D
            key = tl.load(of_k + d, mask=inside, other=0.0).to(tl.float32)[None, :]
            partner_key = tl.load(of_k + pair, mask=inside, other=0.0).to(tl.float32)[None, :]
            key = turned_rows(key, partner_key, k_weight, k_turned, angles, position, d, eps, HALF, NORM, ROPE, dtype)
            value = tl.load(of_v + d, mask=inside, other=0.0)[None, :]
            to = base + position * D + d
            tl.store(keys + to[None, :], key, mask=inside[None, :])
            tl.store(values + to[None, :], value, mask=inside[None, :])
            most = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * scale
            total += tl.where(given >= 0, 1.0, 0.0)
            acc += value.to(tl.float32)
        if LATER:
            to_query = out + (row * HEADS + kv * G + g)[:, None] * D + d[None, :]
            tl.store(to_query, query, mask=some)
    begin = 0
    if WINDOW:
        begin = tl.minimum(tl.maximum(position + 1 - window, 0), past)
    share = tl.cdiv(tl.cdiv(past - begin, splits), BLOCK) * BLOCK
    first = begin + split * share
    last = tl.minimum(past, first + share)
    for start in range(first, last, BLOCK):
        at = start + n
        there = (at < last)[:, None] & inside[None, :]
        of = base + at[:, None] * D + d[None, :]
        key = tl.load(keys + of, mask=there, other=0.0)
        value = tl.load(values + of, mask=there, other=0.0)
        if GROUP == 1:
            score = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1)[None, :] * scale
        else:
            score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where((at < last)[None, :], score, -float("inf"))
        new = tl.maximum(most, tl.max(score, 1))
        weight, shrink = tl.exp2(score - new[:, None]), tl.exp2(most - new)
        total = total * shrink + tl.sum(weight, 1)
        if GROUP == 1:
            gained = tl.sum(tl.trans(weight) * value.to(tl.float32), 0)[None, :]
        else:
            gained = tl.dot(weight.to(dtype), value, input_precision="ieee")
        acc = acc * shrink[:, None] + gained
        most = new
    head = row * HEADS + kv * G + g
    if DIRECT:
        acc = tl.where((total != 0)[:, None], acc / tl.where(total != 0, total, 1.0)[:, None], 0.0)
        tl.store(out + head[:, None] * D + d[None, :], acc.to(dtype), mask=some)
    else:
        at_part = head * splits + split
        tl.store(part + at_part[:, None] * D + d[None, :], acc, mask=some & (total != 0)[:, None])
        tl.store(sums + at_part * 2, most, mask=g < G)
        tl.store(sums + at_part * 2 + 1, total, mask=g < G)


@triton.jit
def decode_merge(part, sums, out, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr):
    """One program for a head of a request: part and sums of its splits -> out (N, HEADS, D)."""
    head = tl.program_id(0).to(tl.int64)
    d, s = tl.arange(0, DP), tl.arange(0, SPLITS)
    at = head * SPLITS + s
    most, total = tl.load(sums + at * 2), tl.load(sums + at * 2 + 1)
    top = tl.max(most, 0)
    weight = tl.where(total != 0, tl.exp2(most - top), 0.0)
    whole = tl.sum(total * weight, 0)
    some = (total != 0)[:, None] & (d < D)[None, :]
    acc = tl.sum(tl.load(part + at[:, None] * D + d[None, :], mask=some, other=0.0) * weight[:, None], 0)
    acc = tl.where(whole != 0, acc / tl.where(whole != 0, whole, 1.0), 0.0)
    tl.store(out + head * D + d, acc.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def merge_later(
    part, sums, slots, positions, firsts, keys, values, out, scale, window, slot_stride, head_stride,
    HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """One program for a head of a request: `decode_merge`, with the tokens that `decode_split` left out.

    out (N, HEADS, D) holds the rotated query at first.
    """
    row, of_row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    position = tl.where(slot >= 0, tl.load(positions + row), 0).to(tl.int32)
    begin = tl.load(firsts + row).to(tl.int32)
    if WINDOW:
        begin = tl.maximum(begin, position + 1 - window)
    d, s, n = tl.arange(0, DP), tl.arange(0, SPLITS), tl.arange(0, BLOCK)
    inside = d < D
    head = row * HEADS + of_row
    query = tl.load(out + head * D + d, mask=inside, other=0.0).to(tl.float32) * (scale * 1.4426950408889634)
    at = head * SPLITS + s
    largest, totals = tl.load(sums + at * 2), tl.load(sums + at * 2 + 1)
    most = tl.max(largest, 0)
    of_part = tl.where(totals != 0, tl.exp2(largest - most), 0.0)
    some = (totals != 0)[:, None] & inside[None, :]
    acc = tl.sum(tl.load(part + at[:, None] * D + d[None, :], mask=some, other=0.0) * of_part[:, None], 0)
    total = tl.sum(totals * of_part, 0)
    base = slot * slot_stride + (of_row // (HEADS // KV)) * head_stride
    for start in range(begin, position, BLOCK):
        there = start + n < position
        of = base + (start + n)[:, None] * D + d[None, :]
        mask = there[:, None] & inside[None, :]
        key = tl.load(keys + of, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(values + of, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(there, tl.sum(query[None, :] * key, 1), -float("inf"))
        new = tl.maximum(most, tl.max(score, 0))
        weight, shrink = tl.exp2(score - new), tl.exp2(most - new)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink + tl.sum(weight[:, None] * value, 0)
        most = new
    acc = tl.where(total != 0, acc / tl.where(total != 0, total, 1.0), 0.0)
    tl.store(out + head * D + d, acc.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the attention of a batch is divided: programs, and what each holds at a time."""

    splits: int
    block: int  # tokens
    group: int  # query heads of a KV head, as rows of a product; 1 for one head, without a product
    warps: int


def tiling(rows: int, heads: int, kv_heads: int, width: int, tokens: int, on_cores: int, value_bytes: int) -> Tiling:
    """The division for `rows` requests of at most `tokens` tokens with heads of `width` values."""
    per_kv = heads // kv_heads
    group = 1 if per_kv == 1 else max(TILE, power_of_two(per_kv))
    wide = group * power_of_two(width) > 2048
    block = 64 if power_of_two(width) <= 128 and value_bytes == 2 else 16 if wide and value_bytes == 4 else 32
    there = rows * kv_heads
    wanted = -(-(PROGRAMS_PER_CORE * on_cores - there // 8) // there)  # an eighth more is not worth a merge
    splits = min(MOST_SPLITS, power_of_two(wanted), power_of_two(-(-tokens // (2 * block))))
    return Tiling(max(1, splits), block, group, 8 if wide else 4)


def decode(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, scale: float,
    angles: Tensor | None = None, norms: tuple[Tensor, Tensor, float] | None = None, window: int | None = None,
    tiles: Tiling | None = None, firsts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Write the new k and v (N, kv_heads, D) into the cache and attend with q (N, heads, D) -> (N, heads x D).

    Request i is in slots[i] (-1: padding; -2 - s: slot s, k and v are written and nothing is read) and has positions[i]
    tokens in the cache already. `angles` (tokens, D) in float32 holds cosines and sines (D / 2 each) that rotate q and
    k; None if they are rotated already. `norms`: weights of q's and k's RMSNorm before that, and its eps. `window`: a
    token sees itself and window - 1 before it. `firsts` (N,): the first position among the rows of the same request, if
    several rows may be of one request; no slot is below -1 then.
    """
    rows, heads, width = q.shape
    _, kv_heads, tokens, _ = keys.shape
    t = tiles or tiling(rows, heads, kv_heads, width, tokens, cores(q.device), q.element_size())
    if firsts is not None and t.splits == 1:
        write(k, v, keys, values, slots, positions, angles, None if norms is None else norms[1:])
        firsts = None
    out = torch.empty((rows, heads * width), dtype=q.dtype, device=q.device)
    part, sums, strides = out, out, (keys.stride(0), keys.stride(1))
    if t.splits > 1:
        part = torch.empty((rows * heads, t.splits, width), dtype=torch.float32, device=q.device)
        sums = torch.empty((rows * heads, t.splits, 2), dtype=torch.float32, device=q.device)
    q_norm, k_norm, eps = norms or (q, q, 0.0)
    padded = power_of_two(width)
    launch(
        decode_split, (rows, kv_heads, t.splits), q, k, v, q_norm, k_norm, out if angles is None else angles, slots,
        positions, positions if firsts is None else firsts, keys, values, part, sums, out, scale, eps, window or 0,
        q.stride(0), k.stride(0), v.stride(0), *strides, HEADS=heads, KV=kv_heads, D=width, DP=padded, GROUP=t.group,
        BLOCK=t.block, DIRECT=t.splits == 1, ROPE=angles is not None, NORM=norms is not None, WINDOW=window is not None,
        LATER=firsts is not None, num_warps=t.warps,
        **({"maxnreg": MOST_REGISTERS} if t.warps > 4 and q.element_size() == 4 else {}),
    )  # fmt: skip
    if firsts is not None:
        launch(
            merge_later, (rows, heads), part, sums, slots, positions, firsts, keys, values, out, scale, window or 0,
            *strides, HEADS=heads, KV=kv_heads, D=width, DP=padded, SPLITS=t.splits, BLOCK=LATER,
            WINDOW=window is not None, maxnreg=MOST_REGISTERS,
        )  # fmt: skip
    elif t.splits > 1:
        launch(decode_merge, (rows * heads,), part, sums, out, D=width, DP=padded, SPLITS=t.splits)
    return out
