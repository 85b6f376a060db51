"""Folders outside of the project: shared data, such as downloaded traces and weights, and the cache between runs."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "HELIOS_SHARED_DATA"


def shared_data_folder() -> Path:
    """Return `$HELIOS_SHARED_DATA`, else `../shared/data` beside the repository; it may not exist."""
    folder = os.environ.get(VARIABLE)
    return Path(folder) if folder else Path(__file__).resolve().parents[2] / "shared" / "data"


def cache_folder() -> Path:
    """Return the folder of weights, tokenizers, texts and compiled code; it may not exist or not be writable.

    It is `$HELIOS_CACHE`, else `helios-sim` under `$XDG_CACHE_HOME` or `~/.cache`.
    """
    own = os.environ.get("HELIOS_CACHE")
    base = own or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/helios-sim"
    return Path(base).expanduser()
