"""The loop as servers call it, and the router in front of them if requests are routed by load or prefix.

Replicas that need nothing but the loop are parked here, and the router runs them up to each arrival. A replica that
needs more is woken, and its server goes on with it on SimPy's clock.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import simpy
from simpy.events import Event

from helios_sim.core import layout
from helios_sim.core.addresses import Replicas
from helios_sim.core.layout import FOREVER_NS, NEVER, IntArray, Record, Storage, Table, Tables, raw
from helios_sim.core.machine import Machine
from helios_sim.core.route import AWAY, CLOCK, DONE, FRONT, LOOK, PREFIX_AWARE, ROOM, STOPPED, SUBMIT, route
from helios_sim.request import Request, RequestBlock
from helios_sim.routing import Routing
from helios_sim.serving.inbox import COLUMNS, arrival_rows, raw_requests

_ROUTED_AT_ONCE = 1024  # requests that are tokenized for every replica beforehand


class Routed(Protocol):
    """A server that requests are routed to."""

    @property
    def state(self) -> Record: ...
    @property
    def requests_in_system(self) -> int: ...
    def tables(self) -> Tables: ...
    def expect(self, requests: IntArray, rows: Table) -> None: ...
    def make_room(self) -> None: ...
    def submit(self, request: Request) -> None: ...
    def close_arrivals(self) -> None: ...
    def forget_prefixes(self) -> None: ...


class Looker(Protocol):
    """An autoscaler: looks at the requests in each replica from time to time, and says which replicas get requests."""

    @property
    def next_ns(self) -> int: ...
    def look(self, now_ns: int) -> None: ...
    def serves(self, number: int) -> bool: ...
    def gone(self) -> list[int]: ...


class Loop:
    """`core.route` over R replicas, compiled or interpreted."""

    def __init__(self, replicas: int, machine: Machine | None) -> None:
        self.storage = storage = Storage(compiled=machine is not None)
        self.replicas = Replicas(replicas, machine)
        self._one_route: Callable[..., int] = route if machine is None else machine.loop()
        self._route: Callable[..., int] = route if machine is None else machine.loop()
        self._nothing = storage.numbers(0), storage.numbers(0), storage.numbers(0, 2), storage.numbers(0, 0)
        self._one = storage.record(FRONT)
        self._one.until_ns, self._one.look_ns = NEVER, FOREVER_NS
        self._all = storage.array(np.ones(replicas, np.int64))
        self.due_ns, self.inside = storage.numbers(replicas), storage.numbers(replicas)
        self.stops = storage.numbers(replicas)

    def advance(self, number: int, tables: Tables, until_ns: int) -> int:
        """Let one replica run until `until_ns`. Returns why it stopped."""
        one = self._one
        one.first, one.end, one.until_ns = number, number + 1, until_ns
        self.replicas.put(number, tables)
        self.due_ns[number], self._all[number] = NEVER, 1
        self._one_route(
            self.replicas.raw, raw(one), *self._nothing, self._all, self.due_ns, self.inside, self.stops
        )  # fmt: skip
        return int(self.stops[number])

    def route(self, front: Any, routed: Sequence[Any], ahead: Any) -> int:
        return self._route(
            self.replicas.raw, raw(front), *routed, ahead, self.due_ns, self.inside, self.stops
        )  # fmt: skip


class Front:
    """Sends each request to a replica when it arrives, by the load or the cached prefixes of each replica."""

    def __init__(
        self,
        env: simpy.Environment,
        servers: Sequence[Routed],
        routing: Routing,
        machine: Machine | None,
        looker: Looker | None = None,
    ) -> None:
        self.loop = Loop(len(servers), machine)
        self._env, self._servers = env, servers
        storage = self.loop.storage
        self._front = storage.record(FRONT)
        self._front.router, self._front.end, self._front.until_ns = routing.number, len(servers), NEVER
        self._front.look_ns = FOREVER_NS
        self._looker = looker
        self._pairs = routing.pairs(len(servers))
        self._homes = storage.array(routing.homes_table())
        self._ahead = storage.numbers(len(servers))
        self._parked: list[Event | None] = [None] * len(servers)
        self._raw: IntArray = np.zeros((0, len(COLUMNS)), np.int64)
        self._routed: tuple[Any, ...] = ()
        self.closed = False

    @property
    def horizon_ns(self) -> int:
        """The next arrival, before which nothing acts on a replica from outside."""
        if self.closed:
            return FOREVER_NS
        f = self._front
        return min(int(self._raw[int(f.next), 1]), int(f.look_ns)) if f.next < f.known else 0

    def frontier_ns(self, number: int) -> int | None:
        """The time up to which a parked replica has run, or None if it is not parked."""
        return None if self._parked[number] is None else self.horizon_ns

    def park(self, number: int) -> Event:
        """Park a replica that needs nothing but the loop. The event's value is why it stopped."""
        event = self._parked[number] = self._env.event()
        s = self._servers[number].state
        self.loop.due_ns[number] = s.end_ns if s.phase == layout.RUNNING else NEVER
        self.loop.inside[number], self._ahead[number] = s.in_system + s.away, 1
        return event

    def run(self, blocks: Iterator[RequestBlock]) -> Generator[Event, None, None]:
        """The SimPy process of arrivals."""
        f = self._front
        self._note_away()
        for block in blocks:
            for first in range(0, len(block), _ROUTED_AT_ONCE):
                self._expect(raw_requests(block)[first : first + _ROUTED_AT_ONCE])
                yield from self._route()
                f.routed_before += f.known
        self.closed = True
        self._expect(self._raw[:0])
        for server in self._servers:
            server.close_arrivals()
        f.until_ns = FOREVER_NS
        self.loop.route(f, self._routed, self._ahead)
        self._wake()

    def _route(self) -> Generator[Event, None, None]:
        f, env = self._front, self._env
        while True:
            f.clock_ns, f.event_ns = int(env.now), min(env.peek(), FOREVER_NS)
            if self._looker is not None:
                f.look_ns = self._looker.next_ns
            for number, parked in enumerate(self._parked):
                if parked is None:
                    server = self._servers[number]
                    self.loop.inside[number] = server.requests_in_system + int(server.state.away)
                    if f.router == PREFIX_AWARE:  # the router looks into the replicas' prefix tables
                        self._put(number)
            why = self.loop.route(f, self._routed, self._ahead)
            if why == DONE:
                return
            wait_ns = self.horizon_ns - int(env.now)
            if why == ROOM:
                self._servers[int(f.chosen)].make_room()
                self._put(int(f.chosen))
            elif why == SUBMIT and not wait_ns:
                request = Request(*self._raw[int(f.next)].tolist())
                self._servers[int(f.chosen)].submit(request)
                f.next += 1
            elif why == LOOK and not wait_ns:
                assert self._looker is not None
                self._looker.look(int(env.now))
                for number in self._looker.gone():
                    self._servers[number].forget_prefixes()
                self._note_away()
            else:
                assert why in (STOPPED, CLOCK, SUBMIT, LOOK)
                self._wake()
                yield env.timeout(wait_ns)

    def _note_away(self) -> None:
        if self._looker is None:
            return
        for number, server in enumerate(self._servers):
            s, away = server.state, 0 if self._looker.serves(number) else AWAY
            self.loop.inside[number] += away - int(s.away)
            s.away = away

    def _expect(self, requests: IntArray) -> None:
        """Set the next requests, (n, 9)."""
        f, storage = self._front, self.loop.storage
        self._raw, f.next, f.known = requests, 0, len(requests)
        self._routed = (
            storage.array(np.ascontiguousarray(requests[:, 1])), storage.array(np.ascontiguousarray(requests[:, 4])),
            storage.array(self._pairs.take(len(requests))), self._homes,
        )  # fmt: skip
        rows: Table = arrival_rows(storage, requests)
        for number, server in enumerate(self._servers):
            server.expect(requests, rows)
            if self._parked[number] is not None:
                self._put(number)

    def _put(self, number: int) -> None:
        self.loop.replicas.put(number, self._servers[number].tables())

    def _wake(self) -> None:
        """Wake the servers of replicas that have stopped."""
        for number, event in enumerate(self._parked):
            if event is not None and not self._ahead[number]:
                self._parked[number] = None
                event.succeed(int(self.loop.stops[number]))
