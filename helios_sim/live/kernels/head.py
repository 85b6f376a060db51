"""The likeliest token and the model's confidence in it, from logits that never leave the card.

The vocabulary is divided into parts. `join_parts` joins their largest logits and sums of exponentials.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from helios_sim.live.kernels.launch import launch, power_of_two

BLOCK = 4096
MEASURES = {"max_probability": 0, "margin": 1, "entropy": 2}  # number of each confidence in `join_parts`
FIGURES = 5  # of a part: largest, second largest, place of the largest, sum of exponentials, their sum times logits


@triton.jit
def look_at_part(logits, parts, words, inverse, FIGURES: tl.constexpr, BLOCK: tl.constexpr):
    """One program for a part of a row: logits (N, words) divided by a temperature -> parts (N, parts, FIGURES)."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = part * BLOCK + tl.arange(0, BLOCK)
    inside = c < words
    x = tl.load(logits + row * words + c, mask=inside, other=-float("inf")).to(tl.float32) * inverse
    largest = tl.max(x, 0)
    place = tl.min(tl.where(x == largest, c, 2147483647), 0)
    second = tl.max(tl.where(c == place, -float("inf"), x), 0)
    above = tl.where(largest == -float("inf"), 0.0, largest)
    e = tl.exp(x - above)  # NaN for NaN and for infinity
    to = parts + (row * tl.num_programs(1) + part) * FIGURES
    tl.store(to, largest)
    tl.store(to + 1, second)
    tl.store(to + 2, place.to(tl.int32).to(tl.float32, bitcast=True))
    tl.store(to + 3, tl.sum(e, 0))
    tl.store(to + 4, tl.sum(tl.where(e > 0.0, e * (x - above), 0.0), 0))


@triton.jit
def join_parts(
    parts, tokens, best, sure, count, log_words, MEASURE: tl.constexpr, FIGURES: tl.constexpr, PARTS: tl.constexpr
):
    """One program for a row: parts (N, count, FIGURES) -> tokens, the largest logit and the confidence, each (N,).

    The largest logit is NaN if any logit is NaN or plus infinity. MEASURE: 0 for the largest probability, 1 for the
    largest minus the second largest, 2 for one minus the entropy over the largest possible entropy.
    """
    row = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, PARTS)
    inside = p < count
    of = parts + (row * count + p) * FIGURES
    low = -float("inf")
    largest = tl.load(of, mask=inside, other=low)
    second = tl.load(of + 1, mask=inside, other=low)
    place = tl.load(of + 2, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    sums, times = tl.load(of + 3, mask=inside, other=0.0), tl.load(of + 4, mask=inside, other=0.0)
    top = tl.max(largest, 0)
    winner = tl.min(tl.where(inside & (largest == top), p, PARTS), 0)
    runner_up = tl.max(tl.where(p == winner, second, largest), 0)
    above = tl.where(top == low, 0.0, top)
    shrink = tl.where(largest == low, 0.0, tl.exp(largest - above))
    total = tl.sum(sums * shrink, 0)
    log_total = tl.log(total)
    confidence = 1.0 / total
    if MEASURE == 1:
        confidence = (1.0 - tl.exp(runner_up - above)) / total
    if MEASURE == 2:
        beside = tl.where(largest == low, 0.0, times + sums * (largest - above))
        entropy = log_total - tl.sum(beside * shrink, 0) / total
        confidence = tl.minimum(tl.maximum(1.0 - entropy / log_words, 0.0), 1.0)
    tl.store(tokens + row, tl.sum(tl.where(p == winner, place, 0), 0).to(tl.int64))
    tl.store(best + row, top + (total - total))  # NaN passes on
    tl.store(sure + row, confidence)


def look_at(logits: Tensor, measure: int, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (N,) int64, the largest logit (N,) and the confidence (N,), float32, of logits (N, words)."""
    rows, words = logits.shape
    count, on = -(-words // BLOCK), logits.device
    parts = torch.empty((rows, count, FIGURES), dtype=torch.float32, device=on)
    tokens = torch.empty(rows, dtype=torch.int64, device=on)
    best, sure = (torch.empty(rows, dtype=torch.float32, device=on) for _ in range(2))
    launch(look_at_part, (rows, count), logits, parts, words, 1.0 / temperature, FIGURES=FIGURES, BLOCK=BLOCK)
    constants: dict[str, Any] = {"MEASURE": measure, "FIGURES": FIGURES, "PARTS": power_of_two(count)}
    launch(join_parts, (rows,), parts, tokens, best, sure, count, math.log(words), **constants)
    return tokens, best, sure
