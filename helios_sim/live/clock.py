"""Serving by the wall clock: a SimPy environment in whole nanoseconds, and how other threads and Ctrl-C act on it.

Events run in order of their times, and never before the clock has reached them. An engine that computes for a while
returns late. Events that fell due meanwhile run at the time for which they were due, before the end of that
computation, as in a simulation. Time that the host spends between two events delays the next one, and so it counts.

Other threads act on the environment by `WallClock.call`. The queue of calls is drained before every event, a call takes
effect at the time at which it was made, and it wakes an environment that waits. `Door` sends and cancels requests this
way; `between_events` turns Ctrl-C into such a call.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from queue import Empty, Full, SimpleQueue
from time import monotonic
from types import FrameType
from typing import Any, Protocol, Self

import simpy.rt
from simpy.core import EmptySchedule, Infinity
from simpy.events import Timeout

from helios_sim.errors import UserError
from helios_sim.request import LONGEST, NS_PER_S, Request, to_ns

Call = Callable[[], None]
MOST_CALLS = 100_000  # most calls that may wait for the environment
# Longest wait at once. A signal that comes just before a wait does not end it, and its handler runs after it.
_WAIT_S = 0.25
_LARGEST = 1 << 62  # largest number that a workload draws


class WallClock(simpy.rt.RealtimeEnvironment):
    """A SimPy environment on `time.monotonic`. Call `sync()` once everything is loaded and warm: time starts there.

    `speedup`: how many times as fast as the wall clock its time runs.
    """

    def __init__(self, speedup: float = 1.0) -> None:
        super().__init__(initial_time=0, factor=1 / (NS_PER_S * speedup), strict=False)
        self._speedup = speedup
        self._calls: SimpleQueue[tuple[int, Call]] = SimpleQueue()
        self._stopped_s: float | None = None  # when the clock was stopped; None while it runs
        self._doors = 0  # callers that may still call; while there are any, an empty schedule does not end the run

    @property
    def wall_ns(self) -> int:
        """The time on the clock now. `now` is the time of the running event, which is never later."""
        stopped_s = self._stopped_s  # read once: another thread may ask
        return to_ns(((monotonic() if stopped_s is None else stopped_s) - self.real_start) * self._speedup)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the clock inside the `with` block, for measuring the device without charging it to requests.

        Other threads are not stopped, so none should be working.
        """
        self._stopped_s = began_s = monotonic()
        try:
            yield
        finally:
            self.real_start += monotonic() - began_s
            self._stopped_s = None

    def call(self, what: Call, always: bool = False, at_ns: int | None = None) -> None:
        """Run `what` in the environment's thread, at the time of this call. May be called from any thread.

        `at_ns`: as if it had been called then, if nothing later has happened yet. Raises queue.Full if `MOST_CALLS`
        wait already, unless `always`.
        """
        if not always and self._calls.qsize() >= MOST_CALLS:
            raise Full(f"{MOST_CALLS} calls wait for the server")
        self._calls.put((self.wall_ns if at_ns is None else at_ns, what))

    def open_door(self) -> None:
        """Announce a caller: an empty schedule then waits for calls. Only from the environment's thread."""
        self._doors += 1

    def close_door(self) -> None:
        """Announce that a caller is done. May be called from within a call."""
        self._doors -= 1

    @property
    def awaits_calls(self) -> bool:
        return self._doors > 0

    def step(self) -> None:
        """Run the next event when it is due. Raises EmptySchedule if there is none and no caller is left."""
        while not self._is_due():
            left_s = self._seconds_left()
            if left_s is None and not self._doors:
                self._drain()
                if self.peek() == Infinity:
                    raise EmptySchedule
                continue
            with suppress(Empty):
                # the event may have fallen due since the last check
                wait_s = _WAIT_S if left_s is None else min(max(0.0, left_s), _WAIT_S)
                self._accept(self._calls.get(timeout=wait_s))
        self._drain()  # calls made before the event was due come first, later ones after it
        simpy.Environment.step(self)

    def _is_due(self) -> bool:
        left_s = self._seconds_left()
        return left_s is not None and left_s <= 0

    def _seconds_left(self) -> float | None:
        due_ns = self.peek()
        return None if due_ns == Infinity else self.real_start + due_ns / NS_PER_S / self._speedup - monotonic()

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
    """Server of one replica, as far as `Door` uses it."""

    def cancel(self, request_id: int, reason: str) -> None: ...
    def end_answer(self, request_id: int) -> None: ...


