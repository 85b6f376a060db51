"""The profile of any model on any device, without a step to build it.

In this order: a profile in the folder, measured or made before; kernels that were measured on the card, which come with
the package; the card's data sheet. The profile's provenance says which, and so does the report.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from helios_sim.profile.catalog import card_key
from helios_sim.profile.devices import Device, device_of
from helios_sim.profile.importers.aiconfigurator import SHIPPED_SOURCES, device_profile
from helios_sim.profile.profile import Profile
from helios_sim.profile.roofline import FITTED, FITTED_BAND, device_roofline
from helios_sim.profile.shapes import Shape, shape_of
from helios_sim.profile.store import HEADER, PROFILES_FOLDER, load_profile

TIMES_FROM = "times_from"  # among a provenance's details, where a profile was made for this run


@lru_cache(maxsize=32)
def find_profile(model: str, hardware: str, folder: Path = PROFILES_FOLDER) -> Profile:
    """`model` and `hardware` are names, or paths of files, as a study's settings have them.

    UserError where one of them is not known, or the group of cards cannot split the model.
    """
    kept = folder / f"{model}@{hardware}"
    if "/" not in model + hardware and (kept / HEADER).is_file():
        return load_profile(kept.name, folder)
    return built(shape_of(model), device_of(hardware), f"models=[{model}] hardware={hardware}")


def built(shape: Shape, device: Device, command: str) -> Profile:
    """From measured kernels where the card has them, else from its data sheet."""
    key = card_key(device.card.name)
    source = SHIPPED_SOURCES.get("" if key is None else key)
    if source is None:
        profile = device_roofline(shape.model, device, None, FITTED, command, shape.windows)
        low, high = FITTED_BAND
        times_from = f"its data sheet; expect {low:g} to {high:g} of these times"
    else:
        profile = device_profile(shape.model, device, source, command, None, shape.windows)
        times_from = f"kernels that NVIDIA measured under vLLM {source.vllm} on {source.card.name.upper()}"
    provenance = replace(profile.provenance, details={TIMES_FROM: times_from, "shape": shape.source})
    return replace(profile, provenance=provenance)


def files_of(name: str) -> list[Path]:
    """The files behind the name of a model or of hardware; none where it is one of the catalogue."""
    path = Path(name.split("x", 1)[1] if name[:1].isdigit() and "x" in name else name).expanduser()
    path = path / "config.json" if path.is_dir() else path
    return [path] if path.suffix in (".json", ".yaml", ".yml") and path.is_file() else []
