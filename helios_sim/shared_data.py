"""The folder of shared data, such as downloaded traces and weights."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "HELIOS_SHARED_DATA"


def shared_data_folder() -> Path:
    """`$HELIOS_SHARED_DATA`, else `../shared/data` beside the repository; it may not exist."""
    folder = os.environ.get(VARIABLE)
    return Path(folder) if folder else Path(__file__).resolve().parents[2] / "shared" / "data"
