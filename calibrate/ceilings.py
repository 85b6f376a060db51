"""What a device can do at most: bytes and matrix operations per second, measured. Knows no model.

The best of many repeats counts, not the median: a ceiling is what nothing comes above. A measured time below the floor
that follows from these is a failed measurement.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from calibrate.device import Device

REPEATS = 7
BUFFER_BYTES = {"cpu": 512 << 20, "cuda": 4 << 30}  # several times any cache
MATRIX_ROWS = {"cpu": 2048, "cuda": 8192}
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Ceilings:
    """`read_bytes_per_s`: the best of several kernels that only read; copies count bytes read and written."""

    dtype: str
    read_bytes_per_s: float
    copy_bytes_per_s: float
    flops_per_s: float  # matrix products in `dtype`, random values
    buffer_bytes: int
    matrix_rows: int

    @property
    def bytes_per_s(self) -> float:
        """The larger of the two: no kernel moves more."""
        return max(self.read_bytes_per_s, self.copy_bytes_per_s)

    def floor_s(self, n_bytes: float, operations: float) -> float:
        """Seconds that nothing on this device can beat."""
        return max(n_bytes / self.bytes_per_s, operations / self.flops_per_s)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Ceilings:
        return cls(**data)


def measure_ceilings(
    device: Device, dtype: str, *, buffer_bytes: int | None = None, matrix_rows: int | None = None
) -> Ceilings:
    """Takes a second or two: `buffer_bytes` twice, and a square product of `matrix_rows`."""
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


def _best_s(device: Device, step: Callable[[], object]) -> float:
    prepared = device.prepare(step)
    device.laps_s([prepared])
    return min(device.laps_s([prepared])[0] for _ in range(REPEATS))
