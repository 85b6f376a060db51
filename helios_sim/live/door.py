"""Requests and cancellations from other threads into a system that serves by the wall clock. Knows no policy.

A request arrives, and a cancellation counts, at the moment at which the method was called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, Self

from helios_sim.live.clock import WallClock
from helios_sim.request import Request


class Serves(Protocol):
    """One replica's server."""

    def cancel(self, request_id: int) -> None: ...


class Takes(Protocol):
    """What requests are dispatched to: a `System`."""

    @property
    def servers(self) -> Sequence[Serves]: ...

    def dispatch(self, request: Request) -> None: ...


class Door:
    """Open from its making until `close`: as long as it is, the run waits for whoever may still come.

    Make it in the environment's thread (`simulate(..., outside=...)` hands over the system); use it from any thread.
    """

    def __init__(self, clock: WallClock, system: Takes) -> None:
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
