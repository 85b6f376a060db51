"""Who runs in the next iteration, compiled: what `serving.scheduler` defines, for one iteration at a time.

Left out are the parts of it that a stretch never meets: places that are freed late, prefixes that are found again, and
changes of the model.
"""

from __future__ import annotations

from helios_sim.compiled import compiled
from helios_sim.profile.composition import IntArray
from helios_sim.profile.price_tables import CONTEXT as CHUNK_CONTEXT, TOKENS as CHUNK_TOKENS
from helios_sim.serving.ahead.arrive import cannot_run, leave
from helios_sim.serving.ahead.layout import (
    ARRIVAL_NS,
    ARRIVES_NS,
    BATCH,
    CHUNK_SLOT,
    CONTEXT,
    FIRST,
    FIRST_TOKEN_NS,
    FREE,
    FRONT,
    GENERATED,
    ID,
    LAST_TOKEN_NS,
    LEFT_AT_ONCE,
    LENGTH,
    MEMBER,
    NEVER,
    OF_TASK,
    OUTPUT,
    OUTPUT_CHARS,
    OUTPUT_TOKENS,
    PREEMPTIONS,
    PREFILL_LEFT,
    PROMPT,
    PROMPT_CHARS,
    PROMPT_TOKENS,
    REMAINING,
    REQUEST_ID,
    SCHEDULED_NS,
    START,
    STARTED,
    TASK,
    TEXT,
    TEXT_START,
    TOKENS_FIRST,
    TOKENS_LENGTH,
    TOKENS_OUTPUT,
    TOKENS_PROMPT,
    TOKENS_START,
    Batch,
    Queue,
    Rules,
    State,
)


@compiled
def plan(s: State, r: Rules, b: Batch, q: Queue) -> bool:
    """Chooses the iteration's decodes and chunks. False: there is nothing to run."""
    slots, lists = b.slots, b.lists
    preempted = False
    s.due_blocks = _blocks_due(s, r, slots, lists)
    while s.due_blocks > s.total_blocks - s.used_blocks:
        _preempt(s, r, slots, lists)
        preempted = True
        s.due_blocks = _blocks_due(s, r, slots, lists)
    budget = r.batch_tokens - s.decoding
    s.chunks = s.finishing = 0
    for i in range(s.decoding, s.running):
        if budget <= 0:
            break
        budget -= _add_chunk(s, slots, lists, b.chunks, lists[BATCH, i], budget)
    if not preempted:
        _admit(s, r, b, q, budget)
    return s.decoding > 0 or s.chunks > 0


