"""How a replica's state lies in arrays while iterations are computed ahead. Knows no step and no object of the loop.

Requests in the batch, and those that lost their place in it, have a row of `slots` each. Requests that arrived and
were never started are no rows there: they wait as a range of the `arrivals`. Numbers are fields of records and arrays
come in small groups, because a compiled function gets a group's arrays one by one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from helios_sim.profile.composition import IntArray

# Columns of a slot. The first are those of the batch's table (serving.batch.Column), in its order.
(
    CONTEXT, PREFILL_LEFT, REMAINING, GENERATED, FIRST, START, LENGTH, LAYERS_RUN, EARLY, BREACH, AGREED, EVALUATED,
    MICROBITS, LAST_TOKEN_NS, PROMPT_TOKENS, OUTPUT_TOKENS, SCHEDULED_NS, FIRST_TOKEN_NS, PREEMPTIONS, STARTED,
    EARLIER_CHARS, EARLIER_TOKENS, REQUEST_ID, ARRIVAL_NS, PROMPT_CHARS, OUTPUT_CHARS, TASK, TEXT_START, MEMBER,
    LEFT_NS, WHY, SLOT_COLUMNS,
) = range(32)  # fmt: skip
BATCH_COLUMNS = LAST_TOKEN_NS + 1
NEVER = -1  # a time that has not come; no limit

# Lists of slots: the batch in its order; the head of the queue, first one last; those that nobody has; the chunks'.
# Then of each decode: the exit at which it leaves, its row of the trace, whether it is a breach, and observed.
BATCH, FRONT, FREE, CHUNK_SLOT, LEAF, ROW, UNSURE, OBSERVED, LISTS = range(9)

# Columns of the arrivals: those of a RequestBlock in its order, then whether it left as it came and the number of the
# model that was active then.
ID, ARRIVES_NS, PROMPT, OUTPUT, OF_TASK, TEXT, LEFT_AT_ONCE, MODEL_THEN, ARRIVAL_COLUMNS = range(9)
# What the active model makes of an arrival.
TOKENS_PROMPT, TOKENS_OUTPUT, TOKENS_FIRST, TOKENS_START, TOKENS_LENGTH, TOKENS_COLUMNS = range(6)

# Why a request left (slot column WHY).
COMPLETED, CONTEXT_EXCEEDED, POOL_EXCEEDED = range(3)

# Why the computation stopped, and where it stands.
MORE_ARRIVALS, FLUSH, FIRED, IDLE = range(4)
TURN, RUNNING = range(2)
ENOUGH_DONE = 4096  # requests that left: it is time to hand their records over, so that they do not pile up here

# Columns of a trigger, and the kinds that are known here: those of a deployment, then what a change waits for, that
# nothing is in flight any more or that it needs few enough blocks.
KIND, ARGUMENT, SPENT, TRIGGER_COLUMNS = range(4)
BREACHES, COMPLETIONS, DRAINED, AT_TIME, QUEUE_ABOVE, ANSWERED, ROOM = range(7)
# Columns of a breach window; its flags lie in a ring.
SIZE, LIMIT, FILLED, NEXT, SUM, WINDOW_COLUMNS = range(6)

# Columns of an observation that is due, and of a sample of the timeline.
SEEN_ID, SEEN_FIRST, SEEN_START, SEEN_LENGTH, SEEN_TOTAL, SEEN_TOKENS, SEEN_NS, SEEN_COLUMNS = range(8)
AT_NS, RUNNING_THEN, QUEUED_THEN, BLOCKS_THEN, SAMPLE_COLUMNS = range(5)

# What is summed up and then handed over.
SUMS = (
    "busy_ns", "floor_ns", "iterations", "outside_grid_iterations", "decode_iterations", "decode_ns",
    "decode_batch_ns", "kv_block_ns", "kv_pool_block_ns", "preemptions",
)  # fmt: skip

STATE = np.dtype(
    [
        (name, np.int64)
        for name in (
            "now_ns", "started_ns", "end_ns", "phase", "idle", "asked", "acted_ns",
            "running", "decoding", "front", "free",  # lengths of the lists of slots
            "head", "arrived", "known", "exhausted", "fresh", "to_release",  # of the arrivals
            "used_blocks", "total_blocks", "starts_left", "completed", "completed_before",
            "loading", "pending", "draining",  # of a change that is on its way
            "chunks", "finishing", "sampled", "banded", "due_blocks", "floor", "outside",  # of the iteration
            "in_system", "changed_ns", "presence_ns", "arrivals",
            "done", "seen", "samples", "sampled_ns", "sample_interval_ns", "sample_room",  # of what is handed over
            "peak_blocks", "gaps", "gaps_ns", "shortest_gap_ns", "longest_gap_ns", *SUMS,
        )
    ]
)  # fmt: skip
State = Any  # a record of STATE; numba has no name for its type

# What holds as long as a deployment is in force; exits by their place among the trace's.
RULES = np.dtype(
    [
        (name, np.int64)
        for name in (
            "block_tokens", "batch_tokens", "running_limit", "context_limit",
            "observe_tokens",  # NEVER: none
            "closed_loop", "per_token",
            "head_checks",  # a token that leaves is sampled by the check's own pass through the head
            "watches_cap", "lazy", "propagates", "repays", "owes",
            "reads_trace",  # 0: every token is the same
            "rule_exit",  # the deepest of the rule
            "loaded_exit", "n_layers",  # of the whole model
        )
    ]
)  # fmt: skip
Rules = Any  # a record of RULES


class Trace(NamedTuple):
    """E exits, T tokens under the rule."""

    exits: IntArray  # (E,) depths
    exit_index: NDArray[np.int8]  # (T,)
    breach: NDArray[np.bool_]  # (T,)
    agree: NDArray[np.bool_]  # (T, E)
    microbits: IntArray  # (T, E), or (0, 0)


class Batch(NamedTuple):
    slots: IntArray  # (slots, SLOT_COLUMNS)
    lists: IntArray  # (LISTS, slots)
    owed: IntArray  # (slots, bands) the batch's kv_debt
    work: IntArray  # (WORK_ROWS, E) of the iteration in progress
    chunks: IntArray  # (CHUNK_ROWS, slots) of the iteration in progress


class Queue(NamedTuple):
    arrivals: IntArray  # (known, ARRIVAL_COLUMNS)
    tokens: IntArray  # (known, TOKENS_COLUMNS)
    done: IntArray  # (n, SLOT_COLUMNS) of requests that left


class Watch(NamedTuple):
    triggers: IntArray  # (n, TRIGGER_COLUMNS)
    windows: IntArray  # (n, WINDOW_COLUMNS)
    flags: NDArray[np.bool_]  # (n, tokens)


class Counts(NamedTuple):
    seen: IntArray  # (n, SEEN_COLUMNS) observations
    samples: IntArray  # (n, SAMPLE_COLUMNS) of the timeline
    depths: IntArray  # (layers + 1,) tokens by the layers that they ran
    gaps: IntArray  # of the histogram
    gap_edges_ns: IntArray
