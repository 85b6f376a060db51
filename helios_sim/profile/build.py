"""Command that builds one model x card profile: `python -m helios_sim.profile.build model=NAME hardware=NAME`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from helios_sim.errors import UserError
from helios_sim.profile.kernels import kernel_profile
from helios_sim.profile.models import HARDWARE, MODELS, hardware_spec, model_spec
from helios_sim.profile.store import PROFILES_FOLDER, write_profile

USAGE = "model=NAME|all hardware=NAME [folder=PATH]"


def main(arguments: Sequence[str]) -> int:
    """Builds from measured kernels and writes; returns the exit status."""
    try:
        options = dict(_option(a) for a in arguments)
        if missing := {"model", "hardware"} - options.keys():
            raise UserError("arguments", " ".join(arguments), USAGE, f"add {' and '.join(sorted(missing))}")
        hardware = hardware_spec(options["hardware"])
        names = tuple(MODELS) if options["model"] == "all" else (options["model"],)
        for name in names:
            profile = kernel_profile(model_spec(name), hardware)
            path = Path(options.get("folder", PROFILES_FOLDER)) / profile.name
            write_profile(profile, path)
            print(path)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _option(argument: str) -> tuple[str, str]:
    key, equals, value = argument.partition("=")
    if not equals or key not in {"model", "hardware", "folder"}:
        known = f"models {', '.join(MODELS)}; cards {', '.join(HARDWARE)}"
        raise UserError("argument", argument, USAGE, f"write key=value ({known})")
    return key, value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
