"""What a replica's card draws, as the loop counts it: whole numbers, so that the same run gives the same bits.

Above its idle power a simulated card draws half of what is left up to the board's limit while an iteration runs, and
the other half for as long as the same work would take at the card's ceilings: the middle of the band that a report
shows. `drawn_ns` is that time in all, each half counted, and `rules.drawn_mw` the power of one half. Where the power
of kernels was measured, both halves are drawn while an iteration runs (`rules.draws_evenly`). Of a device with a
counter `drawn_ns` is what the counter rose by, in units of `rules.drawn_mw`.
"""

from __future__ import annotations

from helios_sim.core.layout import Record, Table

MARK_EVERY_NS = 50_000_000  # at least, between two marks
MARKS = 1024  # that are kept
LONGEST_WINDOW_NS = MARKS * MARK_EVERY_NS - MARK_EVERY_NS  # that they cover at least


def note_drawn(s: Record, marks: Table, start_ns: int, end_ns: int, drawn_ns: int) -> None:
    """From `start_ns` to `end_ns` so much was drawn; before it, since the last mark, nothing is missing."""
    latest_ns = marks[(s.marks - 1) % MARKS].time_ns if s.marks else 0
    if start_ns - latest_ns >= MARK_EVERY_NS:
        _mark(s, marks, start_ns)
        latest_ns = start_ns
    s.drawn_ns += drawn_ns
    if end_ns - latest_ns >= MARK_EVERY_NS:
        _mark(s, marks, end_ns)


def _mark(s: Record, marks: Table, time_ns: int) -> None:
    mark = marks[s.marks % MARKS]
    mark.time_ns = time_ns
    mark.drawn_ns = s.drawn_ns
    s.marks += 1


def drawn_since(s: Record, marks: Table, since_ns: int) -> int:
    """What was drawn from then until now. Between two marks it is spread evenly."""
    low, high = max(0, s.marks - MARKS), s.marks  # the first mark after that time lies between
    while low < high:
        middle = (low + high) // 2
        if marks[middle % MARKS].time_ns <= since_ns:
            low = middle + 1
        else:
            high = middle
    before_ns = before_drawn_ns = 0
    if low > 0:
        mark = marks[(low - 1) % MARKS]
        before_ns, before_drawn_ns = mark.time_ns, mark.drawn_ns
    after_ns, after_drawn_ns = s.now_ns, s.drawn_ns
    if low < s.marks:
        mark = marks[low % MARKS]
        after_ns, after_drawn_ns = mark.time_ns, mark.drawn_ns
    if after_ns <= before_ns:
        return s.drawn_ns - before_drawn_ns
    share = (since_ns - before_ns) / (after_ns - before_ns)
    return s.drawn_ns - before_drawn_ns - int(share * (after_drawn_ns - before_drawn_ns))


def is_above(s: Record, r: Record, marks: Table, limit_mw: int, window_ns: int) -> bool:
    """Whether the mean power of the latest window is above the limit; false before one such window is over."""
    if s.now_ns < window_ns:
        return False
    return drawn_since(s, marks, s.now_ns - window_ns) * r.drawn_mw > (limit_mw - r.idle_mw) * window_ns
