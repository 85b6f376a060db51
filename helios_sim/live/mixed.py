"""Several attention steps in one run of the layers: decodes and pieces of prompts. Knows rows, no request."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from helios_sim.live.layers import Attend
from helios_sim.live.rope import Rotation


class Together:
    """The first `rows[0]` rows belong to the first step, and so on."""

    def __init__(self, steps: Sequence[Attend], rows: Sequence[int]) -> None:
        self._steps, self._rows = list(steps), list(rows)
        self.rotations: list[Rotation | None] = []
        known: dict[tuple[int, ...], Rotation | None] = {}  # layers of a kind share one
        for of_layer in zip(*(step.rotations for step in steps), strict=True):
            key = tuple(map(id, of_layer))
            if key not in known:
                known[key] = _joined(of_layer)
            self.rotations.append(known[key])

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(self._steps, q.split(self._rows), k.split(self._rows), v.split(self._rows), strict=True)
        return torch.cat([step(layer, *qkv) for step, *qkv in parts])

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        for step, part_k, part_v in zip(self._steps, k.split(self._rows), v.split(self._rows), strict=True):
            step.write(layer, part_k, part_v)


def _joined(rotations: Sequence[Rotation | None]) -> Rotation | None:
    known = [rotation for rotation in rotations if rotation is not None]
    return (torch.cat([cos for cos, _ in known]), torch.cat([sin for _, sin in known])) if known else None
