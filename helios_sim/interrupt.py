"""Ctrl-C that neither a library nor the interpreter can lose."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked = threading.Event()


@contextmanager
def remembered() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt as ever, and `stop_if_asked` knows of it where an import has swallowed that.

    Outside the main thread, or where SIGINT has another handler already, nothing changes.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        _asked.set()
        raise KeyboardInterrupt

    _asked.clear()
    signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _asked.clear()


def stop_if_asked() -> None:
    """Raises KeyboardInterrupt if there was one since `remembered` began."""
    if _asked.is_set():
        raise KeyboardInterrupt


def leave_by_status() -> None:
    """Call this where a KeyboardInterrupt is handled for good: the process then ends with the status it chooses.

    An interrupt that passed through the `exec` of a text, as in the making of a dataclass, leaves CPython a note to end
    `python -m` by SIGINT whatever happens later; the next such `exec` clears it (`run_eval_code_obj`, `Py_RunMain`).
    """
    exec("")
