"""The wall clock as a SimPy environment in whole nanoseconds, with a door for whoever is outside. Knows no server.

Events run in order of their times, never before the clock has reached them. An engine that computes for a while
returns late; what fell due meanwhile runs at the time for which it was due, before the end of that computation, just
as in a simulation. Time that the host spends between two events makes the next one late, and so it counts.

Other threads act on what is served by `call`. Such a call happens at the moment it was made: the queue of calls is
drained before every event, and it wakes an environment that waits.


Requests and cancellations from other threads into a system that serves by the wall clock. Knows no policy.

A request arrives, and a cancellation counts, at the moment at which the method was called.


Ctrl-C between two events of the environment, not in the middle of one. Knows signals and the clock, no server.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from queue import Empty, SimpleQueue
from time import monotonic
from types import FrameType
from typing import Any, Protocol, Self

import simpy.rt
from simpy.core import EmptySchedule, Infinity
from simpy.events import Timeout

from helios_sim.request import NS_PER_S, Request

Call = Callable[[], None]


class WallClock(simpy.rt.RealtimeEnvironment):
    """`sync()` once everything is loaded and warm: from then on time passes. One clock, `time.monotonic`."""

    def __init__(self) -> None:
        super().__init__(initial_time=0, factor=1 / NS_PER_S, strict=False)
        self._calls: SimpleQueue[tuple[int, Call]] = SimpleQueue()
        self._stopped_s: float | None = None  # when, while it is
        self._doors = 0  # callers who may still come: until then an empty schedule is no end

    @property
    def wall_ns(self) -> int:
        """Time on the clock now; `now` is the time of the event that runs, which is never later."""
        stopped_s = self._stopped_s  # read once: another thread may ask
        return round(((monotonic() if stopped_s is None else stopped_s) - self.real_start) * NS_PER_S)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """No time passes meanwhile, for whoever looks at the device and must not be served by it. Other threads do not
        stop, so none should be at work.
        """
        self._stopped_s = began_s = monotonic()
        try:
            yield
        finally:
            self.real_start += monotonic() - began_s
            self._stopped_s = None

    def call(self, what: Call) -> None:
        """From any thread: `what` runs in the environment's thread, at the time of this call."""
        self._calls.put((self.wall_ns, what))

    def open_door(self) -> None:
        """Somebody outside will call: an empty schedule is waited on. From the environment's thread."""
        self._doors += 1

    def close_door(self) -> None:
        """That one calls no more. Also from within a call."""
        self._doors -= 1

    def step(self) -> None:
        """Runs the next event when it is due. EmptySchedule where there is none and nobody can call any more."""
        while not self._is_due():
            left_s = self._seconds_left()
            if left_s is None and not self._doors:
                self._drain()
                if self.peek() == Infinity:
                    raise EmptySchedule
                continue
            with suppress(Empty):
                # it may have fallen due since it was looked at
                self._accept(self._calls.get(timeout=None if left_s is None else max(0.0, left_s)))
        self._drain()  # with the event due, whoever called before it comes first; whoever calls now comes later
        simpy.Environment.step(self)

    def _is_due(self) -> bool:
        left_s = self._seconds_left()
        return left_s is not None and left_s <= 0

    def _seconds_left(self) -> float | None:
        due_ns = self.peek()
        return None if due_ns == Infinity else self.real_start + due_ns / NS_PER_S - monotonic()

    def _drain(self) -> None:
        while True:
            try:
                self._accept(self._calls.get_nowait())
            except Empty:
                return

    def _accept(self, call: tuple[int, Call]) -> None:
        called_ns, what = call
        event = Timeout(self, max(called_ns - int(self.now), 0))
        assert event.callbacks is not None
        event.callbacks.append(lambda _: what())


class CancelTarget(Protocol):
    """One replica's server."""

    def cancel(self, request_id: int) -> None: ...


class DispatchTarget(Protocol):
    """What requests are dispatched to: a `System`."""

    @property
    def servers(self) -> Sequence[CancelTarget]: ...

    def dispatch(self, request: Request) -> None: ...


class Door:
    """Open from its making until `close`: as long as it is, the run waits for whoever may still come.

    Make it in the environment's thread (`simulate(..., outside=...)` hands over the system); use it from any thread.
    """

    def __init__(self, clock: WallClock, system: DispatchTarget) -> None:
        self._clock, self._system = clock, system
        clock.open_door()

    def send(self, request: Request) -> None:
        """Its number must be nobody else's; the time of its arrival is now."""
        self._clock.call(lambda: self._system.dispatch(replace(request, arrival_ns=int(self._clock.now))))

    def cancel(self, request_id: int) -> None:
        """The request leaves between two iterations, wherever it is; one that has left already is let be."""

        def everywhere() -> None:
            for server in self._system.servers:
                server.cancel(request_id)

        self._clock.call(everywhere)

    def close(self) -> None:
        self._clock.call(self._clock.close_door)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *of_error: Any) -> None:
        self.close()


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
