"""Events of a calibration: a line each in transcript.jsonl, and progress on standard error.

On a terminal, progress is a bar; elsewhere it is a line per event.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress as Bar, TextColumn, TimeElapsedColumn

from helios_sim import files
from helios_sim.report.format import visible
from helios_sim.report.terminal import say

FILE = "transcript.jsonl"
_SAYS_ENOUGH = ("kept", "skipped", "failed", "outdated")


@dataclass(frozen=True, slots=True)
class Progress:
    """One event of a stage. `share`: how much of it is done, if known."""

    stage: str
    event: str  # started, going, done, kept, skipped, failed, outdated
    text: str
    share: float | None = None


OnProgress = Callable[[Progress], None]


class Transcript:
    """Writes one line of JSON for each event of every call, next to the results."""

    def __init__(self, folder: Path, on_progress: OnProgress) -> None:
        self._path, self._on_progress = folder / FILE, on_progress

    def note(self, stage: str, event: str, text: str, **more: Any) -> None:
        """Write an event to the file and pass it on. Raises OSError if the file cannot be written."""
        line = {"at": now(), "stage": stage, "event": event, "text": text, **more}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(files.to_json(line) + "\n")
        self._on_progress(Progress(stage, event, text))

    def going(self, stage: str, text: str, share: float | None = None) -> None:
        """Pass on progress without writing it to the file."""
        self._on_progress(Progress(stage, "going", text, share))

    def defect(self, stage: str, error: Exception) -> str:
        """Write a failure with its traceback. Returns it in one line."""
        why = f"{type(error).__name__}: {error}"
        self.note(stage, "failed", why, traceback="".join(traceback.format_exception(error)))
        return why


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@contextmanager
def progress(estimates_s: Mapping[str, float]) -> Iterator[OnProgress]:
    """Show the progress of stages, given how long each is expected to take."""
    if not sys.stderr.isatty():
        yield _line
        return
    stage, now = (TextColumn(text, markup=False) for text in ("{task.description:<12}", "{task.fields[now]}"))
    columns = (stage, BarColumn(), TimeElapsedColumn(), now)
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=sum(estimates_s.values()), now="")
        done = 0.0

        def show(event: Progress) -> None:
            nonlocal done
            whole = estimates_s.get(event.stage, 0.0)
            if event.event in _SAYS_ENOUGH:
                bar.console.print(visible(_words(event)), highlight=False, markup=False)
            if event.event in ("done", "kept", "skipped", "failed"):
                done += whole
                bar.update(task, completed=done, description=event.stage, now="")
            else:
                at = done + whole * min(1.0, event.share or 0.0)
                bar.update(task, completed=at, description=event.stage, now=event.text)

        yield show


def _line(event: Progress) -> None:
    if event.event != "going":
        say(_words(event), sys.stderr)


def _words(event: Progress) -> str:
    return f"{event.stage}: {event.event}{', ' if event.text else ''}{event.text}"
