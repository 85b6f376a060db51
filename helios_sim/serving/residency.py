"""Which layers of which models lie in the card's memory, and how many KV blocks that leaves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from helios_sim.policy.deployment import Deployment, Placement
from helios_sim.profile.profile import MemoryBudget, Profile


class Residency:
    """Layers loaded by model. A model is resident once, up to the deepest layer that a placement asks for."""

    def __init__(self, profiles: Mapping[str, Profile], memory: MemoryBudget) -> None:
        self._profiles = profiles
        self._memory = memory
        self.layers: dict[str, int] = {}

    @staticmethod
    def wanted(deployment: Deployment) -> dict[str, int]:
        wanted: dict[str, int] = {}
        for placement in (deployment.active, *deployment.standby):
            wanted[placement.model] = max(placement.layers, wanted.get(placement.model, 0))
        return wanted

    def missing(self, deployment: Deployment) -> list[Placement]:
        """Placements that are not loaded deep enough, the active model's first."""
        return [
            Placement(model, layers)
            for model, layers in self.wanted(deployment).items()
            if self.layers.get(model, 0) < layers
        ]

    def with_placement(self, placement: Placement) -> dict[str, int]:
        return {**self.layers, placement.model: max(placement.layers, self.layers.get(placement.model, 0))}

    def missing_bytes(self, placement: Placement) -> int:
        profile = self._profiles[placement.model]
        loaded = self.layers.get(placement.model)
        return profile.weight_bytes(placement.layers) - (profile.weight_bytes(loaded) if loaded else 0)

    def weight_bytes(self, layers: Mapping[str, int]) -> int:
        return sum(self._profiles[model].weight_bytes(n) for model, n in layers.items())

    def pool_bytes(self, layers: Mapping[str, int]) -> int:
        return self._memory.pool_bytes(self._residents(layers))

    def pool_blocks(self, layers: Mapping[str, int], active: Placement) -> int:
        active_profile = self._profiles[active.model]
        return self._memory.pool_blocks(self._residents(layers), (active_profile, active.layers))

    def block_bytes(self, active: Placement) -> int:
        return self._memory.block_tokens * self._profiles[active.model].kv_bytes_per_token(active.layers)

    def _residents(self, layers: Mapping[str, int]) -> Iterable[tuple[Profile, int]]:
        return [(self._profiles[model], n) for model, n in layers.items()]
