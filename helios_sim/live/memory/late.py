"""Late layers, which lie in host memory and are copied to a few places on the device, one after the other, to run.

Layer n always comes to the same place, so the addresses of its weights never change. A copy starts when all work issued
before it is done, including the layer that was in its place. Work that is issued after a layer was requested waits for
the layer's copy. The host waits for neither, and while one layer runs the next ones are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from helios_sim.live.device import Device, Pairs
from helios_sim.live.model.weights import LayerWeights


class Store(Protocol):
    """Weights in host memory, by layer."""

    def pairs(self, block: int, memory: Tensor) -> Pairs: ...
    def layer(self, layer: int, memory: Tensor) -> LayerWeights: ...


class LateLayers:
    """The first `end` layers of a model, as `SegmentedModel.layers`: the resident ones (`there`), then late layers.

    Only ranges can be requested, and they are read forwards. `layers[start:end]` says which layers are about to run, so
    that no other layer is copied.
    """

    def __init__(
        self,
        there: Sequence[LayerWeights],
        end: int,
        store: Store,
        places: Sequence[Tensor],
        device: Device,
        filled: bool,
    ) -> None:
        """`places`: device memory for one layer each. `filled`: the first late layers are in these places already, and
        return to them between iterations.
        """
        self.stay, self._there, self._end = len(there), list(there), end
        self._store, self._places, self._device, self._filled = store, places, device, filled
        # The layer that is in each place, or on its way there.
        self._lie: list[int | None] = [self.stay + n if filled else None for n in range(len(places))]
        self._coming: dict[int, Callable[[], None]] = {}  # by place, what makes work wait for its copy
        self._views: dict[int, LayerWeights] = {}
        self.came = 0  # layers that were copied

    def __len__(self) -> int:
        return self._end

    def __getitem__(self, layers: slice) -> Sequence[LayerWeights] | Iterator[LayerWeights]:
        start, end, _ = layers.indices(self._end)
        return self._there[start:end] if end <= self.stay else self._through(start, end)

    def return_first(self) -> None:
        """End an iteration: if `filled`, start copying the first late layers back into their places."""
        if self._filled:
            for n in range(len(self._places)):
                self._fetch(self.stay + n)

    def settle(self) -> None:
        """Call `return_first`, and make all work that is issued from now on wait for the copies."""
        self.return_first()
        for wait in self._coming.values():
            wait()
        self._coming.clear()

    def _through(self, start: int, end: int) -> Iterator[LayerWeights]:
        first = max(start, self.stay)
        for layer in range(first, min(first + len(self._places), end)):
            self._fetch(layer)
        yield from self._there[start : self.stay]
        for layer in range(first, end):
            wait = self._coming.pop(self._place_of(layer), None)
            if wait is not None:
                wait()
            yield self._view(layer)
            after = layer + len(self._places)
            if after < end:
                self._fetch(after)
            elif end == self._end and self._filled:  # nothing runs above: the place is free for the next iteration
                self._fetch(self.stay + self._place_of(layer))

    def _place_of(self, layer: int) -> int:
        return (layer - self.stay) % len(self._places)

    def _fetch(self, layer: int) -> None:
        place = self._place_of(layer)
        if self._lie[place] == layer:
            return
        pairs = self._store.pairs(layer, self._places[place])
        self._lie[place] = None  # in case the copy cannot start
        self._coming[place] = self._device.prefetch(pairs, self._device.mark())
        self._lie[place] = layer
        self.came += 1

    def _view(self, layer: int) -> LayerWeights:
        if layer not in self._views:
            self._views[layer] = self._store.layer(layer, self._places[self._place_of(layer)])
        w = self._views[layer]
        if w.mlp_post_norm is None:
            return w
        # The next layer begins with this norm (`run_layer`). By then this layer's place may be overwritten.
        return replace(w, mlp_post_norm=w.mlp_post_norm.clone())
