"""All weights of a model in host memory, ready to be copied to the device. Knows parts and bytes, no placement."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from helios_sim.live.architecture import Shape, values
from helios_sim.live.device import Device
from helios_sim.live.room import check_fits
from helios_sim.live.weights import LayerWeights, OuterWeights, TensorSource, block_bytes, fill, parts_in

OUTER = -1  # beside the layers' numbers: embedding, final norm, head


_made: WeakKeyDictionary[TensorSource, dict[tuple[torch.dtype, bool], HostStore]] = WeakKeyDictionary()


def host_store(name: str, source: TensorSource, dtype: torch.dtype, device: Device) -> HostStore:
    """The store of a checkpoint, kept as long as the checkpoint object: nobody writes into it, and reading takes long.

    Raises as `HostStore` does.
    """
    stores = _made.setdefault(source, {})
    key = (dtype, device.captures)
    if key not in stores:
        stores[key] = HostStore(name, source, dtype, device)
    return stores[key]


class HostStore:
    """Block after block: one of the parts outside the layers, and one of each layer. All read when it is made.

    Raises UserError where host memory is too small.
    """

    def __init__(self, name: str, source: TensorSource, dtype: torch.dtype, device: Device) -> None:
        self.architecture = a = source.architecture
        self._dtype = dtype
        self._shapes: dict[int, Mapping[str, Shape]] = {OUTER: a.outer_shapes()}
        self._shapes |= dict.fromkeys(range(a.n_layers), a.layer_shapes())
        check_fits(f"{name} in host memory", values(a.outer_shapes()) * dtype.itemsize, torch.device("cpu"))
        self._blocks: dict[int, Tensor] = {}
        for block in self._shapes:
            self._blocks[block] = device.host_empty(self.n_bytes(block))
            fill(source, None if block == OUTER else block, self._parts(block, self._blocks[block]))

    def n_bytes(self, block: int) -> int:
        """Of one block, each part at an aligned place."""
        return block_bytes(self._shapes[block], self._dtype)

    def pairs(self, block: int, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What to copy, and where to, so that the block lies in device memory (n_bytes,)."""
        return [(self._blocks[block], memory[: len(self._blocks[block])])]

    def layer(self, layer: int, memory: Tensor) -> LayerWeights:
        """The layer's weights as views of device memory that holds its block."""
        return LayerWeights(**self._parts(layer, memory))

    def outer(self, memory: Tensor) -> OuterWeights:
        parts = self._parts(OUTER, memory)
        return OuterWeights(**{"head": parts["embedding"]} | parts)

    def _parts(self, block: int, memory: Tensor) -> dict[str, Tensor]:
        return parts_in(memory, self._shapes[block], self._dtype)
