"""How much memory a model's KV cache takes, and how many slots so much memory holds. Knows shapes, no request."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from helios_sim.live.architecture import Architecture
from helios_sim.live.pages import ALIGNMENT, aligned


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Of one model, whole."""

    architecture: Architecture
    layers: int
    slot_tokens: int
    dtype: torch.dtype

    @property
    def slot_bytes(self) -> int:
        """Of K, or of V, in one layer."""
        a = self.architecture
        return a.n_kv_heads * self.slot_tokens * a.head_dim * self.dtype.itemsize

    def n_bytes(self, slots: int) -> int:
        """Of all layers, K and V each at an aligned place."""
        return 2 * self.layers * aligned(slots * self.slot_bytes)

    def slots_in(self, n_bytes: int) -> int:
        of_a_tensor = n_bytes // (2 * self.layers)
        return max(0, of_a_tensor // ALIGNMENT * ALIGNMENT // self.slot_bytes)
