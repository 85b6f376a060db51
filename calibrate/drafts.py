"""Reads files of an interrupted call. A damaged file is removed, with a warning, and its content measured again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from helios_sim.errors import lacking
from helios_sim.untrusted import in_short

_Kind = TypeVar("_Kind")
_log = logging.getLogger(__name__)


def kept(path: Path, read: Callable[[Path], _Kind]) -> _Kind | None:
    """Read a file of an interrupted call with `read`; None if the file is missing or damaged.

    Errors from a lack of memory, disk or open files are raised, and the file stays: it is not damaged.
    """
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except Exception as damage:  # safetensors, zipfile, numpy and pyarrow have classes of their own
        if lacking(damage) is not None or (isinstance(damage, OSError) and damage.errno is not None):
            raise
        _log.warning("%s is damaged and is measured again: %s", path, in_short(damage))
        path.unlink()
        return None
