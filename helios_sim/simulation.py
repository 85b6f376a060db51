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
from helios_sim.serving.ahead.contract import Ledger
from helios_sim.serving.ahead.stretch import worth_compiling
from helios_sim.serving.intake import Intake
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

    def add(self, ledger: Ledger) -> None:
        self.note_change(ledger.from_ns)
        self.presence_ns += ledger.presence_ns
        self.changed_ns = ledger.until_ns
        self.arrived += ledger.arrived
        self.left += len(ledger.records)
        self.sojourn_ns += ledger.sojourn_ns


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

    def open_loop(self, intake: Intake) -> Generator[Event, None, None]:
        """The process of arrivals that do not wait for answers."""
        while (arrival_ns := intake.next_arrival_ns) is not None:
            if arrival_ns > self.env.now:  # a server that looks ahead may take it meanwhile
                yield self.env.timeout(arrival_ns - int(self.env.now))
            elif (request := intake.take(arrival_ns)) is not None:
                self.dispatch(request)

    def close_loop(self, intake: Intake, users: int) -> None:
        """Starts with one request of each user; each then sends the next one when its last has left."""
        self._closed_loop = iter(lambda: intake.take(int(self.env.now)), None)
        self._releasing = True  # whoever is dropped now lets the next one come when all users have begun
        for request in islice(self._closed_loop, users):
            self.dispatch(request)
        self._releasing = False
        self._release(None)

    def dispatch(self, request: Request, from_replica: int | None = None) -> None:
        number = self._choose(request)
        book = self.books[number]
        book.note_change(int(self.env.now))
        book.arrived += 1
        self.arrived += 1
        self._requests_in[number] += 1
        self.servers[number].submit(request, from_replica)

    def settle(self, ledger: Ledger) -> None:
        """A server that had all requests to itself has looked ahead and tells what has come to pass since."""
        self.books[0].add(ledger)
        self.arrived += ledger.arrived
        self.left += len(ledger.records)
        self._requests_in[0] = self.arrived - self.left
        for record in ledger.records:
            self._sink(record)

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

    def _release(self, from_replica: int | None) -> None:
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
    ahead: bool | None = None,
) -> Run:
    """Serves all requests and returns when the last one has left.

    `outside` is given the system before the first event: where the environment is a wall clock with a door, whoever
    is outside can send and cancel requests from then on.

    `ahead`: a server that has all requests to itself computes iterations ahead of the clock, to the same result; None:
    if that is worth it.

    `sink` gets each record as its request leaves. With `users` the loop is closed. Raises LittlesLawViolated when
    the books do not balance, which would be a defect of this program.
    """
    env = env or simpy.Environment(initial_time=0)
    system = System(env, routing, sink)
    system.connect(tuple(make_server(env, number, system.on_left) for number in range(replicas)))
    intake = Intake(blocks, closed_loop=users is not None)
    if replicas == 1 and outside is None and (worth_compiling(requests) if ahead is None else ahead):
        system.servers[0].look_ahead(intake, system.settle)
    if users is None:
        env.process(system.open_loop(intake))
    else:
        system.close_loop(intake, users)
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
