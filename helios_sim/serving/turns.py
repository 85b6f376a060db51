"""The turns of one replica's server on SimPy's clock: the server waits, and others wake it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import simpy
from simpy.events import Event, EventPriority

# At equal times arrivals and control come first (SimPy's own priorities are 0 and 1), then servers by replica.
SERVER_PRIORITY = 10


class Turns:
    def __init__(self, env: simpy.Environment, replica: int) -> None:
        self._env = env
        self._priority = EventPriority(SERVER_PRIORITY + replica)
        self._idle: Event | None = None
        self.woken = False  # whether the server was woken since this was reset

    def at(self, time_ns: int) -> Event:
        """An event at `time_ns`, whatever happens meanwhile."""
        event = self._env.event()
        self._trigger(event, time_ns - int(self._env.now))
        return event

    def told(self) -> tuple[Event, Callable[[Any], None]]:
        """Return an event, and the function that triggers it with a value."""
        event = self._env.event()
        return event, lambda value: self._trigger(event, 0, value)

    def idle(self, alarm_ns: int | None) -> Generator[Event, Any, None]:
        """Wait until the server is woken, at the latest until the alarm."""
        self._idle = idle = self._env.event()
        if alarm_ns is not None:
            alarm = self._env.timeout(alarm_ns - self._env.now)
            assert alarm.callbacks is not None
            alarm.callbacks.append(lambda _: self.wake_idle() if self._idle is idle else None)
        try:
            yield idle
        finally:  # the process may be interrupted
            self._idle = None

    @property
    def is_idle(self) -> bool:
        """Whether the server waits and nothing has woken it."""
        return self._idle is not None and not self._idle.triggered

    def wake(self) -> None:
        """Give the server a turn: now if it is idle, else after its iteration."""
        self.woken = True
        self.wake_idle()

    def wake_idle(self) -> None:
        """Give an idle server a turn now. A busy one takes a turn after its iteration anyway."""
        if self._idle is not None and not self._idle.triggered:
            self._trigger(self._idle, 0)

    def _trigger(self, event: Event, delay_ns: int, value: Any = None) -> None:
        """Trigger an event with this server's priority, which SimPy's timeouts cannot have."""
        event._ok = True
        event._value = value
        self._env.schedule(event, self._priority, delay_ns)
