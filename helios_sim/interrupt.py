"""Ctrl-C and SIGTERM that neither a library nor the interpreter can lose, and a time limit for a block of code."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class TimeIsUp(KeyboardInterrupt):
    """The time given to `at_most` is over. It passes through all code that a Ctrl-C passes, Ray's compiled code too."""


AGAIN_S = 10.0
_asked = threading.Event()
_USUAL: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


@contextmanager
def remembered() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise KeyboardInterrupt; `stop_if_asked` raises it again if an import has swallowed it.

    If a library or Python turns it into another error, as Python did in a class body until 3.11, the block still raises
    a KeyboardInterrupt.

    Nothing changes outside the main thread, nor for a signal that has another handler already.
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
    """Restore the handlers of SIGINT and SIGTERM at the end of the block, in case a library has replaced them."""
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
    """Raise TimeIsUp in the block after so many seconds, even if compiled code turns it into another error.

    There is no limit without a time, outside the main thread, or if SIGALRM has another handler.
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
    # again and again, since an error that is raised in a finalizer, for example, is ignored
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
    """Whether a signal has asked the program to stop; some libraries replace its exception by one of their own."""
    return _asked.is_set()


def stop_if_asked() -> None:
    """Raise KeyboardInterrupt if a signal has come since `remembered` began."""
    if _asked.is_set():
        raise KeyboardInterrupt


def leave_by_status() -> None:
    """Call this where a KeyboardInterrupt is handled for good: the process then ends with the status it chooses.

    An interrupt that passed through the `exec` of a text, as in the making of a dataclass, sets a flag in CPython that
    ends `python -m` by SIGINT whatever happens later; the next such `exec` clears the flag (`run_eval_code_obj`,
    `Py_RunMain`).
    """
    exec("")  # noqa: S102 - an empty text
