"""Which kernels a device computes with."""

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

_FAULTS: dict[torch.device, str | None] = {}  # by card, what was found when the kernels first ran there
LEAST_CAPABILITY = (8, 0)  # of a card: bfloat16 on tensor cores


def kernels_for(device: torch.device, wanted: str | None = None) -> Kernels:
    """Those that are wanted; without a wish Triton's on a card that can run them, else torch's.

    Raises UserError for Triton's, and FlashInfer's beside them, where they cannot run. Triton interprets its kernels on
    a CPU where the environment has TRITON_INTERPRET=1, for tests.
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
    """Of what Triton compiles its launcher with at the first launch on a host, the first thing that is not there."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler (gcc, clang, or one named by CC)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's headers (Python.h)"
    return None


def _tried(device: torch.device) -> str | None:
    """What they lack when they run on the card for the first time."""
    from helios_sim.live.kernels.first_contact import fault

    _FAULTS[device] = found = fault(device)
    return found


def described(kernels: Kernels) -> str:
    """What computes a decode step, for people."""
    if kernels.name == "torch":
        lacking = _lacking_to_build() or next((found for found in _FAULTS.values() if found is not None), None)
        return "decode steps by torch's operations" + (f"; Triton's kernels need {lacking}" if lacking else "")
    import triton

    said = f"decode steps by the project's kernels in Triton {triton.__version__}"
    if kernels.name == "flashinfer":
        said += f", attention of captured ones by FlashInfer {import_module('flashinfer').__version__}"
    return said
