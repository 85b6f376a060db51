"""Routing over several replicas: advances all replicas to each arrival, and sends the request to one of them.

A router counts the requests in each replica when one arrives, or looks for its prompt in their caches. So all replicas
run up to the arrival, the request joins the line of one of them, and they run on to the next arrival. A replica that
needs more than the loop (its policy is to be asked, its results are to be handed over) stops, and the caller goes on
with it on SimPy's clock.
"""

from __future__ import annotations

from typing import Any

from helios_sim.core.advance import advance, wakes
from helios_sim.core.arrive import arrive, take_arrivals
from helios_sim.core.layout import FOREVER_NS, HORIZON, IDLE, NEVER, RUNNING, WAITING, Kind, Numbers, Record, Table
from helios_sim.core.prefix import Prefix, depth, find, own_text

ROUND_ROBIN, LEAST_LOADED, POWER_OF_TWO, BY_TASK, PREFIX_AWARE = range(5)
# Why `route` returns.
(
    DONE,  # every request is routed, and all replicas have run up to `until_ns`
    STOPPED,  # some replicas have stopped; `stops` says why
    CLOCK,  # another event is on the clock before the next arrival
    SUBMIT,  # the next request goes to a replica that does not run ahead
    ROOM,  # the next request goes to a replica with full tables
    LOOK,  # it is `look_ns`: the autoscaler is to look at the load now
) = range(6)
AWAY = 1 << 40  # added to the request count of a replica that gets no requests

FRONT = Kind.of(
    "FrontRow",
    (
        "router",
        "next", "known",  # index of the next request, and number of requests
        "routed_before",  # requests of earlier blocks
        "clock_ns",  # SimPy's time
        "event_ns",  # time of its next event
        "until_ns",  # time up to which replicas run after the last request; NEVER: they do not
        "look_ns",  # time at which the autoscaler looks next; FOREVER_NS if there is none
        "first", "end",  # range of replicas that may run
        "chosen",
    ),
)  # fmt: skip


def route(
    replicas: Any,
    fronts: Table,
    arrivals_ns: Numbers,
    tasks: Numbers,
    pairs: Numbers,
    homes: Numbers,
    ahead: Numbers,
    due_ns: Numbers,
    inside: Numbers,
    stops: Numbers,
) -> int:
    """Route requests (n,) one after the other. Runs all replicas up to each arrival, and at last to `until_ns`.

    A request for a replica that gets none goes to the next replica that does.

    For each of R replicas `ahead` says whether it runs ahead of the clock, `due_ns` until when nothing happens in it,
    `inside` how many requests it has, and `stops` why it has stopped. `pairs` (n, 2) and `homes` (tasks, R) are data of
    routers: two replicas drawn for each request, and the replicas meant for each task.
    """
    f = fronts[0]
    while True:
        last = f.next == f.known
        if last and f.until_ns == NEVER:
            return DONE
        looks = not last and f.look_ns <= arrivals_ns[f.next]
        up_to_ns = f.until_ns if last else f.look_ns if looks else arrivals_ns[f.next]
        stopped = False
        for i in range(f.first, f.end):
            if ahead[i] and due_ns[i] < up_to_ns:
                t = replicas[i]
                stop = advance(t, up_to_ns)
                s = t.states[0]
                inside[i], stops[i] = s.in_system + s.away, stop
                if stop == HORIZON or (stop == IDLE and s.routed):
                    due_ns[i] = s.end_ns if s.phase == RUNNING else up_to_ns - 1
                else:
                    ahead[i], stopped = 0, True
        if stopped:
            return STOPPED
        if last:
            return DONE
        if up_to_ns > f.clock_ns and f.event_ns <= up_to_ns:
            return CLOCK
        if looks:
            return LOOK
        if f.router == PREFIX_AWARE:
            i = by_prefix(replicas, f.next, inside)
        else:
            i = choose(f.router, f.routed_before + f.next, tasks[f.next], pairs, f.next, homes, inside)
        while inside[i] >= AWAY:
            i = (i + 1) % len(inside)
        f.chosen = i
        if not ahead[i]:
            return SUBMIT
        t = replicas[i]
        s = t.states[0]
        row = s.known - s.first_row
        if row == len(t.arrivals) or s.waiting + len(t.requests) >= len(t.line.key) or s.free == 0:
            return ROOM
        t.arrivals[row] = t.coming[f.next]
        t.tokens[row] = t.coming_tokens[f.next]
        s.known += 1
        _join(s, t, up_to_ns)
        inside[i] = s.in_system + s.away
        if s.phase == WAITING and s.wake_ns != NEVER:
            due_ns[i] = s.wake_ns
        f.next += 1


