"""Whether what a real model needs is installed. Imports none of it."""

from __future__ import annotations

from importlib.util import find_spec

from helios_sim.errors import UserError

LIVE_PACKAGES = ("torch", "transformers", "safetensors", "gguf")


def check_packages(why: str) -> None:
    """UserError where what the extra `live` brings is not installed; `why`: what needs it."""
    missing = [name for name in LIVE_PACKAGES if find_spec(name) is None]
    if missing:
        fix = "run `make live`, or pip install 'helios-llm-sim[live]'"
        raise UserError("packages", ", ".join(missing), f"{why} needs them installed", fix)
