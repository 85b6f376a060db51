"""Injects faults into engines and servers, the same in a simulation and live.

Faults come at known times, so a simulation stops at each of them. At one point in time requests arrive first, then
faults strike, then servers take their turns: an iteration that ends at that time is still in progress.

Transfers fail or stall at the engine's protocol (`FaultyEngine`), and a device's iterations fail there too. A simulated
iteration is given up while it is in progress. A device's computation cannot be taken back, so its next iteration
fails before it begins.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Container, Generator, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import simpy
from simpy.events import Event, EventPriority, Timeout

from helios_sim.core import layout
from helios_sim.core.layout import FOREVER_NS, IntArray, Storage
from helios_sim.exits.rule import ExitRule
from helios_sim.policy.deployment import Deployment
from helios_sim.policy.telemetry import Observation, Situation
from helios_sim.request import NS_PER_S, Request
from helios_sim.serving.aborts import Aborts
from helios_sim.serving.decider import Decider
from helios_sim.serving.handover import Lost, lose
from helios_sim.serving.iteration import (
    Around,
    Engine,
    Executes,
    Foresees,
    Hands,
    IterationFailed,
    Outcome,
    OutOfMemory,
    Plan,
    Terms,
)
from helios_sim.serving.probing import Prober
from helios_sim.serving.replica import Replica
from helios_sim.serving.transition import Transitions
from helios_sim.workload.faults import LOSING, Fault, FaultKind, FaultPlan, Struck

if TYPE_CHECKING:
    from helios_sim.serving.server import Server

FAULT_PRIORITY = EventPriority(5)  # after arrivals and control, before servers (`turns`)
NOBODY = Lost([], 0, 0)
REASONS = {
    FaultKind.REPLICA_DIES: "its replica died",
    FaultKind.ITERATION_FAILS: "its iteration failed",
    FaultKind.OUT_OF_MEMORY: "injected: out of memory",
    FaultKind.LOAD_FAILS: "injected: the load failed",
}


class FaultyEngine(Around):
    """An engine with transfers that fail or stall on demand."""

    def __init__(self, inner: Engine, env: simpy.Environment) -> None:
        super().__init__(inner)
        self._env = env
        self.pace = 1.0  # factor of the time of iterations
        self.on_fault: Callable[[FaultKind, int], None] = lambda kind, until_ns: None  # a fault has taken effect
        self.on_failed_load: Callable[[str], None] = lambda reason: None
        self.may_lose_load: Callable[[], bool] = lambda: True
        self.wake: Callable[[], None] = lambda: None
        self._armed: dict[FaultKind, int] = {}  # faults that wait for a transfer or iteration, and how long each lasts
        self._stalled_until_ns: int | None = None
        self._abandoned = 0  # transfers up to this number were abandoned: their end is ignored

    def arm(self, kind: FaultKind, lasts_ns: int = 0) -> bool:
        """Let the transfer in progress, or the next one, fail or take so much longer, or the next iteration fail.

        Returns False if another fault of the kind is waiting already.
        """
        if kind in self._armed:
            return False
        self._armed[kind] = lasts_ns
        return True

    @property
    def armed(self) -> Iterable[FaultKind]:
        """The faults that have not taken effect yet."""
        return tuple(self._armed)

    def _fail(self, now_ns: int) -> None:
        """Raise the failure that waits for the next iteration of a device."""
        for kind, error in ((FaultKind.OUT_OF_MEMORY, OutOfMemory), (FaultKind.ITERATION_FAILS, IterationFailed)):
            if self._armed.pop(kind, None) is not None:
                self.on_fault(kind, now_ns)
                raise error(REASONS[kind], now_ns + 1)

    def abandon_transfers(self) -> None:
        """Ignore the end of all transfers in progress."""
        self._abandoned += 1
        self._stalled_until_ns = None

    def start_transfer(self, n_bytes: int, model: str, on_done: Callable[[], None]) -> None:
        began = self._abandoned
        self._inner.start_transfer(n_bytes, model, lambda: self._arrived(began, on_done, self._armed))

    def _arrived(self, began: int, on_done: Callable[[], None], stalls: Container[FaultKind] = ()) -> None:
        if began != self._abandoned:
            self.wake()
            return
        self._stalled_until_ns = None
        now_ns = int(self._env.now)
        if FaultKind.TRANSFER_STALLS in stalls:  # transfers run one at a time
            lasts_ns = self._armed.pop(FaultKind.TRANSFER_STALLS)
            self._stalled_until_ns = now_ns + lasts_ns
            self.on_fault(FaultKind.TRANSFER_STALLS, now_ns + lasts_ns)
            again = Timeout(self._env, lasts_ns)
            assert again.callbacks is not None
            again.callbacks.append(lambda _: self._arrived(began, on_done))
            self.wake()
        elif FaultKind.LOAD_FAILS in self._armed and self.may_lose_load():
            del self._armed[FaultKind.LOAD_FAILS]
            self.on_fault(FaultKind.LOAD_FAILS, now_ns)
            self.on_failed_load(REASONS[FaultKind.LOAD_FAILS])
        else:
            on_done()


class FaultyForesight(FaultyEngine):
    """An engine that foresees iterations, with faults: a slow card is a factor of every iteration's price."""

    def __init__(self, inner: Foresees, env: simpy.Environment) -> None:
        super().__init__(inner, env)
        self._foresees = inner
        self.warm_up_ns = inner.warm_up_ns
        self._slowed: tuple[Any, float, Terms] | None = None  # the terms before, the factor, and the terms with it

    def terms(self, deployment: Deployment, situation: Situation, storage: Storage) -> Terms:
        terms = self._foresees.terms(deployment, situation, storage)
        if self.pace == 1.0:
            return terms
        if self._slowed is None or self._slowed[0] is not terms or self._slowed[1] != self.pace:
            scalars = copy.deepcopy(terms.scalars)
            if isinstance(scalars, np.ndarray):
                scalars["time_factor"] *= self.pace
            else:
                scalars[0].time_factor *= self.pace
            self._slowed = terms, self.pace, replace(terms, scalars=scalars)
        return self._slowed[2]

    def tokens_of(self, model: str, requests: IntArray) -> IntArray:
        return self._foresees.tokens_of(model, requests)

    @property
    def transfer_end_ns(self) -> int | None:
        ends = [ns for ns in (self._foresees.transfer_end_ns, self._stalled_until_ns) if ns is not None]
        return min(ends, default=None)


