"""Finds or makes the profile of any model on any device.

Sources, in this order: a profile in the folder, measured or made before; kernels that were measured on the card, which
come with the package; the card's data sheet. The profile's provenance and the report say which it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from helios_sim.errors import UserError
from helios_sim.profile.catalog import MODELS, plain_model
from helios_sim.profile.devices import Device, card_file, catalogue_name, device_of, group_of
from helios_sim.profile.formats import WEIGHTS
from helios_sim.profile.importers.kernel_tables import KERNELS, SHIPPED_SOURCES
from helios_sim.profile.precision import PLAIN, Precision, in_words, products_on
from helios_sim.profile.profile import Profile
from helios_sim.profile.roofline import FITTED, device_roofline, fitted_band
from helios_sim.profile.store import HEADER, PROFILES_FOLDER, load_profile
from helios_sim.provenance import NOT_READ
from helios_sim.untrusted import is_there

if TYPE_CHECKING:
    from helios_sim.profile.shapes import Shape

VLLM = "vllm"  # engine with the kernels that are used by default
TIMES_FROM, SHAPE_FROM = "times_from", "shape"  # keys of a provenance's details, if a profile was made for this run


def find_profile(
    model: str, hardware: str, folder: Path = PROFILES_FOLDER, precision: Precision = PLAIN, kernels: str = VLLM
) -> Profile:
    """Find or make a profile. `model` and `hardware` are names or paths of files, as in a study's settings.

    `kernels` names the engine with the kernels to use if they were measured on the card; else vLLM's are used. Raises
    UserError if a name is not known, or the cards cannot split the model or compute in that precision.
    """
    kept = kept_profile(model, hardware, folder, precision) if kernels == VLLM else None
    if kept is not None:
        return in_precision(load_profile(kept.name, folder), precision)
    command = f"models=[{model}] hardware={hardware}{precision.settings}"
    command += "" if kernels == VLLM else f" server.kernels={kernels}"
    measured = kept_profile(model, hardware, folder)
    if measured is not None and catalogue_name(group_of(hardware)[1]) is None:  # known by its profile alone
        return in_precision(load_profile(measured.name, folder), precision)
    from helios_sim.profile.shapes import shape_of  # readers of configs, which a kept profile has no need of

    shape = shape_of(model)
    return _built(replace(shape, model=precision.applied(shape.model)), device_of(hardware), command, kernels)


def profile_of(shape: Shape, hardware: str) -> Profile:
    """The profile of a model of these sizes, from kernels or the card's data sheet. UserError as `find_profile`."""
    return _built(shape, device_of(hardware), f"{shape.source} hardware={hardware}", VLLM)


def in_precision(profile: Profile, precision: Precision) -> Profile:
    """Return the profile if it is in this precision. Raises UserError if not: a measured profile has only its own."""
    if precision.applied(profile.model) != profile.model:
        key, value = precision.first
        has = f"the precision of the profile {profile.name}, which has no other"
        raise UserError(key, value, has, "leave it out, or take a card of the catalogue")
    return profile


def kept_profile(
    model: str, hardware: str, folder: Path = PROFILES_FOLDER, precision: Precision = PLAIN
) -> Path | None:
    """The folder of a kept profile, also under another of the model's names; None if one has to be made.

    Kept profiles are in bf16, so one is made if the settings ask for another precision.
    """
    if not precision.is_bf16:
        return None
    return next((folder / name for name in _names(model, hardware) if is_there(folder / name / HEADER)), None)


def _names(model: str, hardware: str) -> Iterator[str]:
    if "/" not in model + hardware:
        yield f"{model}@{hardware}"
    cards, card = group_of(hardware)
    from helios_sim.profile.shapes import config_of

    plain, known = plain_model(model), catalogue_name(card)
    if cards == 1 and known is not None and plain in MODELS and config_of(model) is None:
        yield f"{plain}@{known}"


@lru_cache(maxsize=32)
def _built(shape: Shape, device: Device, command: str, kernels: str) -> Profile:
    """Make a profile from measured kernels if the card has them, else from its data sheet."""
    source = None if device.key is None else KERNELS[kernels].get(device.key, SHIPPED_SOURCES.get(device.key))
    if source is None:
        profile = device_roofline(shape.model, device, None, FITTED, command, shape.windows)
        band = fitted_band(shape.model, device.card)
        times_from = f"its data sheet; expect {band.low:g} to {band.high:g} of these times"
        if device.cards > 1:
            times_from += f", with all-reduces over a link of {device.link.bytes_per_s / 1e9:g} GB/s"
    else:
        from helios_sim.profile.importers.aiconfigurator import device_profile

        profile = device_profile(shape.model, device, source, command, None, shape.windows)
        under = f"{source.engine} {source.version}"
        times_from = f"kernels that NVIDIA measured under {under} on {source.card.name.upper()}"
        products = products_on(shape.model, device.card)
        if products == WEIGHTS and not source.integers:
            band = fitted_band(shape.model, device.card)
            expected = f"{band.low:g} to {band.high:g} of their times"
            times_from += f", products of the layers by shares of an A100's: expect {expected}"
            profile = replace(profile, time_band=band)
    if shape.model.quantization is not None or shape.model.kv_bytes_per_value == 1:
        times_from += f"; {in_words(shape.model)}"
    details = {TIMES_FROM: times_from, SHAPE_FROM: shape.source}
    details |= {NOT_READ: shape.not_read} if shape.not_read else {}
    provenance = replace(profile.provenance, details=details)
    return replace(profile, provenance=provenance)


def files_of(model: str, hardware: str) -> list[Path]:
    """The files that define the model and the hardware; none for names of the catalogue."""
    from helios_sim.profile.shapes import config_of

    found = (config_of(model) if model else None, card_file(group_of(hardware)[1]))
    return [path for path in found if path is not None and is_there(path)]
