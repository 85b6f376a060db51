"""What a device is, does at most and draws: ceilings, buses, launches, waits, power. Knows no model.

Everything is measured through a `Device` and a clock that come in, so that a record of both gives the same again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from calibrate.ceilings import Ceilings, measure_ceilings
from calibrate.device import Device, Step
from calibrate.energy import measure_energy, why_absent
from calibrate.points import figure

REPEATS = 15
COPY_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
CHAIN = 200  # small kernels launched in a row
SMALL = 256  # values of a small kernel


def measure_device(
    device: Device,
    dtype: str,
    now_s: Callable[[], float],
    sleep: Callable[[float], None],
    *,
    buffer_bytes: int | None = None,
    matrix_rows: int | None = None,
    copy_bytes: int | None = None,
) -> dict[str, Any]:
    """JSON values; seconds, bytes, watts. None where the device has no such thing or does not tell."""
    ceilings = measure_ceilings(device, dtype, buffer_bytes=buffer_bytes, matrix_rows=matrix_rows)
    n_bytes = copy_bytes or COPY_BYTES[device.facts.kind]
    power = measure_energy(device, _loads(device, dtype, ceilings), now_s, sleep)
    return {
        "facts": asdict(device.facts),
        "ceilings": ceilings.to_json(),
        "host_copies": {kind: _copies(device, n_bytes, kind) for kind in device.host_buffers},
        "copied_bytes": n_bytes,
        "launch": _launches(device) if device.asynchronous else None,
        "sync_s": _sync_s(device, now_s) if device.asynchronous else None,
        "power": None if power is None else power.to_json(),
        "power_absent": why_absent(device) if power is None else None,
        "disturbance": device.disturbance(),
    }


def _copies(device: Device, n_bytes: int, kind: str) -> dict[str, float]:
    """Bytes per second to the device and back, nothing else running."""
    import torch

    host = device.host_buffer(n_bytes, kind)
    place = torch.empty(n_bytes, dtype=torch.uint8, device=device.torch_device)
    found = {}
    for name, pair in (("to_device_bytes_per_s", (host, place)), ("to_host_bytes_per_s", (place, host))):
        device.start_copy([pair]).wait_s()
        found[name] = n_bytes / figure([device.start_copy([pair]).wait_s() for _ in range(REPEATS)]).median_s
    return found


def _launches(device: Device) -> dict[str, float]:
    """Host seconds of one small kernel launched eagerly, and of one captured graph of many; device seconds of each."""
    import torch

    small = torch.ones(SMALL, device=device.torch_device)

    def chain() -> object:
        for _ in range(CHAIN):
            small.add_(1.0)
        return small

    eager_s = figure([device.launch_s(chain) for _ in range(REPEATS)]).median_s
    captured = device.prepare(chain)
    device.laps_s([captured])
    graph_s = figure([device.launch_s(captured) for _ in range(REPEATS)]).median_s
    laps_s = figure([device.laps_s([captured])[0] for _ in range(REPEATS)]).median_s
    return {
        "host_s_per_kernel": eager_s / CHAIN,
        "host_s_per_graph": graph_s,
        "device_s_per_kernel_in_graph": laps_s / CHAIN,
        "kernels": float(CHAIN),
    }


def _sync_s(device: Device, now_s: Callable[[], float]) -> float:
    """A small kernel and its result on the host: what a decision on the host costs at least."""
    import torch

    small = torch.ones(SMALL, device=device.torch_device)
    ask: Step = _on_host(small)
    found = []
    for _ in range(REPEATS):
        device.wait()
        before_s = now_s()
        ask()
        found.append(now_s() - before_s)
    return figure(found).median_s


def _on_host(small: Any) -> Step:
    return lambda: (small + 1.0).tolist() if small.device.type != "meta" else None


def _loads(device: Device, dtype: str, ceilings: Ceilings) -> dict[str, Step]:
    """What draws most: products of large matrices, and reading memory."""
    import torch

    on, kind, n = device.torch_device, getattr(torch, dtype), ceilings.matrix_rows
    a, b = (torch.randn(n, n, device=on).to(kind) for _ in range(2))
    source = torch.randn(ceilings.buffer_bytes // 4, device=on)
    return {"matrix product": lambda: torch.mm(a, b), "read": source.sum}
