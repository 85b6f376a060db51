"""Commits an iteration that has ended: tokens, memory, telemetry and completions become part of the state.

The token fields of each request say what its token was. `depths` filled them in from a trace, or a device did.
"""

from __future__ import annotations

from helios_sim.core.arrive import leave
from helios_sim.core.blocks import blocks_for, give_blocks, take_blocks
from helios_sim.core.layout import (
    COMPLETED,
    FOREVER_NS,
    NEVER,
    RECENT,
    Counts,
    Line,
    Lists,
    Numbers,
    Record,
    Table,
    Watch,
)
from helios_sim.core.power import note_drawn
from helios_sim.core.prefix import Prefix, leave_blocks
from helios_sim.core.schedule import gather, held_blocks, let_go
from helios_sim.core.triggers import slide_completed, slide_windows


def commit(
    s: Record,
    r: Record,
    it: Record,
    requests: Table,
    lists: Lists,
    line: Line,
    arrivals: Table,
    tokens: Table,
    chunks: Table,
    freed: Table,
    prefix: Prefix,
    owed: Numbers,
    c: Counts,
    watch: Watch,
) -> None:
    """Commit the iteration that began at `s.now_ns` and has ended at `s.end_ns`."""
    start_ns, end_ns, decoded = s.now_ns, s.end_ns, s.decoding
    busy_ns = end_ns - start_ns
    _account(s, r, it, busy_ns)
    if not r.live:  # a device's energy is read from its counter
        drawn_ns = _drawn_ns(r, it.verify_ns if r.draft_parts else busy_ns, it.floor_ns)
        if r.draft_parts:
            drawn_ns += r.draft_cards * _drawn_ns(r, it.draft_ns, it.draft_floor_ns)
        note_drawn(s, c.marks, start_ns, end_ns, drawn_ns)
    if it.due_blocks:
        take_blocks(s, r, freed, it.due_blocks)
    it.done = 0
    if r.regroups:
        hold_back(s, r, it, requests, lists, owed)
    if len(watch.windows):
        slide_windows(s, it, requests, lists, watch)
    if it.decodes:
        _decoded(s, r, it, requests, lists, owed, c, end_ns)
    held_bytes = s.weight_bytes + s.used_blocks * s.block_bytes
    if held_bytes > s.peak_bytes:
        s.peak_bytes = held_bytes
    if r.drafts_apart:
        note_unread(it, requests, lists)
    if it.drafted:
        keep_accepted(s, r, it, requests, lists, freed, c)
    if it.chunks:
        _prefilled(s, r, it, requests, lists, chunks, c, end_ns)
    if r.observe_tokens != NEVER or r.tells_all:
        for i in range(decoded - it.decodes, decoded + it.finishing):
            _observe(s, r, requests, lists.batch[i], c.seen, end_ns)
    if it.done:
        _complete(s, r, requests, lists, line, arrivals, tokens, freed, prefix, owed, c.latest, watch, end_ns)
    elsewhere = s.model != s.sampled_model or s.run_layers != s.sampled_layers
    if s.sampled_ns == NEVER or elsewhere or end_ns - s.sampled_ns >= s.sample_interval_ns:
        _sample(s, c.samples[s.samples])


def _sample(s: Record, sample: Record) -> None:
    """Record the state at the end of the iteration, for pictures."""
    sample.time_ns = s.sampled_ns = s.end_ns
    sample.model = s.sampled_model = s.model
    sample.run_layers = s.sampled_layers = s.run_layers
    sample.running = s.running
    sample.waiting = s.waiting
    sample.kv_bytes = s.used_blocks * s.block_bytes
    sample.weight_bytes = s.weight_bytes
    s.samples += 1


def _account(s: Record, r: Record, it: Record, busy_ns: int) -> None:
    decodes = it.decodes
    s.busy_ns += busy_ns
    s.iterations += 1
    s.floor_ns += it.floor_ns
    if it.drafts or r.draft_parts:
        s.draft_ns += it.draft_ns
    if r.draft_parts:
        s.verify_ns += it.verify_ns
        s.draft_floor_ns += it.draft_floor_ns
    s.outside_grid_iterations += it.outside
    if it.late_layers:
        s.late_layers += it.late_layers
        s.late_ns += it.late_ns
    s.kv_block_ns += (s.used_blocks + it.due_blocks) * busy_ns
    s.kv_pool_block_ns += s.total_blocks * busy_ns
    if decodes:
        batch_ns = busy_ns * decodes
        s.decode_iterations += 1
        s.decode_ns += busy_ns
        s.decode_batch_ns += batch_ns
        s.placed_decode_ns += busy_ns
        s.placed_decode_batch_ns += batch_ns


