"""Opens a trace as text. Knows which files are gzipped, which are JSON lines, and how opening may fail."""

from __future__ import annotations

import csv
import gzip
import zlib
from pathlib import Path
from typing import IO, cast

DAMAGE = (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error)  # what reading a damaged file may raise


def is_jsonl(file: Path) -> bool:
    return file.name.removesuffix(".gz").endswith(".jsonl")


def open_text(file: Path) -> IO[str]:
    """Text of a file that may be gzipped; a byte order mark is dropped."""
    if file.suffix == ".gz":
        return cast(IO[str], gzip.open(file, "rt", encoding="utf-8-sig", newline=""))
    return file.open(encoding="utf-8-sig", newline="")
