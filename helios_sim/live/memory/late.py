"""Layers that lie in host memory and come to the device when they run, one after the other through a few places there.

Layer n always comes to the same place, so that nothing about it changes but what lies there. A copy starts when what
was issued before is done, which includes the layer that lay there; what is issued once a layer has been asked for waits
for its copy. The host waits for neither, and while one layer runs the next ones come.
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
    """The first `end` layers of a model, as `SegmentedModel.layers`: `there`, and above them those that come.

    Only ranges can be asked for, and are read forwards: `layers[start:end]` says which layers are about to run, so that
    none is copied that does not run.
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
        """`places`: device memory of a layer each. `filled`: the first layers that come lie in them already, and are
        there again between iterations.
        """
        self.stay, self._there, self._end = len(there), list(there), end
        self._store, self._places, self._device, self._filled = store, places, device, filled
        # By place, the layer that lies there, or comes there.
        self._lie: list[int | None] = [self.stay + n if filled else None for n in range(len(places))]
        self._coming: dict[int, Callable[[], None]] = {}  # by place, how work waits for it
        self._views: dict[int, LayerWeights] = {}
        self.came = 0  # layers that were copied

    def __len__(self) -> int:
        return self._end

    def __getitem__(self, layers: slice) -> Sequence[LayerWeights] | Iterator[LayerWeights]:
        start, end, _ = layers.indices(self._end)
        return self._there[start:end] if end <= self.stay else self._through(start, end)

    def return_first(self) -> None:
        """An iteration is over: where they lay before, the first layers that come lie again, or are on their way."""
        if self._filled:
            for n in range(len(self._places)):
                self._fetch(self.stay + n)

    def settle(self) -> None:
        """The same, and what is issued from now on finds in the places what is to lie there."""
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
        self._lie[place] = None  # unless the copy starts
        self._coming[place] = self._device.prefetch(pairs, self._device.mark())
        self._lie[place] = layer
        self.came += 1

    def _view(self, layer: int) -> LayerWeights:
        if layer not in self._views:
            self._views[layer] = self._store.layer(layer, self._places[self._place_of(layer)])
        w = self._views[layer]
        if w.mlp_post_norm is None:
            return w
        # The next layer begins with this norm (`run_layer`), when this one's place may be written again.
        return replace(w, mlp_post_norm=w.mlp_post_norm.clone())
