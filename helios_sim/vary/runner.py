"""The one runner: each task once, wherever it runs, and what is finished is kept for a command that starts again.

It tells how far it is on stderr: by a bar on a terminal, by the caller's lines elsewhere.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from helios_sim.errors import UserError
from helios_sim.report import files
from helios_sim.vary.workers import Workers

JOURNAL = "finished.jsonl"

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True, slots=True)
class Task(Generic[_In]):
    """`key` is the same for the same result; `about` says to people what it is."""

    key: str
    about: Mapping[str, Any]
    input: _In


OnDone = Callable[[Task[_In], _Out, bool], None]  # true: kept from before, not run now


class Store(Protocol[_Out]):
    """How results are kept in a folder: in their lines of the journal, or in files beside it."""

    def save(self, folder: Path, key: str, result: _Out) -> Mapping[str, Any] | None:
        """Keeps a result. Returns what its line says of it; None: it is not to be kept."""

    def load(self, folder: Path, key: str, line: Mapping[str, Any] | None) -> _Out | None:
        """The result, None where it is not there. KeyError, TypeError or AttributeError for a line that is damaged."""


class Journal(Generic[_Out]):
    """What is finished, a line each, so that a command that was killed goes on where it was. No folder: no file."""

    def __init__(self, folder: Path | None, store: Store[_Out]) -> None:
        """UserError where the folder's journal cannot be read."""
        self._folder, self._store = folder, store
        self._lines: dict[str, tuple[int, Mapping[str, Any]]] = {}  # by key: which line it is, and what it says
        if folder is not None:
            for number, text in enumerate(_whole_lines(folder / JOURNAL), start=1):
                try:
                    line = json.loads(text)
                    self._lines[line["key"]] = number, line
                except (ValueError, KeyError, TypeError) as error:
                    raise self._damaged(number, text) from error

    def get(self, task: Task[Any]) -> _Out | None:
        """UserError where its line is damaged."""
        if self._folder is None:
            return None
        number, line = self._lines.get(task.key, (0, None))
        try:
            found = self._store.load(self._folder, task.key, line)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(number, json.dumps(line)) from error
        if found is not None and line is None:  # killed between the result and its line
            self.add(task, found)
        return found

    def add(self, task: Task[Any], result: _Out) -> None:
        if self._folder is None:
            return
        said = self._store.save(self._folder, task.key, result)
        if said is None or task.key in self._lines:
            return
        line = {"key": task.key, **task.about, **said}
        self._lines[task.key] = len(self._lines) + 1, line
        path = self._folder / JOURNAL
        try:
            with path.open("a", encoding="utf-8") as journal:
                journal.write(json.dumps(line) + "\n")
        except OSError as error:
            fix = "free space on the disk or choose a folder that you may write to"
            raise UserError("output folder", str(path), f"cannot be written: {error.strerror}", fix) from error

    def _damaged(self, number: int, text: str) -> UserError:
        assert self._folder is not None
        where, fix = f"{self._folder / JOURNAL}, line {number}", "remove that line, and what it is about is run again"
        return UserError(where, text[:60], "must be a line of a journal", f"{fix}, or choose another hydra.run.dir")


def run_tasks(
    function: Callable[[_In], _Out],
    tasks: Iterable[Task[_In]],
    journal: Journal[_Out],
    workers: Workers,
    on_done: OnDone[_In, _Out],
) -> dict[str, _Out]:
    """Results by key. What the journal holds is read, not run, and `on_done` is told so.

    Raises the first error that `function` raises; what was finished before stays in the journal.
    """
    named = {task.key: task for task in tasks}
    results: dict[str, _Out] = {}
    for key, task in named.items():
        kept = journal.get(task)
        if kept is not None:
            results[key] = kept
            on_done(task, kept, True)
    with closing(workers(function, {k: task.input for k, task in named.items() if k not in results})) as finished:
        for key, result in finished:
            results[key] = result
            journal.add(named[key], result)
            on_done(named[key], result, False)
    return results


@contextmanager
def progress(name: str, total: int, say: OnDone[_In, _Out]) -> Iterator[OnDone[_In, _Out]]:
    """What a runner calls when a task is done. `say` prints lines, where there is no terminal for a bar."""
    if not sys.stderr.isatty():
        yield say
        return
    from rich.console import Console  # a tenth of a second, and only a terminal needs it
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        line = bar.add_task(name, total=total)

        def advance(task: Task[_In], result: _Out, kept: bool) -> None:
            bar.update(line, advance=1, description=str(task.about.get("arm", name)))

        yield advance


def _whole_lines(path: Path) -> list[str]:
    """Half a line at the end, left by a kill, is cut off."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        files.write_text(path, whole)
    return whole.splitlines()
