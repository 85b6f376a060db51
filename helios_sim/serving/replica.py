"""The state of one replica and its elementary moves. The server's parts share it; it decides nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import takewhile

import simpy

from helios_sim.policy.deployment import Deployment
from helios_sim.policy.telemetry import Observation, Situation
from helios_sim.request import Request, RequestRecord, Status
from helios_sim.serving.batch import RunningBatch, Sequence
from helios_sim.serving.histogram import GapBuffer
from helios_sim.serving.iteration import Engine
from helios_sim.serving.kv import KvPool, blocks_for
from helios_sim.serving.line import WaitingLine
from helios_sim.serving.meters import Recent
from helios_sim.serving.scheduler import Admission
from helios_sim.serving.stats import RunStats
from helios_sim.serving.timeline import Timeline
from helios_sim.serving.utilisation import Utilisation

SERVED_TEXTS = 64  # latest completed requests that a probe can score
# Why a request can never run as deployed; the model goes into the braces.
CONTEXT_EXCEEDED, POOL_EXCEEDED = "context of {} exceeded", "larger than the KV pool beside {}"


class Replica:
    def __init__(
        self,
        env: simpy.Environment,
        number: int,
        engine: Engine,
        situation: Situation,
        on_left: Callable[[RequestRecord], None],
    ) -> None:
        self.env = env
        self.number = number
        self.engine = engine
        self.situation = situation
        self.on_left = on_left
        self.deployment: Deployment  # in force; set before the first event
        self.batch = RunningBatch()
        self.waiting = WaitingLine()
        self.pool = KvPool(0, situation.memory.block_tokens, remember=situation.vllm_v1)
        self.lingering: list[tuple[int, int]] = []  # (admission number, blocks) of requests that are done
        self.stats = RunStats(block_tokens=situation.memory.block_tokens)
        self.gaps = GapBuffer(self.stats.itl)
        self.utilisation = Utilisation(self.stats)
        self.timeline = Timeline()
        self.recent = Recent()
        self.observations: list[Observation] = []  # new since the policy was last asked
        self.served: deque[Request] = deque(maxlen=SERVED_TEXTS)
        self.completed_requests = 0
        self.acted_ns = 0  # the server's latest turn; timers of leaps that were cut may move the clock beyond it
        self.starts_left: int | None = None  # of the deployment's admission limit
        self._fewer: int | None = None  # may run together, beside one for each completed request; None: no limit
        self.weight_bytes = 0  # resident or on the way, with the activation reserve
        self.block_bytes = 0
        # Models can be compared only where what they make of the text was recorded for all of them.
        self.scores_text = all(c.offline.bits_per_char is not None for c in situation.candidates.values())
        self.decode_ns = 0  # since the placement last changed
        self.decode_batch_ns = 0

    @property
    def now_ns(self) -> int:
        return int(self.env.now)

    @property
    def model_number(self) -> int:
        """Of the active model among the candidates."""
        return list(self.situation.candidates).index(self.deployment.active.model)

    @property
    def run_layers(self) -> int:
        return self.deployment.run_layers or self.deployment.active.layers

    @property
    def running_limit(self) -> int:
        limit = self.situation.max_running_requests
        if self.deployment.batch_limit is not None:
            limit = min(limit, self.deployment.batch_limit)
        places = self.engine.places(self.deployment.active.model)
        if places is not None:
            limit = min(limit, places.requests)
        if self._fewer is not None:
            limit = min(limit, self._fewer + self.completed_requests)
        return limit

    def run_fewer(self, requests: int) -> None:
        """So many may run together from now on, and one more with each that completes."""
        self._fewer = requests - self.completed_requests

    @property
    def in_flight(self) -> bool:
        """Whether an answer of the active model is begun; one that was preempted is at the head of the queue."""
        first = next(self.waiting.known(), None)
        return len(self.batch) > 0 or (first is not None and self.is_begun(first))

    def is_begun(self, sequence: Sequence) -> bool:
        return sequence.generated > 0 and sequence.model == self.deployment.active.model

    def blocks_to_finish(self) -> int:
        """Blocks that all answers in flight hold when each is complete."""
        begun = [*self.batch.members, *takewhile(self.is_begun, self.waiting.known())]
        return sum(blocks_for(s.prompt_tokens + s.output_tokens - 1, self.pool.block_tokens) for s in begun)

    def preempt(self) -> None:
        """The newest running request loses its place and its cache; it is computed again later.

        If the newest is one that is done, only what it still holds becomes free.
        """
        if self.lingering and self.lingering[-1][0] > self.batch.members[-1].admitted:
            self.pool.give(self.lingering.pop()[1])
            return
        self.batch.members[-1].preemptions += 1
        self.stats.preemptions += 1
        self.withdraw()

    def withdraw(self) -> None:
        """The newest running request goes back to the head of the queue."""
        sequence, reserved_tokens = self.batch.pop_newest()
        self.pool.give(blocks_for(reserved_tokens, self.pool.block_tokens), sequence.request.request_id)
        self.waiting.appendleft(sequence)

    def release(self) -> None:
        """Requests that are done give back what they still hold."""
        for _, blocks in self.lingering:
            self.pool.give(blocks)
        self.lingering.clear()

    def preempt_until(self, blocks: int) -> None:
        """Preempts, newest first, until at most so many blocks are used (0: nothing runs any more)."""
        while len(self.batch) and self.pool.used_blocks > blocks:
            self.preempt()

    def note_start(self, sequence: Sequence) -> None:
        """A request is part of an iteration; the first time, it counts against the admission limit."""
        if sequence.scheduled_ns is None:
            sequence.scheduled_ns = self.now_ns
        if not sequence.started:
            sequence.started = True
            if self.starts_left is not None:
                self.starts_left -= 1

    def note_memory(self) -> None:
        used = self.weight_bytes + self.pool.used_blocks * self.block_bytes
        self.stats.hbm_peak_bytes = max(self.stats.hbm_peak_bytes, used)

    def admit(self, sequence: Sequence, change_pending: bool) -> Admission:
        """Prepares the head of the queue for the active model; drops it if it can never run there.

        While a change is on its way nothing is dropped: there may be room again when it has come.
        """
        model = self.deployment.active.model
        if self.planned_model(sequence) != model:
            return Admission.LATER
        if sequence.model != model:
            self._retokenize(sequence, model)
        reason = self.why_impossible(sequence)
        if reason is None:
            return Admission.READY
        if change_pending:
            return Admission.LATER
        self.waiting.popleft()
        self.leave(sequence, Status.DROPPED, reason)
        return Admission.DROPPED

    def planned_model(self, sequence: Sequence) -> str:
        """The model that is to serve a request: the active one, unless the oracle has planned otherwise."""
        plan = self.deployment.plan
        return self.deployment.active.model if plan is None else plan.model(sequence.request.request_id)

    def why_impossible(self, sequence: Sequence) -> str | None:
        """Why this request can never run as deployed, or None."""
        model = sequence.model
        limit = self.situation.candidates[model].profile.model.max_context_tokens
        tokens = sequence.prompt_tokens + sequence.output_tokens
        if tokens > limit:
            return CONTEXT_EXCEEDED.format(model)
        places = self.engine.places(model)
        if places is not None and tokens > places.tokens:
            return f"longer than the {places.tokens} tokens that KV memory has for a request on {model}"
        if blocks_for(tokens - 1, self.pool.block_tokens) > self.pool.total_blocks:
            return POOL_EXCEEDED.format(model)
        return None

    def _retokenize(self, sequence: Sequence, model: str) -> None:
        """The rest of the answer on another model: its text so far becomes part of the prompt."""
        request = sequence.request
        open_chars = request.output_chars - sequence.earlier_chars
        sequence.earlier_chars += open_chars * sequence.generated // sequence.output_tokens
        sequence.earlier_tokens += sequence.generated
        sequence.generated = 0
        sequence.model = model
        sequence.prompt_tokens, sequence.span = self.engine.tokenize(model, request, sequence.earlier_chars)
        sequence.output_tokens = sequence.span.n_tokens

    def leave(self, sequence: Sequence, status: Status, reason: str | None = None) -> None:
        """A request leaves the system with its record."""
        request = sequence.request
        output_tokens = sequence.earlier_tokens + sequence.generated
        if status is Status.COMPLETED:
            self.completed_requests += 1
            self.recent.completed(sequence.prompt_tokens, output_tokens)
            self.served.append(request)
        self.engine.forget(request.request_id)
        self.on_left(
            RequestRecord(
                request_id=request.request_id,
                replica=self.number,
                task=request.task,
                model=sequence.model,
                status=status,
                drop_reason=reason,
                arrival_ns=request.arrival_ns,
                scheduled_ns=sequence.scheduled_ns,
                first_token_ns=sequence.first_token_ns,
                last_token_ns=sequence.last_token_ns,
                prompt_tokens=sequence.prompt_tokens,
                output_tokens=output_tokens,
                prompt_chars=request.prompt_chars,
                output_chars=request.output_chars,
                layers_run=sequence.layers_run,
                early_tokens=sequence.early_tokens,
                breach_tokens=sequence.breach_tokens,
                agreed_tokens=sequence.agreed_tokens,
                evaluated_tokens=sequence.evaluated_tokens,
                preemptions=sequence.preemptions,
                microbits=sequence.microbits if self.scores_text else None,
            )
        )
