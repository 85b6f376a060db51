"""How much memory is free, and whether it was that which ran out. Knows no weights and no cache."""

from __future__ import annotations

from pathlib import Path

import torch

from helios_sim.errors import UserError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_SHARE = 0.9  # others grow too: processes on a host, an allocator's gaps on a card
_SHORTAGES = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


def available_bytes(device: torch.device) -> int | None:
    """Free memory of the device, of a CPU also within its control group; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [n for n in (_free_on_host(), _free_in_group()) if n is not None]
    return min(found) if device.type == "cpu" and found else None


def check_fits(name: str, needed_bytes: int, device: torch.device) -> None:
    """Raises UserError, before anything is allocated, where the weights cannot fit."""
    free = available_bytes(device)
    if free is not None and needed_bytes > free:
        raise UserError(
            "memory", f"{free / 1e9:.2f} GB free on {device}", f"{needed_bytes / 1e9:.2f} GB for the weights of {name}",
            "load fewer layers, use bfloat16, choose a smaller model or free memory",
        )  # fmt: skip


def room_for_caches(device: torch.device, reserve_bytes: int) -> int | None:
    """Of the memory that is free now, what caches may take beside a reserve; None where the system does not tell."""
    free = available_bytes(device)
    return None if free is None else max(0, int(free * _SHARE) - reserve_bytes)


def shortage(error: BaseException) -> str | None:
    """What the error says, if it says that memory has run out; torch has several ways to say so."""
    text = str(error) or type(error).__name__
    said = any(words in text.lower() for words in _SHORTAGES)
    return text.splitlines()[0] if said or isinstance(error, MemoryError) else None


def _free_on_host() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _free_in_group() -> int | None:
    """Of a container with a limit (cgroup v2)."""
    try:
        limit, used = (_CGROUP / "memory.max").read_text(), (_CGROUP / "memory.current").read_text()
        return int(limit) - int(used)
    except (OSError, ValueError):  # no such file, or "max": no limit
        return None
