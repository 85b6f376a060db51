"""A file with a line of JSON for each answer: its times and tokens as seen by front and engine, without text."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from helios_sim.errors import UserError
from helios_sim.request import RequestRecord

_OF_ENGINE = (
    "request_id", "replica", "arrival_ns", "scheduled_ns", "first_token_ns", "last_token_ns", "layers_run",
    "early_tokens", "breach_tokens", "preemptions",
)  # fmt: skip


class Kept:
    """Appends answers to the file.

    `gaps_s` are times between tokens. Times of the front are in s of the wall clock, the engine's in ns of its own
    clock.
    """

    def __init__(self, path: str) -> None:
        """Opens the file. UserError if it cannot be written."""
        try:
            file = Path(path).expanduser().open("a", encoding="utf-8")
        except OSError as error:
            allowed = f"a file that can be written ({error.strerror})"
            raise UserError("serve.records", path, allowed, "name one in a folder that is there") from error
        assert isinstance(file, TextIOWrapper)
        self._file: TextIOWrapper | None = file

    def note(self, seen: Mapping[str, Any], record: RequestRecord) -> None:
        """Writes the line of one answer. If that fails, as on a full disk, says so once and writes no more lines."""
        if self._file is None:
            return
        engine = {name: getattr(record, name) for name in _OF_ENGINE}
        try:
            self._file.write(json.dumps({**seen, "engine": engine}) + "\n")
            self._file.flush()
        except OSError as error:
            said = f"serve.records: no further lines are written to {self._file.name} ({error.strerror})"
            print(f"helios_sim.serve: {said}", file=sys.stderr, flush=True)
            self._file = None
