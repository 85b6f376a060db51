"""The scheduler: chooses what the next iteration runs, as the v1 scheduler of vLLM 0.19 does.

Within one token budget decodes come first, then prompts that were begun, then new requests from the head of the waiting
line. A prompt enters only if blocks for all of it are free. If a decode finds no block, the running request that is
last in order is preempted and later computed again from its text. There is no watermark.

Prompts are computed in chunks of as many tokens as the budget leaves, unless `rules.whole_prompts`.

With `rules.vllm_v1` two more rules of vLLM 0.19 hold (vllm/v1/core/sched/scheduler.py, async_scheduler.py):
- Planned ahead, an iteration is scheduled when the one before it begins. A request that produces its last token in
  between is known not to run again, but it lingers: it keeps its place among the running requests and its blocks.
- A preempted request finds those of its blocks that have not been taken since (`blocks`), and computes the rest again.
  That is `rules.refinds`, since the engine's prefix cache can be switched off.

Rules of other engines, each with its own flag:
- `rules.prefill_first` (SGLang): an iteration computes prompts or decodes, never both, and prompts come first.
- `rules.keeps_answers` (TensorRT-LLM): a request enters only if blocks for its whole answer are free too, beyond what
  the running requests will still need, so that none is preempted.
- `rules.wait_iterations` (TensorRT-LLM's batch_wait): while others decode, prompts wait for so many iterations, or
  until an iteration would have `rules.wait_tokens`.

If requests draft (`rules.draft_tokens`), a decode also takes blocks and token budget for its drafts. Blocks of drafts
that are rejected are given back when the iteration ends.

If the drafter has its own card (`rules.draft_parts`), an iteration verifies the drafts that are there. Meanwhile the
drafter drafts for one part of the other requests.

If batches are split at exits (`rules.regroups`), an iteration runs either the tokens that wait at one exit, without
prompts, or all other tokens. Waiting tokens run on when there are enough of them, when one of them has waited long
enough or would miss its bound on TPOT, or when nothing else decodes.

One rule is simpler than vLLM's: blocks of a whole prompt are taken when it enters. vLLM checks that all of them are
free but takes them chunk by chunk, so that a decode can take one between two chunks of a prompt.
"""

from __future__ import annotations

from helios_sim.core.arrive import cannot_run, depart, occupy
from helios_sim.core.blocks import blocks_for, free_blocks, give_blocks, kept_blocks, take_back, take_blocks
from helios_sim.core.layout import (
    FLUSH,
    GO_ON,
    NEVER,
    RETOKENIZE,
    Line,
    Lists,
    Numbers,
    Record,
    Table,
)
from helios_sim.core.line import last_in_order, last_lingering, order_key, pop, push
from helios_sim.core.prefix import (
    Prefix,
    blocks_due,
    depth,
    extend,
    find,
    free_among,
    has_room,
    hold,
    leave_blocks,
    own_text,
    release,
    settle,
    still_blocked,
)


def begin_schedule(
    s: Record,
    r: Record,
    it: Record,
    requests: Table,
    lists: Lists,
    line: Line,
    tokens: Table,
    chunks: Table,
    freed: Table,
    prefix: Prefix,
    owed: Numbers,
) -> None:
    """Make room for the decodes, by preemption if need be, and continue prompts that were begun.

    Leaves in `it` what admission needs: the token budget, and whether any request may enter.
    """
    it.lingering = s.lingering
    it.drafts = it.drafted = it.drafting_apart = it.first_band = it.splits = 0
    # A migration empties the batch; after that no request of the old model starts.
    it.blocked = s.migrating and s.running == 0
    it.due_blocks = _blocks_due(s, r, it, requests, lists)
    while it.due_blocks > free_blocks(s):
        if r.shares and blocks_due(s, r, requests, lists, prefix) <= free_blocks(s):
            break  # some have got their block already, in a turn that scheduled nothing
        preempt(s, r, requests, lists, line, freed, prefix, owed)
        it.blocked = 1
        it.due_blocks = _blocks_due(s, r, it, requests, lists)
    if r.shares and it.due_blocks:  # before requests enter, since taking a free block may discard its content
        extend(s, r, requests, lists, prefix, owed, it.due_blocks)
        it.due_blocks = 0
    it.decodes = it.members if r.regroups or r.draft_parts else s.decoding
    it.budget = r.batch_tokens if r.prefill_first else r.batch_tokens - s.decoding - it.drafted
    if it.first_band:
        it.budget = 0
    it.chunks = it.finishing = 0
    if s.running > s.decoding:
        for i in range(s.decoding, s.running):
            if it.budget <= 0:
                break
            _add_chunk(s, r, it, requests, chunks, prefix, owed, lists.batch[i])
    if r.wait_iterations and s.decoding and s.waiting and not it.blocked:
        s.waited += 1
        if s.waited > r.wait_iterations or s.decoding + _waiting_tokens(s, r, requests, line, tokens) >= r.wait_tokens:
            s.waited = 0
        else:
            it.blocked = 1


