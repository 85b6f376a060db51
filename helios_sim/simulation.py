"""Runs one arm: a workload against replicas that share one clock."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING, Protocol

import numpy as np
import simpy
from simpy.core import EmptySchedule
from simpy.events import Event

from helios_sim.core.layout import FLUSH_REQUESTS, FOREVER_NS
from helios_sim.core.machine import Machine, for_run
from helios_sim.request import RecordBlock, Request, RequestBlock, RequestRecord
from helios_sim.routing import DOWN, Routing, stand_in
from helios_sim.serving.autoscale import Autoscaler, Scaled, Scaling
from helios_sim.serving.faults import Injector
from helios_sim.serving.front import Front
from helios_sim.serving.replica import OnLeft
from helios_sim.serving.server import Server
from helios_sim.serving.stats import RunStats
from helios_sim.workload.faults import FaultPlan, Outages, Struck

if TYPE_CHECKING:
    from helios_sim.by_answer import Answered, Judging

ONE_AFTER_THE_OTHER = Routing()
_MERGED_AT_ONCE = 4096  # records of several replicas that are collected before they are put in order
_LEAST_DEPARTURES = 64  # least room of each of many replicas for requests that have left

Sink = Callable[[RequestRecord], None]
BlockSink = Callable[[RecordBlock], None]


class MakeServer(Protocol):
    def __call__(self, env: simpy.Environment, number: int, on_left: OnLeft) -> Server: ...


@dataclass(frozen=True, slots=True)
class Run:
    """Results of a run besides its records."""

    servers: tuple[Server, ...]
    stats: RunStats
    requests: int
    end_ns: int
    presence_ns: tuple[int, ...]  # by replica: requests in it, integrated over time
    faults: tuple[Struck, ...] | None = None  # what each fault did; None if none was planned
    scaled: Scaled | None = None  # None if all replicas were always on
    answered: Answered | None = None  # None if no router went by answers


class LittlesLawViolated(RuntimeError):
    """Time in the system summed over requests differs from requests in the system summed over time."""


class System:
    """Sends requests to replicas, counts requests in the system, and hands on the records of requests that left.

    If the routing does not depend on load, each replica is fed its own requests and runs ahead of the clock. Otherwise
    requests are dispatched as they arrive.
    """

    def __init__(
        self, env: simpy.Environment, routing: Routing, sink: Sink, block_sink: BlockSink | None = None
    ) -> None:
        self.env = env
        self.servers: tuple[Server, ...] = ()
        self.left = 0
        self._routing = routing
        self.judging: Judging | None = None
        self._sink, self._block_sink = sink, block_sink
        self._in_order: list[tuple[int, int, int, int, RequestRecord]] | None = None
        self._merge_at = _MERGED_AT_ONCE
        self._closed_loop: Iterator[Request] | None = None
        self._to_release = 0
        self._releasing = False
        self._arrivals_to_come = False  # open-loop ones, which do not wait for answers
        self._first_arrival_ns: dict[int, int] = {}  # of requests in the system that a fault has hit
        self.sent_again = 0

    def connect(self, servers: tuple[Server, ...]) -> None:
        """Set the replicas that serve, before the first request."""
        self.servers = servers
        self._requests_in = [0] * len(servers)
        self._back_ns: list[int | None] = [None] * len(servers)  # of replicas that are down
        self._sent: list[int] | None = None  # requests sent to each replica, if they are dispatched
        by_answer = self._routing.by_answer
        if by_answer is not None:
            self.judging = by_answer.begin(self._requests_in, self._routing.seed)
        self._choose = self.judging.choose if self.judging is not None else self._routing.choice(
            self._requests_in, lambda number, request: servers[number].cached_share(request)
        )

    def feed(
        self,
        blocks: Iterator[RequestBlock],
        machine: Machine | None,
        users: int | None,
        faults: FaultPlan | None = None,
    ) -> None:
        """Give each replica all its requests; the replica then runs ahead of the clock."""
        if len(self.servers) == 1:
            # with faults, a record may have to be changed before it is handed on
            on_block = None if self._block_sink is None or faults is not None else self.on_block
            self.servers[0].open(machine, blocks, users, on_block=on_block)
            return
        self._in_order = []
        outages = None if faults is None else Outages(faults, len(self.servers))
        split = _Split(blocks, len(self.servers), self._routing, outages)
        for number, server in enumerate(self.servers):
            server.open(machine, split.feed(number))

    def open_loop(self, requests: Iterator[Request]) -> Generator[Event, None, None]:
        """SimPy process of open-loop arrivals, which do not wait for answers."""
        self._arrivals_to_come = True
        for request in requests:
            if request.arrival_ns > self.env.now:
                yield self.env.timeout(request.arrival_ns - int(self.env.now))
            self.dispatch(request)
        self._arrivals_to_come = False

    def open(self, machine: Machine | None) -> None:
        """Open the replicas for requests that will be dispatched at any time."""
        self._sent = [0] * len(self.servers)
        for server in self.servers:
            server.open(machine)

    def front(self, blocks: Iterator[RequestBlock], machine: Machine | None, scaler: Autoscaler | None = None) -> None:
        """Dispatch requests as they arrive; between two arrivals nothing acts on a replica from outside."""
        self._in_order = []
        front = Front(self.env, self.servers, self._routing, machine, scaler)
        departures = FLUSH_REQUESTS // len(self.servers)
        for server in self.servers:
            server.open(machine, front=front, departures=max(departures, _LEAST_DEPARTURES))
        self.env.process(front.run(blocks))

    def close_loop(self, requests: Iterator[Request], users: int) -> None:
        """Start with one request of each user; each user sends the next one when its last has left."""
        self._closed_loop = requests
        self._releasing = True  # requests dropped now release the next ones only after all users have begun
        for request in islice(self._closed_loop, users):
            self.dispatch(request)
        self._releasing = False
        self._release(None)

    def dispatch(self, request: Request, from_replica: int | None = None) -> None:
        number = self._choose(request)
        if self._back_ns[number] is not None:
            number = stand_in(number, self._routing.meant(request.task, len(self.servers)), self._back_ns)
        self._send(request, number, from_replica)

    def _send(self, request: Request, number: int, from_replica: int | None = None) -> None:
        self._requests_in[number] += 1
        if self._sent is not None:
            self._sent[number] += 1
        self.servers[number].submit(request, from_replica)

    def send_again(self, lost: Iterable[Request], lost_by: int) -> None:
        """Let requests that a fault has hit arrive anew, in another replica if one is up."""
        for place, request in enumerate(lost):
            self._first_arrival_ns.setdefault(request.request_id, request.arrival_ns)
            self.sent_again += 1
            self._requests_in[lost_by] -= 1
            number = self._routing.again(place, request.task, lost_by, self._requests_in, self._back_ns)
            self._send(replace(request, arrival_ns=int(self.env.now)), number)

    def note_down(self, replica: int, back_ns: int | None) -> None:
        """Note that the replica is down until `back_ns`, or up again if that is None."""
        self._back_ns[replica] = back_ns
        self._requests_in[replica] += DOWN if back_ns is not None else -DOWN

    def requests_in(self, replica: int) -> int:
        """Return the requests in a replica now, up or down, if requests are dispatched."""
        return self._requests_in[replica] - (DOWN if self._back_ns[replica] is not None else 0)

    def requests_served(self, replica: int) -> int:
        """Return the requests in a replica now, by the books of its server."""
        return self.servers[replica].requests_in_system

    def follow(self, scaler: Autoscaler) -> None:
        """Let requests go only to the replicas that the autoscaler lets serve."""
        for number in range(len(self.servers)):
            if (self._back_ns[number] is None) != scaler.serves(number):
                self.note_down(number, None if scaler.serves(number) else FOREVER_NS)

    def scale(self, scaler: Autoscaler) -> Generator[Event, None, None]:
        """SimPy process of an autoscaler while requests are dispatched; it ends after the last arrival."""
        while True:
            yield self.env.timeout(scaler.next_ns - int(self.env.now))
            if not self._arrivals_to_come:
                return
            scaler.look(int(self.env.now))
            for number in scaler.gone():
                self.servers[number].forget_prefixes()
            self.follow(scaler)

    def more_comes(self) -> bool:
        """Whether open-loop requests are still to arrive, or clients from outside may send some."""
        outside = bool(getattr(self.env, "awaits_calls", False))
        return self._arrivals_to_come or outside or any(server.expects for server in self.servers)

    def close(self) -> None:
        """End the run: no further request is sent."""
        self._closed_loop = None

    def on_left(self, record: RequestRecord, left_ns: int) -> None:
        self._requests_in[record.replica] -= 1
        if self.judging is not None:
            judged = self.judging.judge(record, left_ns)
            if isinstance(judged, Request):  # another kind is to answer it
                self.sent_again += 1
                self.dispatch(replace(judged, arrival_ns=int(self.env.now)), record.replica)
                return
            record = judged
        self.left += 1
        if record.request_id in self._first_arrival_ns:
            record = replace(record, arrival_ns=self._first_arrival_ns.pop(record.request_id))
        if self._in_order is None:
            self._sink(record)
        else:
            later = left_ns != record.arrival_ns  # requests that left on arrival come first, in order of arrival
            self._in_order.append((left_ns, later, record.replica if later else record.request_id, self.left, record))
            if len(self._in_order) >= self._merge_at:  # this replica hands over its records in order of time
                self._hand_on(min(left_ns, *(server.frontier_ns for server in self.servers)))
        if self._closed_loop is not None:
            self._to_release += 1
            self._release(record.replica)

    def on_block(self, block: RecordBlock) -> None:
        """Hand on records of the only replica, for which nothing else in the system waits."""
        assert self._block_sink is not None
        self.left += len(block)
        self._requests_in[0] -= len(block)
        self._block_sink(block)

    def finish(self) -> None:
        self._hand_on(FOREVER_NS)
        self._in_order = None
        for server in self.servers:
            server.finish()

    def check_littles_law(self) -> None:
        """Raise LittlesLawViolated unless L = lambda W holds exactly, in integers, for each replica and so for all.

        A request that a fault has hit, or that a cascade hands on, leaves one replica and arrives in another; it has
        one record in the end.
        """
        arrived_in_all = sum(server.books[2] for server in self.servers)
        if arrived_in_all - self.sent_again != self.left:
            raise LittlesLawViolated(
                f"{arrived_in_all} arrived, {self.sent_again} of them sent again, {self.left} left with a record"
            )
        for number, server in enumerate(self.servers):
            presence_ns, sojourn_ns, arrived, left = server.books
            sent = arrived if self._sent is None else self._sent[number]
            if presence_ns != sojourn_ns or not sent == arrived == left:
                raise LittlesLawViolated(
                    f"replica {number}: {presence_ns} request-ns in it, {sojourn_ns} by request; "
                    f"{sent} sent, {arrived} arrived, {left} left"
                )

    def _hand_on(self, before_ns: int) -> None:
        """Hand on records of several replicas in order of time, as soon as no earlier record can come."""
        waiting = self._in_order
        if waiting:
            waiting.sort()
            n = bisect_left(waiting, before_ns, key=itemgetter(0))
            for entry in waiting[:n]:
                self._sink(entry[-1])
            del waiting[:n]
            self._merge_at = 2 * len(waiting) + _MERGED_AT_ONCE

    def _release(self, from_replica: int | None) -> None:
        """Send the next requests of a closed loop.

        A request that is dropped on arrival leaves at once and releases the next: hence a loop, not a recursion.
        """
        if self._releasing or self._closed_loop is None:
            return
        self._releasing = True
        while self._to_release:
            self._to_release -= 1
            following = next(self._closed_loop, None)
            if following is not None:
                self.dispatch(replace(following, arrival_ns=int(self.env.now)), from_replica)
        self._releasing = False


class _Split:
    """Splits blocks of requests by the replica that the routing names; replicas read their parts in any order."""

    def __init__(
        self, blocks: Iterator[RequestBlock], replicas: int, routing: Routing, outages: Outages | None
    ) -> None:
        self._blocks, self._replica_of = blocks, routing.fixed_choice(replicas, outages)
        self._parts: list[deque[RequestBlock]] = [deque() for _ in range(replicas)]

    def feed(self, number: int) -> Iterator[RequestBlock]:
        while True:
            while not self._parts[number]:
                block = next(self._blocks, None)
                if block is None:
                    return
                self._share_out(block)
            yield self._parts[number].popleft()

    def _share_out(self, block: RequestBlock) -> None:
        replica = self._replica_of(block)
        for number, part in enumerate(self._parts):
            mine = np.flatnonzero(replica == number)
            if len(mine):
                part.append(block[mine])


def simulate(
    make_server: MakeServer,
    blocks: Iterator[RequestBlock],
    requests: int,
    sink: Sink,
    *,
    users: int | None = None,
    replicas: int = 1,
    routing: Routing = ONE_AFTER_THE_OTHER,
    env: simpy.Environment | None = None,
    outside: Callable[[System], None] | None = None,
    compiled: bool | None = None,
    stepwise: bool = False,
    block_sink: BlockSink | None = None,
    faults: FaultPlan | None = None,
    scaling: Scaling | None = None,
) -> Run:
    """Serve all requests and return when the last one has left.

    `outside` is called with the system before the first event. If the environment is a wall clock with a door, clients
    can send and cancel requests from then on.

    `compiled`: whether the loop runs as machine code; None if it does so only where that is worth it. `stepwise`: every
    turn of a server is an event of its own, as it is when something outside may act at any time. Neither changes a
    result.

    `faults` strike servers with engines that were made `with_faults`. `scaling`: replicas come and go with load.

    `sink` gets each record in the order in which requests leave; `block_sink`, if given, gets many at once wherever
    compiled code holds them as columns. With `users` the loop is closed. Raises LittlesLawViolated if the books do not
    balance, which would be a defect of this program.
    """
    on_clock = outside is not None or env is not None  # the clock is shared with others, who may act at any time
    stepwise = stepwise or on_clock
    env = env or simpy.Environment(initial_time=0)
    system = System(env, routing, sink, block_sink)
    system.connect(tuple(make_server(env, number, system.on_left) for number in range(replicas)))
    machine = None if on_clock else for_run(requests, compiled)
    by_answer = routing.by_answer is not None
    fixed = not by_answer and (replicas == 1 or (users is None and routing.is_fixed(replicas)))
    injector = None
    if faults is not None:
        injector = Injector(env, faults, system.servers, system.send_again, system.note_down, system.more_comes)
        env.process(injector.run())
    fronted = not stepwise and users is None and faults is None and not by_answer
    scaler = None
    if scaling is not None:
        scaler = Autoscaler(scaling, replicas, system.requests_served if fronted else system.requests_in)
    if not stepwise and fixed and scaler is None:
        system.feed(blocks, machine, users, faults)
    elif fronted:
        system.front(blocks, machine, scaler)
    else:
        rows = (request for block in blocks for request in block.rows())
        system.open(machine)
        if users is None:
            if scaler is not None:
                system.follow(scaler)
            env.process(system.open_loop(rows))
            if scaler is not None:
                env.process(system.scale(scaler))
        else:
            system.close_loop(rows, users)
    if outside is not None:
        outside(system)
    with suppress(EmptySchedule):  # no event is left, and no client can act
        # Even if all requests leave at the first moment, every server takes its first turn, as it does stepwise.
        while system.left < requests or not all(server.has_begun for server in system.servers):
            env.step()
    end_ns = int(env.now)
    struck = None if injector is None else injector.finish()
    system.close()
    system.finish()
    system.check_littles_law()
    stats = RunStats(block_tokens=system.servers[0].stats.block_tokens)
    for server in system.servers:
        stats.merge(server.stats)
    presence_ns = tuple(server.books[0] for server in system.servers)
    arrived = sum(server.books[2] for server in system.servers) - system.sent_again
    scaled = None if scaler is None else scaler.finish(end_ns)
    answered = None if system.judging is None else system.judging.answered
    return Run(system.servers, stats, arrived, end_ns, presence_ns, struck, scaled, answered)