class FaultyDevice(FaultyEngine):
    """An engine that executes, with faults: iterations fail before they begin, and a slow card waits after each."""

    def __init__(self, inner: Executes, env: simpy.Environment) -> None:
        super().__init__(inner, env)
        self._executes = inner

    def execute(self, plan: Plan, now_ns: int) -> Outcome:
        self._fail(now_ns)
        outcome = self._executes.execute(plan, now_ns)
        if self.pace == 1.0:
            return outcome
        more_ns = round((self.pace - 1) * (outcome.end_ns - now_ns))
        time.sleep(more_ns / NS_PER_S)
        return replace(outcome, end_ns=outcome.end_ns + more_ns)


class FaultyThread(FaultyEngine):
    """A `FaultyDevice` for an engine that executes in its own thread. A slow card is waited for on the clock."""

    def __init__(self, inner: Hands, env: simpy.Environment) -> None:
        super().__init__(inner, env)
        self._hands = inner

    def hand(self, plan: Plan, now_ns: int, tell: Callable[[Callable[[], Outcome]], None]) -> None:
        try:
            self._fail(now_ns)
        except (OutOfMemory, IterationFailed) as failed:
            tell(partial(_raise, failed))
            return

        def ended(result: Callable[[], Outcome]) -> None:
            more_ns = round((self.pace - 1) * (int(self._env.now) - now_ns))
            if not more_ns:
                tell(result)
                return
            later = Timeout(self._env, more_ns)
            assert later.callbacks is not None
            later.callbacks.append(lambda _: tell(result))

        self._hands.hand(plan, now_ns, ended)

    def hand_probe(
        self,
        model: str,
        requests: Sequence[Request],
        exit_rule: ExitRule,
        tell: Callable[[Callable[[], tuple[int, tuple[Observation, ...]]]], None],
    ) -> None:
        self._hands.hand_probe(model, requests, exit_rule, tell)


def _raise(error: Exception) -> Outcome:
    raise error


def with_faults(engine: Engine, env: simpy.Environment) -> FaultyEngine:
    """Wrap an engine so that faults can be injected."""
    if isinstance(engine, Foresees):
        return FaultyForesight(engine, env)
    return FaultyThread(engine, env) if isinstance(engine, Hands) else FaultyDevice(cast(Executes, engine), env)


