"""Rotary positions: what each layer turns its queries and keys by. Knows frequencies and positions, no weights."""

from __future__ import annotations

import torch
from torch import Tensor

from helios_sim.live.architecture import Architecture, Rope

Rotation = tuple[Tensor, Tensor]  # cosine and signed sine, each (N, 1, head_dim)


class Rotary:
    """The model's frequencies on a device; `at` gives every layer its rotation at some positions."""

    def __init__(self, architecture: Architecture, dtype: torch.dtype, device: torch.device | str) -> None:
        self._dtype = dtype
        ropes = [
            architecture.sliding_rope if architecture.slides(layer) else architecture.rope
            for layer in range(architecture.n_layers)
        ]
        self._kinds = list(dict.fromkeys(ropes))
        self._kind_of_layer = [self._kinds.index(rope) for rope in ropes]
        self._frequencies = [_frequencies(rope, architecture.head_dim, device) for rope in self._kinds]

    def at(self, positions: Tensor) -> list[Rotation | None]:
        """For each layer the rotation at `positions` (N,); None with learned positions. Layers of a kind share one."""
        kinds = [None if f is None else self._rotation(positions, f) for f in self._frequencies]
        return [kinds[kind] for kind in self._kind_of_layer]

    def _rotation(self, positions: Tensor, frequencies: Tensor) -> Rotation:
        angles = positions.float()[:, None, None] * frequencies  # (N, 1, head_dim / 2)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1).to(self._dtype), torch.cat((-sin, sin), -1).to(self._dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x (N, heads, head_dim) turned: pair i is (x[i], x[i + head_dim / 2])."""
    cos, signed_sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


def _frequencies(rope: Rope | None, head_dim: int, device: torch.device | str) -> Tensor | None:
    if rope is None:
        return None
    inverse = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.divisors is not None:
        inverse = inverse / torch.tensor(rope.divisors)
    return inverse.to(device)