def admit(
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
) -> int:
    """Admit requests from the head of the line as long as there is budget, a place and memory for them.

    Returns GO_ON when admission is over, or why it has to be called again: RETOKENIZE or FLUSH.
    """
    while not it.blocked and it.budget > 0 and s.waiting > 0:
        if s.running + it.lingering >= running_limit(s, r):
            break
        ref = line.ref[0]
        fresh = ref >= 0
        slot = -1 - ref
        if fresh:
            row = ref - s.first_row
            arrival_ns, planned = arrivals[row].arrival_ns, arrivals[row].planned_model
            prompt, output = tokens[row].prompt_tokens, tokens[row].output_tokens
            generated, starts = 0, True
        else:
            request = requests[slot]
            arrival_ns, planned = request.arrival_ns, request.planned_model
            prompt, output = request.prompt_tokens, request.output_tokens
            generated, starts = request.generated, request.started == 0
            if request.model != s.model:
                generated = 0  # of another model: not begun on this one
        if starts and s.starts_left == 0:
            break
        if r.ahead and s.started_ns != NEVER and arrival_ns > s.started_ns:
            break  # it came after the planner looked
        if s.draining and generated == 0:
            break
        if planned != NEVER and planned != s.model:
            break
        if not fresh and requests[slot].model != s.model:
            return RETOKENIZE
        why = cannot_run(s, r, prompt, output)
        if why and s.pending:
            break
        prefill = prompt + generated
        blocks = blocks_for(prefill, r.block_tokens)
        kept, lacking = 0, blocks
        if r.shares and not why:
            if not has_room(s, prefix, blocks, blocks_for(prompt + output, r.block_tokens)):
                return FLUSH
            if still_blocked(s, line.seq[0]):
                break
            if fresh:
                arrival = arrivals[row]
                shared, own = arrival.shared, own_text(arrival.stream, arrival.request_id)
            else:
                request = requests[slot]
                shared, own = request.shared, own_text(request.stream, request.request_id)
            kept = find(r, prefix, shared, own, prefill, depth(r, generated), True)
            lacking = blocks - kept + free_among(prefix, kept)
            if lacking > free_blocks(s):
                s.blocked_seq, s.blocked_free, s.blocked_known = line.seq[0], free_blocks(s), s.made_known
        if not why and lacking > free_blocks(s) - it.due_blocks:
            break
        if r.keeps_answers and not why:
            whole = blocks_for(prompt + output, r.block_tokens)
            if whole - blocks + lacking > free_blocks(s) - _promised_blocks(s, r, requests, lists):
                break
        if r.whole_prompts and not why and it.budget < r.batch_tokens:  # the first of an iteration may be in chunks
            if not fresh and not r.shares:
                kept = _refound(s, r, freed, requests[slot], prefill)
            if prefill - kept * r.block_tokens > it.budget:
                break
        if fresh:
            if s.free == 0:
                return FLUSH
            slot = occupy(s, requests, lists, arrivals[row], tokens[row], ref)
        pop(s, line)
        request = requests[slot]
        request.model = s.model
        if why:
            depart(s, r, requests, lists, slot, s.now_ns, why)  # who comes in its place was not there when this began
            continue
        if fresh:
            request.order_key = order_key(r, request.priority, prompt)
        if r.shares:
            hold(s, prefix, request, kept, blocks)
            _count_hits(s, r, request, prefill, kept * r.block_tokens)
        else:
            kept = _take_prompt_blocks(s, r, freed, request, prefill, blocks)
        request.context_tokens = kept * r.block_tokens
        request.prefill_left = prefill - kept * r.block_tokens
        request.remaining = output - generated
        request.held = request.unread = 0
        for band in range(owed.shape[1]):
            owed[slot, band] = 0
        lists.batch[s.running] = slot
        s.running += 1
        if starts and s.starts_left != NEVER:
            s.starts_left -= 1
        request.started = 1
        _add_chunk(s, r, it, requests, chunks, prefix, owed, slot)
    if it.chunks:
        if r.prefill_first:  # decodes wait
            it.decodes = it.due_blocks = it.kv_tokens = it.drafts = it.drafted = it.drafting_apart = 0
        for p in range(it.chunks):
            request = requests[chunks[p].slot]
            if request.scheduled_ns == NEVER:
                request.scheduled_ns = s.now_ns
    return GO_ON


