"""How much an error of the profile moves waiting times near saturation. Knows records, not the profile.

While a server is busy without a pause, everything that it finishes is later by the profile's error times the busy time
so far. A request that waited in the queue starts as late as those before it let it, so its time to first token grows by
that error times the time since the server was last idle, which may be many times its own waiting time. One that was
served at once grows by its own time only.
"""

from __future__ import annotations

import numpy as np

from helios_sim.report.records import Records

WORTH_A_WARNING = 2.0  # from this on an error of 1 % in the profile moves mean TTFT by 2 % or more


def ttft_sensitivity(records: Records) -> float | None:
    """Relative change of mean TTFT for a relative change of all iteration times, 1 where nothing waits.

    None where no request was completed. Each replica is busy while any of its requests is in the system.
    """
    done = records.completed
    if not done.any():
        return None
    own_ns, moved_ns = 0, 0
    for replica in np.unique(records.replica[done]):
        rows = done & (records.replica == replica)
        arrival, first = records.arrival_ns[rows], records.first_token_ns.values[rows]
        scheduled, last = records.scheduled_ns.values[rows], records.last_token_ns.values[rows]
        order = np.argsort(arrival, kind="stable")
        arrival, first, scheduled, last = arrival[order], first[order], scheduled[order], last[order]
        busy_until = np.maximum.accumulate(last)
        begins = np.concatenate([[True], arrival[1:] > busy_until[:-1]])
        since = arrival[begins][np.cumsum(begins) - 1]  # when the server was last idle
        waited = scheduled - arrival > first - scheduled  # longer than its own prefill took
        own_ns += int((first - arrival).sum())
        moved_ns += int(np.where(waited, first - since, first - arrival).sum())
    return moved_ns / own_ns if own_ns else None
