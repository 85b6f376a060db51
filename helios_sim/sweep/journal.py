"""What is finished, line by line, so that a sweep that was killed goes on where it was. Knows one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helios_sim.errors import UserError
from helios_sim.report import files
from helios_sim.report.files import json_value
from helios_sim.report.metrics import Band, Metrics, MetricValue

JOURNAL = "finished.jsonl"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one design: metrics, or an error."""

    metrics: Metrics | None
    error: str | None
    wall_s: float
    lasting: bool = True  # false: an error that a second try may not meet


class Journal:
    """Outcomes by key. With a folder, each is appended to a file there as soon as it is known."""

    def __init__(self, folder: Path | None) -> None:
        """UserError where the folder's journal cannot be read."""
        self._path = None if folder is None else folder / JOURNAL
        self._outcomes = {} if self._path is None else _read(self._path)

    def get(self, key: str) -> Outcome | None:
        return self._outcomes.get(key)

    def add(self, key: str, shown: Mapping[str, Any], outcome: Outcome) -> None:
        """`shown` is for people: which design it was."""
        self._outcomes[key] = outcome
        if self._path is None or not outcome.lasting:
            return
        line = {
            "key": key,
            "design": dict(shown),
            "wall_s": round(outcome.wall_s, 3),
            "error": outcome.error,
            "metrics": json_value(outcome.metrics),
        }
        try:
            with self._path.open("a", encoding="utf-8") as journal:
                journal.write(json.dumps(line) + "\n")
        except OSError as error:
            fix = "free space on the disk or choose a folder that you may write to"
            raise UserError("output folder", str(self._path), f"cannot be written: {error.strerror}", fix) from error


def _read(path: Path) -> dict[str, Outcome]:
    """Half a line at the end, left by a kill, is cut off. Python writes floats so that they read back the same."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        files.write_text(path, whole)
    found = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            metrics = row["metrics"] and {name: _metric(value) for name, value in row["metrics"].items()}
            found[row["key"]] = Outcome(metrics, row["error"], row["wall_s"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            fix = "remove that line, and its design is run again, or choose another hydra.run.dir"
            raise UserError(f"{path}, line {number}", line[:60], "must be a line of a sweep's journal", fix) from error
    return found


def _metric(value: Any) -> MetricValue:
    return Band(**value) if isinstance(value, dict) else value
