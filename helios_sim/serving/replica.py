"""The state of one replica in the loop's records, and elementary operations on it. All parts of a server share it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import simpy

from helios_sim.core import arrive, blocks, layout, line, schedule, triggers
from helios_sim.core.layout import (
    CHUNK,
    FOREVER_NS,
    FREED,
    ITERATION,
    LATEST,
    MARK,
    NEVER,
    RECENT,
    REQUEST,
    RULES,
    SAMPLE,
    SEEN,
    STATE,
    WORK,
    Counts,
    Line,
    Lists,
    Record,
    Storage,
    Tables,
    Trace,
    Watch,
    number_of,
)
from helios_sim.core.power import MARKS, note_drawn
from helios_sim.exits.rule import DraftModel, PerToken, ReleaseEarly, SelfSpeculation
from helios_sim.policy.deployment import Deployment
from helios_sim.policy.telemetry import Observation, Situation
from helios_sim.request import NS_PER_S, RecordBlock, Request, RequestRecord, Slo, to_ns
from helios_sim.serving import exit_rules
from helios_sim.serving.inbox import COLUMNS, Inbox
from helios_sim.serving.iteration import Engine, Foresees, IntArray, Terms
from helios_sim.serving.prefix import PrefixCache
from helios_sim.serving.stats import SAMPLES, Recent, RunStats, Timeline, bucket_edges_ns

COUNTER_EVERY_NS = NS_PER_S // 10  # shortest time between two reads of a device's energy counter, which are slow
COUNTED_MW = 100_000  # a counter's energy is kept as nanoseconds of this power
MOST_MW = 50_000_000  # most power of a group of cards above idle, halved
SERVED_TEXTS = 64  # latest completed requests that a probe can score
OnLeft = Callable[[RequestRecord, int], None]
"""Called with the record of a request that has left, and the time in ns."""


class Replica:
    """The state of one replica. `on_left` gets each record, with the time at which its request left."""

    def __init__(
        self,
        env: simpy.Environment,
        number: int,
        engine: Engine,
        situation: Situation,
        on_left: OnLeft,
        storage: Storage,
        closed_loop: bool,
        departures: int = layout.FLUSH_REQUESTS,
    ) -> None:
        self.env, self.number, self.engine, self.situation, self.on_left = env, number, engine, situation, on_left
        self.on_block: Callable[[RecordBlock], None] | None = None  # gets records as columns instead, many at once
        self.storage = storage
        self.models = tuple(situation.candidates)
        self.stats = RunStats(block_tokens=situation.memory.block_tokens, prefix_caching=int(situation.shares))
        self.timeline = Timeline()
        self.recent = Recent(situation.slo)
        self.observations: list[Observation] = []  # observations since the policy was last asked
        self.served: deque[Sequence[int]] = deque(maxlen=SERVED_TEXTS)  # fields of `Request`
        # Models can be compared only if their bits per character were recorded for all of them.
        self.scores_text = all(c.offline.bits_per_char is not None for c in situation.candidates.values())
        self.foresees = isinstance(engine, Foresees)
        self.terms: Terms | None = None  # of the deployment in force, if the engine foresees iterations
        self._deployment: Deployment
        self._closed_loop, self._departures = closed_loop, departures
        self.joules: Callable[[], float | None] | None = None  # reads a device's energy counter
        self._counter_ns = 0  # when the counter was last read
        self._trace: Trace | None = None  # the trace as the deployment's rule replays it
        self._trace_of: tuple[Any, Any] = None, None
        self._enforced: Deployment | None = None
        self._rules_now: Mapping[str, int] = {}
        self._rules_of: dict[tuple[Terms, int | None, int | None], Mapping[str, int]] = {}  # by all that they depend on
        self._make_tables()

    def _make_tables(self) -> None:
        storage, situation = self.storage, self.situation
        self.state: Record = storage.record(STATE)
        self.rules: Record = storage.record(RULES)
        for name, value in self._rules_of_run().items():
            setattr(self.rules, name, int(value))
        self.iteration: Record = storage.record(ITERATION)
        self.raw_records = tuple(layout.raw(each) for each in (self.state, self.rules, self.iteration))
        self.inbox = Inbox(storage, self.models, self._tokens_of)
        layers = max(c.profile.model.n_layers for c in situation.candidates.values())
        self.bands = max(len(c.offline.exits) for c in situation.candidates.values())
        self.work = storage.rows(WORK, self.bands + 1)
        n = situation.max_running_requests
        self.chunks = storage.rows(CHUNK, n + 1)
        self.requests = storage.rows(REQUEST, 0)
        self.lists = Lists(*(storage.numbers(0) for _ in Lists._fields))
        self.line = Line(*(storage.numbers(0) for _ in Line._fields))
        self._owed: IntArray = np.zeros((0, self.bands + 1), np.int64)
        self.freed = storage.rows(FREED, 2)
        profiles = {name: candidate.profile for name, candidate in situation.candidates.items()}
        self.prefix = PrefixCache(
            storage, self.state, profiles, situation.prefixes, n + 1, situation.shares
        )
        self.depths: IntArray = np.zeros(layers + 1, np.int64)
        self.counts = Counts(
            seen=storage.rows(SEEN, 2 * n + layout.FLUSH_REQUESTS),
            samples=storage.rows(SAMPLE, SAMPLES + 2),
            depths=storage.array(self.depths),
            gaps=storage.array(self.stats.itl.counts),
            gap_edges_ns=storage.array(bucket_edges_ns()),
            marks=storage.rows(MARK, MARKS),
            latest=storage.rows(LATEST, RECENT),
        )
        s = self.state
        s.wake_ns = s.started_ns = s.sampled_ns = s.shortest_gap_ns = s.room_blocks = s.starts_left = NEVER
        s.blocked_seq = NEVER
        s.fewer = FOREVER_NS
        s.warm_up_ns = cast(Foresees, self.engine).warm_up_ns if self.foresees else 0
        s.exhausted = 1
        self.grow_slots(n + 2 + (2 * self._departures if storage.compiled else n))
        self.grow_line()
        self.meet_timeline()

    def grow_slots(self, n: int) -> None:
        """Grow to n slots."""
        storage, known = self.storage, len(self.requests)
        self.requests = storage.grown(REQUEST, self.requests, n)
        self.request_views = storage.views(REQUEST, self.requests)  # the same for plain Python
        self.lists = Lists(*(storage.more_numbers(each, n) for each in self.lists))
        self._owed = np.concatenate([self._owed, np.zeros((n - known, self.bands + 1), np.int64)])
        self.owed = storage.array(self._owed)
        if self.situation.refinds:
            self._grow_freed(2 * n + 2)
        self.set_free(range(n - 1, known - 1, -1))

    def set_free(self, slots: Sequence[int]) -> None:
        free, listed = int(self.state.free), self.lists.free
        for place, slot in enumerate(slots, free):
            listed[place] = slot
        self.state.free = free + len(slots)

    def _grow_freed(self, n: int) -> None:
        """Grow the ring of freed blocks. Every entry keeps its number."""
        s, old = self.state, self.freed
        self.freed = self.storage.rows(FREED, n)
        for entry in range(int(s.freed_first), int(s.freed_end)):
            kept, now = old[entry % len(old)], self.freed[entry % n]
            now.owner, now.blocks = kept.owner, kept.blocks

    def grow_line(self) -> None:
        """Make room in the line for all requests that may wait until the next call."""
        s = self.state
        most = int(s.waiting + s.known - s.arrived) + len(self.requests) + 1
        if len(self.line.key) < most:
            self.line = Line(*(self.storage.more_numbers(each, 2 * most) for each in self.line))

    def ready(self) -> None:
        """Make room for everything that the next `advance` may need. Call it before each."""
        self.grow_line()
        self.prefix.make_room()
        if self.state.left == 0 and self.state.free < self.rules.running_limit + 2:
            self.grow_slots(2 * len(self.requests))

    # --- What is in force -------------------------------------------------------------------------------------------

    @property
    def deployment(self) -> Deployment:
        return self._deployment

    @deployment.setter
    def deployment(self, deployment: Deployment) -> None:
        if self.prefix.shares:
            self.release_lingering()
            active, exits = deployment.active, self.situation.candidates[deployment.active.model].offline.exits
            self.prefix.follow(active.model, exits, FOREVER_NS if deployment.instant else active.layers)
        self._deployment = deployment
        self.state.model = self.model_number
        self.state.run_layers = self.run_layers
        self.enforce()

    def reprice(self) -> None:
        """Write the rules of the deployment in force again, after prices have changed."""
        self._enforced = None
        self.enforce()

    def enforce(self) -> None:
        """Write the rules of the deployment in force, if it has changed."""
        r, s, deployment, situation = self.rules, self.state, self._deployment, self.situation
        if self.foresees and deployment is self._enforced:
            return
        self._enforced = deployment
        if self.foresees:
            self.terms = terms = cast(Foresees, self.engine).terms(deployment, situation, self.storage)
            if terms.rules["owes"] and r.bands != terms.rules["bands"]:
                self._owed[:] = 0
            behind = terms, deployment.batch_limit, deployment.observe_tokens
            values = self._rules_of.get(behind) or {**self._rules_of_deployment(), **terms.rules}
            self._rules_of[behind] = values
        else:
            exits = situation.candidates[deployment.active.model].offline.exits
            values = {**self._rules_of_deployment(), **exit_rules.of_device(deployment, exits)}
        if r.regroups and (not values.get("regroups") or values["bands"] != r.bands):
            self._begin_anew()
        if r.draft_parts and not values["draft_parts"]:  # drafts are given up; none of them was counted
            for slot in self.lists.batch[: int(s.running)]:
                self.requests[slot].held = 0
        if values is not self._rules_now:
            for name, value in values.items():
                if self._rules_now.get(name) != value:
                    setattr(r, name, int(value))
            self._rules_now = values
        if self.foresees and self.inbox.follow(
            s, deployment.plan, lambda model: situation.candidates[model].offline.exits
        ):
            self._plan_running()

    def _rules_of_deployment(self) -> dict[str, int]:
        """The rules of the deployment in force that do not depend on prices."""
        deployment, situation = self._deployment, self.situation
        profile = situation.candidates[deployment.active.model].profile
        places = self.engine.places(deployment.active.model)
        seen_first = isinstance(deployment.exit_rule, PerToken | SelfSpeculation | DraftModel | ReleaseEarly)
        limit = situation.max_running_requests
        if deployment.batch_limit is not None:
            limit = min(limit, deployment.batch_limit)
        if places is not None:
            limit = min(limit, places.requests)
        rule = deployment.exit_rule
        drafts = rule if isinstance(rule, SelfSpeculation | DraftModel) else None
        return {
            "running_limit": limit,
            "context_limit": profile.model.max_context_tokens,
            "place_tokens": NEVER if places is None else places.tokens,
            # The host cannot plan ahead across an exit check or a verification, since it must see the answer first.
            "ahead": situation.schedule_ahead > 0 and not seen_first,
            "observe_tokens": NEVER if deployment.observe_tokens is None else deployment.observe_tokens,
            "planned": deployment.plan is not None,
            "draft_tokens": 0 if drafts is None or deployment.plan is not None else drafts.draft_tokens,
            "draft_batch": FOREVER_NS if drafts is None or drafts.largest_batch is None else drafts.largest_batch,
            "drafts_apart": isinstance(rule, DraftModel) and deployment.plan is None,
            **_draft_card(deployment, situation, self.foresees),
            "n_layers": profile.model.n_layers,
        }

    def _rules_of_run(self) -> dict[str, int]:
        """The rules that do not depend on the deployment."""
        situation = self.situation
        return {
            "order": line.ORDERS[situation.order],
            "block_tokens": situation.memory.block_tokens,
            "block_mask": _mask(situation.memory.block_tokens),
            "batch_tokens": situation.max_batch_tokens,
            "closed_loop": self._closed_loop,
            "live": not self.foresees,
            "vllm_v1": situation.vllm_v1,
            "prefill_first": situation.prefill_first,
            "keeps_answers": situation.keeps_answers,
            "wait_iterations": situation.wait_iterations,
            "wait_tokens": situation.wait_tokens,
            "whole_prompts": situation.whole_prompts,
            "shares": situation.shares,
            "refinds": situation.refinds,
            **_power(situation, self.foresees),
            **_levels(situation.slo),
        }

    def _begin_anew(self) -> None:
        """Let tokens that wait at an exit begin again from the first layer, since their hidden states are useless now.

        Frees the blocks of their K and V.
        """
        s, r = self.state, self.rules
        for slot in self.lists.batch[: int(s.decoding)]:
            request = self.requests[slot]
            if request.held:
                held = schedule.held_blocks(r, request)
                request.held, request.context_tokens = 0, request.context_tokens - 1
                blocks.give_blocks(s, r, self.freed, held - schedule.held_blocks(r, request), NEVER)

    def read_counter(self, every_ns: int = 0) -> bool:
        """Read a device's energy counter, unless it was read within `every_ns`. Returns whether energy is known."""
        if self.foresees:
            return self.situation.power_w is not None
        s, now_ns = self.state, max(int(self.state.end_ns), self.now_ns)
        if self.joules is None or now_ns - self._counter_ns < every_ns:
            return self.joules is not None
        joules = self.joules()
        if joules is None:
            return False
        drawn_ns = max(0, round(joules * NS_PER_S * 1000 / COUNTED_MW) - int(s.drawn_ns))
        note_drawn(s, self.counts.marks, self._counter_ns, now_ns, drawn_ns)
        self._counter_ns = now_ns
        return True

    def _plan_running(self) -> None:
        """Let requests with a slot follow the service plan as their rows do."""
        plan = self.deployment.plan
        if plan is None:
            for request in self.requests:
                request.planned_model = request.planned_first = NEVER

    def tables(self, watch: Watch) -> Tables:
        """All tables that the loop works on now."""
        model, terms = int(self.state.model), self.terms
        tokens, (coming, coming_tokens) = self.inbox.tokens(self.state, model), self.inbox.coming(model)
        priced: tuple[Any, ...] = (None,) * 9
        if terms is not None:
            of, trace = (terms, self.inbox.planned), terms.trace
            if self._deployment.plan is not None:
                if self._trace is None or self._trace_of[0] is not of[0] or self._trace_of[1] is not of[1]:
                    self._trace, self._trace_of = trace._replace(planned=self.storage.array(of[1])), of
                trace = self._trace
            priced = trace, terms.prices, terms.scalars, self.work, *terms.uniform, *terms.banded, terms.drafter
        return Tables(
            *self.raw_records, self.requests, self.lists, self.line, self.inbox.rows, tokens, coming, coming_tokens,
            self.chunks, self.freed, self.prefix.tables, self.owed, self.counts, watch, *priced,
        )  # type: ignore[call-arg]  # fmt: skip

    @cached_property
    def marks(self) -> Sequence[Record]:
        """The marks of energy drawn (`core.power`), for plain Python."""
        return self.storage.views(MARK, self.counts.marks)

    @property
    def now_ns(self) -> int:
        return int(self.env.now)

    @property
    def model_number(self) -> int:
        """Number of the active model among the candidates."""
        return self.models.index(self.deployment.active.model)

    @property
    def run_layers(self) -> int:
        return self.deployment.run_layers or self.deployment.active.layers

    @property
    def completed_requests(self) -> int:
        return int(self.state.completed)

    @property
    def arrival_rate_per_s(self) -> float | None:
        """Mean rate of the latest `RECENT` arrivals; None with fewer than two arrivals, or if all came at once."""
        s, rows = self.state, self.inbox.rows
        n, end = min(int(s.arrived), RECENT), int(s.arrived - s.first_row)
        if n < 2:
            return None
        span_ns = number_of(rows, end - 1, "arrival_ns") - number_of(rows, end - n, "arrival_ns")
        return (n - 1) * NS_PER_S / span_ns if span_ns else None

    @property
    def running_requests(self) -> int:
        return int(self.state.running)

    @property
    def waiting_requests(self) -> int:
        return int(self.state.waiting)

    @property
    def used_blocks(self) -> int:
        return int(self.state.used_blocks)

    @property
    def in_flight(self) -> bool:
        """Whether an answer of the active model has begun."""
        return bool(triggers.in_flight(self.state, self.request_views, self.line))

    def blocks_to_finish(self) -> int:
        return int(triggers.blocks_to_finish(self.state, self.rules, self.request_views, self.lists, self.line))

    # --- Moves ------------------------------------------------------------------------------------------------------

    def run_fewer(self, requests: int) -> None:
        """Limit the requests that run together to n, and to one more with each that completes."""
        self.state.fewer = requests - int(self.state.completed)

    def preempt_until(self, used_blocks: int) -> None:
        """Preempt requests, last in order first, until at most so many blocks are used (0: nothing runs any more)."""
        self.grow_line()
        s = self.state
        while s.running and s.used_blocks > used_blocks:
            schedule.preempt(
                s, self.rules, self.request_views, self.lists, self.line, self.freed, self.prefix.tables, self.owed
            )

    def release_lingering(self) -> None:
        """Free the blocks of lingering requests."""
        schedule.release_lingering(self.state, self.rules, self.lists, self.freed, self.prefix.tables)

    def forget_prefixes(self) -> None:
        """Discard all cached K and V. No request may hold any."""
        if self.prefix.shares:
            self.release_lingering()
            self.prefix.forget()

    def resize_pool(self, total_blocks: int) -> None:
        if total_blocks < self.state.used_blocks:
            raise RuntimeError(f"KV pool of {total_blocks} blocks while {self.state.used_blocks} are used")
        if self.prefix.shares:
            self.prefix.resize(total_blocks)
        else:
            blocks.resize_pool(self.state, self.rules, self.freed, total_blocks)

    def note_memory(self) -> None:
        s = self.state
        s.peak_bytes = max(s.peak_bytes, s.weight_bytes + s.used_blocks * s.block_bytes)

    def first_waiting_model(self) -> str | None:
        """The model that a service plan gives to the next request in line; None if none waits or there is no plan."""
        if self.deployment.plan is None or not self.state.waiting:
            return None
        ref = int(self.line.ref[0])
        row = self.inbox.rows[ref - int(self.state.first_row)] if ref >= 0 else self.requests[-1 - ref]
        return self.models[int(row.planned_model)]

    def retokenize(self) -> None:
        """Tokenize the next request for the active model. Its answer so far becomes part of the prompt."""
        request, model = self.requests[-1 - int(self.line.ref[0])], self.deployment.active.model
        open_chars = int(request.output_chars) - int(request.earlier_chars)
        request.earlier_chars += open_chars * int(request.generated) // int(request.output_tokens)
        request.earlier_tokens += request.generated
        request.generated = 0
        request.model = self.state.model
        tokens, span = self.engine.tokenize(model, self.request_of(request), int(request.earlier_chars))
        request.prompt_tokens, request.output_tokens = tokens, span.n_tokens
        request.trace_first, request.trace_start, request.trace_length = span.first, span.start, span.length

    def submit(self, request: Request) -> bool:
        """Let a request arrive now. Returns False if it can never run as deployed and has left at once."""
        s = self.state
        self.inbox.insert(s, request)
        if not s.free:
            self.grow_slots(2 * len(self.requests))
        self.grow_line()
        rejected = arrive.arrive(
            s, self.rules, self.requests, self.lists, self.line, self.inbox.rows,
            self.inbox.tokens(s, int(s.model)), self.now_ns,
        )  # fmt: skip
        return not rejected

    def sample(self) -> None:
        """Sample the state now, for pictures, when no iteration ends that would sample it."""
        s = self.state
        self.timeline.sample(
            self.now_ns, self.deployment.active.model, self.run_layers, self.running_requests, self.waiting_requests,
            int(s.used_blocks * s.block_bytes), int(s.weight_bytes),
        )  # fmt: skip
        self.meet_timeline()

    def keep_few_samples(self) -> None:
        self.timeline.keep_few()
        self.meet_timeline()

    def meet_timeline(self) -> None:
        """Let the loop sample the state only when the timeline would keep the sample."""
        s, rows = self.state, self.timeline.rows
        if rows:
            s.sampled_ns, model, s.sampled_layers, *_ = rows[-1]
            s.sampled_model = self.models.index(model)
        s.sample_interval_ns, s.sample_room = self.timeline.interval_ns, SAMPLES + 1 - len(rows)

    def reorder(self) -> None:
        """Sort the waiting line again, since keys may depend on the model that reads the prompts."""
        s = self.state
        if not self.rules.order or not s.waiting:
            return
        entries = [(int(self.line.seq[i]), int(self.line.ref[i])) for i in range(int(s.waiting))]
        tokens, s.waiting, s.waiting_slots = self.inbox.tokens(s, int(s.model)), 0, 0
        for seq, ref in entries:
            if ref < 0:
                key = int(self.requests[-1 - ref].order_key)
            else:
                row = ref - int(s.first_row)
                key = line.order_key(self.rules, int(self.inbox.rows[row].priority), int(tokens[row].prompt_tokens))
            line.push(s, self.line, key, seq, ref)

    def request_of(self, row: Record) -> Request:
        return Request(*(int(getattr(row, name)) for name in COLUMNS))

    def _tokens_of(self, model: str, requests: IntArray) -> IntArray:
        if self.foresees and len(requests) > 1:
            return cast(Foresees, self.engine).tokens_of(model, requests)
        found = []
        for row in requests.tolist():
            tokens, span = self.engine.tokenize(model, Request(*row))
            found.append((tokens, span.n_tokens, span.first, span.start, span.length))
        return np.array(found, np.int64).reshape(-1, 5)


