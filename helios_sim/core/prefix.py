"""Prefix caching: KV blocks with the same beginning of a text are computed once and shared, as in vLLM v1.

The rules are those of vllm/v1/core/{kv_cache_manager,block_pool,kv_cache_utils,single_type_kv_cache_manager}.py:

- A block that is full has a hash, chained over all tokens before it (`chain`; `hash_block_tokens`).
- A request that enters takes the longest run of its first full blocks that are cached, without the last token, which
  is always computed (`find`; `get_computed_blocks`, `find_longest_cache_hit`). It may enter if enough blocks are free
  for its further blocks and for those cached blocks that are free now (`get_num_blocks_to_allocate`).
- Blocks become known (can be found) as soon as the chunk that fills them is scheduled (`settle`; `allocate_slots`,
  `cache_blocks`), so a request that enters in the same iteration finds them. Equal blocks are not merged; the one that
  became known first is found. A text that only its own request could look for becomes known when it is preempted.
- Each block counts its holders (`touch`). A block without a holder is free but stays cached, in a queue ordered by the
  time at which it became free, the last block of a request first (`release`; `free_blocks`, `free`). A new block is one
  that never had content, else the first of the queue; its content is then discarded (`take`; `get_new_blocks`).

A block has a number only while it is known. Other blocks are only counted, by their request or in the queue: it makes
no difference which of them is taken.

Unlike in vLLM a block has a depth: it holds K and V up to the layer to which all of its tokens were computed, and a
request finds only blocks at least as deep as its own tokens would run. So what was computed under a cap serves the same
cap and lower ones, and is computed again after the cap is raised. When a lower cap comes into force, memory is cut
anew and deeper K and V are lost (`keep_layers` in `serving/prefix.py`); when another model does, all blocks are. Layers
that a token skipped and still owes are missing; propagated ones are there. An oracle's skipped layers cost nothing and
lack nothing.

A text is identified by segments, not by tokens: a segment's text, and a token's place in it. A prompt begins with the
segments of its row, which other requests share, and goes on in a stream of its own (its session's, if it has one), in
which its answer follows. `Prefix` holds:

- `blocks` (numbers + 1, 4): for each block its hash (NEVER if it has none), layers, holders, and place in the queue of
  free blocks (NEVER if it is not free). Number 0 is no block. `rings` (numbers + 1, 2): the block's neighbours in its
  bucket; for an unused number the next unused number, beginning with `spare_block`.
- `queue` (a power of two,): free blocks in places `queue_first` to `queue_end`, counted since the run began. An entry
  is the number of a block, or -n for n blocks without numbers. A block that was taken from the middle leaves its number
  behind; that entry is skipped, since the block's place is another one.
- `buckets` (a power of two,): for the last bits of a hash, the first block of a ring in the order they became known.
- `table` (seats + 1, most blocks of a request): the known blocks of each request that runs or lingers, which are its
  first ones; the last row receives the blocks that `find` finds. `seats` (seats, 3): blocks that the request holds,
  how many of them are known, and a list of free seats.
- `starts` (rows + 1,): where the shared segments of each row begin. `segments` (segments, 2): the text of each segment,
  and its end in tokens of the active model. `exits`: the depths of the active model's exits.
"""

from __future__ import annotations

from typing import NamedTuple

from helios_sim.core.layout import NEVER, Lists, Numbers, Record, Table

HASH, LAYERS, HOLDERS, PLACE = range(4)
BEFORE, AFTER = range(2)
HELD, KNOWN, FREE = range(3)
TEXT, END = range(2)
_BITS = 0x7FFF_FFFF_FFFF_FFFF  # bits of a hash, without the sign: Python's and 64-bit integers give the same
_FACTOR, _OF_TEXT = 0x1E35_A7BD_9E37_79B9, 0x2545_F491_4F6C_DD1D


class Prefix(NamedTuple):
    blocks: Numbers
    rings: Numbers
    queue: Numbers
    buckets: Numbers
    table: Numbers
    seats: Numbers
    starts: Numbers
    segments: Numbers
    exits: Numbers


def mix(so_far: int, text: int, place: int, length: int) -> int:
    """Extend the hash `so_far` by `length` tokens of a text, from `place` on.

    NumPy's numbers are converted to Python's, since they would warn about overflows.
    """
    value = (int(text) * _OF_TEXT + (int(place) << 31) + int(length)) & _BITS
    mixed = ((int(so_far) ^ value) * _FACTOR) & _BITS
    return mixed ^ (mixed >> 32)


def own_text(stream: int, request_id: int) -> int:
    """The text of a prompt after its shared segments: its session's, or one of its own."""
    return 3 * request_id + 2 if stream == NEVER else 3 * stream + 1


