"""Conditions that interrupt serving: a policy's triggers, and what a pending change of placement waits for."""

from __future__ import annotations

from helios_sim.core.blocks import blocks_for
from helios_sim.core.layout import (
    AT_TIME,
    BREACHES,
    COMPLETIONS,
    DRAINED,
    FOREVER_NS,
    KV_ABOVE,
    MILLIONTHS,
    NEVER,
    POWER_ABOVE,
    PROBED,
    QUEUE_ABOVE,
    RUNNING_ABOVE,
    Line,
    Lists,
    Numbers,
    Record,
    Table,
    Watch,
)
from helios_sim.core.power import is_above


def turn_is_due(
    s: Record, r: Record, requests: Table, lists: Lists, line: Line, watch: Watch, marks: Table
) -> bool:  # fmt: skip
    """Whether the server must ask its policy now, or go on with a change or a probe, before it schedules."""
    if s.turn_wanted or (s.awaits_completion and s.completed > 0):
        return True
    if s.pending:  # no policy is asked until a change is in force
        if s.room_blocks != NEVER and blocks_to_finish(s, r, requests, lists, line) <= s.room_blocks:
            return True
        return s.awaits_answers != 0 and not in_flight(s, requests, line)
    return first_fired(s, r, requests, line, watch, marks, 0) != NEVER


def first_fired(s: Record, r: Record, requests: Table, line: Line, watch: Watch, marks: Table, start: int) -> int:
    """The index of the first trigger from `start` on that has fired, or NEVER."""
    for k in range(start, len(watch.triggers)):
        if _has_fired(s, r, requests, line, watch, marks, watch.triggers[k]):
            return k
    return NEVER


def _has_fired(
    s: Record, r: Record, requests: Table, line: Line, watch: Watch, marks: Table, trigger: Record
) -> bool:  # fmt: skip
    kind, argument = trigger.kind, trigger.argument
    if kind == BREACHES:
        window = watch.windows[trigger.window]
        return window.filled == window.length and window.breaches > window.limit
    if kind == COMPLETIONS:
        return s.completed - s.completed_before >= argument
    if kind in (QUEUE_ABOVE, RUNNING_ABOVE, KV_ABOVE, POWER_ABOVE):  # fires again only after it has fallen below
        if not _is_above(s, r, marks, trigger):
            trigger.spent = 0
            return False
        return trigger.spent == 0
    if trigger.spent:
        return False
    if kind == AT_TIME:
        return s.now_ns >= argument
    if kind == DRAINED:
        return s.starts_left == 0 and s.running == 0 and not _started_waits(s, requests, line)
    return kind == PROBED and argument != 0  # its argument is set when the probe has scored every candidate


def _is_above(s: Record, r: Record, marks: Table, trigger: Record) -> bool:
    kind, argument = trigger.kind, trigger.argument
    if kind == POWER_ABOVE:
        return is_above(s, r, marks, argument, trigger.span_ns)
    if kind == QUEUE_ABOVE:
        return s.waiting > argument
    if kind == RUNNING_ABOVE:
        return s.running > argument
    return s.used_blocks * MILLIONTHS > argument * s.total_blocks


def next_alarm_ns(s: Record, watch: Watch) -> int:
    """The next time at which a trigger wakes an idle server, or FOREVER_NS."""
    found = FOREVER_NS
    for k in range(len(watch.triggers)):
        trigger = watch.triggers[k]
        if trigger.kind == AT_TIME and trigger.argument > s.now_ns:
            found = min(found, trigger.argument)
    return found


def watches_queue(watch: Watch) -> bool:
    for k in range(len(watch.triggers)):  # noqa: SIM110, Numba knows no `any`
        if watch.triggers[k].kind == QUEUE_ABOVE:
            return True
    return False


def slide_windows(s: Record, it: Record, requests: Table, lists: Lists, watch: Watch) -> None:
    """Add the iteration's decode tokens to the windows of the breach counter, in order of the batch.

    Observed tokens are left out, because they ran deeper than the cap.
    """
    batch, alike, windows, flags = lists.batch, it.alike, watch.windows, watch.flags
    for k in range(len(windows)):
        window = windows[k]
        if window.of_requests:
            continue
        for i in range(it.decodes):
            if alike:
                _enter(window, flags, k, 0)
            else:
                request = requests[batch[i]]
                if not request.observed:
                    _enter(window, flags, k, request.token_breach)


def slide_completed(r: Record, request: Record, watch: Watch) -> None:
    """Add a completed request to the windows of SLO attainment."""
    for k in range(len(watch.windows)):
        if watch.windows[k].of_requests:
            _enter(watch.windows[k], watch.flags, k, 0 if meets_slo(r, request) else 1)


def meets_slo(r: Record, request: Record) -> bool:
    """Whether a completed request met every SLO. An answer of one token has no TPOT."""
    first_ns, last_ns, arrival_ns = request.first_token_ns, request.last_token_ns, request.arrival_ns
    if r.ttft_ns != NEVER and first_ns - arrival_ns > r.ttft_ns:
        return False
    if r.e2e_ns != NEVER and last_ns - arrival_ns > r.e2e_ns:
        return False
    further = request.generated + request.earlier_tokens - 1
    return r.tpot_ns == NEVER or last_ns - first_ns <= r.tpot_ns * further


def _enter(window: Record, flags: Numbers, k: int, breach: int) -> None:
    """Add an entry to the k-th window. If its ring is full, the oldest entry leaves."""
    at, length = window.next, window.length
    if window.filled == length:
        window.breaches -= flags[k, at]
    else:
        window.filled += 1
    flags[k, at] = breach
    window.breaches += breach
    window.next = at + 1 if at + 1 < length else 0


def in_flight(s: Record, requests: Table, line: Line) -> bool:
    """Whether an answer of the active model has begun. A preempted one is at the head of the line."""
    if s.running > 0:
        return True
    return s.waiting > 0 and line.ref[0] < 0 and is_begun(s, requests[-1 - line.ref[0]])


def is_begun(s: Record, request: Record) -> bool:
    return request.generated > 0 and request.model == s.model


def blocks_to_finish(s: Record, r: Record, requests: Table, lists: Lists, line: Line) -> int:
    """KV blocks that all answers in flight will hold when they are complete."""
    blocks = 0
    for i in range(s.running):
        blocks += _whole_blocks(r, requests[lists.batch[i]])
    if s.waiting_slots:
        for i in range(s.waiting):
            ref = line.ref[i]
            if ref < 0 and is_begun(s, requests[-1 - ref]):
                blocks += _whole_blocks(r, requests[-1 - ref])
    return blocks


def _whole_blocks(r: Record, request: Record) -> int:
    return blocks_for(request.prompt_tokens + request.output_tokens - 1, r.block_tokens)


def _started_waits(s: Record, requests: Table, line: Line) -> bool:
    if s.waiting_slots:
        for i in range(s.waiting):
            if line.ref[i] < 0 and requests[-1 - line.ref[i]].started:
                return True
    return False
