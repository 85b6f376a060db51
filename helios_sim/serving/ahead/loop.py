"""Iteration after iteration until only Python can go on, compiled: what `serving.server` and `decider` define."""

from __future__ import annotations

from helios_sim.compiled import compiled
from helios_sim.profile.compiled_prices import floor_s, outside_grid, time_s, whole_ns
from helios_sim.profile.composition import IntArray
from helios_sim.profile.price_tables import PriceTables, Scalars
from helios_sim.serving.ahead.arrive import release, take_arrivals
from helios_sim.serving.ahead.commit import commit
from helios_sim.serving.ahead.depths import lay_out
from helios_sim.serving.ahead.layout import (
    ANSWERED,
    ARGUMENT,
    ARRIVES_NS,
    AT_TIME,
    BATCH,
    BREACHES,
    COMPLETIONS,
    DRAINED,
    ENOUGH_DONE,
    FILLED,
    FIRED,
    FLUSH,
    FRONT,
    GENERATED,
    IDLE,
    KIND,
    LIMIT,
    MORE_ARRIVALS,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    QUEUE_ABOVE,
    ROOM,
    RUNNING,
    SIZE,
    SPENT,
    STARTED,
    SUM,
    TURN,
    Batch,
    Counts,
    Queue,
    Rules,
    State,
    Trace,
    Watch,
)
from helios_sim.serving.ahead.plan import plan


@compiled
def advance(
    s: State,
    r: Rules,
    b: Batch,
    q: Queue,
    x: Trace,
    c: Counts,
    watch: Watch,
    prices: PriceTables,
    scalars: Scalars,
    uniform: IntArray,
    banded: IntArray,
) -> int:
    """Takes the server's turns and iterations as they come. Returns why it stopped; to call it again goes on.

    `uniform` and `banded` are the bands of iterations in which all tokens run the same layers, and of the others.
    """
    while True:
        if s.phase == RUNNING:
            if not take_arrivals(s, r, q, s.end_ns):
                return MORE_ARRIVALS
            commit(s, r, b, q, x, c, watch)
            s.now_ns, s.phase = s.end_ns, TURN
        if not _has_room(s, r, q, c):
            return FLUSH
        release(s, r, q, s.now_ns)
        arrived = s.arrived
        known = take_arrivals(s, r, q, s.now_ns)
        if s.arrived != arrived:  # the policy was asked before they came
            s.asked = 0
        if not known:
            return MORE_ARRIVALS
        if s.idle and not s.in_system:  # whoever came left at once, and nobody woke the server
            if not _next_arrival(s, r, q, watch):
                return IDLE
            continue
        s.idle = 0
        s.acted_ns = s.now_ns
        if not s.asked and _fired(s, r, b.slots, b.lists, watch):
            return FIRED
        s.asked = 0
        if not plan(s, r, b, q):
            if s.draining and s.loading:  # nobody starts before the weights are there, which is all that is waited for
                s.now_ns = watch.triggers[0, ARGUMENT]
            elif not _next_arrival(s, r, q, watch):
                return IDLE
            continue
        lay_out(s, r, b, x)
        bands = banded if s.banded else uniform
        duration_s = time_s(prices, scalars, bands, b.work, b.chunks, s.chunks, s.sampled, r.per_token, s.loading)
        s.floor = whole_ns(floor_s(scalars, bands, b.work, b.chunks, s.chunks, s.sampled))
        s.outside = outside_grid(prices, bands, b.work, b.chunks, s.chunks, s.sampled)
        s.started_ns, s.end_ns, s.phase = s.now_ns, s.now_ns + whole_ns(duration_s), RUNNING


@compiled
def _has_room(s: State, r: Rules, q: Queue, c: Counts) -> bool:
    """Whether all that one more iteration may hand over finds a place, and little has to be handed over yet."""
    may_leave = s.running + s.front + s.fresh + s.known - s.arrived
    return (
        s.done < ENOUGH_DONE
        and s.done + may_leave <= len(q.done)
        and s.seen + s.running + r.running_limit <= len(c.seen)
        and s.samples < s.sample_room
    )


@compiled
def _next_arrival(s: State, r: Rules, q: Queue, watch: Watch) -> bool:
    """Nothing can run: the clock moves to the next arrival, if that is what an idle server waits for."""
    if r.closed_loop or s.in_system or s.arrived == s.known or s.starts_left == 0 or s.draining:
        return False
    next_ns = q.arrivals[s.arrived, ARRIVES_NS]
    for k in range(len(watch.triggers)):
        if watch.triggers[k, KIND] == AT_TIME and s.now_ns < watch.triggers[k, ARGUMENT] <= next_ns:
            return False
    s.now_ns, s.idle = next_ns, 1
    return True


@compiled
def _fired(s: State, r: Rules, slots: IntArray, lists: IntArray, watch: Watch) -> bool:
    """Whether a trigger asks the policy now, or what a change waits for has come to pass."""
    window = 0
    for k in range(len(watch.triggers)):
        kind, argument, spent = watch.triggers[k, KIND], watch.triggers[k, ARGUMENT], watch.triggers[k, SPENT]
        if kind == BREACHES:
            w = watch.windows[window]
            window += 1
            if w[FILLED] == w[SIZE] and w[SUM] > w[LIMIT]:
                return True
        elif kind == COMPLETIONS:
            if s.completed - s.completed_before >= argument:
                return True
        elif kind == QUEUE_ABOVE:
            above = s.front + s.fresh > argument
            if above and not spent:
                return True
            if not above:
                watch.triggers[k, SPENT] = 0
        elif kind == ANSWERED:
            if s.running == 0 and not (s.front and slots[lists[FRONT, s.front - 1], GENERATED]):
                return True
        elif kind == ROOM:
            if _blocks_to_finish(s, r, slots, lists) <= argument:
                return True
        elif spent:
            continue
        elif kind == AT_TIME:
            if s.now_ns >= argument:
                return True
        elif kind == DRAINED and s.starts_left == 0 and s.running == 0 and not _begun_waits(s, slots, lists):
            return True
    return False


@compiled
def _begun_waits(s: State, slots: IntArray, lists: IntArray) -> bool:
    for i in range(s.front):  # noqa: SIM110, numba knows no `any`
        if slots[lists[FRONT, i], STARTED]:
            return True
    return False


@compiled
def _blocks_to_finish(s: State, r: Rules, slots: IntArray, lists: IntArray) -> int:
    """Blocks that all answers in flight hold when each is complete: `Replica.blocks_to_finish`."""
    blocks = 0
    for i in range(s.running):
        blocks += _blocks_of(r, slots, lists[BATCH, i])
    for i in range(s.front - 1, -1, -1):
        if not slots[lists[FRONT, i], GENERATED]:
            break
        blocks += _blocks_of(r, slots, lists[FRONT, i])
    return blocks


@compiled
def _blocks_of(r: Rules, slots: IntArray, slot: int) -> int:
    return -(-(slots[slot, PROMPT_TOKENS] + slots[slot, OUTPUT_TOKENS] - 1) // r.block_tokens)
