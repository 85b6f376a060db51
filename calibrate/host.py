"""What the host does inside a forward pass beside issuing it: making steps, launching, checks. Knows no table.

Separate from device time by what it is: turning lists of requests into tensors and a step, and tokens back into lists.
The device part begins where these inputs lie ready. On a CPU both are wall time of the same cores, one after the
other, and issuing the layers' operations is inside device time. What the server and the engine do around the forward
pass is not in here: `serving.py` measures it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np

from calibrate.points import figure
from calibrate.subject import Subject

REPEATS = 15
LAYERS_BEFORE = 8  # run before each of them, as in service: they leave other data in the caches


@dataclass(frozen=True, slots=True)
class HostCosts:
    """Medians in seconds; by batch where it matters. Launch costs are 0 by definition on a synchronous device."""

    overhead_s: dict[int, float]  # of lists to a step and back
    overhead_iqr_s: dict[int, float]
    sync_s: dict[int, float]
    launch_s_per_layer: float  # eager
    launch_s_per_graph: float  # of all layers captured as one

    @property
    def middle_overhead_s(self) -> float:
        """At the middle batch."""
        return self.overhead_s[sorted(self.overhead_s)[len(self.overhead_s) // 2]]

    @property
    def host_sync_s(self) -> float:
        return self.sync_s[sorted(self.sync_s)[len(self.sync_s) // 2]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> HostCosts:
        by_batch = {k: {int(b): t for b, t in data[k].items()} for k in ("overhead_s", "overhead_iqr_s", "sync_s")}
        return cls(**{**data, **by_batch})


def measure_host(subject: Subject) -> HostCosts:
    """A second or two."""
    overheads = {batch: figure(_overheads_s(subject, batch)) for batch in subject.limits.few_batches}
    syncs = {batch: figure(_syncs_s(subject, batch)).median_s for batch in overheads}
    per_layer, per_graph = _launches_s(subject)
    return HostCosts(
        {batch: f.median_s for batch, f in overheads.items()},
        {batch: f.iqr_s for batch, f in overheads.items()},
        syncs, per_layer, per_graph,
    )  # fmt: skip


def _lengths(subject: Subject, batch: int) -> list[int]:
    rng = np.random.default_rng(batch)
    longest = min(subject.limits.max_kv_tokens, subject.pool_tokens // batch)
    found: list[int] = rng.integers(1, longest, batch, endpoint=True).tolist()
    return found


def _overheads_s(subject: Subject, batch: int) -> list[float]:
    """Token ids and a decode step from lists, then sampled ids to a list."""
    import torch

    from helios_sim.live.memory.kv import DecodeStep

    device, lengths = subject.device, _lengths(subject, batch)
    cache = subject.cache(batch, max(lengths))
    ids, slots, before = list(range(batch)), list(range(batch)), [n - 1 for n in lengths]
    found, layers = [], _layers(subject, batch)
    for _ in range(REPEATS + 1):
        layers()
        device.wait()
        start_s = perf_counter()
        tokens = torch.tensor(ids, device=device.torch_device)
        DecodeStep(cache, slots, before)
        tokens.tolist()
        device.wait()
        found.append(perf_counter() - start_s)
    return found[1:]


def _syncs_s(subject: Subject, batch: int) -> list[float]:
    """Confidences to the host, a comparison there, the hidden states that go on gathered, a step made for them."""
    import torch

    from helios_sim.live.memory.kv import DecodeStep

    device, lengths = subject.device, _lengths(subject, batch)
    cache, hidden = subject.cache(batch, max(lengths)), subject.hidden(batch)
    confidence = torch.linspace(0.0, 1.0, batch, device=device.torch_device)
    found, layers = [], _layers(subject, batch)
    for _ in range(REPEATS + 1):
        layers()
        device.wait()
        start_s = perf_counter()
        stay = [i for i, c in enumerate(confidence.tolist()) if c < 0.5] or [0]
        hidden.index_select(0, torch.tensor(stay, device=device.torch_device))
        DecodeStep(cache, stay, [lengths[i] - 1 for i in stay])
        device.wait()
        found.append(perf_counter() - start_s)
    return found[1:]


def _layers(subject: Subject, batch: int) -> Callable[[], object]:
    """The first ones, for so many decodes with short contexts."""
    step, hidden = subject.decode_step([8] * batch), subject.hidden(batch)
    return lambda: subject.model.run(hidden, 0, min(LAYERS_BEFORE, subject.n_layers), step)


def _launches_s(subject: Subject) -> tuple[float, float]:
    """Host seconds to issue one layer eagerly, and to issue all of them captured."""
    device, model = subject.device, subject.model
    if not device.asynchronous:
        return 0.0, 0.0
    step, hidden = subject.decode_step([64]), subject.hidden(1)

    def run() -> object:
        return model.run(hidden, 0, subject.n_layers, step)

    eager_s = figure([device.launch_s(run) for _ in range(REPEATS)]).median_s
    captured = device.prepare(run)
    graph_s = figure([device.launch_s(captured) for _ in range(REPEATS)]).median_s
    return eager_s / subject.n_layers, graph_s
