"""Makes an iteration that has ended part of the state, compiled: what `serving.commit` defines, for one iteration."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from helios_sim.compiled import compiled
from helios_sim.profile.composition import IntArray
from helios_sim.profile.price_tables import TOKENS as CHUNK_TOKENS
from helios_sim.serving.ahead.arrive import leave
from helios_sim.serving.ahead.depths import is_observed, next_row
from helios_sim.serving.ahead.layout import (
    AGREED,
    AT_NS,
    BATCH,
    BLOCKS_THEN,
    BREACH,
    CHUNK_SLOT,
    COMPLETED,
    CONTEXT,
    EARLY,
    EVALUATED,
    FILLED,
    FIRST,
    FIRST_TOKEN_NS,
    GENERATED,
    LAST_TOKEN_NS,
    LAYERS_RUN,
    LEAF,
    LENGTH,
    MICROBITS,
    NEVER,
    NEXT,
    OBSERVED,
    OUTPUT_TOKENS,
    PREFILL_LEFT,
    QUEUED_THEN,
    REMAINING,
    REQUEST_ID,
    ROW,
    RUNNING_THEN,
    SEEN_FIRST,
    SEEN_ID,
    SEEN_LENGTH,
    SEEN_NS,
    SEEN_START,
    SEEN_TOKENS,
    SEEN_TOTAL,
    SIZE,
    START,
    SUM,
    UNSURE,
    Batch,
    Counts,
    Queue,
    Rules,
    State,
    Trace,
    Watch,
)
from helios_sim.serving.ahead.plan import reserved_blocks


@compiled
def commit(s: State, r: Rules, b: Batch, q: Queue, x: Trace, c: Counts, watch: Watch) -> None:
    end_ns, decoded = s.end_ns, s.decoding
    _account(s, end_ns - s.now_ns)
    s.used_blocks += s.due_blocks
    if len(watch.windows):
        _slide(s, b.lists, watch.windows, watch.flags)
    _decoded(s, r, b, x, c, end_ns)
    s.peak_blocks = max(s.peak_blocks, s.used_blocks)
    _prefilled(s, r, b, x, c, end_ns)
    if r.observe_tokens != NEVER:
        for i in range(decoded + s.finishing):
            _observe(s, r, b.slots, c.seen, b.lists[BATCH, i], end_ns)
    _complete(s, r, b.slots, b.lists, q, end_ns)
    if s.sampled_ns == NEVER or end_ns - s.sampled_ns >= s.sample_interval_ns:
        c.samples[s.samples, AT_NS], c.samples[s.samples, RUNNING_THEN] = end_ns, s.running
        c.samples[s.samples, QUEUED_THEN], c.samples[s.samples, BLOCKS_THEN] = s.front + s.fresh, s.used_blocks
        s.samples += 1
        s.sampled_ns = end_ns


@compiled
def _account(s: State, busy_ns: int) -> None:
    s.busy_ns += busy_ns
    s.iterations += 1
    s.floor_ns += s.floor
    s.outside_grid_iterations += s.outside
    s.kv_block_ns += (s.used_blocks + s.due_blocks) * busy_ns
    s.kv_pool_block_ns += s.total_blocks * busy_ns
    if s.decoding:
        s.decode_iterations += 1
        s.decode_ns += busy_ns
        s.decode_batch_ns += busy_ns * s.decoding


@compiled
def _decoded(s: State, r: Rules, b: Batch, x: Trace, c: Counts, end_ns: int) -> None:
    # Arrays are taken out of their groups once, not once a token: that counts references, which takes its time.
    slots, lists, owed = b.slots, b.lists, b.owed
    exits, agree, microbits = x.exits, x.agree, x.microbits
    depths, gaps, edges_ns = c.depths, c.gaps, c.gap_edges_ns
    gap_ns, equal = 0, 0  # of tokens in a row with the same gap, most often all of them
    for i in range(s.decoding):
        slot, leaf = lists[BATCH, i], lists[LEAF, i]
        slots[slot, CONTEXT] += 1
        _count_token(r, slots, exits, agree, microbits, depths, slot, leaf, lists[ROW, i])
        slots[slot, BREACH] += lists[UNSURE, i]
        gap = end_ns - slots[slot, LAST_TOKEN_NS]
        if gap != gap_ns:
            _count_gaps(s, gaps, edges_ns, gap_ns, equal)
            gap_ns, equal = gap, 0
        equal += 1
        slots[slot, LAST_TOKEN_NS] = end_ns
        if r.owes and s.banded:
            for band in range(owed.shape[1]):
                owed[slot, band] = 0 if band <= leaf else owed[slot, band] + 1
    _count_gaps(s, gaps, edges_ns, gap_ns, equal)


@compiled
def _count_token(
    r: Rules,
    slots: IntArray,
    exits: IntArray,
    agree: NDArray[np.bool_],
    microbits: IntArray,
    depths: IntArray,
    slot: int,
    leaf: int,
    row: int,
) -> None:
    """One more output token, which left at that exit; `row` is the trace's, if that says anything about it."""
    layers = exits[leaf]
    slots[slot, EVALUATED] += is_observed(r, slots, slot)
    slots[slot, REMAINING] -= 1
    slots[slot, GENERATED] += 1
    slots[slot, LAYERS_RUN] += layers
    slots[slot, EARLY] += layers < r.n_layers
    slots[slot, AGREED] += agree[row, leaf] if r.reads_trace else True
    if len(microbits):
        slots[slot, MICROBITS] += microbits[row, leaf]
    depths[layers] += 1


