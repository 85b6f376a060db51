"""Ctrl-C between two events of the environment, not in the middle of one. Knows signals and the clock, no server."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from helios_sim.live.clock import WallClock


@contextmanager
def between_events(clock: WallClock) -> Iterator[None]:
    """The first SIGINT raises KeyboardInterrupt from `clock.step()`, when an iteration has been committed whole.

    So whoever is still in the system can leave with a record (`Server.finish`). A second one acts at once. Outside
    the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def stop() -> None:
        raise KeyboardInterrupt

    def on_signal(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        clock.call(stop)

    signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
