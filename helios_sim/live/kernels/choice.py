"""Choice of the kernels that a device computes with."""

from __future__ import annotations

import os
import shutil
import sysconfig
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from helios_sim.errors import UserError
from helios_sim.live.kernels.interface import TORCH, Kernels

_FAULTS: dict[torch.device, str | None] = {}  # what the kernels lacked when they first ran, by card
LEAST_CAPABILITY = (8, 0)  # of a card, for bfloat16 on tensor cores


def kernels_for(device: torch.device, wanted: str | None = None) -> Kernels:
    """Return the wanted kernels; by default Triton's on a card that can run them, else torch's.

    Raises UserError for Triton's or FlashInfer's if they cannot run. For tests, Triton interprets its kernels on a CPU
    if the environment has TRITON_INTERPRET=1.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    lacking = None
    if device.type != "cuda" and not interpreted:
        lacking = "a CUDA card"
    elif find_spec("triton") is None:
        lacking = "the package triton"
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        lacking = "a card of compute capability 8.0 or later"
    elif device.type == "cuda" and wanted != "torch":
        lacking = _lacking_to_build() or _tried(device)
    if lacking is None and wanted == "flashinfer":
        lacking = _lacking_of_flashinfer(device)
    if wanted == "torch" or (wanted is None and (lacking is not None or device.type != "cuda")):
        return TORCH
    if lacking is not None:
        raise UserError("live.kernels", wanted, f"{wanted} needs {lacking}", "set live.kernels=torch, or leave it out")
    from helios_sim.live.kernels.card import FLASHINFER, TRITON

    return FLASHINFER if wanted == "flashinfer" else TRITON


def _lacking_of_flashinfer(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "a CUDA card"
    return None if find_spec("flashinfer") else "the package flashinfer-python"


def _lacking_to_build() -> str | None:
    """The first missing thing of those that Triton needs to compile its launcher on this host; None if all exist."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler (gcc, clang, or one named by CC)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's headers (Python.h)"
    return None


def _tried(device: torch.device) -> str | None:
    """What the kernels lack on this card, found by running them once; it is noted in `_FAULTS`."""
    from helios_sim.live.kernels.first_contact import fault

    _FAULTS[device] = found = fault(device)
    return found


def described(kernels: Kernels) -> str:
    """Describe what computes a decode step, for people."""
    if kernels.name == "torch":
        lacking = _lacking_to_build() or next((found for found in _FAULTS.values() if found is not None), None)
        return "decode steps by torch's operations" + (f"; Triton's kernels need {lacking}" if lacking else "")
    import triton

    said = f"decode steps by the project's kernels in Triton {triton.__version__}"
    if kernels.name == "flashinfer":
        said += f", attention of captured ones by FlashInfer {import_module('flashinfer').__version__}"
    return said
