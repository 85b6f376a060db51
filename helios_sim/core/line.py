"""The waiting line of a replica, and its order.

Requests are ordered by a key (`order_key`), then by order of arrival. A preempted request keeps its order of arrival,
so with `fcfs` it stands before all requests that have not started. Preemption takes the running request that comes
last in the same order. The line is a binary heap.
"""

from __future__ import annotations

from helios_sim.core.layout import (
    FCFS,
    NEVER,
    PRIORITY,
    SHORTEST_PROMPT,
    Line,
    Lists,
    Record,
    Table,
)

ORDERS = {"fcfs": FCFS, "priority": PRIORITY, "shortest_prompt": SHORTEST_PROMPT}  # by the name in settings


def order_key(r: Record, priority: int, prompt_tokens: int) -> int:
    """The key by which the line is ordered before order of arrival, lowest first; 0 for all requests under `fcfs`."""
    if r.order == PRIORITY:
        return priority
    if r.order == SHORTEST_PROMPT:
        return prompt_tokens
    return 0


def push(s: Record, line: Line, key: int, seq: int, ref: int) -> None:
    """Add a request. `ref` is the number of an arrival, or -1 - slot of a request that was preempted."""
    keys, seqs, refs = line.key, line.seq, line.ref
    at = s.waiting
    s.waiting += 1
    if ref < 0:
        s.waiting_slots += 1
    while at > 0:
        above = (at - 1) // 2
        if keys[above] < key or (keys[above] == key and seqs[above] <= seq):
            break
        keys[at], seqs[at], refs[at] = keys[above], seqs[above], refs[above]
        at = above
    keys[at], seqs[at], refs[at] = key, seq, ref


def pop(s: Record, line: Line) -> None:
    """Remove the first request."""
    keys, seqs, refs = line.key, line.seq, line.ref
    if refs[0] < 0:
        s.waiting_slots -= 1
    s.waiting -= 1
    n = s.waiting
    key, seq, ref = keys[n], seqs[n], refs[n]
    at = 0
    while True:
        below = 2 * at + 1
        if below >= n:
            break
        other = below + 1
        if other < n and (keys[other] < keys[below] or (keys[other] == keys[below] and seqs[other] < seqs[below])):
            below = other
        if key < keys[below] or (key == keys[below] and seq <= seqs[below]):
            break
        keys[at], seqs[at], refs[at] = keys[below], seqs[below], refs[below]
        at = below
    keys[at], seqs[at], refs[at] = key, seq, ref


def last_in_order(s: Record, requests: Table, lists: Lists) -> int:
    """The place in the batch of the running request that comes last in order."""
    batch = lists.batch
    last = s.running - 1
    worst = requests[batch[last]]
    key, seq = worst.order_key, worst.seq
    for i in range(s.running - 1):
        request = requests[batch[i]]
        if request.order_key > key or (request.order_key == key and request.seq > seq):
            last, key, seq = i, request.order_key, request.seq
    return last


def last_lingering(s: Record, lists: Lists, key: int, seq: int) -> int:
    """The place of the lingering request that comes last in order, or NEVER if none comes after (key, seq)."""
    found = NEVER
    for i in range(s.lingering):
        if lists.lingering_key[i] > key or (lists.lingering_key[i] == key and lists.lingering_seq[i] > seq):
            found, key, seq = i, lists.lingering_key[i], lists.lingering_seq[i]
    return found