def running_limit(s: Record, r: Record) -> int:
    """Requests that may run at once: fewer after an OOM, and one more with each request that completes."""
    return min(r.running_limit, s.fewer + s.completed)


def preempt(
    s: Record, r: Record, requests: Table, lists: Lists, line: Line, freed: Table, prefix: Prefix, owed: Numbers
) -> None:
    """Preempt the running request that is last in order: it loses its place and its KV cache.

    If a lingering request comes after it in order, only the blocks of that request are freed.
    """
    place = last_in_order(s, requests, lists)
    request = requests[lists.batch[place]]
    done = last_lingering(s, lists, request.order_key, request.seq)
    if done != NEVER:
        _give_lingering(s, r, lists, freed, prefix, done)
        s.lingering -= 1
        for i in range(done, s.lingering):
            lists.lingering_key[i] = lists.lingering_key[i + 1]
            lists.lingering_seq[i] = lists.lingering_seq[i + 1]
            lists.lingering_blocks[i] = lists.lingering_blocks[i + 1]
        return
    request.preemptions += 1
    s.preemptions += 1
    withdraw(s, r, requests, lists, line, freed, prefix, owed, place)


def withdraw(
    s: Record,
    r: Record,
    requests: Table,
    lists: Lists,
    line: Line,
    freed: Table,
    prefix: Prefix,
    owed: Numbers,
    place: int,
) -> None:
    """Put a running request back into the waiting line."""
    slot = lists.batch[place]
    remove_running(s, lists, place)
    request = requests[slot]
    request.cached_tokens = request.context_tokens
    request.freed_at = let_go(s, r, freed, prefix, request, owed, slot, request.request_id)
    push(s, line, request.order_key, request.seq, -1 - slot)


def remove_running(s: Record, lists: Lists, place: int) -> None:
    """Remove a request from the batch. The others keep their order."""
    s.running -= 1
    if place < s.decoding:
        s.decoding -= 1
    for i in range(place, s.running):
        lists.batch[i] = lists.batch[i + 1]


def held_blocks(r: Record, request: Record) -> int:
    """KV blocks that a running request has reserved."""
    return blocks_for(request.context_tokens + request.prefill_left, r.block_tokens)


def _promised_blocks(s: Record, r: Record, requests: Table, lists: Lists) -> int:
    """Blocks that the running requests will still need to complete."""
    promised = 0
    for i in range(s.running):
        request = requests[lists.batch[i]]
        held = request.context_tokens + request.prefill_left
        promised += blocks_for(held + request.remaining, r.block_tokens) - blocks_for(held, r.block_tokens)
    return promised