def chain(
    r: Record, c: Prefix, shared: int, own: int, so_far: int, block: int, segment: int
) -> tuple[int, int]:  # fmt: skip
    """Return the hash of a block of a prompt, and the segment in which it ends.

    `so_far` is the hash of the block before it, `segment` the segment of an earlier token or the first of the row, and
    `own` the text after the segments.
    """
    first, last = _segments(c, shared)
    at, end = block * r.block_tokens, (block + 1) * r.block_tokens
    while at < end:
        while segment < last and c.segments[segment, END] <= at:
            segment += 1
        begin = c.segments[segment - 1, END] if segment > first else 0
        up_to, text = end, own
        if segment < last:
            up_to, text = min(end, c.segments[segment, END]), 3 * c.segments[segment, TEXT]
        so_far = mix(so_far, text, at - begin, up_to - at)
        at = up_to
    return so_far, segment


def _segments(c: Prefix, shared: int) -> tuple[int, int]:
    if shared == NEVER:
        return 0, 0
    return c.starts[shared], c.starts[shared + 1]


def has_room(s: Record, c: Prefix, blocks: int, widest: int) -> bool:
    """Whether the tables have room for `blocks` more blocks, and for a request that may hold `widest` in all."""
    s.widest_request = max(s.widest_request, widest)
    return most_known(s, blocks) < len(c.blocks) and widest <= c.table.shape[1]


def most_known(s: Record, blocks: int) -> int:
    """The most blocks that may be known at once after `blocks` further ones are taken."""
    return min(s.total_blocks, s.used_blocks + s.queue_end - s.queue_first + blocks)


def find(r: Record, c: Prefix, shared: int, own: int, tokens: int, layers: int, noted: bool) -> int:
    """How many of the first full blocks of a prompt are cached, at least `layers` deep. The last token does not count.

    With `noted` the blocks are written into the last row of `table`.
    """
    limit, n = (tokens - 1) // r.block_tokens, 0
    value, segment = 0, _segments(c, shared)[0]
    while n < limit:
        value, segment = chain(r, c, shared, own, value, n, segment)
        block = _look_up(c, value, layers)
        if block == 0:
            break
        if noted:
            c.table[len(c.table) - 1, n] = block
        n += 1
    return n


def _look_up(c: Prefix, value: int, layers: int) -> int:
    """The first block that became known with this hash and is at least so deep, or 0."""
    blocks = c.blocks
    first = c.buckets[value & (len(c.buckets) - 1)]
    block = first
    while block != 0:
        if blocks[block, HASH] == value and blocks[block, LAYERS] >= layers:
            return block
        block = c.rings[block, AFTER]
        if block == first:
            break
    return 0


def still_blocked(s: Record, seq: int) -> bool:
    """Whether the request that lacked blocks at its last look-up must still lack them, so that no look-up is needed.

    That is so if no more blocks are free than then, and none has become known that it could share.
    """
    same = s.blocked_seq == seq and s.blocked_known == s.made_known
    return same and s.total_blocks - s.used_blocks <= s.blocked_free


def free_among(c: Prefix, found: int) -> int:
    """How many of the first `found` blocks in the last row of `table` are free."""
    free = 0
    for i in range(found):
        if c.blocks[c.table[len(c.table) - 1, i], HOLDERS] == 0:
            free += 1
    return free


def hold(s: Record, c: Prefix, request: Record, found: int, blocks: int) -> None:
    """Give a request that enters `blocks` blocks, of which the first `found` are cached ones."""
    s.free_seats -= 1
    seat = c.seats[s.free_seats, FREE]
    request.seat = seat
    for i in range(found):
        block = c.table[len(c.table) - 1, i]
        if c.blocks[block, HOLDERS] == 0:
            c.blocks[block, PLACE] = NEVER
            s.queued_blocks -= 1
            s.used_blocks += 1
        c.blocks[block, HOLDERS] += 1
        c.table[seat, i] = block
    take(s, c, blocks - found)
    c.seats[seat, HELD] = blocks
    c.seats[seat, KNOWN] = found


def take(s: Record, c: Prefix, blocks: int) -> None:
    """Take free blocks, empty ones first. The scheduler has checked that there are enough."""
    empty = s.total_blocks - s.used_blocks - s.queued_blocks
    s.used_blocks += blocks
    if blocks > empty:
        _drop(s, c, blocks - empty)


