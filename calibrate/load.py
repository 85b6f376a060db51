"""How fast weights come from host memory into place, and what that does to iterations meanwhile. Knows no policy.

On a card: pinned and pageable memory over the bus, on a stream of its own. On a CPU "place" is memory too: a copying
thread shares the cores and the memory bus with the iterations, and says what loading beside serving costs there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

from calibrate.points import figure
from calibrate.subject import Subject

REPEATS = 7
COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # at least that much, in whole layers
MOST_LAYERS = 128
MEANWHILE_S = 1.5  # how long iterations and a copy run side by side


@dataclass(frozen=True, slots=True)
class Loads:
    """Bytes per second by kind of host memory, nothing else running; the engine's kind first.

    `slowdown` is an iteration's time beside a running copy over its time alone; `meanwhile_bytes_per_s` is what the
    copy reaches then. `checkpoint_bytes_per_s`: a layer read from the file, brought to the model's dtype and put in
    place, per byte put there.
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
    """`reload` reads one layer from the checkpoint anew and returns its bytes; None: not measured."""
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


def _meanwhile(subject: Subject, pairs: list[tuple[Any, Any]], moved: int, copy_s: float) -> tuple[float, float]:
    """(slowdown, bytes per second of the copy beside iterations) at a middling decode iteration."""
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
