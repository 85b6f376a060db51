"""Memory of a card: what is left for KV when placements are resident."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class Weighs(Protocol):
    """The part of a profile that memory depends on."""

    @property
    def activation_reserve_bytes(self) -> int: ...

    def weight_bytes(self, layers: int) -> int: ...
    def kv_bytes_per_token(self, layers: int) -> int: ...


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """capacity x utilisation - weights of every resident placement - activation reserve = KV pool."""

    capacity_bytes: int
    utilisation: float  # share of the card given to the engine, as vLLM's gpu_memory_utilization
    block_tokens: int = 16

    @property
    def usable_bytes(self) -> int:
        return int(self.capacity_bytes * self.utilisation)

    def pool_bytes(self, resident: Iterable[tuple[Weighs, int]]) -> int:
        """Bytes left for KV with these (profile, layers) resident; negative when they do not fit.

        The activation reserve is the largest of the residents', since one model runs at a time.
        """
        resident = tuple(resident)
        weights = sum(profile.weight_bytes(layers) for profile, layers in resident)
        reserve = max((profile.activation_reserve_bytes for profile, _ in resident), default=0)
        return self.usable_bytes - weights - reserve

    def pool_blocks(self, resident: Iterable[tuple[Weighs, int]], active: tuple[Weighs, int]) -> int:
        """KV blocks of the active placement that fit beside all residents (at least 0)."""
        profile, layers = active
        block_bytes = self.block_tokens * profile.kv_bytes_per_token(layers)
        return max(0, self.pool_bytes(resident) // block_bytes)