def _drop(s: Record, c: Prefix, blocks: int) -> None:
    """Remove blocks from the queue, the longest free first, and discard their content."""
    queue, mask, place = c.queue, len(c.queue) - 1, s.queue_first
    s.queued_blocks -= blocks
    while blocks > 0:
        block = queue[place & mask]
        if block < -blocks:
            queue[place & mask] = block + blocks
            break
        if block < 0:
            blocks += block
        elif c.blocks[block, PLACE] == place:
            blocks -= 1
            _forget(c, block)
            _give_back(s, c, block)
        place += 1
    s.queue_first = place


def _new_number(s: Record, c: Prefix) -> int:
    """Return a number for a block that becomes known. It has one holder."""
    block = s.spare_block
    if block != 0:
        s.spare_block = c.rings[block, AFTER]
    else:
        s.made_blocks += 1
        block = s.made_blocks
    c.blocks[block, HOLDERS] = 1
    c.blocks[block, PLACE] = NEVER
    return block


def _give_back(s: Record, c: Prefix, block: int) -> None:
    """Make the number of a block that is no longer known available again."""
    c.blocks[block, HOLDERS] = 0
    c.blocks[block, PLACE] = NEVER
    c.rings[block, AFTER] = s.spare_block
    s.spare_block = block


def shrink(s: Record, c: Prefix, total_blocks: int) -> None:
    """Shrink the pool, discarding the first blocks of the queue. Blocks that are held must fit into the new size."""
    _drop(s, c, max(s.used_blocks + s.queued_blocks - total_blocks, 0))
    s.total_blocks = total_blocks


def blocks_due(s: Record, r: Record, requests: Table, lists: Lists, c: Prefix) -> int:
    """Blocks that decodes need for the K and V of their next token, and do not hold yet."""
    due = 0
    for i in range(s.decoding):
        request = requests[lists.batch[i]]
        if request.context_tokens == c.seats[request.seat, HELD] * r.block_tokens:
            due += 1
    return due


def extend(s: Record, r: Record, requests: Table, lists: Lists, c: Prefix, owed: Numbers, needy: int) -> None:
    """Give another block to the first `needy` decodes in `lists.needy`, unless they have got it already."""
    slots, seats, block_tokens, taken = lists.needy, c.seats, r.block_tokens, 0
    for i in range(needy):
        slot = slots[i]
        request = requests[slot]
        context, seat = request.context_tokens, request.seat
        held = seats[seat, HELD]
        if context == held * block_tokens:
            if request.stream != NEVER and settle(s, r, c, request, owed, slot, context, request.generated - 1, False):
                s.made_known += 1
            seats[seat, HELD] = held + 1
            taken += 1
    take(s, c, taken)


def settle(
    s: Record,
    r: Record,
    c: Prefix,
    request: Record,
    owed: Numbers,
    slot: int,
    tokens: int,
    generated: int,
    private: bool,
) -> bool:
    """Make known the blocks that a request's first `tokens` tokens fill. Returns False if all of them are known.

    `generated` is the number of answer tokens when the last of these tokens was computed. Blocks that no other request
    can look for are made known only with `private`.
    """
    seat, shared = request.seat, request.shared
    if request.stream == NEVER and not private:
        first, last = _segments(c, shared)
        tokens = min(tokens, c.segments[last - 1, END]) if last > first else 0
    n, full = c.seats[seat, KNOWN], tokens // r.block_tokens
    if n >= full:
        return False
    value, segment = 0, _segments(c, shared)[0]
    own, reaches = own_text(request.stream, request.request_id), depth(r, generated)
    if n > 0:
        value = c.blocks[c.table[seat, n - 1], HASH]
    while n < full:
        value, segment = chain(r, c, shared, own, value, n, segment)
        block, layers = _new_number(s, c), reaches
        c.table[seat, n] = block
        n += 1
        if r.owes and n * r.block_tokens > request.prompt_tokens:
            layers = min(layers, _paid_layers(r, c, owed, slot, tokens - n * r.block_tokens))
        c.blocks[block, LAYERS] = layers
        make_known(c, block, value)
    c.seats[seat, KNOWN] = full
    return True


def depth(r: Record, generated: int) -> int:
    """The layer up to which K and V are read and computed for a request with `generated` answer tokens."""
    if r.observe_tokens != NEVER and generated < r.observe_tokens:
        return r.loaded_layers
    return r.rule_layers


def _paid_layers(r: Record, c: Prefix, owed: Numbers, slot: int, later: int) -> int:
    """The layers that a token has run or caught up with, if `later` tokens came after it."""
    band = 0
    while band < r.bands and owed[slot, band] <= later:
        band += 1
    return c.exits[band - 1] if band else 0


