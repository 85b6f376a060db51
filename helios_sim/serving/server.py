"""The server of one replica: one SimPy process that plans, executes, waits and commits, iteration by iteration.

It knows only its own replica, never sleeps on a guess and never asks whether its engine is simulated or real.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import simpy
from simpy.events import Event

from helios_sim.exits.rule import PerToken
from helios_sim.policy.telemetry import Policy, Situation
from helios_sim.request import Request, RequestRecord, Status
from helios_sim.serving.ahead.contract import Foreseeing, Ledger, Meanwhile, Stop
from helios_sim.serving.ahead.stretch import Stretch
from helios_sim.serving.batch import Sequence
from helios_sim.serving.commit import commit
from helios_sim.serving.decider import Decider, Decision
from helios_sim.serving.intake import Intake
from helios_sim.serving.iteration import Engine, OutOfMemory, Plan
from helios_sim.serving.probing import Prober
from helios_sim.serving.replica import Replica
from helios_sim.serving.scheduler import Admission, Limits, schedule
from helios_sim.serving.shortage import Shortage
from helios_sim.serving.stats import RunStats
from helios_sim.serving.timeline import Timeline
from helios_sim.serving.transition import Transitions
from helios_sim.serving.turns import Turns
from helios_sim.serving.withdrawal import Withdrawals


class Server:
    def __init__(
        self,
        env: simpy.Environment,
        number: int,
        engine: Engine,
        policy: Policy,
        situation: Situation,
        on_left: Callable[[RequestRecord], None],
        leap: bool = True,
    ) -> None:
        """Without `leap` every iteration is an event of its own."""
        self._turns = Turns(env, number)
        self._leap = leap
        self._replica = Replica(env, number, engine, situation, on_left)
        self._decider = Decider(self._replica, policy)
        self._transitions = Transitions(self._replica, on_change=self._decider.arm, wake=self._turns.wake)
        self._prober = Prober(self._replica, self._decider, self._transitions)
        self._withdrawals = Withdrawals(self._replica)
        self._shortage = Shortage(self._replica, self._withdrawals)
        self._planned_ns: int | None = None  # start of the latest iteration; None: the server was idle since
        self._stretch: Stretch | None = None
        self._transitions.start(self._decider.start())
        self._turns.begin(self._run())

    def _run(self) -> Generator[Event, Any, None]:
        replica = self._replica
        while True:
            replica.acted_ns = replica.now_ns
            self._withdrawals.carry_out()
            if self._transitions.pending:  # a change of memory counts what is in use, not what is about to be free
                replica.release()
            self._transitions.advance()
            if not self._transitions.pending:  # one change at a time
                decided = self._decider.decide()
                if decided is not None:
                    replica.release()
                    self._transitions.begin(decided)
                    continue
            probe_end_ns = self._prober.advance()
            if probe_end_ns is not None:
                yield self._turns.at(probe_end_ns)
                continue
            self._transitions.follow_plan()
            stretch = self._stretch
            if stretch is not None and (meanwhile := self._meanwhile()) is not None and stretch.possible():
                yield from self._go_ahead(stretch, meanwhile)
                continue
            plan = self._plan(self._planned_ns if self._ahead else None)
            if plan is None and self._ahead and self._planned_ns is not None:
                self._planned_ns = None  # with nothing to run, whoever has arrived meanwhile is seen at once
                continue
            if plan is None:
                yield from self._turns.idle(self._decider.next_time_ns)
                continue
            started_ns = replica.now_ns
            try:
                outcome = replica.engine.execute(plan, started_ns)
            except OutOfMemory as short:
                self._shortage.give_way(short.reason)
                yield self._turns.at(short.end_ns)
                continue
            used = yield from self._turns.after(outcome, self._decider.iterations_until_trigger(plan, outcome))
            self._planned_ns = int(outcome.end_ns[used - 2]) if used > 1 else started_ns
            self._decider.count_breaches(plan, outcome, used)
            commit(replica, plan, outcome, used, started_ns)

    def look_ahead(self, intake: Intake, settle: Callable[[Ledger], None]) -> bool:
        """From now on all requests come from the intake and go to this server, and `settle` is told of them later.

        False: it stays as it is, because this server has to see the clock at every iteration.
        """
        engine = self._replica.engine
        if not self._leap or self._replica.situation.vllm_v1 or not isinstance(engine, Foreseeing):
            return False
        self._stretch = Stretch(self._replica, self._decider, engine, intake, settle)
        self._replica.waiting.take_in(intake, self._sequence)
        return True

    def submit(self, request: Request, from_replica: int | None = None) -> None:
        """A request arrives now. It is dropped at once if it can never run as deployed.

        `from_replica` is the replica whose completion released it (closed loop), which orders events at one time.
        """
        replica = self._replica
        replica.recent.arrived(replica.now_ns)
        model, intake = replica.deployment.active.model, replica.waiting.intake
        sequence = self._sequence(request, replica.model_number)
        if not self._transitions.pending and replica.planned_model(sequence) == model:
            reason = replica.why_impossible(sequence)
            if reason is not None:
                if intake is not None:
                    intake.let_go()
                replica.leave(sequence, Status.DROPPED, reason)
                return
        next_in_line = not replica.waiting
        if intake is not None:
            intake.keep(replica.model_number)
        else:
            replica.waiting.append(sequence)
        watched = self._decider.watches_queue  # then the policy may be asked at the end of this very iteration
        if watched or (next_in_line and self._could_start()):
            passed = from_replica is not None and from_replica > replica.number
            # Planned ahead, the iteration after the one in progress is settled already.
            settled = 1 if self._ahead and not passed and not watched else 0
            self._turns.wake(turn_passed=passed, settled=settled)

    def cancel(self, request_id: int, reason: str = "cancelled") -> None:
        """The request leaves at the end of the iteration in progress, dropped for this reason."""
        self._withdrawals.ask(request_id, reason)
        self._turns.wake()

    def request_failed(self, request_id: int, reason: str) -> None:
        """What the device computed for this request is no answer."""
        self.cancel(request_id, reason)

    def load_failed(self, model: str, reason: str) -> None:
        """Weights under way will not come; serving goes on with what is there. UserError where nothing is."""
        self._decider.note_failed_load(model, reason, self._transitions.give_up(model, reason))

    def finish(self) -> None:
        """Ends the run: whatever is still here leaves as unfinished."""
        replica = self._replica
        replica.release()
        while len(replica.batch):
            replica.withdraw()
        while replica.waiting:
            replica.leave(replica.waiting.popleft(), Status.UNFINISHED)
        replica.stats.batch_capacity_blocks = replica.pool.total_blocks
        self._transitions.close()

    @property
    def requests_in_system(self) -> int:
        return len(self._replica.waiting) + len(self._replica.batch)

    @property
    def used_blocks(self) -> int:
        return self._replica.pool.used_blocks

    @property
    def stats(self) -> RunStats:
        self._replica.gaps.flush()
        self._replica.utilisation.flush()
        return self._replica.stats

    @property
    def timeline(self) -> Timeline:
        return self._replica.timeline

    @property
    def decisions(self) -> list[Decision]:
        return self._decider.decisions

    @property
    def decisions_left_out(self) -> int:
        """How many of the middle ones the log has dropped."""
        return self._decider.decisions_left_out

    def _sequence(self, request: Request, model_number: int) -> Sequence:
        """A request that has not started, as that model reads it."""
        model = list(self._replica.situation.candidates)[model_number]
        prompt_tokens, span = self._replica.engine.tokenize(model, request)
        return Sequence(request, model, prompt_tokens, span.n_tokens, span)

    def _meanwhile(self) -> Meanwhile | None:
        """What goes on beside serving; None where not all that can act on this replica is known beforehand."""
        return self._transitions.meanwhile() if self._prober.waits and not self._ahead else None

    def _go_ahead(self, stretch: Stretch, meanwhile: Meanwhile) -> Generator[Event, Any, None]:
        """Takes turns ahead of the clock, up to one at which a trigger has fired or nothing can run."""
        stretch.enter(meanwhile)
        while True:
            stop = stretch.advance()
            yield self._turns.at(stretch.now_ns)
            if stop is not Stop.GO_ON:
                break
            stretch.hand_over()
        stretch.leave()
        if stretch.started_ns is not None:
            self._planned_ns = stretch.started_ns
        if stop is Stop.WAIT:
            yield from self._turns.idle(self._decider.next_time_ns)

    def _could_start(self) -> bool:
        replica = self._replica
        has_place = len(replica.batch) < replica.running_limit
        return not self._transitions.draining and replica.starts_left != 0 and has_place

    @property
    def _ahead(self) -> bool:
        """An exit check that the host must see is a barrier: nothing is planned across it."""
        replica = self._replica
        return replica.situation.schedule_ahead > 0 and not isinstance(replica.deployment.exit_rule, PerToken)

    def _plan(self, seen_until_ns: int | None) -> Plan | None:
        replica, deployment = self._replica, self._replica.deployment
        limits = Limits(
            batch_tokens=replica.situation.max_batch_tokens,
            running_requests=replica.running_limit,
            starts_left=replica.starts_left,
            admission_open=not self._transitions.closed,
            observe_tokens=deployment.observe_tokens,
            leap=self._leap,
            lingering=len(replica.lingering),
            seen_until_ns=seen_until_ns,
        )
        scheduled = schedule(
            replica.batch, replica.waiting, replica.pool, limits, admit=self._admit, preempt=replica.preempt
        )
        replica.release()
        if scheduled is None:
            return None
        for part in scheduled.prefill:
            replica.note_start(replica.batch.members[part.index])
        return Plan(
            model=deployment.active.model,
            loaded_layers=deployment.active.layers,
            run_layers=replica.run_layers,
            exit_rule=deployment.exit_rule,
            batching=deployment.batching,
            kv_rule=deployment.kv_rule,
            batch=replica.batch,
            decoding=replica.batch.decoding,
            prefill=scheduled.prefill,
            observe_tokens=deployment.observe_tokens,
            service_plan=deployment.plan,
            max_iterations=scheduled.max_iterations,
            new_blocks=scheduled.new_blocks,
            host_ahead=self._ahead,
            loading=self._transitions.loading,
        )

    def _admit(self, sequence: Sequence) -> Admission:
        if self._transitions.draining and not self._replica.is_begun(sequence):
            return Admission.LATER
        return self._replica.admit(sequence, self._transitions.pending)