class Breakdown:
    """Applies faults to one server.

    Methods for faults that hit requests return the requests that were lost, or None if there was nothing to strike.
    """

    def __init__(
        self,
        server: Server,
        replica: Replica,
        decider: Decider,
        transitions: Transitions,
        prober: Prober,
        aborts: Aborts,
    ) -> None:
        self._server, self._replica, self._decider = server, replica, decider
        self._transitions, self._prober, self._aborts = transitions, prober, aborts
        self.died_ns = self.back_ns = 0  # the server is down between these times

    @property
    def engine(self) -> FaultyEngine:
        if not isinstance(self._replica.engine, FaultyEngine):
            raise TypeError(f"faults need an engine made with_faults, not {type(self._replica.engine).__name__}")
        return self._replica.engine

    @property
    def is_down(self) -> bool:
        return self._replica.now_ns < self.back_ns

    @property
    def waits_for_device(self) -> bool:
        """Whether a device computes, or has computed, the iteration in progress, so that only the next one can fail."""
        return not self._replica.foresees and self._runs

    @property
    def _runs(self) -> bool:
        return int(self._replica.state.phase) == layout.RUNNING

    def note(self, what: str) -> None:
        """Write a fault into the decision log."""
        self._decider.note_fault(what)

    def meet(self, on_fault: Callable[[FaultKind, int], None]) -> None:
        """Let faults at the engine reach the server. `on_fault` is called with each and the time at which it ends."""
        engine = self.engine
        engine.on_fault, engine.on_failed_load = on_fault, self.load_fails
        engine.may_lose_load = lambda: not self._transitions.falls_back
        engine.wake = self._transitions.wake

    def load_fails(self, reason: str, again: bool = True) -> None:
        """Handle a failed load. With `again`, weights needed to serve on are loaded once more if they were lost too."""
        model = self._prober.streams or self._transitions.loads
        if model is not None:
            self._transitions.backoff.note_failed(model, self._replica.now_ns)
        self._lose_load(reason, again)

    def _lose_load(self, reason: str, again: bool = True) -> None:
        if self._prober.streams is not None:
            self._prober.lose_stream()
            self._transitions.lose_transfer()
            return
        stays = self._transitions.give_up(reason, again)
        if stays is not None:
            model, fallback = stays
            self._decider.note_failed_load(model, reason, fallback)

    def iteration_fails(self, again: Callable[[int], bool], reason: str) -> Lost | None:
        self._server.catch_up()
        return self._settled(lose(self._replica, False, again, reason)) if self._give_up_iteration() else None

    def runs_out_of_memory(self) -> Lost | None:
        self._server.catch_up()
        if not self._give_up_iteration():
            return None
        self._aborts.give_way(REASONS[FaultKind.OUT_OF_MEMORY])
        return self._settled(NOBODY)

    def dies(self, back_ns: int, again: Callable[[int], bool], reason: str) -> Lost:
        """The replica dies: requests and loads in progress are lost, and nothing runs before it is back."""
        self._server.catch_up()
        self._give_up_iteration()
        self.died_ns, self.back_ns = self._replica.now_ns, back_ns
        lost = lose(self._replica, True, again, reason)
        self._replica.sample()
        if self._transitions.loading:
            self.engine.abandon_transfers()
            self._lose_load(reason)
        self._prober.lose_stream()
        return self._settled(lost)

    def runs_at(self, pace: float) -> None:
        self.engine.pace = pace
        if self._replica.foresees:
            self._replica.reprice()

    def _settled(self, lost: Lost) -> Lost:
        self._server.catch_up()  # users of a closed loop send their next requests in place of dropped ones
        self._server.stop()
        return lost

    def _give_up_iteration(self) -> bool:
        """Discard the iteration in progress, except for the time it took. Returns False if there is none."""
        replica, s = self._replica, self._replica.state
        if not self._runs:
            return False
        replica.stats.busy_ns += replica.now_ns - int(s.now_ns)
        replica.release_lingering()
        s.phase, s.started_ns = layout.TURN, layout.NEVER
        return True


