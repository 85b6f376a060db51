"""A few short tasks in processes that are forked from this one: they have everything it has loaded, and start at once.

joblib's processes load and build everything again, which takes longer than such tasks.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import wait
from typing import Any, Generic, TypeVar

_In = TypeVar("_In")
_Out = TypeVar("_Out")


class ForkEnded(Exception):
    """A process ended before its task did."""


def can_fork() -> bool:
    """Whether this process can fork safely: a fork lacks all other threads, and locks that they hold stay held."""
    return sys.platform == "linux" and threading.active_count() == 1


class Forks(Generic[_In, _Out]):
    """Processes that work on these values. Each first calls `begin` with the process id of this one."""

    def __init__(
        self, function: Callable[[_In], _Out], values: Sequence[_In], workers: int, begin: Callable[[int], None]
    ) -> None:
        context: Any = get_context("fork")
        self._values = len(values)
        self._forks: list[tuple[Any, Any]] = []  # each with our end of its pipe
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # or each fork would write the buffered text again
        with warnings.catch_warnings():  # about threads of libraries, which handle forks by themselves
            warnings.simplefilter("ignore", DeprecationWarning)
            for _ in range(min(workers, len(values))):
                ours, theirs = context.Pipe()
                fork = context.Process(target=_work, args=(function, values, theirs, begin, os.getpid()), daemon=True)
                fork.start()
                theirs.close()
                self._forks.append((fork, ours))

    def results(self) -> Iterator[_Out]:
        """Yield results in the order of the values. Raises the first error among them, or ForkEnded."""
        busy: dict[Any, int] = {}
        found: dict[int, tuple[bool, Any]] = {}
        places = iter(range(self._values))

        def go_on(ours: Any) -> None:
            place = next(places, None)
            if place is not None:
                ours.send(place)
                busy[ours] = place

        for place in range(self._values):
            try:
                for _, ours in self._forks if place == 0 else ():
                    go_on(ours)
                while place not in found:
                    ready: list[Any] = wait(list(busy))
                    for ours in ready:
                        found[busy.pop(ours)] = ours.recv()
                        go_on(ours)
            except (EOFError, ConnectionError) as error:
                raise ForkEnded from error
            well, result = found.pop(place)
            if not well:
                raise result
            yield result

    def close(self) -> None:
        """End the processes, whatever they do."""
        for fork, ours in self._forks:
            ours.close()
            fork.kill()
            fork.join()


def _work(
    function: Callable[[Any], Any], values: Sequence[Any], theirs: Any, begin: Callable[[int], None], parent: int
) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    begin(parent)
    while True:
        place = theirs.recv()
        try:
            sent = True, function(values[place])
        except Exception as error:  # `results` raises it in the parent process
            sent = False, error
        theirs.send(sent)
