"""How deep the tokens of one iteration run, compiled: what `engine.depths` and `engine.simulated` define."""

from __future__ import annotations

from helios_sim.compiled import compiled
from helios_sim.profile.composition import IntArray
from helios_sim.profile.price_tables import CHECKED, CLASSIFIED, DECODE, KV, LAYERS, PROPAGATED
from helios_sim.serving.ahead.layout import (
    BATCH,
    CHUNK_SLOT,
    CONTEXT,
    FIRST,
    GENERATED,
    LEAF,
    LENGTH,
    NEVER,
    OBSERVED,
    ROW,
    START,
    UNSURE,
    Batch,
    Rules,
    State,
    Trace,
)


@compiled
def next_row(slots: IntArray, slot: int) -> int:
    """The trace's row of a request's next token."""
    return slots[slot, FIRST] + (slots[slot, START] + slots[slot, GENERATED]) % slots[slot, LENGTH]


@compiled
def is_observed(r: Rules, slots: IntArray, slot: int) -> bool:
    return r.observe_tokens != NEVER and slots[slot, GENERATED] < r.observe_tokens


@compiled
def lay_out(s: State, r: Rules, b: Batch, x: Trace) -> None:
    """Fills the iteration's work with its decodes and its chunks, whose tokens and context are there already."""
    slots, lists, work = b.slots, b.lists, b.work
    s.banded = r.per_token
    if r.observe_tokens != NEVER:
        for i in range(s.running):
            if is_observed(r, slots, lists[BATCH, i]):
                s.banded = 1
    bands = r.loaded_exit + 1 if s.banded else 1
    for row in range(len(work)):
        for band in range(bands):
            work[row, band] = 0
    s.sampled = s.decoding
    if s.banded:
        _banded(s, r, b, x)
    else:
        _uniform(s, r, b, x)
    observed = 0
    for p in range(s.chunks):
        looks = is_observed(r, slots, lists[CHUNK_SLOT, p])
        b.chunks[LAYERS, p] = x.exits[r.loaded_exit if looks else r.rule_exit]
        if looks and p < s.finishing:
            observed += 1
    s.sampled += s.finishing
    if observed:  # a prompt's last token is checked at every exit, as the answer's further tokens are
        for band in range(bands - 1):
            work[CHECKED, band] += observed


@compiled
def _uniform(s: State, r: Rules, b: Batch, x: Trace) -> None:
    """All tokens run the same layers: one band."""
    slots, lists, breach, context = b.slots, b.lists, x.breach, 0
    for i in range(s.decoding):
        slot = lists[BATCH, i]
        context += slots[slot, CONTEXT]
        lists[LEAF, i], lists[OBSERVED, i], lists[UNSURE, i] = r.rule_exit, 0, 0
        if r.reads_trace:
            lists[ROW, i] = next_row(slots, slot)
            lists[UNSURE, i] = breach[lists[ROW, i]]
    b.work[DECODE, 0] = s.decoding
    b.work[KV, 0] = context + s.decoding
    if r.watches_cap:
        b.work[CLASSIFIED, 0] = s.decoding


@compiled
def _banded(s: State, r: Rules, b: Batch, x: Trace) -> None:
    """Tokens leave at different exits: one band between any two exits that are loaded."""
    slots, lists, work = b.slots, b.lists, b.work
    exit_index, breach, n, last = x.exit_index, x.breach, s.decoding, r.loaded_exit
    deepest, n_observed = 0, 0
    for i in range(n):
        row = next_row(slots, lists[BATCH, i])
        lists[ROW, i], lists[LEAF, i], lists[UNSURE, i] = row, exit_index[row], breach[row]
        deepest = max(deepest, lists[LEAF, i])
    for i in range(n):
        slot = lists[BATCH, i]
        lists[OBSERVED, i] = is_observed(r, slots, slot)
        if lists[OBSERVED, i]:
            lists[LEAF, i], lists[UNSURE, i] = last, 0
            n_observed += 1
        elif r.lazy:
            lists[LEAF, i] = deepest
        work[DECODE, lists[LEAF, i]] += 1
        work[KV, lists[LEAF, i]] += slots[slot, CONTEXT] + 1
    for band in range(last - 1, -1, -1):  # whoever runs a band runs those before it
        work[DECODE, band] += work[DECODE, band + 1]
        work[KV, band] += work[KV, band + 1]

    if r.per_token:  # at the last layer there is nothing to decide: the token is sampled there
        for band in range(r.rule_exit):
            work[CHECKED if r.head_checks else CLASSIFIED, band] = work[DECODE, band]
    elif r.watches_cap:
        work[CLASSIFIED, r.rule_exit] = n
    if n_observed and not r.head_checks:
        for band in range(last):
            work[CHECKED, band] = n_observed
    if r.head_checks:
        s.sampled = work[DECODE, r.rule_exit]
    if r.propagates:
        for band in range(last + 1):
            work[PROPAGATED, band] = n - work[DECODE, band]
    if r.repays:
        for i in range(n):
            slot = lists[BATCH, i]
            for band in range(lists[LEAF, i] + 1):
                work[DECODE, band] += b.owed[slot, band]
                work[KV, band] += b.owed[slot, band] * (slots[slot, CONTEXT] + 1)
