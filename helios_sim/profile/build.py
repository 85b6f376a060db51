"""Command that builds a profile from tables that others measured.

`python -m helios_sim.profile.build model=NAME hardware=NAME` from aiconfigurator's GEMM and attention tables (see
`kernels`), `... importer=layers tables=FOLDER model=NAME [hardware=NAME] [tensor_parallel=N]` from kernel times by
layer (see `importers.layers`), `... importer=vidur tables=FOLDER model=NAME hardware=NAME` from Vidur's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from helios_sim.entry import run
from helios_sim.errors import UserError
from helios_sim.help import is_asked
from helios_sim.profile.catalog import (
    CARDS,
    HARDWARE,
    MODELS,
    hardware_spec,
    model_spec,
    published_card,
    published_model,
)
from helios_sim.profile.importers.aiconfigurator import kernel_profile
from helios_sim.profile.importers.layers import layer_profile, read_meta
from helios_sim.profile.importers.vidur import OTHER_TYPES, vidur_profile
from helios_sim.profile.profile import Profile
from helios_sim.profile.runtimes import preset
from helios_sim.profile.store import PROFILES_FOLDER, write_profile

IMPORTERS = ("aiconfigurator", "layers", "vidur")
KEYS = ("importer", "tables", "model", "hardware", "tensor_parallel", "folder")
USAGE = (
    "model=NAME|all hardware=NAME [importer=aiconfigurator|layers|vidur tables=PATH tensor_parallel=N] [folder=PATH]"
)


def main(arguments: Sequence[str] | None = None) -> int:
    return run("helios_sim.profile.build", _built, arguments)


def _built(arguments: Sequence[str]) -> int:
    """Build a profile from measured kernels and write it."""
    if is_asked(arguments):
        print(__doc__)
        return 0
    options = dict(_option(a) for a in arguments)
    importer = options.get("importer", "aiconfigurator")
    if importer not in IMPORTERS:
        raise UserError("importer", importer, f"one of {', '.join(IMPORTERS)}", "choose one of these")
    for profile in _from_kernels(options) if importer == "aiconfigurator" else [_from_tables(importer, options)]:
        path = Path(options.get("folder", PROFILES_FOLDER)) / profile.name
        write_profile(profile, path)
        print(path)
    return 0


def _from_kernels(options: dict[str, str]) -> list[Profile]:
    if missing := {"model", "hardware"} - options.keys():
        raise UserError("arguments", " ".join(options), USAGE, f"add {' and '.join(sorted(missing))}")
    if "tensor_parallel" in options:
        fix = "set hardware=4xh100 in the study: a group needs no profile of its own"
        raise UserError("tensor_parallel", options["tensor_parallel"], "only with importer=layers or vidur", fix)
    hardware = hardware_spec(options["hardware"])
    names = tuple(MODELS) if options["model"] == "all" else (options["model"],)
    return [kernel_profile(model_spec(name), hardware) for name in names]


def _from_tables(importer: str, options: dict[str, str]) -> Profile:
    tables = Path(options.get("tables", ""))
    if "tables" not in options or not tables.is_dir():
        raise UserError("tables", options.get("tables"), "a folder of measured tables", "set tables=FOLDER")
    meta = read_meta(tables)
    name, hardware = options.get("model", meta.get("model")), options.get("hardware", meta.get("hardware"))
    _check_meta(options, meta)
    if name is None or hardware is None:
        raise UserError("arguments", " ".join(options), "model=NAME hardware=NAME", "add what meta.yaml does not say")
    card = published_card(str(hardware))
    if card is None:
        raise UserError("hardware", hardware, f"one of {', '.join(CARDS)}", "choose one of these")
    degree = options.get("tensor_parallel", "1")
    if not degree.isdigit() or int(degree) < 1:
        raise UserError("tensor_parallel", degree, "a whole number from 1", "correct it")
    build = layer_profile if importer == "layers" else vidur_profile
    return build(tables, published_model(str(name)), str(hardware), card, preset("captured_graphs"), int(degree))


def _check_meta(options: dict[str, str], meta: dict[str, Any]) -> None:
    """Raise UserError if meta.yaml says that another card, or a model of another shape, was measured."""
    told, measured = options.get("hardware"), meta.get("hardware")
    if told and measured and published_card(str(measured)) not in (None, published_card(told)):
        allowed = f"{measured}, on which these tables were measured as meta.yaml says"
        raise UserError("hardware", told, allowed, "leave it out, or correct meta.yaml")
    card = published_card(str(meta.get("gpu")))
    if measured and card is not None and published_card(str(measured)) not in (None, card):
        told = f"gpu {meta['gpu']}, hardware {measured}"
        raise UserError("meta.yaml", told, "one card", "correct it")
    engine = meta.get("engine_effective")
    for key, value in {**(engine if isinstance(engine, dict) else {}), **meta}.items():
        if key in ("variant", "quantization", "dtype", "kv_cache_dtype") and OTHER_TYPES.search(str(value).lower()):
            raise UserError(f"meta.yaml: {key}", value, "bf16 or fp16: a profile is of these", "take those tables")
    told, measured = options.get("model"), meta.get("model")
    if told and measured and str(measured) != told:
        shapes = [asdict(replace(published_model(str(n)), name="any", max_context_tokens=1)) for n in (told, measured)]
        if shapes[0] != shapes[1]:
            allowed = f"of the shape of {measured}, which was measured as meta.yaml says"
            raise UserError("model", told, allowed, "leave it out, or correct meta.yaml")


def _option(argument: str) -> tuple[str, str]:
    key, equals, value = argument.partition("=")
    if not equals or key not in KEYS:
        known = f"models {', '.join(MODELS)}; cards {', '.join(HARDWARE)}"
        raise UserError("argument", argument, USAGE, f"write key=value ({known})")
    return key, value


if __name__ == "__main__":
    sys.exit(main())
