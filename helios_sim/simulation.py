"""Runs one arm: a workload against replicas that share one clock. Knows no file, no report and no experiment."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import simpy
from simpy.core import EmptySchedule
from simpy.events import Event

from helios_sim.request import Request, RequestBlock, RequestRecord
from helios_sim.routing import Routing
from helios_sim.serving.server import Server
from helios_sim.serving.stats import RunStats

ONE_AFTER_THE_OTHER = Routing()


class MakeServer(Protocol):
    def __call__(self, env: simpy.Environment, number: int, on_left: Callable[[RequestRecord], None]) -> Server: ...


@dataclass(frozen=True, slots=True)
class Run:
    """What is left of a run besides its records."""

    servers: tuple[Server, ...]
    stats: RunStats
    requests: int
    end_ns: int
    presence_ns: tuple[int, ...]  # of each replica: requests in it, integrated over time


class LittlesLawViolated(RuntimeError):
    """Time in the system summed over requests differs from requests in the system summed over time."""


@dataclass(slots=True)
class Books:
    """Of one replica. Arrivals and departures are counted separately."""

    arrived: int = 0
    left: int = 0
    presence_ns: int = 0  # requests in it, integrated over time
    sojourn_ns: int = 0  # time in it, summed over requests
    changed_ns: int = 0

    def note_change(self, now_ns: int) -> None:
        self.presence_ns += (self.arrived - self.left) * (now_ns - self.changed_ns)
        self.changed_ns = now_ns


class System:
    """Counts who is in the system, and hands out requests of a closed loop as others leave."""

    def __init__(self, env: simpy.Environment, routing: Routing, sink: Callable[[RequestRecord], None]) -> None:
        self.env = env
        self.servers: tuple[Server, ...] = ()
        self.arrived = 0
        self.left = 0
        self.books: list[Books] = []
        self._routing = routing
        self._sink = sink
        self._closed_loop: Iterator[Request] | None = None
        self._to_release = 0
        self._releasing = False

    def connect(self, servers: tuple[Server, ...]) -> None:
        """Before the first request: who serves."""
        self.servers = servers
        self.books = [Books() for _ in servers]
        self._requests_in = [0] * len(servers)
        self._choose = self._routing.choice(self._requests_in)

    def open_loop(self, blocks: Iterator[RequestBlock]) -> Generator[Event, None, None]:
        """The process of arrivals that do not wait for answers."""
        for block in blocks:
            for request in block.rows():
                if request.arrival_ns > self.env.now:
                    yield self.env.timeout(request.arrival_ns - self.env.now)
                self.dispatch(request)

    def close_loop(self, blocks: Iterator[RequestBlock], users: int) -> None:
        """Starts with one request of each user; each then sends the next one when its last has left."""
        self._closed_loop = (request for block in blocks for request in block.rows())
        for request in list(islice(self._closed_loop, users)):
            self.dispatch(request)

    def dispatch(self, request: Request, from_replica: int | None = None) -> None:
        number = self._choose(request)
        book = self.books[number]
        book.note_change(int(self.env.now))
        book.arrived += 1
        self.arrived += 1
        self._requests_in[number] += 1
        self.servers[number].submit(request, from_replica)

    def close(self) -> None:
        """The run ends: nobody sends a further request."""
        self._closed_loop = None

    def on_left(self, record: RequestRecord) -> None:
        now_ns = int(self.env.now)
        book = self.books[record.replica]
        book.note_change(now_ns)
        book.left += 1
        book.sojourn_ns += now_ns - record.arrival_ns
        self.left += 1
        self._requests_in[record.replica] -= 1
        self._sink(record)
        if self._closed_loop is not None:
            self._to_release += 1
            self._release(record.replica)

    def check_littles_law(self) -> None:
        """L = lambda W holds exactly on every run, in integers, of each replica and so of all together."""
        for number, book in enumerate(self.books):
            book.note_change(int(self.env.now))
            if book.presence_ns != book.sojourn_ns or book.arrived != book.left:
                raise LittlesLawViolated(
                    f"replica {number}: {book.presence_ns} request-ns in it, {book.sojourn_ns} by request; "
                    f"{book.arrived} arrived, {book.left} left"
                )

    def _release(self, from_replica: int) -> None:
        """A request that is dropped on arrival leaves at once and releases the next: a loop, not a recursion."""
        if self._releasing or self._closed_loop is None:
            return
        self._releasing = True
        while self._to_release:
            self._to_release -= 1
            following = next(self._closed_loop, None)
            if following is not None:
                self.dispatch(replace(following, arrival_ns=int(self.env.now)), from_replica)
        self._releasing = False


def simulate(
    make_server: MakeServer,
    blocks: Iterator[RequestBlock],
    requests: int,
    sink: Callable[[RequestRecord], None],
    *,
    users: int | None = None,
    replicas: int = 1,
    routing: Routing = ONE_AFTER_THE_OTHER,
    env: simpy.Environment | None = None,
    outside: Callable[[System], None] | None = None,
) -> Run:
    """Serves all requests and returns when the last one has left.

    `outside` is given the system before the first event: where the environment is a wall clock with a door, whoever
    is outside can send and cancel requests from then on.

    `sink` gets each record as its request leaves. With `users` the loop is closed. Raises LittlesLawViolated when
    the books do not balance, which would be a defect of this program.
    """
    env = env or simpy.Environment(initial_time=0)
    system = System(env, routing, sink)
    system.connect(tuple(make_server(env, number, system.on_left) for number in range(replicas)))
    if users is None:
        env.process(system.open_loop(blocks))
    else:
        system.close_loop(blocks, users)
    if outside is not None:
        outside(system)
    with suppress(EmptySchedule):  # nothing can happen any more, nor can anybody outside act
        while system.left < requests:
            env.step()
    end_ns = int(env.now)
    system.close()
    for server in system.servers:
        server.finish()
    system.check_littles_law()
    stats = RunStats(block_tokens=system.servers[0].stats.block_tokens)
    for server in system.servers:
        stats.merge(server.stats)
    presence_ns = tuple(book.presence_ns for book in system.books)
    return Run(system.servers, stats, system.arrived, end_ns, presence_ns)
