"""Finds a trace and opens it as text. Knows which files are gzipped or JSON lines, and how opening may fail."""

from __future__ import annotations

import csv
import gzip
import zlib
from pathlib import Path
from typing import IO, cast

from helios_sim.errors import UserError
from helios_sim.shared_data import VARIABLE, shared_data_folder

DAMAGE = (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error)  # what reading a damaged file may raise


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


def is_jsonl(file: Path) -> bool:
    return file.name.removesuffix(".gz").endswith(".jsonl")


def open_text(file: Path) -> IO[str]:
    """Text of a file that may be gzipped; a byte order mark is dropped."""
    if file.suffix == ".gz":
        return cast(IO[str], gzip.open(file, "rt", encoding="utf-8-sig", newline=""))
    return file.open(encoding="utf-8-sig", newline="")
