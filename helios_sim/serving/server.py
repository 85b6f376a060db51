"""The server of one replica: a SimPy process that runs the loop, and takes the turns that need more than the loop.

A server knows only its own replica. If its engine foresees the time of iterations, the loop runs ahead of the clock up
to the next time at which something outside can act. If the engine executes iterations, the loop schedules and commits
each of them around the execution.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple, cast

import simpy
from simpy.events import Event

from helios_sim.core import layout
from helios_sim.core.arrive import release, take_arrivals
from helios_sim.core.layout import FLUSH_REQUESTS, FOREVER_NS, NEVER, IntArray, Record, Table, Tables, number_of
from helios_sim.core.machine import Machine
from helios_sim.core.power import note_drawn
from helios_sim.core.route import cached_share
from helios_sim.core.schedule import running_limit
from helios_sim.errors import UserError
from helios_sim.policy.deployment import Placement, require_one_card
from helios_sim.policy.telemetry import Policy, Situation
from helios_sim.request import RecordBlock, Request, RequestBlock, whole_ns
from helios_sim.serving.aborts import Aborts
from helios_sim.serving.decider import Decider, Decision
from helios_sim.serving.device_plan import note_outcome, plan_of
from helios_sim.serving.faults import Breakdown, Injector
from helios_sim.serving.front import Front, Loop
from helios_sim.serving.handover import finish, hand_over
from helios_sim.serving.iteration import Engine, Executes, Foresees, Hands, IterationFailed, OutOfMemory
from helios_sim.serving.probing import Prober
from helios_sim.serving.replica import COUNTER_EVERY_NS, OnLeft, Replica
from helios_sim.serving.stats import RunStats, Timeline
from helios_sim.serving.transition import Transitions
from helios_sim.serving.turns import Turns


class Produced(NamedTuple):
    """One output token of one request."""

    request_id: int
    number: int  # index in its answer, from 0
    layers: int  # layers that it ran
    breach: bool  # it left at the cap without confidence
    after: int = 0  # tokens of its request that the same pass produced after it


OnTokens = Callable[["Server", Sequence[Produced]], None]
"""Called with the tokens of an iteration that ends now, before it is committed: requests still have their slots."""


class Scheduled(NamedTuple):
    """What an iteration runs."""

    decodes: int
    prompts: int  # chunks of prompts
    prompt_tokens: int
    floor_ns: int  # roofline floor


class Server:
    def __init__(
        self,
        env: simpy.Environment,
        number: int,
        engine: Engine,
        policy: Policy,
        situation: Situation,
        on_left: OnLeft,
    ) -> None:
        self._env, self._number, self._engine, self._policy = env, number, engine, policy
        self._situation, self._on_left = situation, on_left
        self._turns = Turns(env, number)
        self._hands = isinstance(engine, Hands)
        self._pictures = True
        self.on_iteration: Callable[[int, int], None] | None = None  # called with its start and end, stepwise only
        self.on_tokens: OnTokens | None = None  # stepwise only
        self.joules: Callable[[], float | None] | None = None  # reads the device's energy counter
        self._ending: set[int] = set()  # requests that complete with their next token
        self._opened = False
        self.has_begun = False  # its first turn is over
        self.injector: Injector | None = None  # injects faults
        self._process = env.process(self._run())

    def open(
        self,
        machine: Machine | None = None,
        feed: Iterator[RequestBlock] | None = None,
        users: int | None = None,
        front: Front | None = None,
        departures: int = FLUSH_REQUESTS,
        on_block: Callable[[RecordBlock], None] | None = None,
    ) -> None:
        """Load the first deployment, before the first request. A second call does nothing.

        `machine` is the loop as machine code. `feed` yields all requests of this replica, which then runs ahead of the
        clock; with `users` they arrive in a closed loop. Without a feed requests are submitted: by a `front`, which
        knows the next arrival, or else at any time, so that each turn is an event. There is room for twice `departures`
        departed requests until they are handed over. `on_block` gets their records as columns if the loop is compiled.
        """
        if self._opened:
            return
        self._opened = True
        self._loop, self._place = (Loop(1, machine), 0) if front is None else (front.loop, self._number)
        self._feed, self._front = feed, front
        self._replica = replica = Replica(
            self._env, self._number, self._engine, self._situation, self._on_left, self._loop.storage,
            users is not None, departures,
        )  # fmt: skip
        replica.joules = self._joules
        if machine is not None:
            replica.on_block = on_block
        if not self._pictures:
            replica.keep_few_samples()
        replica.state.exhausted = int(feed is None)
        replica.state.eager = int(feed is None and front is None)
        replica.state.routed = int(front is not None)
        replica.state.to_release = users or 0
        self._decider = Decider(replica, self._policy)
        self._transitions = Transitions(replica, on_change=self._decider.arm, wake=self._turns.wake)
        self._prober = Prober(replica, self._decider, self._transitions, self._turns)
        self._aborts = Aborts(replica)
        self.breakdown = Breakdown(self, replica, self._decider, self._transitions, self._prober, self._aborts)
        self._transitions.start(self._decider.start())

    def _require_open(self) -> None:
        if not self._opened:
            self.open()

    def _run(self) -> Generator[Event, Any, None]:
        self._require_open()
        # The first turn comes before the first arrival, but users of a closed loop are there already.
        self._started = bool(self._replica.rules.closed_loop)
        interrupted = False
        while True:
            try:
                if interrupted:  # by a fault, which the server handles in its next turn, or when the replica is back
                    interrupted = False
                    yield from self._wait(self.breakdown.back_ns)
                yield from self._take_turns()
            except simpy.Interrupt:
                interrupted = True

    def _take_turns(self) -> Generator[Event, Any, None]:
        replica, s, decided = self._replica, self._replica.state, None
        while True:
            s.now_ns = s.acted_ns = replica.now_ns
            s.turn_wanted = 0
            if self._started and decided is None:  # after a decision nothing has happened yet
                yield from self._take_arrivals(replica.now_ns)
                self._note()
            if self._aborts.carry_out():
                yield from self._take_arrivals(replica.now_ns)
            if self._transitions.pending:  # their blocks would count as used
                replica.release_lingering()
            self._transitions.advance()
            decided = None
            if not self._transitions.pending:  # one change at a time
                decided = self._decider.decide()
                if decided is not None:
                    replica.release_lingering()
                    refused = self._transitions.refused(decided)
                    if refused is None:
                        self._transitions.begin(decided)
                    else:
                        model, reason, until_ns = refused
                        self._decider.note_refused(model, reason, self._transitions.refuse(model, reason), until_ns)
                    continue
            self._started = self.has_begun = True
            probe_end_ns = yield from self._prober.advance()
            if probe_end_ns is not None:
                self._transitions.tell_loop()
                yield from self._wait(probe_end_ns)
                probe_ns = probe_end_ns - int(s.now_ns)
                replica.stats.busy_ns += probe_ns
                if replica.foresees:
                    note_drawn(s, replica.counts.marks, int(s.now_ns), probe_end_ns, probe_ns)
                continue
            self._transitions.follow_plan()
            yield from self._serve()

    def _wait(self, end_ns: int) -> Generator[Event, Any, None]:
        """Wait until `end_ns`, while requests arrive."""
        end_ns = max(end_ns, self._replica.now_ns)
        while True:
            until_ns = min(end_ns, self._next_fault_ns)
            if self._feed is not None:
                yield from self._take_arrivals(until_ns)
                yield from self._hand_over_departures()
            yield self._turns.at(until_ns)
            if until_ns == end_ns:
                return

    def _serve(self) -> Generator[Event, Any, None]:
        """Let the loop run until the server has to take a turn itself, at the current time."""
        replica, s = self._replica, self._replica.state
        self._transitions.tell_loop()
        s.awaits_completion = int(self._prober.awaits_completion)
        s.asked, s.idle, s.phase, self._turns.woken = 1, 0, layout.TURN, False
        s.wake_ns = NEVER
        while True:
            stop = self._run_loop()
            if self._front is not None and self._may_park(stop):
                stop = yield self._front.park(self._number)
                replica.inbox.note_routed(s, int(s.model))
            if stop == layout.ARRIVALS:
                self._read_on()
            elif stop == layout.HORIZON:
                if s.end_ns >= FOREVER_NS:
                    allowed = "times that end within 146 years"
                    raise UserError("iteration", f"an end at {s.end_ns:.1e} ns", allowed, "correct the profile's costs")
                if self.on_iteration is not None:
                    self.on_iteration(int(s.started_ns), int(s.end_ns))
                if (s.left or s.seen) and not self._runs_alone:  # a router counts departures; all else can wait
                    hand_over(replica)
                yield self._turns.at(int(s.end_ns))
                if self.on_tokens is not None:
                    self.on_tokens(self, self._produced())
                s.turn_wanted, self._turns.woken = int(self._turns.woken), False
            elif stop == layout.EXECUTE:
                given_up_ns = yield from self._execute()
                if given_up_ns is not None:
                    yield self._turns.at(given_up_ns)
                    return
            else:
                # Requests may have arrived while nothing could run: move the clock to the latest of them.
                seen_ns = int(max(s.now_ns, s.changed_ns) if s.phase == layout.WAITING else s.now_ns)
                if seen_ns > replica.now_ns:
                    yield self._turns.at(seen_ns)
                if stop == layout.RETOKENIZE:
                    hand_over(replica)
                    replica.retokenize()
                    continue
                if stop == layout.FLUSH:
                    hand_over(replica)
                    continue
                self._note()
                if stop == layout.IDLE and not self._turns.woken:
                    yield from self._turns.idle(self._decider.next_time_ns)
                return

    @property
    def _runs_alone(self) -> bool:
        """Whether nothing outside looks at departures before the run ends."""
        return self._feed is not None and self.injector is None

    def _note(self) -> None:
        """Hand results over at the beginning of a turn, unless they can wait. A policy gets its own when asked."""
        if not (self._runs_alone and (self._replica.state.in_system or self.expects)):
            hand_over(self._replica)

    def _may_park(self, stop: int) -> bool:
        """Whether the replica needs nothing but the loop, now and when the next request arrives."""
        s, front = self._replica.state, self._front
        waits = stop == layout.HORIZON or (stop == layout.IDLE and bool(s.routed))
        return waits and front is not None and not (front.closed or self._transitions.loading or self._turns.woken)

    def _run_loop(self) -> int:
        self._replica.ready()
        return self._loop.advance(self._place, self.tables(), self._until_ns())

    def tables(self) -> Tables:
        """All tables that the loop works on now."""
        return self._replica.tables(self._decider.watch)

    def _until_ns(self) -> int:
        """The time before which nothing outside can act on this replica."""
        if self._feed is not None:
            until_ns = self._next_fault_ns
        elif self._front is not None:
            until_ns = self._front.horizon_ns
        else:
            return self._replica.now_ns + 1
        if self._transitions.loading:
            transfer_end_ns = cast(Foresees, self._engine).transfer_end_ns
            if transfer_end_ns is not None:
                until_ns = min(until_ns, transfer_end_ns)
        return until_ns

    def _execute(self) -> Generator[Event, Any, int | None]:
        """Run the scheduled iteration on the device. Returns the time at which it was given up, else None.

        An engine with its own thread computes while other processes act. They find this replica in the state that it
        has during an iteration.
        """
        replica, s, started_ns = self._replica, self._replica.state, self._replica.now_ns
        require_one_card(replica.deployment.exit_rule)
        plan = plan_of(replica, self._transitions.loading)
        try:
            if self._hands:
                ended, tell = self._turns.told()
                cast(Hands, self._engine).hand(plan, started_ns, tell)
                outcome = (yield ended)()
            else:
                outcome = cast(Executes, self._engine).execute(plan, started_ns)
        except OutOfMemory as error:
            s.phase = layout.TURN
            self._aborts.give_way(error.reason)
            return max(error.end_ns, replica.now_ns)
        except IterationFailed as error:
            assert self.injector is not None
            self.injector.iteration_failed(self._number)
            return max(error.end_ns, replica.now_ns)
        note_outcome(replica, outcome.decoded, outcome.prefilled)
        it = replica.iteration
        it.floor_ns = sum(int(whole_ns(profile.iteration_floor_s(part))[0]) for profile, part in outcome.parts)
        it.draft_ns = outcome.draft_ns
        it.late_layers, it.late_ns = outcome.late_layers, 0  # the time that they add is not known
        it.outside = int(outcome.profile.outside_grid(outcome.composition)[0])
        # The loop expects the end of an iteration to be later than now.
        s.end_ns = max(outcome.end_ns, replica.now_ns + 1)
        if self._decider.watches_power:
            replica.read_counter(COUNTER_EVERY_NS)
        return None

    def _joules(self) -> float | None:
        return None if self.joules is None else self.joules()

    def _produced(self) -> list[Produced]:
        """The tokens of the iteration in progress, in the order of the batch."""
        replica, it, found = self._replica, self._replica.iteration, []
        slots = [int(slot) for slot in replica.lists.batch[: int(it.decodes)] if not replica.requests[slot].held]
        decodes = len(slots)
        slots += [int(replica.chunks[p].slot) for p in range(int(it.finishing))]
        for place, slot in enumerate(slots):
            request = replica.requests[slot]
            layers, breach = (it.token_layers, 0) if it.alike else (request.token_layers, request.token_breach)
            number = int(request.earlier_tokens + request.generated)
            after = int(request.accepted) if it.drafts and place < decodes else 0
            if int(request.request_id) in self._ending:
                self._ending.discard(int(request.request_id))
                after, request.remaining, request.output_tokens = 0, 1, request.generated + 1
            found += [
                Produced(int(request.request_id), number + n, int(layers), bool(breach), after - n)
                for n in range(after + 1)
            ]
        return found

    def _take_arrivals(self, until_ns: int) -> Generator[Event, Any, None]:
        """Put requests that arrive until then into the line, before the policy is asked or while a probe runs."""
        while True:
            known = self._join_line(until_ns)
            if not self._replica.state.free:
                yield from self._hand_over_departures()
            elif known:
                return
            else:
                self._read_on()

    def _join_line(self, until_ns: int) -> bool:
        """Put known requests that arrive until then into the line, while slots are free. Returns False to read on."""
        replica, s = self._replica, self._replica.state
        comes = s.arrived < s.known and not replica.rules.closed_loop
        if comes and number_of(replica.inbox.rows, s.arrived - s.first_row, "arrival_ns") > until_ns:
            return True
        replica.ready()
        tables = (
            s, replica.rules, replica.requests, replica.lists, replica.line, replica.inbox.rows,
            replica.inbox.tokens(s, int(s.model)),
        )  # fmt: skip
        known = take_arrivals(*tables, until_ns) or self._feed is None
        if known:
            release(*tables, replica.now_ns)
        return known

    def catch_up(self) -> None:
        """Put requests that have arrived by now into the line, and hand over all results."""
        replica = self._replica
        while True:
            known = self._join_line(replica.now_ns)
            hand_over(replica)
            if known and replica.state.free:
                return
            if not known:
                self._read_on()

    def _hand_over_departures(self) -> Generator[Event, Any, None]:
        """Hand over departed requests, at the time of the latest change, since the last departure ends the run."""
        replica, s = self._replica, self._replica.state
        if s.left:
            if s.changed_ns > replica.now_ns:
                yield self._turns.at(int(s.changed_ns))
            hand_over(replica)

    def _read_on(self) -> None:
        assert self._feed is not None
        block = next(self._feed, None)
        if block is None:
            self._replica.state.exhausted = 1
        else:
            self._replica.inbox.add_block(self._replica.state, block)

    def expect(self, requests: IntArray, rows: Table) -> None:
        """Set the requests (n, 9) that a router may send here."""
        self._replica.inbox.expect(requests, rows)

    def make_room(self) -> None:
        """Make room for further requests, before a router sends one here."""
        replica = self._replica
        replica.inbox.note_routed(replica.state, int(replica.state.model))
        replica.inbox.make_room(replica.state, 1)
        if not replica.state.free:
            replica.grow_slots(2 * len(replica.requests))
        replica.grow_line()

    def close_arrivals(self) -> None:
        """Note that no further request comes."""
        self._replica.state.routed = 0

    def forget_prefixes(self) -> None:
        """Discard the prefix cache when the replica, which is empty, goes off."""
        self._replica.forget_prefixes()

    def submit(self, request: Request, from_replica: int | None = None) -> None:
        """Let a request arrive now. It is dropped at once if it can never run as deployed.

        `from_replica` is the replica that completed the request before it (closed loop): at one point in time replicas
        take their turns in the order of their numbers.
        """
        self._require_open()
        replica = self._replica
        if self._feed is not None:  # another replica has lost it
            self.catch_up()
        next_in_line = not replica.waiting_requests or bool(replica.rules.order)
        if not replica.submit(request):
            hand_over(replica)
        elif self._decider.watches_queue or (next_in_line and self._could_start()):
            self._turns.wake_idle()

    def cached_share(self, request: Request) -> float:
        """The share of a new request's prompt that is in this replica's prefix cache."""
        self._require_open()
        replica = self._replica
        prompt_tokens, _ = self._engine.tokenize(replica.deployment.active.model, request)
        return float(
            cached_share(
                replica.rules, replica.prefix.tables, request.shared, request.stream, request.request_id, prompt_tokens
            )
        )

    def cancel(self, request_id: int, reason: str = "cancelled") -> None:
        """Drop a request for this reason, at the end of the iteration in progress."""
        self._ending.discard(request_id)
        self._aborts.ask(request_id, reason)
        self._turns.wake()

    def end_answer(self, request_id: int) -> None:
        """Let a request complete with its next token, even if a longer answer was planned. It must not have left.

        Needs `on_tokens` to be set.
        """
        self._ending.add(request_id)

    def request_failed(self, request_id: int, reason: str) -> None:
        """Drop a request for which the device computed no valid answer."""
        self.cancel(request_id, reason)

    def load_failed(self, model: str, reason: str) -> None:
        """Go on with the resident weights after a failed load. Raises UserError if there are none."""
        self.breakdown.load_fails(reason, again=False)

    def stop(self) -> None:
        """Interrupt the server because of a fault: it takes a turn now, or when the replica is back."""
        if self._env.active_process is not self._process:
            self._process.interrupt()

    def look(self) -> None:
        """Give an idle server a turn, since others may have acted."""
        self._turns.wake_idle()

    @property
    def expects(self) -> bool:
        """Whether requests of its own feed are still to arrive, at known times."""
        s = self._replica.state
        return not self._replica.rules.closed_loop and bool(s.arrived < s.known or not s.exhausted)

    @property
    def at_rest(self) -> bool:
        """Whether nothing happens here until something arrives, and nothing has arrived just now."""
        waits = self._turns.is_idle and self._decider.rests
        waits = waits and int(self._replica.state.changed_ns) < self._replica.now_ns
        return waits and not self._transitions.loading and not self.breakdown.is_down

    @property
    def _next_fault_ns(self) -> int:
        return FOREVER_NS if self.injector is None else self.injector.next_ns

    def finish(self) -> None:
        """End the run: every request that is still here leaves as unfinished."""
        self._require_open()
        finish(self._replica)
        self._transitions.close()

    def keep_few_samples(self) -> None:
        """Keep few samples of the state over time, for runs without pictures."""
        self._pictures = False
        if self._opened:
            self._replica.keep_few_samples()

    @property
    def frontier_ns(self) -> int:
        """The time before which all departures have been handed over."""
        replica, s = self._replica, self._replica.state
        if s.left:
            return int(replica.requests[int(replica.lists.left[0])].left_ns)
        if s.phase == layout.RUNNING:
            return int(s.end_ns)
        if self.breakdown.is_down:
            return self.breakdown.died_ns
        parked_ns = None if self._front is None else self._front.frontier_ns(self._number)
        return replica.now_ns if parked_ns is None else parked_ns

    @property
    def state(self) -> Record:
        """The loop's record of this replica."""
        return self._replica.state

    @property
    def number(self) -> int:
        """The number of its replica."""
        return self._number

    @property
    def placement(self) -> Placement:
        """The model that serves, and its loaded layers."""
        return self._replica.deployment.active

    @property
    def resident(self) -> dict[str, int]:
        """Layers in memory or being loaded, by model."""
        return dict(self._transitions.residency.layers)

    @property
    def loads(self) -> str | None:
        """The model that is being loaded, or waits for room."""
        return self._transitions.loads

    def free_weights(self) -> None:
        """Free all weights. No request may be in the system, and nothing may be loading."""
        self._engine.free()

    def load_weights(self, on_done: Callable[[], None]) -> None:
        """Load again what `free_weights` has freed."""
        self._transitions.load_again(on_done)

    @property
    def scheduled(self) -> Scheduled:
        """The iteration that runs, or the last one that ran."""
        it, chunks = self._replica.iteration, self._replica.chunks
        tokens = sum(int(chunks[p].tokens) for p in range(int(it.chunks)))
        return Scheduled(int(it.decodes), int(it.chunks), tokens, int(it.floor_ns))

    @property
    def requests_in_system(self) -> int:
        return int(self._replica.state.in_system)

    @property
    def used_blocks(self) -> int:
        return self._replica.used_blocks

    @property
    def books(self) -> tuple[int, int, int, int]:
        """The integrals for Little's law: request-ns in the system by time and by request, arrivals and departures."""
        s = self._replica.state
        return int(s.presence_ns), int(s.sojourn_ns), int(s.arrivals), int(s.departures)

    @property
    def stats(self) -> RunStats:
        self._require_open()
        hand_over(self._replica)
        return self._replica.stats

    @property
    def timeline(self) -> Timeline:
        self._require_open()
        hand_over(self._replica)
        return self._replica.timeline

    @property
    def decisions(self) -> list[Decision]:
        self._require_open()
        return self._decider.decisions

    @property
    def decisions_left_out(self) -> int:
        """The number of decisions that the log has dropped from its middle."""
        return self._decider.decisions_left_out

    def _could_start(self) -> bool:
        replica, s = self._replica, self._replica.state
        has_place = s.running < running_limit(s, replica.rules)
        return not self._transitions.draining and s.starts_left != 0 and bool(has_place)
