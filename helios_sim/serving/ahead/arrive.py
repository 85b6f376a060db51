"""Requests that come and go while iterations are computed ahead, compiled. Knows no iteration."""

from __future__ import annotations

from helios_sim.compiled import compiled
from helios_sim.profile.composition import IntArray
from helios_sim.serving.ahead.layout import (
    ARRIVAL_NS,
    ARRIVES_NS,
    COMPLETED,
    CONTEXT_EXCEEDED,
    FIRST_TOKEN_NS,
    FREE,
    ID,
    LAST_TOKEN_NS,
    LEFT_AT_ONCE,
    LEFT_NS,
    MEMBER,
    NEVER,
    OF_TASK,
    OUTPUT,
    OUTPUT_CHARS,
    POOL_EXCEEDED,
    PROMPT,
    PROMPT_CHARS,
    PROMPT_TOKENS,
    REQUEST_ID,
    SCHEDULED_NS,
    TASK,
    TEXT,
    TEXT_START,
    TOKENS_OUTPUT,
    TOKENS_PROMPT,
    WHY,
    Queue,
    Rules,
    State,
)


@compiled
def cannot_run(s: State, r: Rules, prompt_tokens: int, output_tokens: int) -> int:
    """Why a request can never run as deployed; 0: it can."""
    tokens = prompt_tokens + output_tokens
    if tokens > r.context_limit:
        return CONTEXT_EXCEEDED
    if -(-(tokens - 1) // r.block_tokens) > s.total_blocks:
        return POOL_EXCEEDED
    return 0


@compiled
def take_arrivals(s: State, r: Rules, q: Queue, until_ns: int) -> bool:
    """Whoever arrives until then joins the queue. False: those that come next are not known yet."""
    if r.closed_loop:  # there they come as others leave; enough are known if all that run may leave at once
        return s.known - s.arrived > r.running_limit or s.exhausted != 0
    while s.arrived < s.known and q.arrivals[s.arrived, ARRIVES_NS] <= until_ns:
        _arrive(s, r, q, q.arrivals[s.arrived, ARRIVES_NS])
    return s.arrived < s.known or s.exhausted != 0


@compiled
def release(s: State, r: Rules, q: Queue, now_ns: int) -> None:
    """In a closed loop each request that leaves lets the next one come, which may leave at once."""
    while s.to_release and s.arrived < s.known:
        s.to_release -= 1
        q.arrivals[s.arrived, ARRIVES_NS] = now_ns
        if _arrive(s, r, q, now_ns):
            s.to_release += 1


@compiled
def leave(s: State, r: Rules, q: Queue, slots: IntArray, lists: IntArray, slot: int, now_ns: int, why: int) -> None:
    """A request leaves the system; its slot is free."""
    _note_change(s, now_ns)
    s.in_system -= 1
    for column in range(slots.shape[1]):
        q.done[s.done, column] = slots[slot, column]
    q.done[s.done, LEFT_NS] = now_ns
    q.done[s.done, WHY] = why
    s.done += 1
    if why == COMPLETED:
        s.completed += 1
    lists[FREE, s.free] = slot
    s.free += 1
    if r.closed_loop:
        s.to_release += 1
        release(s, r, q, now_ns)


@compiled
def _arrive(s: State, r: Rules, q: Queue, now_ns: int) -> bool:
    """The next known request arrives. True: it can never run here and left at once."""
    row = s.arrived
    s.arrived += 1
    s.arrivals += 1
    # While a change is pending nobody is dropped: there may be room again when it has come.
    why = 0 if s.pending else cannot_run(s, r, q.tokens[row, TOKENS_PROMPT], q.tokens[row, TOKENS_OUTPUT])
    if not why:
        _note_change(s, now_ns)
        s.in_system += 1
        s.fresh += 1
        return False
    q.arrivals[row, LEFT_AT_ONCE] = 1
    done, at = q.done, s.done
    done[at, :] = 0
    done[at, REQUEST_ID] = q.arrivals[row, ID]
    done[at, ARRIVAL_NS] = done[at, LEFT_NS] = now_ns
    done[at, PROMPT_CHARS] = q.arrivals[row, PROMPT]
    done[at, OUTPUT_CHARS] = q.arrivals[row, OUTPUT]
    done[at, TASK] = q.arrivals[row, OF_TASK]
    done[at, TEXT_START] = q.arrivals[row, TEXT]
    done[at, PROMPT_TOKENS] = q.tokens[row, TOKENS_PROMPT]
    done[at, SCHEDULED_NS] = done[at, FIRST_TOKEN_NS] = done[at, LAST_TOKEN_NS] = done[at, MEMBER] = NEVER
    done[at, WHY] = why
    s.done += 1
    return True


@compiled
def _note_change(s: State, now_ns: int) -> None:
    s.presence_ns += s.in_system * (now_ns - s.changed_ns)
    s.changed_ns = now_ns
