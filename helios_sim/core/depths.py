"""The depth of each token of an iteration, and from it the rows that run in each band of layers.

A trace says where a token would leave on its own. The batching rule says where it leaves in this batch, and the KV rule
what the layers that it skipped still compute for it.

Speculative decoding: an iteration has several passes (`lay_out_pass`). In the k-th draft pass, all requests that draft
at least k tokens run the layers up to the draft exit, and the LM head. Then one pass verifies. In it the layers up to
the exit run the last drafts, which have no K and V yet; the layers above run all drafts and the token before them;
prompts run beside them. A draft is accepted as long as the exit predicts the full model's token. The full model's own
token replaces the first draft that is rejected, so each pass yields one token more than drafts are accepted.

A drafter that is another model computes prompts too, in the first draft pass, and its layers are one band. On its own
card it drafts for requests that are verified later, while the other card verifies the drafts that are there.

Exits that check tokens one by one (`look`): a token is checked by the exits that always check, and by those near the
exits of the request's latest tokens. With predictors, the head of the first exit proposes words for every token. A
later head is asked only if its predictor is sure, and the token leaves if the head's word is one of those proposed.

Split batches (`split_at`): an iteration goes from band to band until all of its tokens leave, or enough of them want to
leave. Those leave, and the others wait before the next band.
"""

from __future__ import annotations

from helios_sim.core.layout import (
    AGREES_THERE,
    BREACHES_THERE,
    EXIT_BITS,
    EXIT_MASK,
    LEAF_BITS,
    MILLIONTHS,
    NEVER,
    Lists,
    Numbers,
    Record,
    Table,
    Trace,
)


def lay_out(
    s: Record, r: Record, it: Record, requests: Table, lists: Lists, chunks: Table, x: Trace, owed: Numbers, work: Table
) -> None:
    """Fill `work`, the iteration's counts and each request's token fields, from the decodes and the chunks."""
    it.alike = 0
    it.banded = r.per_token or r.clairvoyant or r.planned or it.drafts > 0 or r.draft_parts or r.releases
    if r.observe_tokens != NEVER and not it.banded:
        for i in range(s.running):
            if is_observed(r, requests[lists.batch[i]]):
                it.banded = 1
    bands = r.bands if it.banded else 1
    for band in range(bands):
        w = work[band]
        w.decode_tokens = w.kv_tokens = w.checked_tokens = w.classified_tokens = w.propagated_tokens = 0
        w.verified_tokens = 0
    it.sampled_tokens = it.decodes
    it.syncs = r.per_token
    it.host_ahead = r.ahead
    it.loading = s.loading
    it.kv_least = it.kv_most = NEVER
    if r.spread:
        _spread(s, it, requests, lists)
    if it.drafts or r.draft_parts:
        _drafted(r, it, requests, lists, x)
    elif r.releases:
        lay_out_releases(r, it, requests, lists, x, work)
    elif it.banded:
        _banded(s, r, it, requests, lists, x, owed, work)
    else:
        _uniform(s, r, it, requests, lists, x, work)
    if it.chunks:
        _prompts(s, r, it, requests, chunks, x, work, bands)


def lay_out_pass(r: Record, it: Record, requests: Table, lists: Lists, work: Table, draft: int) -> None:
    """Fill `work` for one pass of an iteration that drafts: the `draft`-th draft pass, or 0 for the verification."""
    rows, kv_tokens, more, unread = 0, 0, 0, 0
    it.drafting = draft > (1 if r.draft_parts else 0)  # a drafter on its own card pays its host's overhead once
    it.kv_least = it.kv_most = NEVER
    first_place, end = 0, it.decodes
    if draft and r.draft_parts:
        first_place, end = end, end + it.drafting_apart
    for i in range(first_place, end):
        request = requests[lists.batch[i]]
        drafts = request.drafts
        if draft > drafts:
            continue
        context = request.context_tokens + (draft if draft else drafts + 1)
        rows += 1
        kv_tokens += context
        more += drafts
        unread += request.unread
        if r.spread:
            it.kv_least = context if it.kv_least == NEVER else min(it.kv_least, context)
            it.kv_most = max(it.kv_most, context)
    first, last = work[0], work[r.bands - 1]
    last.decode_tokens = last.kv_tokens = last.verified_tokens = 0
    first.decode_tokens, first.kv_tokens = rows, kv_tokens
    if draft:
        it.sampled_tokens = rows
        first.verified_tokens = unread if draft == 1 else 0
    else:
        it.sampled_tokens = rows + more + it.finishing
        first.verified_tokens = 0
        last.decode_tokens, last.kv_tokens, last.verified_tokens = rows, kv_tokens, more


