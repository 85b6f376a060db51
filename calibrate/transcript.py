"""What happened in a calibration, as lines in a file and as calls to a watcher. Knows no stage's meaning."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from helios_sim.report import files

FILE = "transcript.jsonl"


@dataclass(frozen=True, slots=True)
class Progress:
    """One thing that happened to a stage. `share` of it is done, where that is known."""

    stage: str
    event: str  # started, going, done, kept, skipped, failed, outdated
    text: str
    share: float | None = None


OnProgress = Callable[[Progress], None]


class Transcript:
    """One line of JSON for each event of every call, beside the results."""

    def __init__(self, folder: Path, on_progress: OnProgress) -> None:
        self._path, self._on_progress = folder / FILE, on_progress

    def note(self, stage: str, event: str, text: str, **more: Any) -> None:
        """Into the file and to the watcher. OSError when the file cannot be written to."""
        line = {"at": now(), "stage": stage, "event": event, "text": text, **more}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(files.to_json(line) + "\n")
        self._on_progress(Progress(stage, event, text))

    def going(self, stage: str, text: str, share: float | None = None) -> None:
        """To the watcher alone."""
        self._on_progress(Progress(stage, "going", text, share))

    def defect(self, stage: str, error: Exception) -> str:
        """Notes a failure with its traceback, for whoever mends it; returns it in one line."""
        why = f"{type(error).__name__}: {error}"
        self.note(stage, "failed", why, traceback="".join(traceback.format_exception(error)))
        return why


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
