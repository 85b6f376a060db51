"""Launch of kernels, in one place so that tests can count launches."""

from __future__ import annotations

from typing import Any

import torch

MOST_ROWS = 4  # of a product by the project's own kernels
CORES = 132  # multiprocessors to assume without a card: those of an H100 or H200


def launch(kernel: Any, grid: tuple[int, ...], *given: Any, **constants: Any) -> None:
    """Launch a kernel with these arguments: tensors and numbers first, then its compile-time constants."""
    kernel[grid](*given, **constants)


def power_of_two(n: int) -> int:
    """The least power of two that is no less than `n` (at least 1)."""
    return 1 << max(0, n - 1).bit_length()


def cores(device: torch.device) -> int:
    """How many multiprocessors the card has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else CORES