def next_row(request: Record) -> int:
    """The row of the trace for a request's next token."""
    at, length = request.trace_start + request.generated, request.trace_length
    return request.trace_first + (at if at < length else _begun_anew(at, length))


def _row_after(request: Record, tokens: int) -> int:
    """The row of the trace for the token `tokens` after a request's next one."""
    at, length = request.trace_start + request.generated + tokens, request.trace_length
    return request.trace_first + (at if at < length else _begun_anew(at, length))


def _begun_anew(at: int, length: int) -> int:
    """Wrap a place beyond the end of a text to its beginning. A division is avoided, since it is slow."""
    return at - length if at < 2 * length else at % length


def is_observed(r: Record, request: Record) -> bool:
    """Whether the request's next token is observed: it runs all loaded layers and is checked at every exit."""
    return r.observe_tokens != NEVER and request.generated < r.observe_tokens


def _spread(s: Record, it: Record, requests: Table, lists: Lists) -> None:
    """Note the shortest and the longest context of the decodes, for prices that depend on them."""
    for i in range(it.decodes):
        context = requests[lists.batch[i]].context_tokens + (1 if it.first_band == 0 else 0)
        if it.kv_most == NEVER:
            it.kv_least = it.kv_most = context
        else:
            it.kv_least = min(it.kv_least, context)
            it.kv_most = max(it.kv_most, context)


def _uniform(s: Record, r: Record, it: Record, requests: Table, lists: Lists, x: Trace, work: Table) -> None:
    """Lay out an iteration in which all tokens run the same layers: one band."""
    leaf, layers = r.rule_exit, x.exits[r.rule_exit]
    it.alike, it.token_layers = not r.reads_trace, layers
    if r.reads_trace:
        batch, leaves, microbits, scores = lists.batch, x.leaves, x.microbits, r.scores
        for i in range(it.decodes):
            request = requests[batch[i]]
            row = next_row(request)
            request.observed = 0
            request.token_exit = leaf
            request.token_layers = layers
            found = leaves[row]
            request.token_breach = 1 if found & BREACHES_THERE else 0
            request.token_agrees = found & AGREES_THERE
            request.token_microbits = microbits[row, leaf] if scores else 0
    w, decodes = work[0], it.decodes
    w.decode_tokens = decodes
    w.kv_tokens = it.kv_tokens + decodes
    if r.watches_cap:
        w.classified_tokens = decodes


def _drafted(r: Record, it: Record, requests: Table, lists: Lists, x: Trace) -> None:
    """Decide which drafts are accepted. Accepted drafts and the token after them are those of the full model."""
    agree, microbits, leaf = x.agree, x.microbits, r.rule_exit
    for i in range(it.decodes):
        request = requests[lists.batch[i]]
        drafts, accepted, row = request.drafts, 0, next_row(request)
        of_all = microbits[row, leaf] if r.scores else 0
        while accepted < drafts and agree[row, r.draft_exit]:
            accepted += 1
            row = _row_after(request, accepted)
            if r.scores:
                of_all += microbits[row, leaf]
        request.drafted, request.accepted = drafts, accepted
        request.observed = 0
        request.token_exit = leaf
        request.token_layers = x.exits[leaf]
        request.token_breach = 0
        request.token_agrees = 1
        request.token_microbits = of_all