def choose(router: int, number: int, task: int, pairs: Numbers, row: int, homes: Numbers, inside: Numbers) -> int:
    """The replica for a request, the `number`-th of the run.

    Least loaded: the replica with the fewest requests. Power of two: of two drawn at random (`pairs[row]`) the one with
    fewer. By task: the one with the fewest of those meant for the task. Of equal ones the first.
    """
    n = len(inside)
    if n == 1:
        return 0
    if router == ROUND_ROBIN:
        return number % n
    if router == POWER_OF_TWO:
        one, other = pairs[row, 0], pairs[row, 1]
        return other if inside[other] < inside[one] else one
    found, least = NEVER, FOREVER_NS
    if router == BY_TASK:
        for place in range(homes.shape[1]):
            i = homes[task, place]
            if i != NEVER and inside[i] < least:
                found, least = i, inside[i]
        return found
    for i in range(n):
        if inside[i] < least:
            found, least = i, inside[i]
    return found


def by_prefix(replicas: Any, row: int, inside: Numbers) -> int:
    """The replica with the highest score for the request in row `row` of `coming`; of equal ones the first."""
    n, total = len(inside), 0
    for i in range(n):
        total += inside[i]
    found, best = NEVER, 0.0
    for i in range(n):
        t = replicas[i]
        arrival, prompt_tokens = t.coming[row], t.coming_tokens[row].prompt_tokens
        share = cached_share(t.rules[0], t.prefix, arrival.shared, arrival.stream, arrival.request_id, prompt_tokens)
        value = score(share, inside[i], total, n)
        if found == NEVER or value > best:
            found, best = i, value
    return found


def score(share: float, inside: int, total: int, n: int) -> float:
    """How well a replica suits a request: `share` of its prompt is cached there, and `inside` requests are in it.

    The rule of the vLLM production stack's load-aware router with its default weight of 1: the cached share, minus the
    replica's excess over the mean number of requests, in units of that mean (at least 1). All n replicas have `total`
    requests. A replica with twice the mean loses as much as a wholly cached prompt gains.
    """
    return share - (n * inside - total) / max(n, total)


def cached_share(r: Record, c: Prefix, shared: int, stream: int, request_id: int, prompt_tokens: int) -> float:
    """The share of a new prompt's tokens with K and V in the cache, as deep as its tokens would run."""
    if not r.shares:
        return 0.0
    blocks = find(r, c, shared, own_text(stream, request_id), prompt_tokens, depth(r, 0), False)
    return blocks * r.block_tokens / prompt_tokens


def _join(s: Record, t: Any, now_ns: int) -> None:
    """Let the request that has just become known arrive. It may wake an idle server."""
    if s.phase != WAITING:
        take_arrivals(s, t.rules[0], t.requests, t.lists, t.line, t.arrivals, t.tokens, now_ns)
        return
    awake = wakes(s, t.rules[0], t.watch)
    rejected = arrive(s, t.rules[0], t.requests, t.lists, t.line, t.arrivals, t.tokens, now_ns)
    if awake and not rejected and s.wake_ns == NEVER:
        s.wake_ns = now_ns
