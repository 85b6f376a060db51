"""A replica's turns and iterations computed ahead of the clock, up to the next moment at which only Python can go on.

Moves the state from objects into arrays, lets the compiled steps run, and moves it back when the clock has come to
where they stopped. Until then nobody else may act on the replica or send it requests; weights on their way arrive when
the engine says.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from helios_sim.compiled import is_made
from helios_sim.exits.trace import TokenSpan
from helios_sim.policy.deployment import Deployment
from helios_sim.profile.price_tables import CHUNK_ROWS, WORK_ROWS
from helios_sim.serving.ahead import layout as at
from helios_sim.serving.ahead.contract import Foreseeing, Ledger, Meanwhile, Stop, Terms
from helios_sim.serving.ahead.layout import STATE, Batch, Counts, Queue, State, Watch
from helios_sim.serving.ahead.rows import empty, record_of, request_of, rows_of, sequence_of, slot_row, time_of
from helios_sim.serving.ahead.watching import give_back, watch_of
from helios_sim.serving.batch import Sequence
from helios_sim.serving.decider import Decider
from helios_sim.serving.histogram import bucket_edges_ns
from helios_sim.serving.intake import Intake
from helios_sim.serving.meters import RECENT
from helios_sim.serving.replica import SERVED_TEXTS, Replica
from helios_sim.serving.timeline import SAMPLES

WORTH_COMPILING = 2000  # requests that take about as long uncompiled as compiling does
_SEEN = 2048
_PLACES = {name: place for place, name in enumerate(STATE.names or ())}
_HANDED_OVER = [_PLACES[name] for name in (*at.SUMS, "gaps", "gaps_ns", "presence_ns", "arrivals", "done", "seen")]


def worth_compiling(requests: int) -> bool:
    """Whether so many requests are worth it, or it was done before; the result of a run does not depend on it."""
    return requests >= WORTH_COMPILING or is_made("advance")


class Stretch:
    """One object serves one replica, again and again."""

    def __init__(
        self, replica: Replica, decider: Decider, engine: Foreseeing, intake: Intake, settle: Callable[[Ledger], None]
    ) -> None:
        self._replica = replica
        self._decider = decider
        self._engine = engine
        self._intake = intake
        self._settle = settle
        self._fields = empty(len(STATE.names or ()))  # all of the state, one number after the other
        self._state: State = self._fields.view(STATE)[0]  # the same memory, by name
        self._terms: tuple[Deployment, Terms | None] | None = None
        self._batch: Batch
        # What is written before it is read stays from one stretch to the next.
        self._queue = Queue(intake.rows, empty(0, at.TOKENS_COLUMNS), empty(0, at.SLOT_COLUMNS))
        self._counts = Counts(
            seen=empty(0, at.SEEN_COLUMNS),
            samples=empty(SAMPLES + 1, at.SAMPLE_COLUMNS),
            depths=empty(0),
            gaps=replica.stats.itl.counts,
            gap_edges_ns=bucket_edges_ns(),
        )
        self._watch: Watch
        self._meanwhile: Meanwhile
        self._settled_ns = 0
        self._known: list[Sequence] = []  # objects of requests that have a slot

    @property
    def now_ns(self) -> int:
        """To where the clock has to come before `leave`."""
        return int(self._state["now_ns"])

    @property
    def started_ns(self) -> int | None:
        """When the latest iteration began, if there was any."""
        return time_of(int(self._state["started_ns"]))

    def possible(self) -> bool:
        """Whether the compiled steps know all that is going on, beside what the server knows of loads and changes."""
        replica = self._replica
        if replica.lingering or self._terms_now() is None:
            return False
        model = replica.deployment.active.model
        return all(sequence.model == model for sequence in replica.waiting.known())

    def enter(self, meanwhile: Meanwhile) -> None:
        """Moves the replica's state into arrays. The policy has just been asked."""
        replica, s = self._replica, self._state
        terms = self._terms_now()
        assert terms is not None
        self._fields[:] = 0
        s["now_ns"] = s["changed_ns"] = s["acted_ns"] = self._settled_ns = replica.now_ns
        s["asked"] = 1
        s["started_ns"] = s["shortest_gap_ns"] = at.NEVER
        s["used_blocks"], s["total_blocks"] = replica.pool.used_blocks, replica.pool.total_blocks
        s["peak_blocks"] = replica.pool.used_blocks
        s["starts_left"] = at.NEVER if replica.starts_left is None else replica.starts_left
        s["completed"], s["completed_before"] = replica.completed_requests, self._decider.completed_before
        s["loading"], s["pending"], s["draining"] = meanwhile.loading, meanwhile.pending, meanwhile.draining
        self._fill(terms)
        self._meanwhile = meanwhile
        triggers = replica.deployment.triggers
        self._watch = watch_of(self._decider, triggers, meanwhile, self._engine.transfer_end_ns)
        s["in_system"] = s["running"] + s["front"] + self._intake.waiting
        self._meet_timeline()

    def advance(self) -> Stop:
        """Computes on. The clock has to come to `now_ns` before the next call of anything here."""
        from helios_sim.serving.ahead.loop import advance  # compiling takes its time, and not all need it

        s, t = self._state, self._terms_now()
        assert t is not None
        while True:
            self._meet_intake()
            stop = advance(
                s, t.rules, self._batch, self._queue, t.trace, self._counts, self._watch,
                t.prices, t.scalars, t.uniform, t.banded,
            )  # fmt: skip
            self._return_intake()
            if stop == at.FIRED:
                return Stop.DECIDE
            if stop == at.IDLE:
                return Stop.WAIT
            if stop == at.MORE_ARRIVALS:
                self._intake.read_on()
            elif s["done"] >= at.ENOUGH_DONE or s["samples"] < s["sample_room"]:
                return Stop.GO_ON
            else:
                self._sample()

    def hand_over(self) -> None:
        """What has happened so far becomes part of the replica's books; the state stays where it is."""
        s, replica, depths = self._state, self._replica, self._counts.depths
        stats, model = replica.stats, replica.deployment.active.model
        for name in at.SUMS:
            setattr(stats, name, getattr(stats, name) + int(s[name]))
        replica.decode_ns += int(s["decode_ns"])
        replica.decode_batch_ns += int(s["decode_batch_ns"])
        if depths.any():
            stats.count_by_depth(model, depths)
        stats.itl.add_counted(int(s["gaps"]), int(s["gaps_ns"]), int(s["shortest_gap_ns"]), int(s["longest_gap_ns"]))
        used = replica.weight_bytes + int(s["peak_blocks"]) * replica.block_bytes
        stats.hbm_peak_bytes = max(stats.hbm_peak_bytes, used)
        self._hand_over_requests(model)
        self._sample()
        self._fields[_HANDED_OVER] = 0
        depths[:] = 0

    def leave(self) -> None:
        """Moves the state back into objects; the clock stands at `now_ns`."""
        self.hand_over()
        replica, s, slots = self._replica, self._state, self._batch.slots
        model = replica.deployment.active.model
        running, front = self._batch.lists[at.BATCH, : s["running"]], self._batch.lists[at.FRONT, : s["front"]]
        members = [sequence_of(row, self._known, model) for row in slots[running].tolist()]
        columns = slots[running, : at.BATCH_COLUMNS]
        replica.batch.replace(members, columns, self._batch.owed[running], int(s["decoding"]))
        replica.waiting.replace_known([sequence_of(row, self._known, model) for row in slots[front[::-1]].tolist()])
        replica.pool.used_blocks = int(s["used_blocks"])
        if replica.starts_left is not None:
            replica.starts_left = int(s["starts_left"])
        replica.acted_ns = int(s["acted_ns"])
        self._known = []
        give_back(self._decider, replica.deployment.triggers, self._meanwhile, self._watch)

    def _terms_now(self) -> Terms | None:
        replica = self._replica
        if self._terms is None or self._terms[0] is not replica.deployment:
            closed_loop = self._intake.closed_loop
            terms = self._engine.terms(replica.deployment, replica.situation, replica.running_limit, closed_loop)
            self._terms = replica.deployment, terms
        return self._terms[1]

    def _fill(self, terms: Terms) -> None:
        replica, s, rules = self._replica, self._state, terms.rules
        members, front = replica.batch.members, list(replica.waiting.known())
        self._known = [*members, *front]
        n, known, debt = len(members), len(self._known), replica.batch.kv_debt
        n_slots = known + int(rules["running_limit"]) + 1
        bands = int(rules["loaded_exit"]) + 1 if rules["owes"] else len(debt)
        slots, lists, owed = empty(n_slots, at.SLOT_COLUMNS), empty(at.LISTS, n_slots), empty(n_slots, bands)
        if known:
            slots[:known] = [slot_row(sequence, i) for i, sequence in enumerate(self._known)]
            slots[:n, : at.BATCH_COLUMNS] = replica.batch.rows()
        if len(debt) == bands:
            owed[:n] = debt[:, :n].T
        s["running"], s["decoding"], s["front"], s["free"] = n, replica.batch.decoding, len(front), n_slots - known
        lists[at.BATCH, :n] = np.arange(n)
        lists[at.FRONT, : len(front)] = np.arange(n, known)[::-1]
        lists[at.FREE, : s["free"]] = np.arange(known, n_slots)
        work, chunks = empty(WORK_ROWS, len(terms.trace.exits)), empty(CHUNK_ROWS, n_slots)
        self._batch = Batch(slots, lists, owed, work, chunks)
        seen, n_seen = self._counts.seen, _SEEN + 2 * n_slots
        self._counts = self._counts._replace(
            seen=seen if len(seen) >= n_seen else empty(n_seen, at.SEEN_COLUMNS),
            depths=empty(int(rules["n_layers"]) + 1),
        )

    def _meet_intake(self) -> None:
        """Rows may have come and gone since; whoever may leave finds a place."""
        s, intake = self._state, self._intake
        model = self._replica.deployment.active.model
        s["head"], s["arrived"], s["fresh"] = intake.head, intake.arrived, intake.waiting
        s["known"], s["exhausted"] = len(intake.rows), intake.exhausted
        may_leave = int(s["running"] + s["front"] + s["fresh"] + s["known"] - s["arrived"])
        done = self._queue.done
        if len(done) < s["done"] + may_leave + at.ENOUGH_DONE:
            room = empty(int(s["done"]) + may_leave + 2 * at.ENOUGH_DONE, at.SLOT_COLUMNS)
            room[: s["done"]] = done[: s["done"]]
            done = room
        tokens = intake.tokens(model, self._engine.tokens_of)
        self._queue = Queue(intake.rows, tokens, done)

    def _return_intake(self) -> None:
        s, intake, replica = self._state, self._intake, self._replica
        first, end = intake.arrived, int(s["arrived"])
        intake.rows[first:end, at.MODEL_THEN] = replica.model_number
        for time_ns in intake.rows[max(first, end - RECENT) : end, at.ARRIVES_NS].tolist():
            replica.recent.arrived(time_ns)
        intake.head, intake.arrived, intake.waiting = int(s["head"]), end, int(s["fresh"])

    def _hand_over_requests(self, model: str) -> None:
        s, replica = self._state, self._replica
        rows = rows_of(self._queue.done, int(s["done"]))
        records = [record_of(row, replica.number, model, replica.scores_text) for row in rows]
        completed = [row for row in rows if row[at.WHY] == at.COMPLETED]
        replica.completed_requests += len(completed)
        for row in completed[-RECENT:]:
            replica.recent.completed(row[at.PROMPT_TOKENS], row[at.EARLIER_TOKENS] + row[at.GENERATED])
        replica.served.extend(request_of(row) for row in completed[-SERVED_TEXTS:])
        rule = replica.deployment.exit_rule
        for row in rows_of(self._counts.seen, int(s["seen"])):
            span = TokenSpan(row[at.SEEN_FIRST], row[at.SEEN_START], row[at.SEEN_LENGTH], row[at.SEEN_TOTAL])
            replica.observations.append(
                self._engine.observed(model, row[at.SEEN_ID], span, row[at.SEEN_TOKENS], rule, row[at.SEEN_NS])
            )
        sojourn_ns = sum(row[at.LEFT_NS] - row[at.ARRIVAL_NS] for row in rows)
        until_ns = int(s["changed_ns"])
        self._settle(Ledger(records, int(s["arrivals"]), self._settled_ns, until_ns, int(s["presence_ns"]), sojourn_ns))
        self._settled_ns = until_ns

    def _meet_timeline(self) -> None:
        s, timeline, replica = self._state, self._replica.timeline, self._replica
        last = timeline.rows[-1] if timeline.rows else None
        same = last is not None and last[1:3] == (replica.deployment.active.model, replica.run_layers)
        s["sampled_ns"] = last[0] if last is not None and same else at.NEVER
        s["sample_interval_ns"], s["sample_room"] = timeline.interval_ns, SAMPLES + 1 - len(timeline.rows)

    def _sample(self) -> None:
        s, replica = self._state, self._replica
        model, layers = replica.deployment.active.model, replica.run_layers
        for time_ns, running, queued, blocks in rows_of(self._counts.samples, int(s["samples"])):
            replica.timeline.sample(
                time_ns, model, layers, running, queued, blocks * replica.block_bytes, replica.weight_bytes
            )
        s["samples"] = 0
        self._meet_timeline()
