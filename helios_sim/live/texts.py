"""The text of prompts, from plain text files. Importing this loads no torch.

A folder holds TASK.txt for every task of the workload; a single file serves all tasks. `python -m calibrate.prompts`
(part of `make models`) writes the held-out texts that exit traces are measured on into the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from helios_sim.errors import UserError
from helios_sim.live.checkpoint.known import cache_folder

FOLDER = "prompts"  # in the cache folder
_FIX = "name a folder with these files or one text file by live.texts, or run `make models`"


class PromptTexts(Protocol):
    """The source of prompt text."""

    def prompt(self, task: int, start: int, chars: int) -> str:
        """The `chars` characters of the workload's task number `task` that end just before character `start`.

        `start` is a request's `text_start`, where the recorded answer begins. It may be any whole number: a task's
        text is circular, so that every span exists.
        """
        ...


@dataclass(frozen=True, slots=True)
class FileTexts:
    """Circular texts, one per task, in the order of the workload's task numbers. No text is empty."""

    by_task: tuple[str, ...]

    def prompt(self, task: int, start: int, chars: int) -> str:
        """The `chars` characters of the task's text that end just before character `start`."""
        text = self.by_task[task]
        end = start % len(text)
        rounds = -(-(chars - end) // len(text)) if chars > end else 0
        whole = text * rounds + text[:end]
        return whole[len(whole) - chars :]


def read_texts(tasks: Sequence[str], place: str | None = None) -> FileTexts:
    """Read the tasks' texts from a folder or a file (`place` None: the cache folder).

    Raises UserError for a missing or empty file.
    """
    where = cache_folder() / FOLDER if place is None else Path(place).expanduser()
    if where.is_file():
        return FileTexts((_read(where),) * len(tasks))
    missing = [task for task in tasks if not (where / f"{task}.txt").is_file()]
    if missing:
        files = ", ".join(f"{task}.txt" for task in missing)
        raise UserError("live.texts", str(where), f"a folder that holds {files}", _FIX)
    return FileTexts(tuple(_read(where / f"{task}.txt") for task in tasks))


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("live.texts", str(path), f"text in UTF-8 that can be read ({error})", _FIX) from error
    if not text.strip():
        raise UserError("live.texts", str(path), "a file with some text", _FIX)
    return text