def _banded(
    s: Record, r: Record, it: Record, requests: Table, lists: Lists, x: Trace, owed: Numbers, work: Table
) -> None:
    """Lay out an iteration in which tokens leave at different exits: one band between any two loaded exits."""
    # Rules are read once here, not once a token.
    batch, n, last, first = lists.batch, it.decodes, r.bands - 1, it.first_band
    leaves, exits, n_observed, leavers = x.leaves, x.exits, 0, it.decodes
    planned, looks, lazy, regroups = r.planned, r.looks, r.lazy, r.regroups
    reads_trace, scores = r.reads_trace, r.scores
    observed_below = NEVER if planned else r.observe_tokens  # NEVER: none is observed
    elsewhere = planned or looks or lazy or regroups or not reads_trace  # tokens leave at exits other than the trace's
    new = 1 if first == 0 else 0  # a token that goes on from an exit has its K and V in the cache already
    shared = _shared_exit(r, it, requests, lists, x) if lazy or regroups else last
    for i in range(n):
        request = requests[batch[i]]
        row = next_row(request)
        observed = request.generated < observed_below
        found = leaves[row]
        leaf, breach, agrees = found >> LEAF_BITS, 1 if found & BREACHES_THERE else 0, found & AGREES_THERE
        if observed or elsewhere:
            if planned:
                leaf, breach = x.planned[request.planned_first + request.generated], 0
            elif observed:
                leaf, breach = r.loaded_exit, 0
                n_observed += 1
            elif looks:
                leaf = look(r, request, x, row, work)
            elif lazy:
                leaf = shared
            elif regroups:
                request.held = 0 if leaf <= shared else shared + 1
                leavers -= 1 if request.held else 0
                leaf = shared
            agrees = x.agree[row, leaf] if reads_trace else 1
        request.observed = observed
        request.token_exit = leaf
        request.token_breach = breach
        request.token_layers = exits[leaf]
        request.token_agrees = agrees
        request.token_microbits = x.microbits[row, leaf] if scores else 0
        w = work[leaf]
        w.decode_tokens += 1
        w.kv_tokens += request.context_tokens + new
    for band in range(last - 1, first - 1, -1):  # a token that runs a band also runs the bands before it
        work[band].decode_tokens += work[band + 1].decode_tokens
        work[band].kv_tokens += work[band + 1].kv_tokens

    if r.per_token and not r.looks:  # no check at the last layer: the token is sampled there
        for band in range(r.rule_exit):
            if x.checks[band] == 0:
                continue
            if r.head_checks:
                work[band].checked_tokens = work[band].decode_tokens
            else:
                work[band].classified_tokens = work[band].decode_tokens
    elif r.watches_cap:
        work[r.rule_exit].classified_tokens = n
    if n_observed and not r.head_checks:
        for band in range(last):
            work[band].checked_tokens += n_observed
    it.sampled_tokens, it.splits = leavers, int(leavers < n)
    if r.head_checks or r.proposes:
        it.sampled_tokens = work[r.rule_exit].decode_tokens
    if r.propagates:
        for band in range(first, last + 1):
            work[band].propagated_tokens = max(leavers - work[band].decode_tokens, 0)
    if r.repays:
        for i in range(n):
            slot = batch[i]
            request = requests[slot]
            for band in range(first, request.token_exit + 1):
                work[band].decode_tokens += owed[slot, band]
                work[band].kv_tokens += owed[slot, band] * (request.context_tokens + new)


def look(r: Record, request: Record, x: Trace, row: int, work: Table) -> int:
    """Return the exit at which a token leaves if exits check tokens one by one. Counts the checks and head calls.

    With predictors the first exit's head proposes words. Its own word is one of them, so it is not asked again.
    """
    checks, leaf, last = looking(r.always_checks, request.recent, x.near), 0, r.rule_exit
    sure, asked = x.sure[row], x.sure[row] | x.in_vain[row]
    if r.proposes:
        work[0].checked_tokens += 1
    while leaf < last:
        if (checks >> leaf) & 1:
            w = work[leaf]
            if r.head_checks:
                w.checked_tokens += 1
            else:
                w.classified_tokens += 1
                if r.proposes and leaf and (asked >> leaf) & 1:
                    w.checked_tokens += 1
            if (sure >> leaf) & 1:
                break
        leaf += 1
    if r.recent_mask:
        request.recent = remembered(request.recent, leaf, r.recent_mask)
    return leaf


def looking(always: int, recent: int, near: Numbers) -> int:
    """Bits of the exits that check a request's next token: those that always do, and those near its latest exits."""
    checks = always
    while recent:
        checks |= near[(recent & EXIT_MASK) - 1]
        recent >>= EXIT_BITS
    return checks


def remembered(recent: int, leaf: int, mask: int) -> int:
    """`request.recent` after a token has left at exit `leaf`."""
    return ((recent << EXIT_BITS) | (leaf + 1)) & mask


