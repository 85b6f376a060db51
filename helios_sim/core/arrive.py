"""Arrivals and departures of requests, and the integrals by which every run checks L = lambda W (Little's law)."""

from __future__ import annotations

from helios_sim.core.blocks import blocks_for
from helios_sim.core.layout import (
    COMPLETED,
    CONTEXT_EXCEEDED,
    NEVER,
    PLACES_EXCEEDED,
    POOL_EXCEEDED,
    Line,
    Lists,
    Record,
    Table,
)
from helios_sim.core.line import order_key, push


def cannot_run(s: Record, r: Record, prompt_tokens: int, output_tokens: int) -> int:
    """Why a request can never run under the deployment in force; 0 if it can."""
    tokens = prompt_tokens + output_tokens
    if tokens > r.context_limit:
        return CONTEXT_EXCEEDED
    if r.place_tokens != NEVER and tokens > r.place_tokens:
        return PLACES_EXCEEDED
    if blocks_for(tokens - 1, r.block_tokens) > s.total_blocks:
        return POOL_EXCEEDED
    return 0


def take_arrivals(
    s: Record, r: Record, requests: Table, lists: Lists, line: Line, arrivals: Table, tokens: Table, until_ns: int
) -> bool:
    """Put requests that arrive up to `until_ns` into the line. Returns False if later arrivals are not known yet.

    Stops when no slot is free, since a request that can never run takes a slot until its record is handed over.
    """
    if r.closed_loop:  # requests arrive as others leave, and all running requests may leave at once
        return s.known - s.arrived > r.running_limit or s.exhausted != 0
    while s.arrived < s.known and arrivals[s.arrived - s.first_row].arrival_ns <= until_ns:
        if s.free == 0:
            return True
        arrive(s, r, requests, lists, line, arrivals, tokens, arrivals[s.arrived - s.first_row].arrival_ns)
    return s.arrived < s.known or s.exhausted != 0


def release(
    s: Record, r: Record, requests: Table, lists: Lists, line: Line, arrivals: Table, tokens: Table, now_ns: int
) -> None:
    """Closed loop: let the next request arrive for each that has left. One that can never run leaves at once again.

    A request that cannot arrive yet, since no slot is free or it is not known, arrives with the next call.
    """
    while s.to_release and s.arrived < s.known and s.free > 0:
        s.to_release -= 1
        arrivals[s.arrived - s.first_row].arrival_ns = now_ns
        if arrive(s, r, requests, lists, line, arrivals, tokens, now_ns):
            s.to_release += 1


def arrive(
    s: Record, r: Record, requests: Table, lists: Lists, line: Line, arrivals: Table, tokens: Table, now_ns: int
) -> bool:
    """Let the next known request arrive. Returns True if it can never run here and has left at once.

    No request is dropped while a change of deployment is pending, since there may be room after it. A request that a
    service plan gives to another model is checked when that model is active.
    """
    number = s.arrived
    row = number - s.first_row
    arrival = arrivals[row]
    s.arrived += 1
    s.arrivals += 1
    arrival.model = s.model
    note_change(s, now_ns)
    s.in_system += 1
    read = tokens[row]
    planned = arrival.planned_model
    why = 0
    if not s.pending and (planned == NEVER or planned == s.model):
        why = cannot_run(s, r, read.prompt_tokens, read.output_tokens)
    if not why:
        push(s, line, order_key(r, arrival.priority, read.prompt_tokens), number, number)
        return False
    slot = occupy(s, requests, lists, arrival, read, number)
    _count_departure(s, requests, lists, slot, now_ns, why)
    return True


def occupy(s: Record, requests: Table, lists: Lists, arrival: Record, read: Record, number: int) -> int:
    """Give an arrival a slot, with its tokens as the model active at its arrival reads them. Returns the slot."""
    s.free -= 1
    slot = lists.free[s.free]
    request = requests[slot]
    request.request_id = arrival.request_id
    request.arrival_ns = arrival.arrival_ns
    request.prompt_chars = arrival.prompt_chars
    request.output_chars = arrival.output_chars
    request.task = arrival.task
    request.text_start = arrival.text_start
    request.priority = arrival.priority
    request.shared = arrival.shared
    request.stream = arrival.stream
    request.seq = number
    request.order_key = 0
    request.model = arrival.model
    request.prompt_tokens = read.prompt_tokens
    request.output_tokens = read.output_tokens
    request.trace_first = read.trace_first
    request.trace_start = read.trace_start
    request.trace_length = read.trace_length
    request.planned_model = arrival.planned_model
    request.planned_first = arrival.planned_first
    request.context_tokens = 0
    request.prefill_left = 0
    request.remaining = read.output_tokens
    request.generated = 0
    request.started = 0
    request.preemptions = 0
    request.cached_tokens = 0
    request.freed_at = NEVER
    request.seat = NEVER
    request.hit_tokens = 0
    request.earlier_chars = 0
    request.earlier_tokens = 0
    request.scheduled_ns = NEVER
    request.first_token_ns = NEVER
    request.last_token_ns = NEVER
    request.left_ns = NEVER
    request.why = 0
    request.layers_run = 0
    request.early_tokens = 0
    request.breach_tokens = 0
    request.agreed_tokens = 0
    request.evaluated_tokens = 0
    request.microbits = 0
    request.recent = 0
    return slot


def leave(
    s: Record,
    r: Record,
    requests: Table,
    lists: Lists,
    line: Line,
    arrivals: Table,
    tokens: Table,
    slot: int,
    now_ns: int,
    why: int,
) -> None:
    """Let a request leave the system; in a closed loop the next one arrives.

    Its slot becomes free when its record has been handed over.
    """
    depart(s, r, requests, lists, slot, now_ns, why)
    if r.closed_loop:
        release(s, r, requests, lists, line, arrivals, tokens, now_ns)


def depart(s: Record, r: Record, requests: Table, lists: Lists, slot: int, now_ns: int, why: int) -> None:
    """Let a request leave the system. In a closed loop the next one arrives with a later `release`."""
    _count_departure(s, requests, lists, slot, now_ns, why)
    if r.closed_loop:
        s.to_release += 1


def _count_departure(s: Record, requests: Table, lists: Lists, slot: int, now_ns: int, why: int) -> None:
    note_change(s, now_ns)
    request = requests[slot]
    s.in_system -= 1
    s.departures += 1
    s.sojourn_ns += now_ns - request.arrival_ns
    request.left_ns = now_ns
    request.why = why
    lists.left[s.left] = slot
    s.left += 1
    if why == COMPLETED:
        s.completed += 1


def note_change(s: Record, now_ns: int) -> None:
    s.presence_ns += s.in_system * (now_ns - s.changed_ns)
    s.changed_ns = now_ns