def leave_blocks(
    s: Record, r: Record, c: Prefix, request: Record, owed: Numbers, slot: int, may_return: bool
) -> int:  # fmt: skip
    """Take a request out of the batch, and make known the blocks that it has filled and a request may look for.

    Returns its seat, which `release` takes.
    """
    settle(s, r, c, request, owed, slot, request.context_tokens, request.generated - 1, may_return)
    seat = request.seat
    while c.seats[seat, KNOWN] * r.block_tokens > request.context_tokens:  # blocks of an iteration that was given up
        c.seats[seat, KNOWN] -= 1
        block = c.table[seat, c.seats[seat, KNOWN]]
        _forget(c, block)
        if c.blocks[block, HOLDERS] == 1:
            _give_back(s, c, block)
        else:  # its other holders release it
            c.blocks[block, HOLDERS] -= 1
            c.seats[seat, HELD] -= 1
    if r.owes:  # layers that it owed when a block was filled may have been caught up with
        for n in range(request.prompt_tokens // r.block_tokens, c.seats[seat, KNOWN]):
            later = request.context_tokens - (n + 1) * r.block_tokens
            paid = min(depth(r, request.generated - 1), _paid_layers(r, c, owed, slot, later))
            block = c.table[seat, n]
            c.blocks[block, LAYERS] = max(c.blocks[block, LAYERS], paid)
    request.seat = NEVER
    return seat


def release(s: Record, c: Prefix, seat: int) -> None:
    """Remove a holder from the blocks of a seat. Blocks without a holder become free, the last ones first."""
    blocks, table, known = c.blocks, c.table, c.seats[seat, KNOWN]
    if s.queue_end - s.queue_first + known + 1 > len(c.queue):
        _close_up(s, c)
    freed = c.seats[seat, HELD] - known
    _append_unknown(s, c, freed)
    for i in range(known - 1, -1, -1):
        block = table[seat, i]
        blocks[block, HOLDERS] -= 1
        if blocks[block, HOLDERS] > 0:
            continue
        if blocks[block, HASH] == NEVER:
            _give_back(s, c, block)
            _append_unknown(s, c, 1)
        else:
            _append(s, c, block)
        freed += 1
    s.queued_blocks += freed
    s.used_blocks -= freed
    c.seats[s.free_seats, FREE] = seat
    s.free_seats += 1


def _append(s: Record, c: Prefix, block: int) -> None:
    """Append a known block to the queue."""
    c.queue[s.queue_end & (len(c.queue) - 1)] = block
    c.blocks[block, PLACE] = s.queue_end
    s.queue_end += 1


def _append_unknown(s: Record, c: Prefix, blocks: int) -> None:
    """Append blocks that are not known to the queue."""
    last = (s.queue_end - 1) & (len(c.queue) - 1)
    if s.queue_end > s.queue_first and c.queue[last] < 0:
        c.queue[last] -= blocks
    elif blocks > 0:
        c.queue[s.queue_end & (len(c.queue) - 1)] = -blocks
        s.queue_end += 1


def _close_up(s: Record, c: Prefix) -> None:
    """Remove the entries that blocks taken from the middle have left behind.

    The queue has room for all numbers twice, since there may be blocks without numbers between any two of them.
    """
    queue, mask, end = c.queue, len(c.queue) - 1, s.queue_end
    s.queue_end = s.queue_first
    for place in range(s.queue_first, end):
        block = queue[place & mask]
        if block < 0:
            _append_unknown(s, c, -block)
        elif c.blocks[block, PLACE] == place:
            _append(s, c, block)


def make_known(c: Prefix, block: int, value: int) -> None:
    """Make a block known: append it to the ring of its bucket."""
    rings = c.rings
    c.blocks[block, HASH] = value
    bucket = value & (len(c.buckets) - 1)
    first = c.buckets[bucket]
    if first == 0:
        c.buckets[bucket] = rings[block, BEFORE] = rings[block, AFTER] = block
        return
    last = rings[first, BEFORE]
    rings[block, BEFORE], rings[block, AFTER] = last, first
    rings[last, AFTER] = rings[first, BEFORE] = block


def _forget(c: Prefix, block: int) -> None:
    """Make a block unknown, so that it is no longer found."""
    rings, value = c.rings, c.blocks[block, HASH]
    if value == NEVER:
        return
    c.blocks[block, HASH] = NEVER
    after, bucket = rings[block, AFTER], value & (len(c.buckets) - 1)
    if after == block:
        c.buckets[bucket] = 0
        return
    before = rings[block, BEFORE]
    rings[before, AFTER], rings[after, BEFORE] = after, before
    if c.buckets[bucket] == block:
        c.buckets[bucket] = after
