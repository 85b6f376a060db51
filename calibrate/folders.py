"""Folders that one process writes and that appear whole. Knows the disk, not what is in them."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helios_sim.errors import UserError

_LOCK = ".lock"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps a second process out of the folder. The system drops the lock when this one ends, however it does."""
    try:
        with (folder / _LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                allowed = "another process is at work in this folder"
                raise UserError("out", str(folder), allowed, "wait until it ends, or name another folder") from None
            yield
    except OSError as error:
        raise unwritable(folder, error) from error


def put(draft: Path, place: Path) -> Path:
    """Moves the finished folder to its place; one with outdated settings makes way."""
    place.parent.mkdir(exist_ok=True)
    if place.exists():
        shutil.rmtree(place)
    os.rename(draft, place)
    return place


def unwritable(folder: Path, error: OSError) -> UserError:
    fix = "free space on the disk or choose a folder that you may write to; finished stages are kept"
    return UserError("out", str(folder), f"cannot be written: {error.strerror or error}", fix)
