"""Ceilings of a device (measured bytes and matrix operations per second), and the resulting floors of times.

The best of many repeats counts, not the median: nothing exceeds a ceiling. A measured time below its floor is a failed
measurement. A floor counts the bytes that must be read (weights once, K and V of every token attended to) and two
operations per weight and row, and four per query, key and head width in attention. Activations are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from calibrate.measure.device import TimedDevice
from helios_sim.profile.profile import Profile
from helios_sim.profile.spec import ModelSpec

REPEATS = 7
BUFFER_BYTES = {"cpu": 512 << 20, "cuda": 4 << 30}  # several times any cache
MATRIX_ROWS = {"cpu": 2048, "cuda": 8192}
DTYPES = ("float32", "bfloat16", "float16")
ATTENTION = ("decode_attention", "prefill_attention")  # tables of attention


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured ceilings. `read_bytes_per_s` is the best of several read-only kernels; copies count reads and writes."""

    dtype: str
    read_bytes_per_s: float
    copy_bytes_per_s: float
    flops_per_s: float  # matrix products in `dtype` of random values
    buffer_bytes: int
    matrix_rows: int

    @property
    def bytes_per_s(self) -> float:
        """The larger of the two bandwidths: no kernel moves more."""
        return max(self.read_bytes_per_s, self.copy_bytes_per_s)

    def floor_s(self, n_bytes: float, operations: float) -> float:
        """The least seconds for this work on this device."""
        return max(n_bytes / self.bytes_per_s, operations / self.flops_per_s)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Ceilings:
        return cls(**data)


def measure_ceilings(
    device: TimedDevice, dtype: str, *, buffer_bytes: int | None = None, matrix_rows: int | None = None
) -> Ceilings:
    """Measure in a second or two, with two buffers of `buffer_bytes` and a square product of `matrix_rows`."""
    import torch

    n_bytes = buffer_bytes or min(BUFFER_BYTES[device.facts.kind], device.facts.memory_bytes // 8)
    n = matrix_rows or MATRIX_ROWS[device.facts.kind]
    on = device.torch_device
    kind = getattr(torch, dtype)
    width = 4096
    # noise, since zeros can run faster than data
    source = torch.randn(n_bytes // 4 // width, width, device=on)
    target = torch.empty_like(source)
    vector = torch.randn(width, device=on)
    moved = source.numel() * 4
    reads: tuple[Callable[[], object], ...] = (lambda: torch.mv(source, vector), source.sum, source.amax)
    read_s = min(_best_s(device, read) for read in reads)
    copy_s = _best_s(device, lambda: target.copy_(source))
    a, b = (torch.randn(n, n, device=on).to(kind) for _ in range(2))
    product_s = _best_s(device, lambda: torch.mm(a, b))
    return Ceilings(dtype, moved / read_s, 2 * moved / copy_s, 2 * n**3 / product_s, moved, n)


def _best_s(device: TimedDevice, step: Callable[[], object]) -> float:
    prepared = device.prepare(step)
    device.laps_s([prepared])
    return min(device.laps_s([prepared])[0] for _ in range(REPEATS))


@dataclass(frozen=True, slots=True)
class OverFloor:
    """One entry of a table with its floor."""

    table: str
    place: tuple[int, ...]
    time_s: float
    floor_s: float
    iqr_s: float | None
    samples: int | None

    @property
    def ratio(self) -> float:
        return self.time_s / self.floor_s


def over_floor(profile: Profile, ceilings: Ceilings) -> dict[str, list[OverFloor]]:
    """All entries by table, for the first class of layers. Tables with a negligible floor are left out."""
    spec = profile.model
    layer = profile.layer_tables[0]
    found: dict[str, list[OverFloor]] = {}
    by_rows = {"dense": layer.dense, "kv_projection": layer.kv_projection, "head": profile.head}
    if profile.check is not None:
        by_rows["check"] = profile.check
    for name, rows in by_rows.items():
        found[name] = [
            OverFloor(
                name,
                (int(n),),
                float(rows.time_s[i]),
                ceilings.floor_s(*_work_of_rows(spec, name, int(n))),
                None if rows.iqr_s is None else float(rows.iqr_s[i]),
                None if rows.samples is None else int(rows.samples[i]),
            )
            for i, n in enumerate(rows.rows)
        ]
    for name, grid in zip(ATTENTION, (layer.decode_attention, layer.prefill_attention), strict=True):
        found[name] = [
            OverFloor(
                name,
                (int(a), int(b)),
                float(grid.time_s[i, j]),
                ceilings.floor_s(*_work_of_attention(spec, name, int(a), int(b))),
                None if grid.iqr_s is None else float(grid.iqr_s[i, j]),
                None if grid.samples is None else int(grid.samples[i, j]),
            )
            for i, a in enumerate(grid.first)
            for j, b in enumerate(grid.second)
        ]
    return found


def median_ratio(entries: Sequence[OverFloor]) -> float:
    ordered = sorted(entry.ratio for entry in entries)
    return ordered[len(ordered) // 2]


def below_floor(found: dict[str, list[OverFloor]]) -> list[OverFloor]:
    """Entries faster than the ceilings allow: failed measurements.

    Attention is left out: it is a difference of two times and may be noise.
    """
    return [e for entries in found.values() for e in entries if e.ratio < 1 and e.table not in ATTENTION]


def _work_of_rows(spec: ModelSpec, table: str, rows: int) -> tuple[float, float]:
    """The (bytes, operations) of an entry."""
    values = {
        "dense": spec.layer_values,
        "kv_projection": 2 * spec.d_model * spec.kv_width,
        "head": spec.vocab_size * spec.d_model,
        "check": spec.vocab_size * spec.d_model,
    }[table]
    return values * spec.weight_bytes_per_value, 2.0 * rows * values


def _work_of_attention(spec: ModelSpec, table: str, first: int, second: int) -> tuple[float, float]:
    """The (bytes, operations) of an entry."""
    width = spec.n_heads * spec.head_dim
    if table == ATTENTION[0]:
        pairs, kv = first * second, first * second
    else:
        pairs, kv = first * second + first * (first + 1) // 2, first + second
    return kv * spec.kv_bytes_per_token_layer, 4.0 * width * pairs
