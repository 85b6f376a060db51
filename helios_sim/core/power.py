"""Energy that a replica's card draws, counted in whole numbers so that the same run gives the same bits.

The power between idle and the board's limit is split into two halves of `rules.drawn_mw` each. A simulated card draws
one half while an iteration runs, and the other for as long as the iteration's work would take at the card's ceilings;
that is the middle of the energy band that a report shows. `drawn_ns` sums the time of both halves. If the power of
kernels was measured, both halves are drawn while an iteration runs (`rules.draws_evenly`). For a device with an energy
counter, `drawn_ns` is the counter's increase in units of `rules.drawn_mw`.
"""

from __future__ import annotations

from helios_sim.core.layout import Record, Table

MARK_EVERY_NS = 50_000_000  # shortest time between two marks
MARKS = 1024  # marks that are kept
LONGEST_WINDOW_NS = MARKS * MARK_EVERY_NS - MARK_EVERY_NS  # shortest time that the kept marks cover


def note_drawn(s: Record, marks: Table, start_ns: int, end_ns: int, drawn_ns: int) -> None:
    """Add what was drawn between `start_ns` and `end_ns`, and set marks. Everything drawn before is counted already."""
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
    """What was drawn since `since_ns`, in ns of `rules.drawn_mw`; interpolated linearly between two marks."""
    low, high = max(0, s.marks - MARKS), s.marks  # the first mark after `since_ns` lies between
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
    """Whether the mean power over the latest window is above the limit; False until one window has passed."""
    if s.now_ns < window_ns:
        return False
    return drawn_since(s, marks, s.now_ns - window_ns) * r.drawn_mw > (limit_mw - r.idle_mw) * window_ns