@compiled
def _count_gaps(s: State, gaps: IntArray, edges_ns: IntArray, gap_ns: int, count: int) -> None:
    if count:
        gaps[np.searchsorted(edges_ns, gap_ns)] += count
        s.gaps += count
        s.gaps_ns += gap_ns * count
        s.longest_gap_ns = max(s.longest_gap_ns, gap_ns)
        if s.shortest_gap_ns == NEVER or gap_ns < s.shortest_gap_ns:
            s.shortest_gap_ns = gap_ns


@compiled
def _slide(s: State, lists: IntArray, windows: IntArray, flags: NDArray[np.bool_]) -> None:
    """The iteration's tokens enter the windows of the breach counter. Observed ones ran deeper than the cap."""
    for k in range(len(windows)):
        for i in range(s.decoding):
            if lists[OBSERVED, i]:
                continue
            at = windows[k, NEXT]
            if windows[k, FILLED] == windows[k, SIZE]:
                windows[k, SUM] -= flags[k, at]
            else:
                windows[k, FILLED] += 1
            flags[k, at] = lists[UNSURE, i] != 0
            windows[k, SUM] += lists[UNSURE, i]
            windows[k, NEXT] = 0 if at + 1 == windows[k, SIZE] else at + 1


@compiled
def _prefilled(s: State, r: Rules, b: Batch, x: Trace, c: Counts, end_ns: int) -> None:
    """Chunks of prompts; a prompt's last one yields a token. Those that finish are the first ones."""
    slots, lists = b.slots, b.lists
    for p in range(s.chunks):
        slot, tokens = lists[CHUNK_SLOT, p], b.chunks[CHUNK_TOKENS, p]
        slots[slot, CONTEXT] += tokens
        slots[slot, PREFILL_LEFT] -= tokens
        if p < s.finishing:
            leaf = r.loaded_exit if is_observed(r, slots, slot) else r.rule_exit
            row = next_row(slots, slot)
            _count_token(r, slots, x.exits, x.agree, x.microbits, c.depths, slot, leaf, row)
            if slots[slot, FIRST_TOKEN_NS] == NEVER:
                slots[slot, FIRST_TOKEN_NS] = end_ns
            else:
                _count_gaps(s, c.gaps, c.gap_edges_ns, end_ns - slots[slot, LAST_TOKEN_NS], 1)
            slots[slot, LAST_TOKEN_NS] = end_ns
    s.decoding += s.finishing


@compiled
def _observe(s: State, r: Rules, slots: IntArray, seen: IntArray, slot: int, end_ns: int) -> None:
    """Notes the observation of a request that was observed for long enough or is complete."""
    generated, limit, at = slots[slot, GENERATED], r.observe_tokens, s.seen
    if generated - 1 < limit and (generated >= limit or slots[slot, REMAINING] == 0):
        seen[at, SEEN_ID], seen[at, SEEN_NS] = slots[slot, REQUEST_ID], end_ns
        seen[at, SEEN_FIRST], seen[at, SEEN_START] = slots[slot, FIRST], slots[slot, START]
        seen[at, SEEN_LENGTH], seen[at, SEEN_TOTAL] = slots[slot, LENGTH], slots[slot, OUTPUT_TOKENS]
        seen[at, SEEN_TOKENS] = min(limit, generated)
        s.seen += 1


@compiled
def _complete(s: State, r: Rules, slots: IntArray, lists: IntArray, q: Queue, end_ns: int) -> None:
    """Requests with no token left to produce leave; the others close up first, so that places are free by then."""
    n, kept = s.running, 0
    for i in range(n):
        slot = lists[BATCH, i]
        if slots[slot, REMAINING]:
            lists[BATCH, kept] = slot
            kept += 1
        else:
            lists[LEAF, i - kept] = slot
    s.running = kept
    s.decoding -= n - kept
    for i in range(n - kept):
        slot = lists[LEAF, i]
        s.used_blocks -= reserved_blocks(r, slots, slot)
        leave(s, r, q, slots, lists, slot, end_ns, COMPLETED)
