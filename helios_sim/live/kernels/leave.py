"""Decision about which rows of a captured pass leave at an exit, on the card and in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from helios_sim.live.kernels.interface import UNKNOWN, Inside
from helios_sim.live.kernels.launch import launch, power_of_two


@triton.jit
def leave_rows(
    sure, tokens, best, threshold, recorded, now, was_sure, said, depth, rows,
    HEAD: tl.constexpr, ASKS: tl.constexpr, LAZY: tl.constexpr, LAST: tl.constexpr, NONE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for all rows, equal to `TorchKernels.leave`. said (4, rows): token, largest logit, depth, breach."""
    i = tl.arange(0, BLOCK)
    there = i < rows
    slot = tl.load(now + i, mask=there, other=-1)
    inside = slot >= 0
    leaving = inside
    if ASKS:
        known = tl.load(recorded + i, mask=there, other=NONE)
        by_card = tl.load(sure + i, mask=there, other=0.0).to(tl.float64)
        by_card = by_card >= tl.load(threshold + i, mask=there, other=0.0)
        was = (tl.load(was_sure + i, mask=there, other=0) > 0) | tl.where(known == NONE, by_card, known > 0.0)
        tl.store(was_sure + i, was.to(tl.int64), mask=there)
        if LAST:
            tl.store(said + 3 * rows + i, tl.where(inside & (was == 0), 1.0, 0.0).to(tl.float64), mask=there)
        elif LAZY:
            leaving = inside & (tl.sum(tl.where(inside & (was == 0), 1, 0), 0) == 0)
        else:
            leaving = inside & was
    if HEAD:
        tl.store(said + i, tl.load(tokens + i, mask=there, other=0).to(tl.float64), mask=leaving)
        tl.store(said + rows + i, tl.load(best + i, mask=there, other=0.0).to(tl.float64), mask=leaving)
    tl.store(said + 2 * rows + i, (i * 0 + depth).to(tl.float64), mask=leaving)
    tl.store(now + i, -2 - slot, mask=leaving)


def leave(
    rows: Inside, depth: int, sure: Tensor | None, look: tuple[Tensor, Tensor] | None, threshold: Tensor,
    recorded: Tensor, lazy: bool, last: bool,
) -> None:  # fmt: skip
    """Implement `interface.Kernels.leave`."""
    tokens, best = (rows.now, threshold) if look is None else look
    launch(
        leave_rows, (1,), threshold if sure is None else sure.contiguous(), tokens, best, threshold, recorded, rows.now,
        rows.was_sure, rows.said, depth, len(rows.now), HEAD=look is not None, ASKS=sure is not None, LAZY=lazy,
        LAST=last, NONE=UNKNOWN, BLOCK=power_of_two(len(rows.now)),
    )  # fmt: skip
