"""Attention steps for measuring: none at all, or only in some layers. Knows no time and no device.

They stand where a real step stands (`helios_sim.live.model.decoder.Attend`), so that the model runs the same code.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from helios_sim.live.model.decoder import Attend, Rotation


class NoAttention:
    """Everything of a layer but attention and the writing of K and V: queries come back as they are."""

    def __init__(self, rotations: Sequence[Rotation | None]) -> None:
        self.rotations = rotations

    def __call__(self, layer: int, q: Any, k: Any, v: Any) -> Any:
        return q.reshape(len(q), -1)

    def write(self, layer: int, k: Any, v: Any) -> None:
        return None


class OnlyLayers:
    """A real step in some layers and none in the others: what attention costs in one class of layers."""

    def __init__(self, step: Attend, layers: Collection[int]) -> None:
        self._step, self._layers = step, frozenset(layers)
        self.rotations = step.rotations
        self._none = NoAttention(step.rotations)

    def __call__(self, layer: int, q: Any, k: Any, v: Any) -> Any:
        return (self._step if layer in self._layers else self._none)(layer, q, k, v)

    def write(self, layer: int, k: Any, v: Any) -> None:
        self._step.write(layer, k, v)