def _waiting_tokens(s: Record, r: Record, requests: Table, line: Line, tokens: Table) -> int:
    """Prompt tokens of the waiting requests, at most as many as one iteration takes."""
    waiting = 0
    for i in range(s.waiting):
        ref = line.ref[i]
        if ref >= 0:
            waiting += tokens[ref - s.first_row].prompt_tokens
        else:
            request = requests[-1 - ref]
            waiting += request.prompt_tokens + request.generated
        if waiting >= r.batch_tokens:
            return int(r.batch_tokens)
    return waiting


def let_go(
    s: Record, r: Record, freed: Table, prefix: Prefix, request: Record, owed: Numbers, slot: int, owner: int
) -> int:
    """Free all blocks of a running request. Returns the entry of `freed` that remembers them, or NEVER."""
    if not r.shares:
        return give_blocks(s, r, freed, held_blocks(r, request), owner)
    release(s, prefix, leave_blocks(s, r, prefix, request, owed, slot, request.remaining > 0))
    return NEVER


def release_lingering(s: Record, r: Record, lists: Lists, freed: Table, prefix: Prefix) -> None:
    """Free the blocks of all lingering requests."""
    for i in range(s.lingering):
        _give_lingering(s, r, lists, freed, prefix, i)
    s.lingering = 0


def _give_lingering(s: Record, r: Record, lists: Lists, freed: Table, prefix: Prefix, i: int) -> None:
    if r.shares:
        release(s, prefix, lists.lingering_blocks[i])
    else:
        give_blocks(s, r, freed, lists.lingering_blocks[i], NEVER)


def _blocks_due(s: Record, r: Record, it: Record, requests: Table, lists: Lists) -> int:
    """Count the blocks that decodes need for their next token. Lists those decodes, and sums up their contexts."""
    if r.draft_tokens:
        return blocks_to_draft(s, r, it, requests, lists)
    if r.regroups:
        return blocks_to_regroup(s, r, it, requests, lists)
    batch, needy, due, kv_tokens = lists.batch, lists.needy, 0, 0
    block_tokens, mask = r.block_tokens, r.block_mask
    for i in range(s.decoding):
        slot = batch[i]
        context = requests[slot].context_tokens
        kv_tokens += context
        if (context & mask if mask >= 0 else context % block_tokens) == 0:
            needy[due] = slot
            due += 1
    it.kv_tokens = kv_tokens
    return due