def _decoded(
    s: Record, r: Record, it: Record, requests: Table, lists: Lists, owed: Numbers, c: Counts, end_ns: int
) -> None:
    """Commit the tokens of the decodes."""
    # Arrays are taken out of their groups once, not once a token: interpreted, each look takes time.
    batch, gaps, edges_ns, decodes = lists.batch, c.gaps, c.gap_edges_ns, it.decodes
    owes, bands, alike = r.owes and it.banded, owed.shape[1], it.alike
    releases, at_ns = r.releases, end_ns
    gap_ns, equal = 0, 0  # gap of the latest tokens, and how many in a row had it: most often all of them
    _count_tokens(r, it, requests, batch, 0, decodes, c.depths)
    for i in range(decodes):
        slot = batch[i]
        request = requests[slot]
        request.context_tokens += 1
        if not alike:
            request.breach_tokens += request.token_breach
        if releases:
            at_ns = end_ns - request.earlier_ns
            s.released_ns += request.earlier_ns
            s.released_tokens += 1 if request.token_exit < r.rule_exit else 0
        gap = at_ns - request.last_token_ns
        if gap != gap_ns:
            _count_gaps(s, gaps, edges_ns, gap_ns, equal)
            gap_ns, equal = gap, 0
        equal += 1
        request.last_token_ns = at_ns
        if owes:
            for band in range(bands):
                owed[slot, band] = 0 if band <= request.token_exit else owed[slot, band] + 1
    _count_gaps(s, gaps, edges_ns, gap_ns, equal)


def hold_back(s: Record, r: Record, it: Record, requests: Table, lists: Lists, owed: Numbers) -> None:
    """Let decodes that do not leave wait before the next band. The others, which yield a token, are moved first."""
    first = it.first_band
    for i in range(it.decodes):
        slot = lists.batch[i]
        request = requests[slot]
        if first:
            request.context_tokens -= 1  # the token was counted when it began to wait
            s.held_token_ns += s.now_ns - request.held_ns
        if request.held:
            request.context_tokens += 1
            request.held_ns = s.end_ns
            s.held_tokens += 1
            for band in range(first, request.held):
                owed[slot, band] = 0
    s.splits += it.splits
    it.decodes = gather(requests, lists, it.decodes, 0)


def note_unread(it: Record, requests: Table, lists: Lists) -> None:
    """Note the tokens that the drafter has not read: those of iterations without drafts, or an accepted last draft.

    It has read all earlier drafts, since none is accepted after a rejected one. With the drafter on its own card, also
    note which requests have drafts now.
    """
    for i in range(it.decodes):
        request = requests[lists.batch[i]]
        if request.drafts == 0:
            request.unread += 1
        else:
            request.unread = 1 if request.accepted == request.drafts else 0
        request.held = 0
    for i in range(it.decodes, it.decodes + it.drafting_apart):
        requests[lists.batch[i]].held = 1


def _drawn_ns(r: Record, busy_ns: int, floor_ns: int) -> int:
    return busy_ns + (busy_ns if r.draws_evenly or busy_ns < floor_ns else floor_ns)


def keep_accepted(
    s: Record, r: Record, it: Record, requests: Table, lists: Lists, freed: Table, c: Counts
) -> None:  # fmt: skip
    """Turn accepted drafts into tokens, at the same time as the first token of their pass, which is counted elsewhere.

    Blocks with K and V of rejected drafts are freed.
    """
    block_tokens, spare, zeros = r.block_tokens, 0, 0
    for i in range(it.decodes):
        request = requests[lists.batch[i]]
        drafted, accepted, layers = request.drafted, request.accepted, request.token_layers
        spare += blocks_for(request.context_tokens + request.drafts, block_tokens)
        if drafted:
            s.verifications += 1
            s.drafted_tokens += drafted
            s.tested_drafts += min(accepted + 1, drafted)
            s.accepted_drafts += accepted
        request.context_tokens += accepted
        spare -= blocks_for(request.context_tokens, block_tokens)
        request.agreed_tokens += accepted
        request.layers_run += accepted * layers
        c.depths[layers] += accepted
        request.generated += accepted
        request.remaining -= accepted
        if accepted and request.remaining == 0:
            it.done += 1
        zeros += accepted
    if zeros:
        c.gaps[0] += zeros
        s.gaps += zeros
        s.shortest_gap_ns = 0
    give_blocks(s, r, freed, spare, NEVER)


def _count_tokens(
    r: Record, it: Record, requests: Table, batch: Numbers, first: int, end: int, depths: Numbers
) -> None:  # fmt: skip
    """Count one more output token of each request at these places in the batch."""
    observed_below, whole, alike, done = r.observe_tokens, r.n_layers, it.alike, 0  # NEVER: none is observed
    layers = it.token_layers
    for i in range(first, end):
        request = requests[batch[i]]
        if request.generated < observed_below:
            request.evaluated_tokens += 1
        if alike:
            request.agreed_tokens += 1
            if layers < whole:
                request.early_tokens += 1
        else:
            layers = request.token_layers
            request.agreed_tokens += request.token_agrees
            request.microbits += request.token_microbits
            depths[layers] += 1
            request.early_tokens += 1 if layers < whole else 0  # branch-free: mispredicted jumps are slow
        request.layers_run += layers
        request.generated += 1
        request.remaining -= 1
        if request.remaining == 0:
            done += 1
    if alike:
        depths[layers] += end - first
    if done:
        it.done += done


