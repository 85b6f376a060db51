"""Weights in memory: which layers of which models are resident on the device, and how they get there.

All weights of every model lie in host memory (`HostStore`) from the beginning. A load copies them layer by layer into
the device's `Slab`, in a thread of its own, while iterations run. The layers become visible all at once when the last
one has arrived. A load that fails leaves everything as it was. Late layers (`late.py`) pass through the memory of the
last resident layers, which return there between iterations.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from helios_sim.live.device import Device, Mark, aligned, check_fits, written_block
from helios_sim.live.exits import ExitReader
from helios_sim.live.memory.late import LateLayers
from helios_sim.live.model.architecture import Shape
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.model.weights import LayerWeights, OuterWeights, TensorSource, block_bytes, fill, parts_in
from helios_sim.live.served import LiveModel
from helios_sim.policy.deployment import LATE_ROOM

OUTER = -1  # number of the block of embedding, final norm and head; layers count from 0
Done = Callable[[Exception | None], None]


@dataclass(frozen=True, slots=True)
class SlabPiece:
    start: int
    n_bytes: int  # a multiple of the alignment


class Slab:
    """Device memory for weights, allocated once and handed out in pieces (first fit).

    Pieces are given back in any order, and neighbouring free ones are merged. Thread-safe: the loading thread takes
    pieces and the serving thread gives them back.
    """

    def __init__(self, n_bytes: int, device: torch.device) -> None:
        self._lock = threading.Lock()
        self._memory = written_block(aligned(n_bytes), device)
        self._free = [SlabPiece(0, len(self._memory))]

    @property
    def free_bytes(self) -> int:
        return sum(piece.n_bytes for piece in self._free)

    @property
    def total_bytes(self) -> int:
        return len(self._memory)

    def take(self, n_bytes: int, at: int | None = None) -> SlabPiece:
        """Take a piece of at least `n_bytes`: the one that starts `at` this byte if it is free, else the first that
        is large enough. Raises MemoryError if there is none.
        """
        wanted = aligned(n_bytes)
        with self._lock:
            if at is not None and (found := self._taken(wanted, at)):
                return found
            for piece in self._free:
                if found := self._taken(wanted, piece.start):
                    return found
        raise MemoryError(f"{wanted} bytes of weights wanted, {self.free_bytes} of {self.total_bytes} free")

    def _taken(self, n_bytes: int, start: int) -> SlabPiece | None:
        for i, free in enumerate(self._free):
            end = free.start + free.n_bytes
            if free.start <= start and start + n_bytes <= end:
                around = SlabPiece(free.start, start - free.start), SlabPiece(start + n_bytes, end - start - n_bytes)
                self._free[i : i + 1] = [piece for piece in around if piece.n_bytes]
                return SlabPiece(start, n_bytes)
        return None

    def give(self, piece: SlabPiece) -> None:
        with self._lock:
            joined: list[SlabPiece] = []
            for free in sorted([*self._free, piece], key=lambda p: p.start):
                if joined and joined[-1].start + joined[-1].n_bytes == free.start:
                    joined[-1] = SlabPiece(joined[-1].start, joined[-1].n_bytes + free.n_bytes)
                else:
                    joined.append(free)
            self._free = joined

    def bytes_of(self, piece: SlabPiece) -> Tensor:
        """The piece's memory as a uint8 view (n_bytes,)."""
        return self._memory[piece.start : piece.start + piece.n_bytes]


_made: WeakKeyDictionary[TensorSource, dict[tuple[torch.dtype, bool], HostStore]] = WeakKeyDictionary()


def host_store(name: str, source: TensorSource, dtype: torch.dtype, device: Device) -> HostStore:
    """The store of a checkpoint, cached for as long as the checkpoint object lives, since reading it takes long.

    It is read-only. Raises as `HostStore` does.
    """
    stores = _made.setdefault(source, {})
    key = (dtype, device.captures)
    if key not in stores:
        stores[key] = HostStore(name, source, dtype, device)
    return stores[key]