@compiled
def reserved_blocks(r: Rules, slots: IntArray, slot: int) -> int:
    return -(-(slots[slot, CONTEXT] + slots[slot, PREFILL_LEFT]) // r.block_tokens)


@compiled
def _blocks_due(s: State, r: Rules, slots: IntArray, lists: IntArray) -> int:
    due = 0
    for i in range(s.decoding):
        due += slots[lists[BATCH, i], CONTEXT] % r.block_tokens == 0
    return due


@compiled
def _preempt(s: State, r: Rules, slots: IntArray, lists: IntArray) -> None:
    """The newest running request goes back to the head of the queue and is computed again later."""
    s.running -= 1
    s.decoding = min(s.decoding, s.running)
    slot = lists[BATCH, s.running]
    s.used_blocks -= reserved_blocks(r, slots, slot)
    slots[slot, PREEMPTIONS] += 1
    s.preemptions += 1
    lists[FRONT, s.front] = slot
    s.front += 1


@compiled
def _add_chunk(s: State, slots: IntArray, lists: IntArray, chunks: IntArray, slot: int, budget: int) -> int:
    tokens = min(slots[slot, PREFILL_LEFT], budget)
    lists[CHUNK_SLOT, s.chunks] = slot
    chunks[CHUNK_TOKENS, s.chunks] = tokens
    chunks[CHUNK_CONTEXT, s.chunks] = slots[slot, CONTEXT]
    s.chunks += 1
    if tokens == slots[slot, PREFILL_LEFT]:
        s.finishing += 1
    return tokens


@compiled
def _admit(s: State, r: Rules, b: Batch, q: Queue, budget: int) -> None:
    """Requests enter from the head of the queue as long as there is budget, a place and memory for them."""
    slots, lists = b.slots, b.lists
    while budget > 0 and s.running < r.running_limit and s.front + s.fresh > 0:
        fresh = s.front == 0
        if fresh:
            while q.arrivals[s.head, LEFT_AT_ONCE]:
                s.head += 1
            slot, prompt, output = NEVER, q.tokens[s.head, TOKENS_PROMPT], q.tokens[s.head, TOKENS_OUTPUT]
            prefill = prompt
        else:
            slot = lists[FRONT, s.front - 1]
            prompt, output = slots[slot, PROMPT_TOKENS], slots[slot, OUTPUT_TOKENS]
            prefill = prompt + slots[slot, GENERATED]
        starts = fresh or slots[slot, STARTED] == 0
        if starts and s.starts_left == 0:
            return
        if s.draining and (fresh or slots[slot, GENERATED] == 0):
            return
        why = cannot_run(s, r, prompt, output)
        blocks = -(-prefill // r.block_tokens)
        if why and s.pending:
            return
        if not why and blocks > s.total_blocks - s.used_blocks - s.due_blocks:
            return
        if fresh:
            slot = _occupy(s, slots, lists, q)
        else:
            s.front -= 1
        if why:
            leave(s, r, q, slots, lists, slot, s.now_ns, why)
            continue
        if starts:
            slots[slot, STARTED] = 1
            if s.starts_left != NEVER:
                s.starts_left -= 1
        if slots[slot, SCHEDULED_NS] == NEVER:
            slots[slot, SCHEDULED_NS] = s.now_ns
        s.used_blocks += blocks
        slots[slot, CONTEXT] = 0
        slots[slot, PREFILL_LEFT] = prefill
        slots[slot, REMAINING] = output - slots[slot, GENERATED]
        for band in range(b.owed.shape[1]):
            b.owed[slot, band] = 0
        lists[BATCH, s.running] = slot
        s.running += 1
        budget -= _add_chunk(s, slots, lists, b.chunks, slot, budget)


@compiled
def _occupy(s: State, slots: IntArray, lists: IntArray, q: Queue) -> int:
    """The oldest request that was never started takes a slot."""
    s.free -= 1
    slot, row = lists[FREE, s.free], s.head
    s.head += 1
    s.fresh -= 1
    for column in range(slots.shape[1]):
        slots[slot, column] = 0
    slots[slot, FIRST] = q.tokens[row, TOKENS_FIRST]
    slots[slot, START] = q.tokens[row, TOKENS_START]
    slots[slot, LENGTH] = q.tokens[row, TOKENS_LENGTH]
    slots[slot, PROMPT_TOKENS] = q.tokens[row, TOKENS_PROMPT]
    slots[slot, OUTPUT_TOKENS] = q.tokens[row, TOKENS_OUTPUT]
    slots[slot, REQUEST_ID] = q.arrivals[row, ID]
    slots[slot, ARRIVAL_NS] = q.arrivals[row, ARRIVES_NS]
    slots[slot, PROMPT_CHARS] = q.arrivals[row, PROMPT]
    slots[slot, OUTPUT_CHARS] = q.arrivals[row, OUTPUT]
    slots[slot, TASK] = q.arrivals[row, OF_TASK]
    slots[slot, TEXT_START] = q.arrivals[row, TEXT]
    slots[slot, SCHEDULED_NS] = slots[slot, FIRST_TOKEN_NS] = slots[slot, LAST_TOKEN_NS] = slots[slot, MEMBER] = NEVER
    return slot
