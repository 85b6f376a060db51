"""Runs each task once, wherever tasks run, and keeps finished results for a command that is started again.

Progress is shown on stderr: by a bar on a terminal, by the caller's lines elsewhere.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from helios_sim import files
from helios_sim.errors import UserError
from helios_sim.opened import Watched, digest_now
from helios_sim.report.format import visible
from helios_sim.report.terminal import say
from helios_sim.untrusted import parse_json
from helios_sim.vary.workers import Workers

JOURNAL = "finished.jsonl"
CHECKSUM = "sha256"  # last entry of a journal's line
READ = "read"  # entry of a journal's line: digests by path of files that the user's own code read

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True, slots=True)
class Task(Generic[_In]):
    """A task to run. Tasks with equal keys have equal results; `about` describes the task to people."""

    key: str
    about: Mapping[str, Any]
    input: _In
    settings: str = ""  # a key of the settings alone, whatever `made_of` says
    made_now: Callable[[], Mapping[str, str]] = dict  # digests by name of the code and files that it depends on
    made_of: Mapping[str, str] = field(init=False)  # what `made_now` returned when the task was planned

    def __post_init__(self) -> None:
        object.__setattr__(self, "made_of", self.made_now())

    def changed(self, before: Mapping[str, str]) -> list[str]:
        """Return the names of inputs with other digests than in `before`."""
        return sorted(n for n in {*before, *self.made_of} if before.get(n) != self.made_of.get(n))


OnDone = Callable[[Task[_In], _Out, bool], None]  # true: kept from before, not run now


class Store(Protocol[_Out]):
    """How results are kept in a folder: in their lines of the journal, or in files beside it."""

    def save(self, folder: Path, key: str, result: _Out) -> Mapping[str, Any] | None:
        """Keep a result. Returns further entries of its journal line; None if the result is not to be kept."""

    def load(self, folder: Path, key: str, line: Mapping[str, Any]) -> _Out | None:
        """Return the result; None if it is not there. ValueError if it is damaged."""


class Journal(Generic[_Out]):
    """Finished results, one line each, so that a command that was killed goes on from there. No folder: no file.

    A result that is damaged, or was made with other code or files, is not used; a line on stderr says so.
    """

    def __init__(self, folder: Path | None, store: Store[_Out]) -> None:
        """Open the folder's journal. Raises UserError if it cannot be read."""
        self._folder, self._store = folder, store
        self._lines: dict[str, Mapping[str, Any]] = {}  # by key
        self._made_of: dict[str, Mapping[str, str]] = {}  # by settings, what their last result was made of
        self._said: set[str] = set()
        if folder is not None and (folder / JOURNAL).is_file():
            self._read(folder / JOURNAL)

    def get(self, task: Task[Any]) -> _Out | None:
        """Return the task's kept result; None if there is none, it is damaged, or a file that it read has changed."""
        line = self._lines.get(task.key)
        if self._folder is None or line is None:
            self._say_why_not(task)
            return None
        changed = [path for path, digest in self.read_by(task).items() if digest_now(path) != digest]
        if changed:
            del self._lines[task.key]
            self._say(_not_kept(sorted(changed), self._folder))
            return None
        try:
            return self._store.load(self._folder, task.key, line)
        except (ValueError, KeyError, TypeError, AttributeError):
            del self._lines[task.key]
            self._say(f"a result in {self._folder} is damaged: {_in_words(task)} is run anew")
            return None

    def read_by(self, task: Task[Any]) -> Mapping[str, str]:
        """Return digests by path of the files that the user's own code read for the task's result."""
        read = self._lines.get(task.key, {}).get(READ)
        return {str(path): str(digest) for path, digest in read.items()} if isinstance(read, Mapping) else {}

    @property
    def read(self) -> dict[str, str]:
        """Digests by path of the files that the user's own code read, over all tasks."""
        found = [line[READ] for line in self._lines.values() if isinstance(line.get(READ), Mapping)]
        return {path: digest for read in found for path, digest in read.items()}

    def add(self, task: Task[Any], result: _Out, read: Mapping[str, str] | None = None) -> None:
        """Keep a result, with digests of the files `read` for it. UserError if the folder cannot be written to."""
        if self._folder is None:
            return
        said = self._store.save(self._folder, task.key, result)
        if said is None or task.key in self._lines:
            return
        own = {"settings": task.settings, "made_of": dict(task.made_of)} if task.settings else {}
        own |= {READ: dict(read)} if read else {}
        self._lines[task.key] = line = {"key": task.key, **task.about, **said, **own}
        with _writing(self._folder / JOURNAL) as path, path.open("a", encoding="utf-8") as journal:
            journal.write(_with_checksum(line) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def _read(self, path: Path) -> None:
        """Read all lines. Damaged ones, and half a line that a kill has left at the end, are cut out of the file."""
        with _writing(path):
            content = path.read_bytes()
        texts = content.split(b"\n")
        whole = []
        for text in texts[:-1]:
            try:
                line = parse_json(text)
                checksum = line.pop(CHECKSUM)
                if _with_checksum(line) != json.dumps({**line, CHECKSUM: checksum}):
                    raise ValueError("the checksum does not match")
                self._lines[line["key"]] = line
                if "settings" in line:
                    self._made_of[line["settings"]] = dict(line["made_of"])
                whole.append(text)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                self._say(f"{path}: a line is damaged or of an older version, and what it is about is run anew")
        if whole != texts[:-1] or texts[-1]:
            files.write_bytes(path, b"".join(text + b"\n" for text in whole))

    def _say_why_not(self, task: Task[Any]) -> None:
        """Say so on stderr if the same settings were run with other code or files."""
        before = self._made_of.get(task.settings)
        changed = [] if before is None else task.changed(before)
        if changed:
            self._say(_not_kept(changed, self._folder))

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            say(f"helios_sim: {text}", sys.stderr)


def _not_kept(changed: list[str], folder: Path | None) -> str:
    return f"{', '.join(changed)} changed since: results in {folder} are not kept, but run anew"


def _with_checksum(line: Mapping[str, Any]) -> str:
    checksum = hashlib.sha256(json.dumps(line).encode()).hexdigest()[:16]
    return json.dumps({**line, CHECKSUM: checksum})


def _in_words(task: Task[Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in task.about.items())


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    try:
        yield path
    except OSError as error:
        fix = "free space on the disk or choose a folder that you may write to"
        raise UserError("output folder", str(path), f"cannot be written: {error.strerror}", fix) from error


@contextmanager
def at_work_in(folder: Path, key: str = "hydra.run.dir") -> Iterator[None]:
    """Make the folder and lock it against a second process, without a lock file. The lock ends with the process.

    UserError, under the setting that names the folder, if another process is at work in it, if it cannot be made, or if
    it was replaced meanwhile: what was written before is then not in it.
    """
    files.make_folder(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            allowed = "another process is at work in this folder"
            raise UserError(key, str(folder), allowed, "wait until it ends, or name another folder") from None
        except OSError:
            pass  # a file system without locks
        yield
        if not _is_still_there(folder, descriptor):
            allowed = "it was removed or replaced while it was used, and what was written is not there"
            raise UserError(key, str(folder), allowed, "start again, and leave the folder as it is meanwhile")
    finally:
        os.close(descriptor)


def _is_still_there(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def run_tasks(
    function: Callable[[_In], _Out],
    tasks: Iterable[Task[_In]],
    journal: Journal[_Out],
    workers: Workers,
    on_done: OnDone[_In, _Out],
) -> dict[str, _Out]:
    """Return results by key. A task in the journal is read, not run, and `on_done` is told so.

    Raises the first error that `function` raises; what was finished before stays in the journal.
    """
    named = {task.key: task for task in tasks}
    results: dict[str, _Out] = {}
    read: dict[str, str] = {}
    for key, task in named.items():
        kept = journal.get(task)
        if kept is not None:
            results[key] = kept
            read |= journal.read_by(task)
            on_done(task, kept, True)
    given = {k: task.input for k, task in named.items() if k not in results}
    with closing(workers(Watched(function), given)) as finished:
        for key, (result, opened) in finished:
            results[key] = result
            changed = [path for path, digest in opened.items() if read.setdefault(path, digest) != digest]
            _check_unchanged(named[key], changed)
            journal.add(named[key], result, opened)
            on_done(named[key], result, False)
    return results


def _check_unchanged(task: Task[Any], reread: list[str]) -> None:
    """Raise UserError if a file has changed since the task was planned, or since another task read it.

    Results from both contents would be mixed.
    """
    changed = [*task.changed(task.made_now()), *sorted(reread)]
    if changed:
        allowed = "must stay as it is while it is used; what is finished is kept"
        raise UserError(", ".join(changed), "changed meanwhile", allowed, "start again in the same hydra.run.dir")


@contextmanager
def progress(name: str, total: int | None, line: OnDone[_In, _Out]) -> Iterator[OnDone[_In, _Out]]:
    """Yield the function that a runner calls when a task is done: it moves a bar on a terminal, else it is `line`.

    `total`: number of tasks; None if it is not known beforehand.
    """
    if not sys.stderr.isatty():
        yield line
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

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        shown = bar.add_task(visible(name), total=total)

        def advance(task: Task[_In], result: _Out, kept: bool) -> None:
            bar.update(shown, advance=1, description=visible(str(task.about.get("arm", name))))

        yield advance
