"""Ctrl-C and SIGTERM, which neither a library nor the interpreter can lose, and an end to what takes too long."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class TimeIsUp(KeyboardInterrupt):
    """The time given to `at_most` is over. It passes whatever a Ctrl-C passes, compiled code of Ray too."""


AGAIN_S = 10.0
_asked = threading.Event()
_USUAL: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


@contextmanager
def remembered() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt, and `stop_if_asked` still does where an import has swallowed that.

    What a library or Python makes of it, as of one in a class body until 3.11, is raised as a KeyboardInterrupt again.

    Outside the main thread nothing changes, nor for a signal that has another handler already.
    """
    in_main = threading.current_thread() is threading.main_thread()
    ours = [number for number, usual in _USUAL.items() if in_main and signal.getsignal(number) is usual]

    def on_signal(number: int, frame: FrameType | None) -> None:
        _asked.set()
        raise KeyboardInterrupt

    if ours:
        _asked.clear()
    for number in ours:
        signal.signal(number, on_signal)
    try:
        yield
    except Exception as error:
        if ours and _asked.is_set():
            raise KeyboardInterrupt from error
        raise
    finally:
        for number in ours:
            signal.signal(number, _USUAL[number])
        if ours:
            _asked.clear()


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Handlers of SIGINT and SIGTERM that a library sets inside are taken back."""
    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in _USUAL} if in_main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: not set from Python
                signal.signal(number, handler)


@contextmanager
def at_most(seconds: float | None) -> Iterator[None]:
    """Raise TimeIsUp inside once so much time has passed, in place of what compiled code makes of it. Without a time,
    outside the main thread, and where SIGALRM is used by others, it never is.
    """
    free = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    if seconds is None or not free:
        yield
        return
    inside, is_up = True, False

    def on_alarm(number: int, frame: FrameType | None) -> None:
        nonlocal is_up
        if inside:
            is_up = True
            raise TimeIsUp

    signal.signal(signal.SIGALRM, on_alarm)
    # again and again, since what is raised where nothing can be raised, as in a finalizer, is lost
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6), min(max(seconds, 1.0), AGAIN_S))
    try:
        yield
    except BaseException as error:
        if is_up and not _asked.is_set():
            raise TimeIsUp from error
        raise
    finally:
        inside = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def is_asked() -> bool:
    """Whether a signal has asked the program to stop; some libraries make an error of their own of its exception."""
    return _asked.is_set()


def stop_if_asked() -> None:
    """Raises KeyboardInterrupt if there was one since `remembered` began."""
    if _asked.is_set():
        raise KeyboardInterrupt


def leave_by_status() -> None:
    """Call this where a KeyboardInterrupt is handled for good: the process then ends with the status it chooses.

    An interrupt that passed through the `exec` of a text, as in the making of a dataclass, leaves CPython a note to end
    `python -m` by SIGINT whatever happens later; the next such `exec` clears it (`run_eval_code_obj`, `Py_RunMain`).
    """
    exec("")  # noqa: S102 - an empty text
