"""When the turns of one replica's server come on SimPy's clock: it waits, and others wake it or end a leap early.

It does not know what the server does in a turn.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import simpy
from simpy.events import Event, EventPriority

from helios_sim.serving.iteration import Outcome

# At equal times arrivals and control come first (SimPy's own priorities are 0 and 1), then servers by replica.
SERVER_PRIORITY = 10


class Turns:
    def __init__(self, env: simpy.Environment, replica: int) -> None:
        self._env = env
        self._priority = EventPriority(SERVER_PRIORITY + replica)
        self._process: simpy.Process
        self._idle: Event | None = None
        self._outcome: Outcome | None = None  # of the iterations in progress
        self._cut = 0  # how many of them will be used

    def begin(self, server: Generator[Event, Any, None]) -> None:
        """From now on the server takes its turns; it waits for each by this object."""
        self._process = self._env.process(server)

    def at(self, time_ns: int) -> Event:
        event = self._env.event()
        self._trigger(event, time_ns - int(self._env.now))
        return event

    def after(self, outcome: Outcome, iterations: int) -> Generator[Event, Any, int]:
        """Waits until these iterations have ended and returns how many were used: `wake` may end them early."""
        self._outcome, self._cut = outcome, iterations
        while True:
            try:
                yield self.at(int(outcome.end_ns[self._cut - 1]))
                break
            except simpy.Interrupt:
                pass  # wake has cut the leap
        self._outcome = None
        return self._cut

    def idle(self, alarm_ns: int | None) -> Generator[Event, Any, None]:
        """Waits until somebody wakes the server, at the latest at the alarm."""
        if alarm_ns is not None:
            alarm = self._env.timeout(alarm_ns - self._env.now)
            assert alarm.callbacks is not None
            alarm.callbacks.append(lambda _: self.wake())
        self._idle = self._env.event()
        yield self._idle
        self._idle = None

    def wake(self, turn_passed: bool = False, settled: int = 0) -> None:
        """Something acted on this replica: ends its idling, or its leap with the iteration in progress.

        `turn_passed`: whoever acted comes after this server at equal times, so an iteration that ends now is over.
        `settled`: further iterations that nobody can change any more.
        """
        if self._idle is not None:
            if not self._idle.triggered:
                self._trigger(self._idle, 0)
        elif self._outcome is not None:
            cut = self._outcome.iterations_until(int(self._env.now), turn_passed) + settled
            if cut < self._cut:
                self._cut = cut
                self._process.interrupt()

    def _trigger(self, event: Event, delay_ns: int) -> None:
        """With this server's priority, which SimPy's timeouts do not take."""
        event._ok = True
        event._value = None
        self._env.schedule(event, self._priority, delay_ns)