class HostStore:
    """All weights of a model in host memory, ready to be copied to the device.

    There is one block per layer and one for the parts outside the layers, one after the other in one piece of memory.
    All are read in the constructor, which raises UserError if host memory is too small.
    """

    def __init__(self, name: str, source: TensorSource, dtype: torch.dtype, device: Device) -> None:
        self.architecture = a = source.architecture
        self._dtype = dtype
        self._shapes: dict[int, Mapping[str, Shape]] = {OUTER: a.outer_shapes()}
        self._shapes |= dict.fromkeys(range(a.n_layers), a.layer_shapes())
        self.sizes = {block: self.n_bytes(block) for block in self._shapes}  # bytes by block
        n_bytes = sum(self.sizes.values())
        check_fits(f"{name} in host memory", n_bytes, torch.device("cpu"))
        memory = device.host_empty(n_bytes).split(list(self.sizes.values()))
        self._blocks: dict[int, Tensor] = dict(zip(self._shapes, memory, strict=True))
        for block, part in self._blocks.items():
            fill(source, None if block == OUTER else block, self._parts(block, part))

    def n_bytes(self, block: int) -> int:
        """Bytes of one block, each part at an aligned offset."""
        return block_bytes(self._shapes[block], self._dtype)

    def pairs(self, block: int, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The (source, target) pairs to copy so that the block lies in device `memory` (n_bytes,)."""
        return [(self._blocks[block], memory[: len(self._blocks[block])])]

    def layer(self, layer: int, memory: Tensor) -> LayerWeights:
        """The layer's weights as views of device `memory`, which holds its block."""
        return LayerWeights(**self._parts(layer, memory))

    def outer(self, memory: Tensor) -> OuterWeights:
        parts = self._parts(OUTER, memory)
        return OuterWeights(**{"head": parts["embedding"]} | parts)

    def _parts(self, block: int, memory: Tensor) -> dict[str, Tensor]:
        return parts_in(memory, self._shapes[block], self._dtype)


@dataclass(slots=True)
class _Resident:
    model: SegmentedModel
    outer: SlabPiece
    weights: list[LayerWeights]  # resident layers; the list `model.layers` if none are late
    layers: list[SlabPiece] = field(default_factory=list)  # memory of the resident layers
    late: LateLayers | None = None

    def settle(self) -> None:
        """Let the model have its resident layers alone again, without late layers."""
        if self.late is not None:
            self.late.settle()
            self.model.layers, self.model.staying, self.late = self.weights, None, None


class Residents:
    """The resident layers of each model. `weight_bytes`: device memory for weights; None for all models'."""

    def __init__(self, models: Mapping[str, LiveModel], device: Device, weight_bytes: int | None = None) -> None:
        self._models, self._device, self._weight_bytes = models, device, weight_bytes
        self._stores: dict[str, HostStore] = {}
        self._slab = Slab(0, device.torch_device)
        self._homes: dict[tuple[str, int], int] = {}  # start of each block, if there is room for all models
        self._made: dict[tuple[str, int, int], Any] = {}  # weights and models by the piece of the slab they view
        self._freed: Mark | None = None  # work that may still use memory that is free now
        self._there: dict[str, _Resident] = {}
        self._held: dict[str, int] = {}
        self._most: dict[str, int] | None = None  # layers that are ever held; None for all
        self._exits = {
            n: ExitReader(m.heads, m.checkpoint.architecture.n_layers, m.predictors) for n, m in models.items()
        }
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")  # loads run one after the other

    def exits(self, name: str) -> ExitReader:
        return self._exits[name]

    @property
    def free_bytes(self) -> int:
        """Free bytes in the memory for weights."""
        return self._slab.free_bytes

    @property
    def layers(self) -> dict[str, int]:
        """The number of resident layers by model."""
        return {name: len(resident.layers) for name, resident in self._there.items()}

    def hold(self, layers: Mapping[str, int], for_good: bool = False) -> None:
        """Keep at most these layers of each model and drop the rest at once.

        The first call reads the checkpoints and loads the layers that it names. If it is `for_good`, device memory is
        taken for these layers alone.
        """
        self._held = dict(layers)
        first = not self._stores
        if first:
            self._read()
            self._most = dict(layers) if for_good else None
        if not self._slab.total_bytes:
            self._take_memory()
        for name in list(self._there):
            self._drop(name, layers.get(name, 0))
        if first:
            for name, end in layers.items():
                self._load(name, end)

    def running(self, name: str, layers: int, late: bool = False) -> SegmentedModel:
        """The model with at least this many layers. With `late`, layers that are not resident come when they run.

        Raises RuntimeError if there are fewer.
        """
        there = self.layers.get(name, 0)
        if there < layers and not (late and there > LATE_ROOM):
            raise RuntimeError(f"{layers} layers of {name} are to run, {there} are there")
        resident = self._there[name]
        if there >= layers:
            resident.settle()
        elif resident.late is None or (resident.late.stay, len(resident.late)) != (there - LATE_ROOM, layers):
            resident.settle()
            stay, store = there - LATE_ROOM, self._stores[name]
            places = [self._slab.bytes_of(piece) for piece in resident.layers[stay:there]]
            resident.late = LateLayers(resident.weights[:stay], layers, store, places, self._device, filled=True)
            resident.model.layers, resident.model.staying = resident.late, stay  # type: ignore[assignment]
        return resident.model

    def return_first(self, name: str) -> None:
        """End an iteration of the model: its first late layers, if any, return to their places."""
        if (late := self._late(name)) is not None:
            late.return_first()

    def came(self, name: str) -> int:
        """How many late layers were copied for the model since the last call."""
        if (late := self._late(name)) is None:
            return 0
        n, late.came = late.came, 0
        return n

    def _late(self, name: str) -> LateLayers | None:
        resident = self._there.get(name)
        return None if resident is None else resident.late

    def load(self, name: str, done: Done) -> None:
        """Load the held layers of the model that are not resident yet. `done` is called from the loading thread."""
        end = self._held.get(name, 0)

        def run() -> None:
            error: Exception | None = None
            try:
                self._load(name, end)
            except (MemoryError, RuntimeError, OSError) as failed:  # torch's own out-of-memory is a RuntimeError
                error = failed
            done(error)

        self._loader.submit(run)

    @contextmanager
    def whole(self, name: str) -> Iterator[SegmentedModel]:
        """The model with all its layers; those that are not resident stream through a window of two.

        Raises MemoryError if there is no room for the window.
        """
        store, resident = self._stores[name], self._there.get(name)
        if resident is not None:
            resident.settle()
        there = [] if resident is None else resident.weights
        end = store.architecture.n_layers
        missing = end - len(there)
        taken: list[SlabPiece] = []
        streamed: LateLayers | None = None
        try:
            if resident is None:
                taken.append(self._copied(name, OUTER))
            for _ in range(min(LATE_ROOM, missing)):
                taken.append(self._slab.take(store.n_bytes(len(there))))
            window = [self._slab.bytes_of(piece) for piece in taken[resident is None :]]
            outer = store.outer(self._slab.bytes_of(taken[0])) if resident is None else resident.model.outer
            model = self._segmented(name, outer)
            streamed = LateLayers(there, end, store, window, self._device, filled=False)
            model.layers, model.staying = streamed, len(there)  # type: ignore[assignment]
            yield model
        finally:
            if streamed is not None:
                streamed.settle()
            self._freed = self._device.mark()
            for piece in taken:
                self._slab.give(piece)

    @contextmanager
    def laid_out(self, name: str) -> Iterator[SegmentedModel | None]:
        """The model with all layers that are ever held, at their fixed places in memory, loaded or not.

        None if layers have no fixed places, since memory is not enough for all models. Nothing may be loading.
        """
        if (name, OUTER) not in self._homes:
            yield None
            return
        model = self._placed(name, OUTER, self._homes[name, OUTER])
        resident = model.layers
        try:
            ends = sorted(block for of, block in self._homes if of == name and block != OUTER)
            model.layers = [self._placed(name, layer, self._homes[name, layer]) for layer in ends]
            yield model
        finally:
            model.layers = resident

    def stop(self) -> None:
        """Wait for a load that is in progress, and cancel queued ones."""
        self._loader.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        """Stop loading, and free the memory for weights."""
        self.stop()
        self.free()
        self._device.mark().synchronize()  # nothing is read from host memory any more
        self._stores.clear()

    def free(self) -> None:
        """Free the device memory for weights; `hold` takes it again from host memory's copy. Nothing may be loading."""
        for resident in self._there.values():
            resident.settle()
            resident.model.drop_layers(0)
        for of in (self._there, self._made, self._homes):
            of.clear()
        self._slab, self._freed = Slab(0, self._device.torch_device), None
        self._device.release()

    def _read(self) -> None:
        for name, live in self._models.items():
            self._stores[name] = host_store(name, live.checkpoint, live.dtype, self._device)

    def _take_memory(self) -> None:
        on = self._device.torch_device
        blocks = {
            (name, block): n for name, store in self._stores.items() for block, n in store.sizes.items()
            if self._most is None or block < self._most.get(name, OUTER)
        }  # fmt: skip
        n_bytes = sum(blocks.values()) if self._weight_bytes is None else self._weight_bytes
        self._device.release()
        check_fits("the models", n_bytes, on)
        self._slab = Slab(n_bytes, on)
        self._freed = self._device.mark()  # it has been filled with zeros
        if self._weight_bytes is None:
            ends = accumulate(map(aligned, blocks.values()))
            self._homes = {key: end - aligned(n) for (key, n), end in zip(blocks.items(), ends, strict=True)}

    def _load(self, name: str, end: int) -> None:
        """Load up to layer `end`, completely or not at all."""
        resident = self._there.get(name)
        there = 0 if resident is None else len(resident.layers)
        if there >= end:
            return
        taken: list[SlabPiece] = []
        try:
            if resident is None:
                taken.append(self._copied(name, OUTER))
            for layer in range(there, end):
                taken.append(self._copied(name, layer))
        except BaseException:
            for piece in taken:
                self._slab.give(piece)
            raise
        if resident is None:
            outer = taken.pop(0)
            model = self._placed(name, OUTER, outer.start)
            resident = _Resident(model, outer, model.layers)
        resident.weights += [self._placed(name, there + i, piece.start) for i, piece in enumerate(taken)]
        resident.layers += taken
        self._there[name] = resident

    def _copied(self, name: str, block: int) -> SlabPiece:
        """Copy the block into the slab, at its home if that is free. Returns its piece."""
        store = self._stores[name]
        piece = self._slab.take(store.n_bytes(block), self._homes.get((name, block)))
        try:
            self._device.copy(store.pairs(block, self._slab.bytes_of(piece)), self._freed)()
        except BaseException:
            self._slab.give(piece)
            raise
        return piece

    def _drop(self, name: str, end: int) -> None:
        """Drop the layers from `end` on; with `end` 0, the whole model."""
        resident = self._there[name]
        if end >= len(resident.layers):
            return
        resident.settle()
        resident.model.drop_layers(end)
        gone, resident.layers = resident.layers[end:], resident.layers[:end]
        if not end:
            gone.append(resident.outer)
            del self._there[name]
        self._freed = self._device.mark()  # what was issued before may still read them
        for piece in gone:
            self._slab.give(piece)

    def _placed(self, name: str, block: int, start: int) -> Any:
        """Weights of a layer, or with `OUTER` the model without layers, in a piece of the slab. Each is made once."""
        key = (name, block, start)
        if key not in self._made:
            store = self._stores[name]
            memory = self._slab.bytes_of(SlabPiece(start, store.n_bytes(block)))
            outer = block == OUTER
            self._made[key] = self._segmented(name, store.outer(memory)) if outer else store.layer(block, memory)
        return self._made[key]

    def _segmented(self, name: str, outer: OuterWeights) -> SegmentedModel:
        live = self._models[name]
        return SegmentedModel(live.checkpoint, outer, live.dtype, self._device.torch_device, self._device.kernels)
