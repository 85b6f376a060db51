"""Two optional terms of a layer's attention: decodes beside a prompt chunk, and unequal KV lengths. Plain tables.

A kernel that serves prompts and decodes at once runs the decodes in another way than one for decodes alone (its grid
follows the longest chunk, and no sequence is split), so its time is not the sum of the two. And a batch of unequal
lengths takes longer than one of equal lengths with the same sum: what is left at the end does not fill the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from helios_sim.errors import UserError
from helios_sim.profile.composition import IntArray
from helios_sim.profile.tables import FloatArray, check_axis, check_times


@dataclass(frozen=True, slots=True, eq=False)
class MixedTable:
    """Seconds that B decodes add to one layer's attention beside a prompt chunk, over the chunk alone."""

    chunk: IntArray  # (C,) ascending, C >= 2: new tokens of the chunk
    context: IntArray  # (X,) ascending, X >= 2: tokens before the chunk
    batch: IntArray  # (B,) ascending, B >= 2: decodes
    kv: IntArray  # (V,) ascending, V >= 2: their mean KV tokens, the new token included
    time_s: FloatArray  # (C, X, B, V)

    def check(self, name: str) -> None:
        """Raises UserError unless all axes ascend and every time is finite and not negative."""
        axes = (("chunk", self.chunk, 1), ("context", self.context, 0), ("batch", self.batch, 1), ("kv", self.kv, 1))
        for axis, values, start in axes:
            check_axis(f"{name}.{axis}", values, start)
        check_times(f"{name}.time_s", self.time_s, tuple(len(values) for _, values, _ in axes))


@dataclass(frozen=True, slots=True, eq=False)
class UnequalTable:
    """By what share decode attention takes longer than that of a batch with equal lengths and the same mean.

    A batch of least, mean and greatest length L, M and G is looked up as the measured one of two lengths with the
    same three: `longest` is G, and the share of the long ones is (M - L) / (G - L).
    """

    chunk: IntArray  # (C,) ascending from 0, which stands for decodes alone: tokens of the longest chunk beside them
    batch: IntArray  # (B,) ascending, B >= 2
    longest: IntArray  # (G,) ascending, G >= 2: KV tokens
    share: FloatArray  # (P,) ascending from 0 to 1
    excess: FloatArray  # (C, B, G, P), may be negative where measurements scatter, above -1

    def check(self, name: str) -> None:
        """Raises UserError unless all axes ascend and every excess is finite and above -1."""
        for axis, values, start in (("batch", self.batch, 1), ("longest", self.longest, 1)):
            check_axis(f"{name}.{axis}", values, start)
        if self.chunk.ndim != 1 or not len(self.chunk) or self.chunk[0] != 0 or np.any(np.diff(self.chunk) <= 0):
            raise UserError(f"{name}.chunk", self.chunk.tolist(), "ascends from 0", "rebuild the profile")
        if self.share[0] != 0.0 or self.share[-1] != 1.0 or np.any(np.diff(self.share) <= 0):
            raise UserError(f"{name}.share", self.share.tolist(), "ascends from 0 to 1", "rebuild the profile")
        shape = (len(self.chunk), len(self.batch), len(self.longest), len(self.share))
        check_times(f"{name}.excess", self.excess + 1.0, shape)

    def part(self, fraction: float) -> UnequalTable:
        """The same with `fraction` of the excess (0: none of it)."""
        return replace(self, excess=self.excess * fraction)
