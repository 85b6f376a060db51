"""Memory of a model on a device, predicted and measured, and how fast weights are loaded.

Memory in use is counted by the allocator on a card, and by the kernel as the process's resident memory on a CPU. On a
card, weights come from pinned or pageable memory over the bus, on their own stream. On a CPU the copy goes to memory as
well: a copying thread shares cores and memory bus with iterations, which shows the cost of loading while serving.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any, TypeVar

from calibrate.measure.ceilings import Ceilings
from calibrate.measure.sampling import figure
from calibrate.measure.subject import Subject
from helios_sim.profile.catalog import activation_reserve_bytes
from helios_sim.profile.spec import ModelSpec

Made = TypeVar("Made")
REPEATS = 7
COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # approximate size of a copy, in whole layers
MOST_LAYERS = 128
MEANWHILE_S = 1.5  # how long iterations and a copy run side by side


@dataclass(frozen=True, slots=True)
class Bytes:
    """A predicted and a measured size. `measured` is None if the device cannot tell."""

    predicted: int
    measured: int | None


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of all weights, of one layer, of KV for `kv_tokens` tokens in all layers, and peak activations."""

    weights: Bytes
    layer_bytes: int
    kv: Bytes
    kv_tokens: int
    activations: Bytes  # in the largest iteration within the limits
    method: str

    @property
    def activation_reserve_bytes(self) -> int:
        found = self.activations
        return found.predicted if found.measured is None else found.measured

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Memory:
        parts = {key: Bytes(**data[key]) for key in ("weights", "kv", "activations")}
        return cls(**{**data, **parts})


def grown(device: Any, make: Callable[[], Made]) -> tuple[Made, int | None]:
    """The result of `make`, and by how many bytes memory use grew."""
    before = device.used_bytes()
    made = make()
    device.wait()
    after = device.used_bytes()
    return made, None if before is None or after is None else after - before


def measure_memory(subject: Subject, spec: ModelSpec, loaded_bytes: int | None) -> Memory:
    """Compare predicted with measured memory, running the largest iterations once.

    `loaded_bytes`: by how much memory grew when the model was loaded (see `grown`).
    """
    from helios_sim.live.memory.kv import KvCache

    limits, model, device = subject.limits, subject.model, subject.device
    kv_tokens = limits.max_kv_tokens

    def allocate() -> KvCache:
        cache = KvCache(subject.architecture, subject.n_layers, 1, kv_tokens, model.dtype, device.torch_device)
        for tensor in (*cache.keys, *cache.values):
            tensor.fill_(1.0)  # on a CPU, memory counts only once it is written
        return cache

    _, kv_bytes = grown(device, allocate)

    def prompt() -> object:
        context = limits.max_kv_tokens - limits.max_chunk
        return model.run(
            subject.hidden(limits.max_chunk), 0, subject.n_layers, subject.prompt_step(limits.max_chunk, context)
        )

    def head() -> object:
        return subject.checked(subject.hidden(limits.max_head_rows))

    peaks = [device.peak_bytes(step) for step in (prompt, head)]
    known = [p for p in peaks if p is not None]
    predicted = predicted_memory(subject, spec, loaded_bytes)
    return replace(
        predicted,
        kv=replace(predicted.kv, measured=kv_bytes),
        activations=replace(predicted.activations, measured=max(known) if len(known) == len(peaks) else None),
        method="the allocator's own count" if device.asynchronous else "resident memory of the process (/proc/self)",
    )


def predicted_memory(subject: Subject, spec: ModelSpec, loaded_bytes: int | None) -> Memory:
    """What `measure_memory` predicts, without measuring anything."""
    limits = subject.limits
    kv_bytes = limits.max_kv_tokens * subject.n_layers * spec.kv_bytes_per_token_layer
    return Memory(
        weights=Bytes(spec.weight_bytes(subject.n_layers), loaded_bytes),
        layer_bytes=spec.weight_bytes(1) - spec.weight_bytes(0),
        kv=Bytes(kv_bytes, None),
        kv_tokens=limits.max_kv_tokens,
        activations=Bytes(activation_reserve_bytes(spec, limits.max_chunk, limits.max_head_rows), None),
        method="predicted from sizes",
    )