def _count_gaps(s: Record, gaps: Numbers, edges_ns: Numbers, gap_ns: int, count: int) -> None:
    """Add `count` equal gaps to the histogram, in the first bucket with an upper edge of at least `gap_ns`."""
    if count == 0:
        return
    low = high = s.gap_bucket  # the search starts at the latest bucket: iterations in a row take about equally long
    step, last = 1, len(edges_ns) - 1
    while edges_ns[high] < gap_ns:
        low, high, step = high + 1, min(high + step, last), 2 * step
    while low > 0 and edges_ns[low - 1] >= gap_ns:
        low, high, step = max(low - step, 0), low - 1, 2 * step
    while low < high:
        middle = (low + high) // 2
        if edges_ns[middle] < gap_ns:
            low = middle + 1
        else:
            high = middle
    s.gap_bucket = low
    gaps[low] += count
    s.gaps += count
    s.gaps_ns += gap_ns * count
    if gap_ns > s.longest_gap_ns:
        s.longest_gap_ns = gap_ns
    if s.shortest_gap_ns == NEVER or gap_ns < s.shortest_gap_ns:
        s.shortest_gap_ns = gap_ns


def _prefilled(
    s: Record, r: Record, it: Record, requests: Table, lists: Lists, chunks: Table, c: Counts, end_ns: int
) -> None:
    """Commit chunks of prompts. The last chunk of a prompt yields a token; chunks that finish a prompt come first."""
    _count_tokens(r, it, requests, lists.batch, s.decoding, s.decoding + it.finishing, c.depths)
    for p in range(it.chunks):
        chunk = chunks[p]
        request = requests[chunk.slot]
        request.context_tokens += chunk.tokens
        request.prefill_left -= chunk.tokens
        if p < it.finishing:
            if request.first_token_ns == NEVER:
                request.first_token_ns = end_ns
            else:
                _count_gaps(s, c.gaps, c.gap_edges_ns, end_ns - request.last_token_ns, 1)
            request.last_token_ns = end_ns
    s.decoding += it.finishing


def _observe(s: Record, r: Record, requests: Table, slot: int, seen: Table, end_ns: int) -> None:
    """Note the observation of a request that was observed for long enough, or is complete."""
    request = requests[slot]
    generated, limit = request.generated, (FOREVER_NS if r.tells_all else r.observe_tokens)
    if generated - 1 < limit and (generated >= limit or request.remaining == 0):
        noted = seen[s.seen]
        noted.slot = slot
        noted.tokens = min(limit, generated)
        noted.time_ns = end_ns
        s.seen += 1


def _complete(
    s: Record,
    r: Record,
    requests: Table,
    lists: Lists,
    line: Line,
    arrivals: Table,
    tokens: Table,
    freed: Table,
    prefix: Prefix,
    owed: Numbers,
    latest: Table,
    watch: Watch,
    end_ns: int,
) -> None:
    """Let requests with no token left to produce leave. The others close up first, so their places are free by then.

    If the next iteration was planned before that was known, a completed request lingers (`schedule`).
    """
    batch, n, kept = lists.batch, s.running, 0
    for i in range(n):
        slot = batch[i]
        if requests[slot].remaining:
            batch[kept] = slot
            kept += 1
        else:
            lists.leaving[i - kept] = slot
    s.running = kept
    s.decoding -= n - kept
    for i in range(n - kept):
        slot = lists.leaving[i]
        request = requests[slot]
        if len(watch.windows):
            slide_completed(r, request, watch)
        _note_latest(latest[s.completed % RECENT], request)
        if r.ahead and r.vllm_v1:
            lists.lingering_key[s.lingering] = request.order_key
            lists.lingering_seq[s.lingering] = request.seq
            if r.shares:
                lists.lingering_blocks[s.lingering] = leave_blocks(s, r, prefix, request, owed, slot, False)
            else:
                lists.lingering_blocks[s.lingering] = held_blocks(r, request)
            s.lingering += 1
        else:
            let_go(s, r, freed, prefix, request, owed, slot, NEVER)
        leave(s, r, requests, lists, line, arrivals, tokens, slot, end_ns, COMPLETED)


def _note_latest(row: Record, request: Record) -> None:
    row.arrival_ns, row.scheduled_ns = request.arrival_ns, request.scheduled_ns
    row.first_token_ns, row.last_token_ns = request.first_token_ns, request.last_token_ns
    row.output_tokens = request.generated + request.earlier_tokens
    row.prompt_tokens, row.hit_tokens = request.prompt_tokens, request.hit_tokens
