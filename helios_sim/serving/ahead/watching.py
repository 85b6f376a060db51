"""What ends a stretch, as objects and as arrays: triggers, breach windows, and what a change waits for."""

from __future__ import annotations

import numpy as np

from helios_sim.policy.trigger import AtTime, BreachLimit, Completed, Drained, QueueAbove, Trigger
from helios_sim.serving.ahead import layout as at
from helios_sim.serving.ahead.contract import Meanwhile
from helios_sim.serving.ahead.layout import Watch
from helios_sim.serving.ahead.rows import empty
from helios_sim.serving.decider import Decider


def watch_of(
    decider: Decider, triggers: tuple[Trigger, ...], meanwhile: Meanwhile, transfer_end_ns: int | None
) -> Watch:
    """Of a deployment's triggers. Windows slide on while a change is pending, though no policy is asked then."""
    asking = () if meanwhile.pending else triggers
    rows = [(*_numbers(trigger), int(trigger in decider.spent)) for trigger in asking]
    if meanwhile.loading:
        assert transfer_end_ns is not None
        rows.append((at.AT_TIME, transfer_end_ns, 0))
    elif meanwhile.room_blocks is not None:
        rows.append((at.ROOM, meanwhile.room_blocks, 0))
    elif meanwhile.pending:
        rows.append((at.ANSWERED, 0, 0))
    limits = [trigger for trigger in triggers if isinstance(trigger, BreachLimit)]
    flags = np.zeros((len(limits), max((limit.window_tokens for limit in limits), default=0)), np.bool_)
    windows = empty(len(limits), at.WINDOW_COLUMNS)
    for k, limit in enumerate(limits):
        seen = decider.windows[limit].flags
        flags[k, : len(seen)] = seen
        following = len(seen) % limit.window_tokens
        windows[k] = limit.window_tokens, limit.limit, len(seen), following, int(seen.sum())
    return Watch(np.array(rows, np.int64).reshape(-1, at.TRIGGER_COLUMNS), windows, flags)


def give_back(decider: Decider, triggers: tuple[Trigger, ...], meanwhile: Meanwhile, watch: Watch) -> None:
    """What became of them goes back to the decider."""
    if not meanwhile.pending:
        for trigger, row in zip(triggers, watch.triggers.tolist(), strict=False):  # a load's end has a row of its own
            if not row[at.SPENT]:
                decider.spent.discard(trigger)
    limits = (trigger for trigger in triggers if isinstance(trigger, BreachLimit))
    for k, limit in enumerate(limits):
        flags, filled = watch.flags[k, : limit.window_tokens], int(watch.windows[k, at.FILLED])
        full = filled == limit.window_tokens
        latest = np.roll(flags, -int(watch.windows[k, at.NEXT])) if full else flags[:filled]
        decider.windows[limit].flags = latest.astype(np.int64)


def _numbers(trigger: Trigger) -> tuple[int, int]:
    """A trigger as kind and argument; a probe's never fires without a probe, so it counts as one that is never due."""
    match trigger:
        case BreachLimit():
            return at.BREACHES, 0
        case Completed(requests):
            return at.COMPLETIONS, requests
        case Drained():
            return at.DRAINED, 0
        case AtTime(time_ns):
            return at.AT_TIME, time_ns
        case QueueAbove(requests):
            return at.QUEUE_ABOVE, requests
    return at.NEVER, 0