@dataclass(frozen=True, slots=True)
class Loads:
    """Load rates in bytes per second.

    bytes_per_s: by kind of host memory with nothing else running, the engine's kind first.
    slowdown: an iteration's time while a copy runs over its time alone.
    meanwhile_bytes_per_s: the copy's rate while iterations run.
    checkpoint_bytes_per_s: the rate of reading a layer from the file, including conversion to the model's dtype.
    """

    bytes_per_s: dict[str, float]
    iqr_share: dict[str, float]
    layer_bytes: int
    slowdown: float
    meanwhile_bytes_per_s: float
    checkpoint_bytes_per_s: float | None

    @property
    def engine_bytes_per_s(self) -> float:
        return next(iter(self.bytes_per_s.values()))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Loads:
        return cls(**data)


def measure_loads(subject: Subject, reload: Callable[[], int] | None = None) -> Loads:
    """Measure load rates. `reload` reads one layer from the checkpoint and returns its bytes (None: not measured)."""
    import torch

    device = subject.device
    layer_bytes = sum(t.nbytes for t in subject.layer_tensors(0))
    enough = max(1, min(COPY_BYTES[device.facts.kind], device.facts.memory_bytes // 16) // layer_bytes)
    layers = min(enough, MOST_LAYERS)
    targets = [
        torch.empty(t.nbytes, dtype=torch.uint8, device=device.torch_device)
        for _ in range(layers)
        for t in subject.layer_tensors(0)
    ]
    moved = sum(t.nbytes for t in targets)
    rates, spread = {}, {}
    pairs: dict[str, list[tuple[Any, Any]]] = {}
    for kind in device.host_buffers:
        sources = device.host_buffer(moved, kind).split([t.nbytes for t in targets])
        pairs[kind] = list(zip(sources, targets, strict=True))
        device.wait()  # for earlier work on the targets' memory, on another stream
        device.start_copy(pairs[kind]).wait_s()
        times = figure([device.start_copy(pairs[kind]).wait_s() for _ in range(REPEATS)])
        rates[kind], spread[kind] = moved / times.median_s, times.iqr_s / times.median_s
    engine = device.host_buffers[0]
    slowdown, meanwhile = _meanwhile(subject, pairs[engine], moved, moved / rates[engine])
    checkpoint = None
    if reload is not None:
        times_s = []
        for _ in range(3):
            start_s = perf_counter()
            read = reload()
            device.wait()
            times_s.append((perf_counter() - start_s) / read)
        checkpoint = 1.0 / figure(times_s).median_s
    return Loads(rates, spread, layer_bytes, slowdown, meanwhile, checkpoint)


def loads_by_ceilings(subject: Subject, ceilings: Ceilings) -> Loads:
    """Assumed loads: copies run at their ceiling, and iterations lose the share of bandwidth that copies take."""
    rate = ceilings.copy_bytes_per_s / 2  # a copied byte is read and written
    layer_bytes = sum(t.nbytes for t in subject.layer_tensors(0))
    engine = subject.device.host_buffers[0]
    share = min(0.5, rate / ceilings.bytes_per_s)
    return Loads({engine: rate}, {engine: 0.0}, layer_bytes, 1.0 / (1.0 - share), rate, None)


def _meanwhile(subject: Subject, pairs: list[tuple[Any, Any]], moved: int, copy_s: float) -> tuple[float, float]:
    """(slowdown, the copy's bytes per second while iterations run), at a medium-sized decode iteration."""
    device, model = subject.device, subject.model
    batch = max(1, subject.limits.max_batch // 4)
    step = subject.decode_step([max(1, min(subject.limits.max_kv_tokens // 4, subject.pool_tokens // batch))] * batch)
    hidden = subject.hidden(batch)
    run = device.prepare(lambda: model.run(hidden, 0, subject.n_layers, step))
    device.laps_s([run])
    alone = figure([device.laps_s([run])[0] for _ in range(REPEATS)]).median_s
    repeats = max(1, round(MEANWHILE_S / copy_s))
    copy = device.start_copy(pairs, repeats)
    beside: list[float] = []
    started_s = perf_counter()
    while perf_counter() - started_s < 0.6 * MEANWHILE_S or not beside:
        beside += device.laps_s([run])
    taken_s = copy.wait_s()
    again = figure([device.laps_s([run])[0] for _ in range(REPEATS)]).median_s
    return max(1.0, figure(beside).median_s / (0.5 * (alone + again))), moved * repeats / taken_s
