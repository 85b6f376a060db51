"""Which layers of which models are in the device's memory, and how they get there. Knows no request and no time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch

from helios_sim.live.look import Exits
from helios_sim.live.model import SegmentedModel
from helios_sim.live.served import LiveModel

DTYPES = {4: torch.float32, 2: torch.bfloat16}
Done = Callable[[Exception | None], None]


class Residents:
    def __init__(self, models: Mapping[str, LiveModel], device: str) -> None:
        self._models, self._device = models, torch.device(device)
        self._held: dict[str, int] | None = None
        self._there: dict[str, SegmentedModel] = {}
        self._exits = {n: Exits(m.heads, m.checkpoint.architecture.n_layers) for n, m in models.items()}

    def exits(self, name: str) -> Exits:
        return self._exits[name]

    def hold(self, layers: Mapping[str, int]) -> None:
        """The first call loads, at no charge; later ones drop what is not held any more."""
        first = self._held is None
        self._held = dict(layers)
        for name in list(self._there):
            if name not in layers:
                del self._there[name]
            else:
                self._there[name].drop_layers(layers[name])
        if first:
            for name in layers:
                self._load(name, layers[name])

    def running(self, name: str, layers: int) -> SegmentedModel:
        model = self._there[name]
        assert model.n_loaded >= layers
        return model

    def load(self, name: str, done: Done) -> None:
        assert self._held is not None
        end = self._held.get(name, 0)
        end = end if name not in self._there or self._there[name].n_loaded < end else self._n_layers(name)

        def run() -> None:
            try:
                self._load(name, end or self._n_layers(name))
            except Exception as error:
                done(error)
            else:
                done(None)

        threading.Thread(target=run, daemon=True).start()

    def visiting(self, name: str) -> SegmentedModel:
        return self._there[name]

    def dismiss(self, name: str) -> None:
        assert self._held is not None
        if name not in self._held:
            del self._there[name]
        else:
            self._there[name].drop_layers(self._held[name])

    def _n_layers(self, name: str) -> int:
        return self._models[name].checkpoint.architecture.n_layers

    def _load(self, name: str, end: int) -> None:
        if name in self._there:
            self._there[name].load_layers(end)
            return
        live = self._models[name]
        dtype = DTYPES[live.profile.model.weight_bytes_per_value]
        self._there[name] = SegmentedModel.load(live.checkpoint, end, dtype, self._device)
