"""The serving loop: turns of one replica's server, one after the other, until something outside has to act.

A turn takes arrivals, checks whether the policy is to be asked, schedules an iteration, prices it (or has a device run
it), and commits it when it ends. `advance` returns why it stopped; calling it again goes on from there.
"""

from __future__ import annotations

from helios_sim.core.arrive import arrive, release, take_arrivals
from helios_sim.core.commit import commit
from helios_sim.core.depths import lay_out, lay_out_pass, note_releases
from helios_sim.core.layout import (
    ADMITTING,
    ARRIVALS,
    ASK,
    EXECUTE,
    FCFS,
    FLUSH,
    FLUSH_REQUESTS,
    FOLLOW_PLAN,
    FOREVER_NS,
    GO_ON,
    HORIZON,
    IDLE,
    NEVER,
    RUNNING,
    TURN,
    WAITING,
    Counts,
    Line,
    Lists,
    Record,
    Table,
    Tables,
    Watch,
)
from helios_sim.core.prefix import Prefix, has_room
from helios_sim.core.price import floor_s, outside_grid, time_s, whole_ns
from helios_sim.core.schedule import admit, begin_schedule, release_lingering, running_limit
from helios_sim.core.triggers import next_alarm_ns, turn_is_due, watches_queue


def advance(t: Tables, until_ns: int) -> int:
    """Take the turns of this replica before `until_ns`, when something else may act on it. Returns why it stopped."""
    s, r, it = t.states[0], t.rules[0], t.iterations[0]
    requests, lists, line, arrivals, tokens = t.requests, t.lists, t.line, t.arrivals, t.tokens
    chunks, freed, prefix, owed, c, watch, work = t.chunks, t.freed, t.prefix, t.owed, t.counts, t.watch, t.work
    other = t.drafter
    while True:
        if s.to_release and s.phase in (ADMITTING, RUNNING):  # requests left meanwhile
            release(s, r, requests, lists, line, arrivals, tokens, s.now_ns)
        if s.phase == RUNNING:
            if s.end_ns >= until_ns:
                return HORIZON
            if not take_arrivals(s, r, requests, lists, line, arrivals, tokens, s.end_ns):
                return ARRIVALS
            if s.free == 0:
                return FLUSH
            commit(s, r, it, requests, lists, line, arrivals, tokens, chunks, freed, prefix, owed, c, watch)
            s.now_ns, s.phase, s.asked = s.end_ns, TURN, 0
        if s.phase == TURN:
            if not _has_room(s, r, c, prefix) or (s.eager and s.left):
                return FLUSH
            arrived = s.arrived
            if s.to_release:
                release(s, r, requests, lists, line, arrivals, tokens, s.now_ns)
            known = take_arrivals(s, r, requests, lists, line, arrivals, tokens, s.now_ns)
            if s.arrived != arrived:  # the policy was asked before they came
                s.asked = 0
            if not known:
                return ARRIVALS
            if s.free == 0:
                return FLUSH
            if s.idle and s.waiting == s.idle - 1:  # every arrival was rejected: stay idle
                s.phase = WAITING
                continue
            s.idle = 0
            s.acted_ns = s.now_ns
            if not s.asked and turn_is_due(s, r, requests, lists, line, watch, c.marks):
                return ASK
            s.asked = 0
            if s.pending:
                release_lingering(s, r, lists, freed, prefix)
            if r.planned and s.running == 0 and s.waiting and _planned_model(s, requests, line, arrivals) != s.model:
                return FOLLOW_PLAN
            begin_schedule(s, r, it, requests, lists, line, tokens, chunks, freed, prefix, owed)
            s.phase = ADMITTING
        if s.phase == WAITING:
            stop = _wait(s, r, requests, lists, line, arrivals, tokens, watch, until_ns)
            if stop != GO_ON:
                return stop
            s.phase = TURN
            continue
        stop = admit(s, r, it, requests, lists, line, arrivals, tokens, chunks, freed, prefix, owed)
        if stop != GO_ON:
            return stop
        if s.lingering:
            release_lingering(s, r, lists, freed, prefix)
        s.phase = TURN
        if it.decodes == 0 and it.chunks == 0 and it.drafting_apart == 0:
            if r.ahead and s.started_ns != NEVER:
                s.started_ns = NEVER  # with nothing to run, requests that have arrived meanwhile are seen at once
            else:
                s.phase = WAITING
            continue
        s.started_ns, s.phase = s.now_ns, RUNNING
        if r.live:
            return EXECUTE
        lay_out(s, r, it, requests, lists, chunks, t.trace, owed, work)
        prices, scalars = t.prices, t.scalars[0]
        spans, class_layers = (t.banded, t.banded_layers) if it.banded else (t.uniform, t.uniform_layers)
        n_chunks, duration_ns = it.chunks, 0
        draft = 1 if it.drafts or (r.drafts_apart and n_chunks) else 0
        passes = draft or r.draft_parts
        it.floor_ns = it.outside = it.draft_ns = it.draft_floor_ns = it.late_layers = it.late_ns = 0
        up_to, sampled, before_s = 0, it.sampled_tokens, 0.0
        if r.releases and it.decodes:
            up_to, before_s = 1, scalars.host_overhead_s + scalars.host_s_per_request * (it.decodes + it.chunks)
            before_s += scalars.sync_s
        while True:  # once for each ramp or draft pass, then for the whole iteration or the verification
            if r.releases:
                while 0 < up_to < r.bands and t.trace.checks[up_to - 1] == 0:
                    up_to += 1
                up_to = up_to if up_to < r.bands else 0  # bands to price, device time alone; 0: all
                it.drafting, it.sampled_tokens = (1, 0) if up_to else (0, sampled)
            if passes:
                apart = r.drafts_apart if draft else 0
                it.chunks = n_chunks if draft == 0 or (apart and draft == 1) else 0
                lay_out_pass(r, it, requests, lists, work, draft)
                if apart:
                    scalars, spans, class_layers = t.scalars[1], other.spans, other.layers
                elif r.drafts_apart:
                    scalars, spans, class_layers = t.scalars[0], t.banded, t.banded_layers
            seconds = time_s(prices, scalars, it, spans, class_layers, work, chunks, up_to if up_to else len(spans))
            if up_to:
                work[up_to - 1].done_ns = s.warm_up_ns + whole_ns(seconds + before_s * scalars.time_factor)
                up_to += 1
                it.late_layers = it.late_ns = 0
                continue
            floor_ns = whole_ns(floor_s(prices.windows, scalars, it, spans, class_layers, work, chunks))
            if draft and r.draft_parts:
                it.draft_floor_ns += floor_ns
            else:
                it.floor_ns += floor_ns
            it.outside |= outside_grid(prices, scalars, it, spans, class_layers, work, chunks)
            duration_ns += whole_ns(seconds)
            if duration_ns > FOREVER_NS:
                duration_ns = FOREVER_NS
            if draft == 0:
                break
            it.draft_ns = duration_ns
            draft = draft + 1 if draft < it.drafts else 0
            if draft == 0 and it.decodes == 0 and n_chunks == 0:
                break  # another card drafts, and nothing waits for verification
        if r.draft_parts:
            it.verify_ns = duration_ns - it.draft_ns
            compare_ns = it.drafts * r.exchange_ns if r.draft_cards > 1 else 0
            duration_ns = max(it.draft_ns + compare_ns, it.verify_ns)
            if it.draft_ns or it.drafted:
                duration_ns += r.exchange_ns
        s.end_ns, s.warm_up_ns = s.now_ns + duration_ns + s.warm_up_ns, 0
        if r.releases:
            note_releases(s, r, it, requests, lists, work)


