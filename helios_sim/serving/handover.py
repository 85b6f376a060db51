"""Hands results of the loop over to a replica's statistics: sums, records of requests, observations and samples.

Requests also leave for reasons that the loop does not know: aborted, or unfinished when a run ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from helios_sim.core import arrive, layout, line, schedule
from helios_sim.core.layout import LATEST, NEVER, RECENT, SAMPLE, SEEN, SUMS, IntArray, numbers_of, take_sums, tuples
from helios_sim.exits.trace import TokenSpan
from helios_sim.request import RecordBlock, Request, RequestRecord, Status
from helios_sim.serving.inbox import COLUMNS
from helios_sim.serving.replica import SERVED_TEXTS, Replica

DROP_REASONS = {
    layout.CONTEXT_EXCEEDED: "context of {model} exceeded",
    layout.POOL_EXCEEDED: "larger than the KV pool beside {model}",
    layout.PLACES_EXCEEDED: "longer than the {tokens} tokens that KV memory has for a request on {model}",
}
_TEXT = COLUMNS[:7]  # columns that say what a request asks for
_LEFT_FIELDS = (
    *_TEXT, "model", "prompt_tokens", "generated", "earlier_tokens", "scheduled_ns", "first_token_ns",
    "last_token_ns", "left_ns", "why", "hit_tokens", "layers_run", "early_tokens", "breach_tokens", "agreed_tokens",
    "evaluated_tokens", "preemptions", "microbits",
)  # fmt: skip
_MODEL, _WHY = _LEFT_FIELDS.index("model"), _LEFT_FIELDS.index("why")
_AS_THEY_ARE = (
    "request_id", "task", "arrival_ns", "prompt_tokens", "prompt_chars", "output_chars", "layers_run", "early_tokens",
    "breach_tokens", "agreed_tokens", "evaluated_tokens", "preemptions",
)  # fmt: skip
_MOMENTS = ("scheduled_ns", "first_token_ns", "last_token_ns")
_SPAN_FIELDS = ("request_id", "model", "trace_first", "trace_start", "trace_length", "output_tokens")


def hand_over(replica: Replica) -> None:
    """Hand over everything since the last call: sums, records, observations and samples."""
    s, stats = replica.state, replica.stats
    if s.iterations or s.preemptions:
        for name, value in zip(SUMS, take_sums(s), strict=True):
            if value:
                setattr(stats, name, getattr(stats, name) + int(value))
    if s.gaps:
        stats.itl.add_counted(int(s.gaps), int(s.gaps_ns), int(s.shortest_gap_ns), int(s.longest_gap_ns))
        s.gaps = s.gaps_ns = s.longest_gap_ns = 0
        s.shortest_gap_ns = NEVER
    stats.hbm_peak_bytes = max(stats.hbm_peak_bytes, int(s.peak_bytes))
    _depths(replica)
    _samples(replica)
    tell(replica)
    _records(replica)


def settle(replica: Replica, model: str) -> None:
    """Hand over what belongs to the deployment in force, before a deployment of this model comes into force."""
    if model != replica.deployment.active.model:
        _depths(replica)
    _observations(replica)


def _depths(replica: Replica) -> None:
    if replica.depths.any():
        replica.stats.count_by_depth(replica.deployment.active.model, replica.depths)
        replica.depths[:] = 0


def tell(replica: Replica) -> None:
    """Hand over what a policy may ask for."""
    _forget_arrivals(replica)
    _observations(replica)


def _samples(replica: Replica) -> None:
    s = replica.state
    if s.samples:
        taken = tuples(replica.counts.samples, slice(int(s.samples)), SAMPLE.dtype.names or ())
        replica.timeline.keep([
            (time_ns, replica.models[model], layers, running, waiting, kv_bytes, weight_bytes)
            for time_ns, model, layers, running, waiting, kv_bytes, weight_bytes in taken
        ])
        s.samples = 0
        replica.meet_timeline()


def _forget_arrivals(replica: Replica) -> None:
    """Forget rows of arrivals that have started, except for the latest, from which the arrival rate is computed."""
    s = replica.state
    before = int(s.arrived) - RECENT
    if replica.inbox.may_forget(s, before):
        waiting = [ref for ref in replica.line.ref[: int(s.waiting)].tolist() if ref >= 0]
        replica.inbox.forget_before(s, min([before, *waiting]))


def _observations(replica: Replica) -> None:
    s, rule = replica.state, replica.deployment.exit_rule
    if not s.seen:
        return
    noted = tuples(replica.counts.seen, slice(int(s.seen)), SEEN.dtype.names or ())
    requests = tuples(replica.requests, [slot for slot, *_ in noted], _SPAN_FIELDS)
    for (_, seen_tokens, time_ns), (request_id, model, *span) in zip(noted, requests, strict=True):
        replica.observations.append(
            replica.engine.observe(replica.models[model], request_id, TokenSpan(*span), seen_tokens, rule, time_ns)
        )
    s.seen = 0


def latest_completed(replica: Replica) -> IntArray:
    """The fields of `LATEST` for the latest completed requests, oldest first, (n, 7)."""
    completed, names = int(replica.state.completed), LATEST.dtype.names or ()
    ring = numbers_of(replica.counts.latest, slice(min(completed, RECENT)), names)
    oldest = completed % RECENT if completed > RECENT else 0
    return np.concatenate((ring[oldest:], ring[:oldest])) if oldest else ring


def _records(replica: Replica) -> None:
    s = replica.state
    n = int(s.left)
    if not n:
        return
    slots = replica.lists.left[:n].tolist()
    s.left = 0
    if replica.on_block is not None:
        block = _block(replica, slots)
        replica.set_free(slots)
        replica.on_block(block)
        return
    rows = tuples(replica.requests, slots, _LEFT_FIELDS)
    replica.set_free(slots)
    replica.served.extend([row[: len(_TEXT)] for row in rows if not row[_WHY]][-SERVED_TEXTS:])
    for row in rows:
        why = row[_WHY]
        _record(replica, row, Status.DROPPED if why else Status.COMPLETED, _drop_reason(replica, why, row[_MODEL]))


def _block(replica: Replica, slots: Sequence[int]) -> RecordBlock:
    """Return the records of these requests as columns. Used if nothing outside reacts to each single record."""
    table = replica.requests[np.array(slots)]
    why, models = table["why"], replica.models
    output_tokens = table["generated"] + table["earlier_tokens"]
    completed = np.flatnonzero(why == 0)
    replica.served.extend(table[completed[-SERVED_TEXTS:]][list(_TEXT)].tolist())
    reasons: dict[str | None, int] = {None: 0}
    reason = np.zeros(len(table), np.int64)
    for row in np.flatnonzero(why):
        text = _drop_reason(replica, int(why[row]), int(table["model"][row]))
        reason[row] = reasons.setdefault(text, len(reasons))
    numbers = {name: table[name] for name in _AS_THEY_ARE}
    numbers |= {"replica": np.full(len(table), replica.number), "output_tokens": output_tokens}
    maybe = {name: (np.maximum(table[name], 0), table[name] != NEVER) for name in _MOMENTS}
    maybe["microbits"] = table["microbits"], np.full(len(table), replica.scores_text)
    maybe["cached_tokens"] = table["hit_tokens"], (table["scheduled_ns"] != NEVER) & replica.prefix.shares
    labels = {
        "model": (table["model"], models),
        "status": ((why != 0).astype(np.int64), (Status.COMPLETED, Status.DROPPED)),
        "drop_reason": (reason, tuple(reasons)),
    }
    return RecordBlock(numbers, maybe, labels)


def _drop_reason(replica: Replica, why: int, model: int) -> str | None:
    return _told(why, replica.models[model], int(replica.rules.place_tokens)) if why else None


@lru_cache(maxsize=64)
def _told(why: int, model: str, place_tokens: int) -> str:
    return DROP_REASONS[why].format(model=model, tokens=place_tokens)


def _depart(replica: Replica, slot: int, now_ns: int) -> None:
    """Count a request that leaves for a reason outside the loop."""
    s, request = replica.state, replica.requests[slot]
    arrive.note_change(s, now_ns)
    s.in_system -= 1
    s.departures += 1
    s.sojourn_ns += now_ns - int(request.arrival_ns)
    request.left_ns = now_ns
    replica.set_free([slot])


def _leave(replica: Replica, slot: int, now_ns: int, status: Status, reason: str | None) -> None:
    """Let a request leave for a reason outside the loop."""
    _depart(replica, slot, now_ns)
    if replica.rules.closed_loop:
        replica.state.to_release += 1
    (row,) = tuples(replica.requests, [slot], _LEFT_FIELDS)
    _record(replica, row, status, reason)


def _record(replica: Replica, row: Sequence[int], status: Status, reason: str | None) -> None:
    (
        request_id, arrival_ns, prompt_chars, output_chars, task, _, _, model, prompt_tokens, generated, earlier,
        scheduled_ns, first_token_ns, last_token_ns, left_ns, _, hit_tokens, layers_run, early, breaches, agreed,
        evaluated, preemptions, microbits,
    ) = row  # fmt: skip
    replica.engine.forget(request_id)
    replica.on_left(
        RequestRecord(
            request_id, replica.number, task, replica.models[model], status, reason, arrival_ns, _time(scheduled_ns),
            _time(first_token_ns), _time(last_token_ns), prompt_tokens, earlier + generated, prompt_chars,
            output_chars, layers_run, early, breaches, agreed, evaluated, preemptions,
            microbits if replica.scores_text else None,
            hit_tokens if replica.prefix.shares and scheduled_ns != NEVER else None,
        ),
        left_ns,
    )  # fmt: skip


def abort(replica: Replica, reasons: dict[int, str]) -> None:
    """Drop requests now, by id with the reason. Requests that have left already are ignored."""
    tell(replica)
    now_ns = replica.now_ns
    for place in reversed(range(int(replica.state.running))):
        reason = reasons.get(int(replica.requests[int(replica.lists.batch[place])].request_id))
        if reason is not None:
            _leave(replica, _take_from_batch(replica, place), now_ns, Status.DROPPED, reason)
    for slot in _take_from_line(replica, set(reasons)):
        _leave(replica, slot, now_ns, Status.DROPPED, reasons[int(replica.requests[slot].request_id)])


@dataclass(frozen=True, slots=True)
class Lost:
    """Requests that a replica has lost through a fault."""

    again: list[Request]  # requests to be sent again, in order of arrival
    dropped: int
    wasted_tokens: int  # output tokens of all lost requests


def lose(replica: Replica, all_of_them: bool, again: Callable[[int], bool], reason: str) -> Lost:
    """Take the running requests (with `all_of_them` also the waiting ones) out; what was computed for them is lost.

    Requests for which `again` is true of their id leave without a record. All others are dropped for this reason.
    """
    now_ns, found = replica.now_ns, Lost([], 0, 0)
    slots = [_take_from_batch(replica, place) for place in reversed(range(int(replica.state.running)))]
    slots += _take_from_line(replica, None) if all_of_them else []
    dropped = wasted = 0
    for slot in sorted(slots, key=lambda slot: int(replica.requests[slot].seq)):
        request = replica.requests[slot]
        wasted += int(request.generated + request.earlier_tokens)
        if again(int(request.request_id)):
            found.again.append(replica.request_of(request))
            _depart(replica, slot, now_ns)
            replica.engine.forget(found.again[-1].request_id, again=True)
        else:
            _leave(replica, slot, now_ns, Status.DROPPED, reason)
            dropped += 1
    return replace(found, dropped=dropped, wasted_tokens=wasted)


def _take_from_batch(replica: Replica, place: int) -> int:
    """Take a running request out of the batch and free its blocks. Returns its slot."""
    slot = int(replica.lists.batch[place])
    schedule.remove_running(replica.state, replica.lists, place)
    schedule.let_go(
        replica.state, replica.rules, replica.freed, replica.prefix.tables, replica.requests[slot], replica.owed, slot,
        NEVER,
    )  # fmt: skip
    return slot


def finish(replica: Replica) -> None:
    """End the run: every request that is still here leaves as unfinished."""
    s = replica.state
    hand_over(replica)
    replica.release_lingering()
    replica.grow_line()
    while s.running:
        place = line.last_in_order(s, replica.requests, replica.lists)
        schedule.withdraw(
            s, replica.rules, replica.requests, replica.lists, replica.line, replica.freed, replica.prefix.tables,
            replica.owed, place,
        )  # fmt: skip
    for slot in _take_from_line(replica, None):
        _leave(replica, slot, replica.now_ns, Status.UNFINISHED, None)
    replica.stats.batch_capacity_blocks = int(s.total_blocks)


def _take_from_line(replica: Replica, wanted: set[int] | None) -> list[int]:
    """Take these requests (None: all) out of the line, in its order. Returns their slots."""
    s, kept, taken = replica.state, [], []
    tokens = replica.inbox.tokens(s, int(s.model)) if s.known > s.first_row else None
    while s.waiting:
        key, seq, ref = int(replica.line.key[0]), int(replica.line.seq[0]), int(replica.line.ref[0])
        line.pop(s, replica.line)
        row = ref - int(s.first_row)
        request = replica.inbox.rows[row] if ref >= 0 else replica.requests[-1 - ref]
        if wanted is not None and int(request.request_id) not in wanted:
            kept.append((key, seq, ref))
        elif ref < 0:
            taken.append(-1 - ref)
        else:
            if not s.free:
                replica.grow_slots(2 * len(replica.requests))
            read = replica.inbox.tokens(s, int(request.model))[row] if tokens is not None else None
            taken.append(int(arrive.occupy(s, replica.requests, replica.lists, request, read, ref)))
    for entry in kept:
        line.push(s, replica.line, *entry)
    return taken


def _time(value: int) -> int | None:
    return None if value == NEVER else value