class DispatchTarget(Protocol):
    """Receiver of requests, such as a `System`."""

    @property
    def servers(self) -> Sequence[CancelTarget]: ...

    def dispatch(self, request: Request) -> None: ...


class Door:
    """Sends and cancels requests from other threads. The run does not end before the door is closed.

    Create it in the environment's thread (`simulate(..., outside=...)` passes the system); use it from any thread. A
    request arrives, and a cancellation counts, at the time at which the method is called. `tasks`: how many tasks the
    workload has. An invalid call raises an error in its caller, and the run goes on.
    """

    def __init__(self, clock: WallClock, system: DispatchTarget, tasks: int = 1) -> None:
        self._clock, self._system, self._tasks = clock, system, tasks
        self._lock, self._closed = threading.Lock(), False
        self._last_sent = -1
        clock.open_door()

    def send(self, request: Request) -> None:
        """Dispatch a request that arrives now.

        Raises UserError for a malformed request, for a number that is not above all that were sent before, and after
        `close`; queue.Full if the server is too far behind.
        """
        self._check(request)
        with self._lock:
            self._require_open()
            if request.request_id <= self._last_sent:
                raise UserError("request_id", request.request_id, "a number above all that were sent", "count on")
            self._clock.call(lambda: self._system.dispatch(replace(request, arrival_ns=int(self._clock.now))))
            self._last_sent = request.request_id

    def cancel(self, request_id: int, reason: str = "cancelled") -> None:
        """Abort the request between two iterations, wherever it is. Does nothing if it has left already.

        Raises UserError after `close`.
        """

        def everywhere() -> None:
            for server in self._system.servers:
                server.cancel(request_id, reason)

        with self._lock:
            self._require_open()
            self._clock.call(everywhere, always=True)

    def end_answer(self, request_id: int) -> None:
        """Let the request complete with its next token. Does nothing if it has left already.

        Raises UserError after `close`.
        """

        def everywhere() -> None:
            for server in self._system.servers:
                server.end_answer(request_id)

        with self._lock:
            self._require_open()
            self._clock.call(everywhere, always=True)

    def close(self, now: bool = False) -> None:
        """End the calls. Only the first call counts. The run ends when all requests have left, and no alarm is due.

        `now`: the run ends between two events, and requests that are still in the system leave as unfinished.
        """
        with self._lock:
            if not self._closed:
                self._closed = True
                self._clock.call(_end if now else self._clock.close_door, always=True)

    def _require_open(self) -> None:
        if self._closed:
            raise UserError("door", "closed", "open: what is sent now would be lost", "send before close()")

    def _check(self, request: Request) -> None:
        """Raise UserError for a request that the server could not serve."""
        if not isinstance(request, Request):
            raise UserError("request", type(request).__name__, "a Request", "make one: helios_sim.request.Request")
        ranges = {
            "request_id": (0, _LARGEST), "prompt_chars": (1, LONGEST), "output_chars": (1, LONGEST),
            "task": (0, self._tasks - 1), "text_start": (-_LARGEST, _LARGEST), "priority": (-_LARGEST, _LARGEST),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(request, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise UserError(f"{name} of a request", value, f"a whole number from {low} to {high}", "correct it")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *of_error: Any) -> None:
        self.close()


def _end() -> None:
    raise EmptySchedule


@contextmanager
def between_events(clock: WallClock) -> Iterator[None]:
    """Let the first SIGINT raise KeyboardInterrupt from `clock.step()`, after the running iteration is committed.

    Requests that are still in the system can then end with a record (`Server.finish`). A second SIGINT acts at once.
    Outside the main thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def stop() -> None:
        raise KeyboardInterrupt

    def on_signal(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        clock.call(stop, always=True)

    signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
