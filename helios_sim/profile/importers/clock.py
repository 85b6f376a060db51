"""The slowdown of matrix products by a card's power limit, which lowers its clock.

Kernel tables are timed with uninitialized weights: vLLM's layers are made but never filled (collector/vllm/
collect_gemm.py of github ai-dynamo/aiconfigurator: "TODO, to evaluate random weights impact"). Zeros switch few
transistors, so the card keeps its full clock, while a real model's numbers would draw more power than the limit. The
product of two matrices of 8,192 x 8,192 on an A100 with 400 W does 294 TFLOPS in the tables, 295 with zeros and 257
with random numbers (thonking.ai, "Strangely, Matrix Multiplications on GPUs Run Faster When Given Predictable Data");
264.5 with random numbers where others measured it (database.md of github zzc0721/torch-performance-test-data), and
213.5 on one with 250 W (issue 108 there).

Power is taken to be a part that stays, and one that rises with the share of the peak that a product would reach and
with the cube of the clock, since voltage follows the clock. The rates at 400 and 250 W determine the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from helios_sim.profile.spec import HardwareSpec
from helios_sim.profile.tables import FloatArray


@dataclass(frozen=True, slots=True)
class Power:
    """A chip's power: `still_w + busy_w * share * clock**3`, with the shares of peak rate and of full clock."""

    still_w: float
    busy_w: float  # at the full clock, if all units multiplied all the time
    measured_w: float  # the power limit of the card in the tables

    def slowed(self, card: HardwareSpec, time_s: FloatArray, operations: FloatArray) -> FloatArray:
        """Seconds of products on this card with a real model's numbers, if they take `time_s` at the full clock."""
        share = operations / (time_s * card.flops_per_s)
        found: Any = time_s * np.maximum(1.0, np.cbrt(self.busy_w * share / (self._limit_w(card) - self.still_w)))
        return np.asarray(found)

    def slower_than_measured(self, card: HardwareSpec) -> float:
        """The slowdown against the tables of a kernel timed with real numbers, if power binds on both cards."""
        ratio = (self.measured_w - self.still_w) / (self._limit_w(card) - self.still_w)
        return float(max(1.0, np.cbrt(ratio)))

    def _limit_w(self, card: HardwareSpec) -> float:
        return self.measured_w if card.tdp_w is None else card.tdp_w


def _power(peak: float, full: float, limits: tuple[tuple[float, float], tuple[float, float]]) -> Power:
    """The power of a card from the TFLOPS of one product: peak, full clock, and random numbers at two limits."""
    (high_w, high), (low_w, low) = limits
    busy_w = (high_w - low_w) / ((high / full) ** 3 - (low / full) ** 3) * peak / full
    return Power(high_w - busy_w * full / peak * (high / full) ** 3, busy_w, high_w)


OF_A100 = _power(peak=312.0, full=294.0, limits=((400.0, 264.5), (250.0, 213.5)))