def _has_room(s: Record, r: Record, c: Counts, prefix: Prefix) -> bool:
    """Whether results of one more iteration are sure to fit into their tables, and few wait to be handed over."""
    return (
        s.left < FLUSH_REQUESTS
        and s.free >= r.running_limit + 1
        and s.seen + s.running + r.running_limit <= len(c.seen)
        and s.samples < s.sample_room
        and (not r.shares or has_room(s, prefix, s.running, 0))
    )


def _wait(
    s: Record,
    r: Record,
    requests: Table,
    lists: Lists,
    line: Line,
    arrivals: Table,
    tokens: Table,
    watch: Watch,
    until_ns: int,
) -> int:
    """Move the clock of an idle server to the next arrival or alarm that wakes it, and return GO_ON.

    If that is not known returns ARRIVALS or FLUSH, and IDLE if none comes before `until_ns`.
    """
    if s.wake_ns != NEVER:  # a router has put an arrival into the line
        if s.wake_ns >= until_ns:
            return IDLE
        s.now_ns, s.wake_ns, s.idle = s.wake_ns, NEVER, 0
        return GO_ON
    alarm_ns = next_alarm_ns(s, watch)
    while True:
        if s.free == 0:
            return FLUSH
        if s.to_release and s.arrived == s.known and not s.exhausted:
            return ARRIVALS
        if s.to_release and s.arrived < s.known:  # closed loop, after a record has given its slot back
            if wakes(s, r, watch):
                s.idle = 1 + s.waiting
                return GO_ON
            release(s, r, requests, lists, line, arrivals, tokens, s.now_ns)
            continue
        arrival_ns = FOREVER_NS
        if not r.closed_loop:
            if s.arrived < s.known:
                arrival_ns = arrivals[s.arrived - s.first_row].arrival_ns
            elif not s.exhausted:
                return ARRIVALS
        # A run ends at the last departure, even if alarms are set.
        over = arrival_ns == FOREVER_NS and s.in_system == 0 and not s.routed
        if over or min(arrival_ns, alarm_ns) >= until_ns:
            return IDLE
        if alarm_ns <= arrival_ns:  # the alarm counts even if a request that arrives at the same time is rejected
            s.now_ns, s.idle = alarm_ns, 0
            return GO_ON
        if wakes(s, r, watch):
            s.now_ns, s.idle = arrival_ns, 1 + s.waiting
            return GO_ON
        arrive(s, r, requests, lists, line, arrivals, tokens, arrival_ns)


def wakes(s: Record, r: Record, watch: Watch) -> bool:
    """Whether an arriving request wakes an idle server: it is next in line and could start."""
    if watches_queue(watch):
        return True
    could_start = s.running < running_limit(s, r) and s.starts_left != 0 and not s.draining
    return could_start and (s.waiting == 0 or r.order != FCFS)


def _planned_model(s: Record, requests: Table, line: Line, arrivals: Table) -> int:
    ref = line.ref[0]
    return arrivals[ref - s.first_row].planned_model if ref >= 0 else requests[-1 - ref].planned_model
