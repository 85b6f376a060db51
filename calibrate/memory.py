"""Bytes: what the shapes predict against what the device's own count says. Knows no time.

On a card the count is the allocator's; on a CPU it is resident memory, by the kernel's count, of this process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from calibrate.subject import Subject
from helios_sim.profile.models import activation_reserve_bytes
from helios_sim.profile.spec import ModelSpec

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Bytes:
    """`measured` is None where the device cannot tell."""

    predicted: int
    measured: int | None


@dataclass(frozen=True, slots=True)
class Memory:
    """Weights with all layers loaded, one layer, KV of `kv_tokens` tokens in all layers, peak of activations."""

    weights: Bytes
    layer_bytes: int
    kv: Bytes
    kv_tokens: int
    activations: Bytes  # of the largest iteration within the limits
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
    """What `make` made, and how many bytes more are in use since."""
    before = device.used_bytes()
    made = make()
    device.wait()
    after = device.used_bytes()
    return made, None if before is None or after is None else after - before


def measure_memory(subject: Subject, spec: ModelSpec, loaded_bytes: int | None) -> Memory:
    """`loaded_bytes` is how much memory grew by loading the model (`grown`). Runs the largest iterations once each."""
    from helios_sim.live.memory.kv import KvCache

    limits, model, device = subject.limits, subject.model, subject.device
    kv_tokens = limits.max_kv_tokens

    def allocate() -> KvCache:
        cache = KvCache(subject.architecture, subject.n_layers, 1, kv_tokens, model.dtype, device.torch_device)
        for tensor in (*cache.keys, *cache.values):
            tensor.fill_(1.0)  # on a CPU memory is there only when it was written
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
    return Memory(
        weights=Bytes(spec.weight_bytes(subject.n_layers), loaded_bytes),
        layer_bytes=spec.weight_bytes(1) - spec.weight_bytes(0),
        kv=Bytes(kv_tokens * subject.n_layers * spec.kv_bytes_per_token_layer, kv_bytes),
        kv_tokens=kv_tokens,
        activations=Bytes(
            activation_reserve_bytes(spec, limits.max_chunk, limits.max_head_rows),
            max(known) if len(known) == len(peaks) else None,
        ),
        method="the allocator's own count" if device.asynchronous else "resident memory of the process (/proc/self)",
    )