def _shared_exit(r: Record, it: Record, requests: Table, lists: Lists, x: Trace) -> int:
    """The exit at which all tokens stop, from the exits of each token on its own, which `token_exit` receives."""
    deepest = 0
    for i in range(it.decodes):
        request = requests[lists.batch[i]]
        request.token_exit = x.leaves[next_row(request)] >> LEAF_BITS
        deepest = max(deepest, request.token_exit)
    return split_at(r, it, requests, lists, x) if r.regroups else deepest


def lay_out_releases(r: Record, it: Record, requests: Table, lists: Lists, x: Trace, work: Table) -> None:
    """Lay out an iteration in which tokens run all layers, and the first ramp that is sure releases the answer."""
    for band in range(r.bands):
        w = work[band]
        w.decode_tokens, w.kv_tokens = it.decodes, it.kv_tokens + it.decodes
        if x.checks[band]:
            if r.head_checks or r.tells_all:  # every token is checked at every ramp
                w.checked_tokens = it.decodes
            if not r.head_checks:
                w.classified_tokens = it.decodes
    for i in range(it.decodes):
        request = requests[lists.batch[i]]
        row = next_row(request)
        leaf = x.leaves[row] >> LEAF_BITS
        request.observed = request.token_breach = 0
        request.token_exit = leaf
        _leaves_at(r, x, request, row, leaf)
        request.token_layers = x.exits[r.rule_exit]
        if not r.head_checks and not r.tells_all and leaf < r.rule_exit:  # the check does not say which token it is
            work[leaf].checked_tokens += 1


def note_releases(s: Record, r: Record, it: Record, requests: Table, lists: Lists, work: Table) -> None:
    """Note how much earlier than the end of the iteration each of its tokens is delivered."""
    for i in range(it.decodes):
        request = requests[lists.batch[i]]
        request.earlier_ns = 0
        if request.token_exit < r.rule_exit:
            request.earlier_ns = max(s.end_ns - s.now_ns - work[request.token_exit].done_ns, 0)


def split_at(r: Record, it: Record, requests: Table, lists: Lists, x: Trace) -> int:
    """The exit at which a batch stops: all tokens want to leave there, or more than the share that splits it.

    A batch is not split beside prompts: they run all layers, so nothing would be saved.
    """
    for leaf in range(it.first_band, r.bands - 1):
        leavers = 0
        for i in range(it.decodes):
            if requests[lists.batch[i]].token_exit <= leaf:
                leavers += 1
        if parts(leavers, it.decodes, it.chunks, x.split_above[leaf]):
            return leaf
    return int(r.bands - 1)


def parts(leavers: int, tokens: int, chunks: int, split_above: int) -> bool:
    """Whether a batch stops at an exit if `leavers` of its tokens want to leave there.

    `split_above` is in millionths. Live engines use the same function.
    """
    return leavers == tokens or (chunks == 0 and leavers * MILLIONTHS > split_above * tokens)


def _prompts(
    s: Record, r: Record, it: Record, requests: Table, chunks: Table, x: Trace, work: Table, bands: int
) -> None:
    """Lay out chunks of prompts. The last chunk of a prompt yields a token, from the last layer that it runs."""
    observed = 0
    for p in range(it.chunks):
        request = requests[chunks[p].slot]
        looks = not r.planned and is_observed(r, request)
        row = next_row(request)
        leaf = r.rule_exit
        if r.planned:
            leaf = x.planned[request.planned_first + request.generated]
        elif looks:
            leaf = r.loaded_exit
        elif r.clairvoyant:
            leaf = x.leaves[row] >> LEAF_BITS
        chunks[p].layers = x.exits[leaf]
        if p < it.finishing:
            request.observed = looks
            request.token_exit = leaf
            request.token_breach = 0
            _leaves_at(r, x, request, row, leaf)
            if looks:
                observed += 1
    it.sampled_tokens += it.finishing
    if observed:  # the last token of a prompt is checked at every exit, like the answer's further tokens
        for band in range(bands - 1):
            work[band].checked_tokens += observed


def _leaves_at(r: Record, x: Trace, request: Record, row: int, leaf: int) -> None:
    """Fill in the request's token fields for a token that leaves at exit `leaf`."""
    request.token_layers = x.exits[leaf]
    request.token_agrees = 1
    request.token_microbits = 0
    if r.reads_trace:
        request.token_agrees = x.agree[row, leaf]
        if r.scores:
            request.token_microbits = x.microbits[row, leaf]