def _power(situation: Situation, foresees: bool) -> dict[str, int]:
    """The rules for the power of the replica's card (`core.power`)."""
    if not foresees or situation.power_w is None:
        return {"idle_mw": 0, "drawn_mw": 0 if foresees else COUNTED_MW}
    idle_w, drawn_w = situation.power_w
    if situation.busy_w is not None:
        drawn_w = sum(situation.busy_w) / 2
    drawn_mw = min(round((drawn_w - idle_w) * 500), MOST_MW)
    return {"idle_mw": round(idle_w * 1000), "drawn_mw": drawn_mw, "draws_evenly": situation.busy_w is not None}


def _draft_card(deployment: Deployment, situation: Situation, foresees: bool) -> dict[str, int]:
    """The rules for drafters on their own cards. The idle power of those cards counts too."""
    rule = deployment.exit_rule if deployment.plan is None else None
    own = rule.own_card if isinstance(rule, DraftModel) else None
    idle_mw = _power(situation, foresees)["idle_mw"]
    if own is None or not isinstance(rule, DraftModel):
        return {"draft_parts": 0, "exchange_ns": 0, "draft_cards": 0, "idle_mw": idle_mw}
    cards = len(rule.drafters)
    return {
        "draft_parts": own.parts, "exchange_ns": to_ns(own.exchange_s, "exchange_s"), "draft_cards": cards,
        "idle_mw": (1 + cards) * idle_mw,
    }  # fmt: skip


def _levels(slo: Slo) -> dict[str, int]:
    bounds = {"ttft_ns": slo.ttft_s, "tpot_ns": slo.tpot_s, "e2e_ns": slo.e2e_s}
    return {name: NEVER if bound is None else to_ns(bound, "slo") for name, bound in bounds.items()}


def _mask(block_tokens: int) -> int:
    return block_tokens - 1 if block_tokens & (block_tokens - 1) == 0 else NEVER


def _time(value: int) -> int | None:
    return None if value == NEVER else value


