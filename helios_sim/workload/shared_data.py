"""Where data from elsewhere lies. Knows a folder and an environment variable, no file in it."""

from __future__ import annotations

import os
from pathlib import Path

from helios_sim.errors import UserError

VARIABLE = "HELIOS_SHARED_DATA"


def shared_data_folder() -> Path:
    """`$HELIOS_SHARED_DATA`, else `../shared/data` beside the repository; it may not exist."""
    folder = os.environ.get(VARIABLE)
    return Path(folder) if folder else Path(__file__).resolve().parents[3] / "shared" / "data"


def locate(path: str | Path) -> Path:
    """The file itself, or the one of that relative path in the folder of shared data. UserError where neither is."""
    given = Path(path)
    for candidate in (given, shared_data_folder() / given):  # an absolute path stays itself
        if candidate.is_file():
            return candidate
    raise UserError(
        "workload.trace",
        str(path),
        f"there is no such file here, nor in {shared_data_folder()}",
        f"give a path that exists, or set {VARIABLE} to the folder that holds it",
    )