def blocks_to_draft(s: Record, r: Record, it: Record, requests: Table, lists: Lists) -> int:
    """Count as `_blocks_due` does, with drafts. Decides how many tokens each request drafts: none in a large batch.

    If another card drafts, requests with drafts, and those that do not draft, are verified now and come first in the
    batch. One part of the others, right after them, is drafted for. Only the verification takes blocks.
    """
    batch, due, kv_tokens, apart = lists.batch, 0, 0, r.draft_parts
    drafts = r.draft_tokens if s.decoding <= r.draft_batch else 0
    it.drafts = it.drafted = 0
    for i in range(s.decoding):
        request = requests[batch[i]]
        context = request.context_tokens
        if apart == 0 or request.held == 0:
            request.drafts = min(drafts, request.remaining - 1)  # a pass yields one token more than it accepts
            if apart:
                request.held = int(request.drafts == 0)
        if apart and request.held == 0:
            continue
        kv_tokens += context
        it.drafted += request.drafts
        it.drafts = max(it.drafts, request.drafts)
        due += blocks_for(context + 1 + request.drafts, r.block_tokens) - blocks_for(context, r.block_tokens)
    if apart:
        it.members, it.drafts = gather(requests, lists, s.decoding, 1), 0
        it.drafting_apart = min(s.decoding - it.members, (s.decoding + apart - 1) // apart)
        for i in range(it.members, it.members + it.drafting_apart):
            it.drafts = max(it.drafts, requests[batch[i]].drafts)
    it.kv_tokens = kv_tokens
    return due


def blocks_to_regroup(s: Record, r: Record, it: Record, requests: Table, lists: Lists) -> int:
    """Count as `_blocks_due` does, with split batches. Decides which decodes run, and puts them before the others.

    The deepest group of waiting tokens that is due runs; if none is due, the decodes that do not wait run.
    """
    batch, members, due, kv_tokens = lists.batch, gather(requests, lists, s.decoding, 0), 0, 0
    enough = members if r.flush_requests == NEVER or members == 0 else r.flush_requests
    # One more iteration of the others and then their own, each about as long as the latest iteration.
    soon_ns = s.now_ns if s.started_ns == NEVER else 3 * s.now_ns - 2 * s.started_ns
    it.first_band = 0
    for band in range(1, r.bands):
        waiting, urgent = 0, 0
        for i in range(members, s.decoding):
            request = requests[batch[i]]
            if request.held == band:
                waiting += 1
                late_ns = request.first_token_ns + request.generated * r.tpot_ns
                if s.now_ns >= request.held_ns + r.flush_ns or (r.tpot_ns != NEVER and s.now_ns <= late_ns < soon_ns):
                    urgent = 1
        if urgent or waiting >= max(enough, 1):
            it.first_band = band
    if it.first_band:
        members = gather(requests, lists, s.decoding, it.first_band)
    for i in range(members):
        context = requests[batch[i]].context_tokens
        kv_tokens += context
        if it.first_band == 0 and context % r.block_tokens == 0:
            due += 1
    it.members, it.kv_tokens = members, kv_tokens
    return due


def gather(requests: Table, lists: Lists, n: int, held: int) -> int:
    """Move those of the first n of the batch with this value of `held` to the front. Returns how many there are."""
    batch, others, found = lists.batch, lists.leaving, 0
    for i in range(n):
        slot = batch[i]
        if requests[slot].held == held:
            batch[found] = slot
            found += 1
        else:
            others[i - found] = slot
    for i in range(found, n):
        batch[i] = others[i - found]
    return found


def _take_prompt_blocks(s: Record, r: Record, freed: Table, request: Record, prefill: int, blocks: int) -> int:
    """Take blocks for a request that enters. Returns how many of them still hold its first tokens."""
    kept = _refound(s, r, freed, request, prefill)
    if request.cached_tokens and kept_blocks(s, freed, request.freed_at, request.request_id) > 0:
        take_back(s, freed, request.freed_at, kept)
    request.freed_at = NEVER
    take_blocks(s, r, freed, blocks - kept)
    return kept


def _refound(s: Record, r: Record, freed: Table, request: Record, prefill: int) -> int:
    """How many blocks of a preempted request still hold its first tokens."""
    if request.cached_tokens == 0 or request.freed_at == NEVER:
        return 0
    known = min(request.cached_tokens, prefill - 1)  # the last token is always computed
    return min(kept_blocks(s, freed, request.freed_at, request.request_id), known // r.block_tokens)


def _count_hits(s: Record, r: Record, request: Record, prefill: int, hit_tokens: int) -> None:
    """Count tokens looked up and found, preempted requests apart, as vLLM's PrefixCacheStats (v1/metrics/stats.py)."""
    if request.preemptions > 0:
        s.prefix_cache_refound += hit_tokens
        return
    s.prefix_cache_queries += prefill
    s.prefix_cache_hits += hit_tokens
    if not request.started:
        request.hit_tokens = hit_tokens


def _add_chunk(
    s: Record, r: Record, it: Record, requests: Table, chunks: Table, prefix: Prefix, owed: Numbers, slot: int
) -> None:  # fmt: skip
    request = requests[slot]
    tokens = min(request.prefill_left, it.budget)
    chunk = chunks[it.chunks]
    chunk.slot = slot
    chunk.tokens = tokens
    chunk.context_tokens = request.context_tokens
    it.chunks += 1
    it.budget -= tokens
    if tokens == request.prefill_left:
        it.finishing += 1
    filled, generated = request.context_tokens + tokens, request.generated
    if r.shares and settle(s, r, prefix, request, owed, slot, filled, generated, False):
        s.made_known += 1