class Injector:
    """The process that injects faults. Records what each of them did.

    `send_again` gets requests that a replica has lost. `note_down` is called with the time at which a dead replica will
    be back, and with None when it is back. `more_comes` says whether requests are still to arrive.
    """

    def __init__(
        self,
        env: simpy.Environment,
        plan: FaultPlan,
        servers: Sequence[Server],
        send_again: Callable[[Iterable[Request], int], None],
        note_down: Callable[[int, int | None], None],
        more_comes: Callable[[], bool],
    ) -> None:
        self._env, self._plan, self._servers = env, plan, servers
        self._send_again, self._note_down, self._more_comes = send_again, note_down, more_comes
        self._coming = plan.faults(len(servers))
        self._next = next(self._coming, None)
        self._hits: Counter[int] = Counter()  # by request: how often a fault hit it
        self.struck: list[Struck] = []
        for server in servers:
            server.injector = self

    @property
    def next_ns(self) -> int:
        """The time of the next fault, at which servers may act on each other."""
        return FOREVER_NS if self._next is None else self._next.time_ns

    def run(self) -> Generator[Event, Any, None]:
        env = self._env
        for number, server in enumerate(self._servers):
            server.breakdown.meet(partial(self._note, number))
        while self._next is not None:
            event = env.event()
            event._ok, event._value = True, None
            env.schedule(event, FAULT_PRIORITY, max(self._next.time_ns - int(env.now), 0))
            yield event
            for server in self._servers:
                server.catch_up()
            if not self._more_comes() and all(server.at_rest for server in self._servers):
                self._next = None  # the remaining requests can never be served, and no fault changes that
                return
            while self._next is not None and self._next.time_ns <= env.now:
                fault, self._next = self._next, next(self._coming, None)
                self._strike(fault)
            for server in self._servers:
                server.look()

    def finish(self) -> tuple[Struck, ...]:
        """Return what each fault did when the run is over, including those that struck nothing."""
        now_ns = int(self._env.now)
        for number, server in enumerate(self._servers):
            self.struck += [Struck(now_ns, kind, number, False, now_ns) for kind in server.breakdown.engine.armed]
        return tuple(self.struck)

    def iteration_failed(self, number: int) -> None:
        """Handle an iteration of a device that failed before it began."""
        kind = FaultKind.ITERATION_FAILS
        lost = self._servers[number].breakdown.iteration_fails(self._again, self._reason(kind))
        self._settle(number, kind, lost, 0)

    def _strike(self, fault: Fault) -> None:
        number, kind, struck = fault.replica, fault.kind, self._servers[fault.replica].breakdown
        match kind:
            case FaultKind.REPLICA_DIES if fault.ends:
                self._note_down(number, None)
            case FaultKind.REPLICA_DIES:
                self._note_down(number, fault.until_ns)
                self._settle(number, kind, struck.dies(fault.until_ns, self._again, self._reason(kind)), fault.lasts_ns)
            case FaultKind.SLOW_CARD:
                struck.runs_at(1.0 if fault.ends else fault.factor)
                if not fault.ends:
                    self._settle(number, kind, NOBODY, fault.lasts_ns)
            case FaultKind.LOAD_FAILS | FaultKind.TRANSFER_STALLS:
                self._arm(fault)
            case _ if struck.waits_for_device:
                self._arm(fault)
            case FaultKind.ITERATION_FAILS:
                self._settle(number, kind, struck.iteration_fails(self._again, self._reason(kind)), 0)
            case FaultKind.OUT_OF_MEMORY:
                self._settle(number, kind, struck.runs_out_of_memory(), 0)

    def _arm(self, fault: Fault) -> None:
        if not self._servers[fault.replica].breakdown.engine.arm(fault.kind, fault.lasts_ns):
            self._settle(fault.replica, fault.kind, None, 0)

    def _note(self, number: int, kind: FaultKind, until_ns: int) -> None:
        """Record a fault that took effect at the engine."""
        if kind is not FaultKind.ITERATION_FAILS:  # `iteration_failed` records the requests that were lost
            self._settle(number, kind, NOBODY, until_ns - int(self._env.now))

    def _settle(self, number: int, kind: FaultKind, lost: Lost | None, lasts_ns: int) -> None:
        now_ns = int(self._env.now)
        if lost is None:
            self.struck.append(Struck(now_ns, kind, number, False, now_ns))
            return
        until_ns, retried = now_ns + lasts_ns, len(lost.again)
        self.struck.append(Struck(now_ns, kind, number, True, until_ns, retried, lost.dropped, lost.wasted_tokens))
        lasts = f" for {lasts_ns / NS_PER_S:g} s" if lasts_ns else ""
        hit = f": {retried} requests sent again, {lost.dropped} dropped" if kind in LOSING else ""
        self._servers[number].breakdown.note(f"{kind.value.replace('_', ' ')}{lasts}{hit}")
        self._send_again(lost.again, number)

    def _again(self, request_id: int) -> bool:
        self._hits[request_id] += 1
        return self._hits[request_id] <= self._plan.retries

    def _reason(self, kind: FaultKind) -> str:
        n = self._plan.retries
        after = f"after it was sent again {n} times" if n > 1 else "after it was sent again" if n else "not sent again"
        return f"{REASONS[kind]}, {after}"

