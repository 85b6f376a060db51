"""What the serving loop works on: named records, and arrays in small groups.

A record is one row with named fields, all of them whole numbers: `request.context_tokens`. The loop runs in two ways
over the same names. Interpreted, a record is a Python object and an array is a memoryview, whose items are plain
numbers; compiled, a table of records is a NumPy record array. `Storage` makes either kind.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, make_dataclass
from functools import cached_property, lru_cache
from operator import attrgetter, index
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
Record = Any  # one row of a table: numba has no name for its type
Table = Any  # rows of one kind
Numbers = Any  # an array of whole numbers, as NumPy array or as memoryview

_Group = TypeVar("_Group", bound=tuple[Any, ...])

NEVER = -1  # a time that has not come; no limit; nothing
FOREVER_NS = 2**62

# Phases of a replica: at a turn, in the middle of admission, while an iteration runs, while nothing can run.
TURN, ADMITTING, RUNNING, WAITING = range(4)
GO_ON = -1
# Why `advance` returns.
(
    HORIZON,  # the next turn is not before the time up to which nothing else can act on this replica
    ARRIVALS,  # the next arrivals are not known yet
    FLUSH,  # results are to be handed over, so that they do not pile up
    ASK,  # a trigger has fired, or what a pending change waits for has come to pass
    IDLE,  # nothing can run, and no arrival or alarm that is known changes that
    RETOKENIZE,  # the next request to be admitted has begun on another model
    FOLLOW_PLAN,  # the oracle's plan wants another model for the next request
    EXECUTE,  # an iteration is scheduled, and a device is to run it
) = range(8)
# Why a request left.
COMPLETED, CONTEXT_EXCEEDED, POOL_EXCEEDED, PLACES_EXCEEDED = range(4)
# Order of the waiting line.
FCFS, PRIORITY, SHORTEST_PROMPT = range(3)
# Kinds of trigger.
BREACHES, COMPLETIONS, DRAINED, AT_TIME, QUEUE_ABOVE, PROBED, RUNNING_ABOVE, KV_ABOVE, POWER_ABOVE = range(9)
MILLIONTHS = 1_000_000  # in which the argument of KV_ABOVE is written
LEAF_BITS, BREACHES_THERE, AGREES_THERE = 2, 2, 1  # of `Trace.leaves`
EXIT_BITS, EXIT_MASK = 6, 63  # of one exit among those of a request's latest tokens

RECENT = 256  # completed requests and arrivals that policies are told of
FLUSH_REQUESTS = 4096  # requests that left: it is time to hand their records over


@dataclass(frozen=True)
class Kind:
    """A kind of record: its fields, as a NumPy type, as a Python class, and as a view of a NumPy record."""

    name: str
    dtype: np.dtype[Any]
    view: type[View]

    @cached_property
    def row(self) -> type[Any]:
        """Made when it is first used, since compiled code does without."""
        kinds = [(name, float if self.dtype[name] == np.float64 else int) for name in self.dtype.names or ()]
        return make_dataclass(self.name, [(name, kind, kind()) for name, kind in kinds], slots=True)

    @classmethod
    def of(cls, name: str, fields: Sequence[str], floats: Sequence[str] = ()) -> Kind:
        taken = [name for name in (*fields, *floats) if hasattr(np.record, name)]
        if taken:  # NumPy's records would answer with their own attribute
            raise ValueError(f"{name}: {taken} are attributes of NumPy's records")
        dtype = np.dtype((np.record, [*((f, np.int64) for f in fields), *((f, np.float64) for f in floats)]))
        numbers = [*((f, ctypes.c_int64) for f in fields), *((f, ctypes.c_double) for f in floats)]
        return cls(name, dtype, type(f"{name}View", (View,), {"_fields_": numbers}))


class View(ctypes.Structure):
    """One NumPy record for plain Python: its numbers by name, far faster than NumPy gives them."""

    raw: Table  # of one row: Numba takes an array more quickly than a record

    @classmethod
    def of(cls, raw: Table) -> View:
        view = cls.from_buffer(raw)
        object.__setattr__(view, "raw", raw)
        return view

    def __setattr__(self, name: str, value: int) -> None:
        """Also to one of NumPy's whole numbers, which a field would refuse."""
        _set_field(self, name, index(value))

    def take_last(self, n: int) -> list[int]:
        """The last n numbers, which are 0 from now on."""
        last = self.raw.view(np.int64)[-n:]
        found: list[int] = last.tolist()
        last[:] = 0
        return found


_set_field = ctypes.Structure.__setattr__


def raw(record: Record) -> Table:
    """The record as the loop's entry points take it: the only row of a table."""
    return record.raw if isinstance(record, View) else [record]


REQUEST = Kind.of(
    "RequestRow",
    (
        # what each of its tokens changes, side by side in memory
        "context_tokens",  # whose K and V are in the cache
        "remaining", "generated",  # output tokens
        "last_token_ns",
        # sums over its output tokens
        "layers_run", "early_tokens", "breach_tokens", "agreed_tokens", "evaluated_tokens", "microbits",
        # the token of the iteration in progress, unless all tokens of the iteration are alike
        "observed", "token_exit", "token_layers", "token_breach", "token_agrees", "token_microbits",
        "drafts",  # tokens that it may draft in this iteration, for which it has blocks
        "drafted", "accepted",  # those that it did, and those that became tokens beside it; microbits are of all
        "unread",  # its tokens beside the latest that the model which drafts has not read
        "held",  # the band before which its next token waits, its K and V in the cache up to there; 0: it does not.
        # Where another card drafts: 1, it waits for its verification
        "held_ns",  # since when
        "earlier_ns",  # its token is delivered so much before the iteration ends
        "recent",  # 1 + the exits of its latest tokens, the last in the lowest EXIT_BITS (`depths.look`)
        # where its output tokens lie in the exit trace
        "trace_first", "trace_start", "trace_length",
        # progress
        "prefill_left", "started", "preemptions",
        "seq",  # order of arrival at this replica
        "order_key",  # what the waiting line is sorted by, before `seq`
        "cached_tokens",  # whose K and V were in the cache when it last lost its place
        "freed_at",  # where the blocks that it lost lie among the freed ones
        "seat",  # its row of the blocks that it shares (`prefix`)
        "hit_tokens",  # of its prompt, found in the prefix cache when it first entered
        "earlier_chars", "earlier_tokens",  # answered by another model, before a migration
        "scheduled_ns", "first_token_ns", "left_ns", "why",
        # as a model reads it
        "model",  # number of the candidate whose tokens these are
        "prompt_tokens", "output_tokens",
        "planned_model", "planned_first",  # NEVER without a service plan
        # as it arrived
        "request_id", "arrival_ns", "prompt_chars", "output_chars", "task", "text_start", "priority",
        "shared", "stream",
    ),
)  # fmt: skip
ARRIVAL = Kind.of(
    "ArrivalRow",
    (
        "request_id", "arrival_ns", "prompt_chars", "output_chars", "task", "text_start", "priority",
        "shared",  # row of the segments that its prompt begins with; NEVER: none
        "stream",  # session of the text that follows, and of its answer; NEVER: none
        "planned_model", "planned_first",  # NEVER without a service plan
        "model",  # that was active when it arrived
    ),
)  # fmt: skip
TOKENS = Kind.of(  # what one model makes of an arrival
    "TokensRow",
    ("prompt_tokens", "output_tokens", "trace_first", "trace_start", "trace_length"),
)
CHUNK = Kind.of("ChunkRow", ("slot", "tokens", "context_tokens", "layers"))
WORK = Kind.of(  # of one band of layers in one iteration
    "WorkRow",
    (
        "decode_tokens", "kv_tokens", "checked_tokens", "classified_tokens", "propagated_tokens",
        "verified_tokens",  # further rows of the requests that decode: they read the same K and V in the same pass
        "done_ns",  # after the iteration has begun, an answer that leaves at the band's end is delivered
    ),
)
SPAN = Kind.of("SpanRow", ("start", "end"))  # layers of a band
ITERATION = Kind.of(
    "IterationRow",
    (
        "decodes",  # requests that decode; those of `state.decoding`, or none
        "chunks", "finishing",
        "sampled_tokens",  # rows that pass the LM head
        "kv_tokens",  # context of the decodes, summed, without the new tokens
        "kv_least", "kv_most",  # shortest and longest context of the decodes, the new token included; NEVER: not known
        "banded",  # tokens run to different layers
        "alike",  # every token runs `token_layers` and agrees with full depth: no record says so
        "token_layers",
        "syncs",  # the host must see a check's answer before it launches the next band
        "host_ahead",  # the host prepares the next iteration meanwhile
        "loading",  # weights stream into the card meanwhile
        "done",  # requests whose last token this is
        "drafts",  # tokens that a request drafts at most; 0: none drafts
        "drafted",  # the same of all requests together
        "drafting",  # priced as one step of drafting, which the host launches with the others of its pass
        "draft_ns",  # of the iteration's time that of its drafting
        "late_layers", "late_ns",  # that came from host memory meanwhile, and by how much that made it longer
        "members",  # requests that decode, where not all do: the others wait at an exit, or for their drafts
        "drafting_apart",  # those after them in the batch for which another card drafts meanwhile
        "verify_ns", "draft_floor_ns",  # what the verification takes, and the floor of the drafts, each on its own card
        "first_band",  # with which their tokens begin or go on
        "splits",  # not all of them leave: the rest waits for others
        "due_blocks", "floor_ns", "outside",
        "budget", "blocked", "lingering",  # of the admission in progress
    ),
)  # fmt: skip
TRIGGER = Kind.of("TriggerRow", ("kind", "argument", "spent", "window", "span_ns"))
WINDOW = Kind.of(  # a ring of tokens that may be breaches, or of completed requests that may have missed the SLOs
    "WindowRow", ("length", "limit", "filled", "next", "breaches", "of_requests")
)
MARK = Kind.of("MarkRow", ("time_ns", "drawn_ns"))  # what had been drawn by then (`power`)
LATEST = Kind.of(  # of a request that has completed, as policies are told
    "LatestRow",
    (
        "arrival_ns", "scheduled_ns", "first_token_ns", "last_token_ns", "output_tokens", "prompt_tokens", "hit_tokens",
    ),
)  # fmt: skip
SEEN = Kind.of("SeenRow", ("slot", "tokens", "time_ns"))  # an observation that is due
SAMPLE = Kind.of(  # of the timeline
    "SampleRow", ("time_ns", "model", "run_layers", "running", "waiting", "kv_bytes", "weight_bytes")
)
FREED = Kind.of("FreedRow", ("owner", "blocks"))  # owner: a request's number, NEVER: none
# Integrals and counts that are handed over and then start from 0 again.
SUMS = (
    "busy_ns", "floor_ns", "iterations", "outside_grid_iterations", "decode_iterations", "decode_ns",
    "decode_batch_ns", "kv_block_ns", "kv_pool_block_ns", "preemptions",
    "prefix_cache_queries", "prefix_cache_hits", "prefix_cache_refound",
    "verifications", "drafted_tokens", "tested_drafts", "accepted_drafts", "draft_ns",
    "verify_ns", "draft_floor_ns",
    "splits", "held_tokens", "held_token_ns", "released_tokens", "released_ns", "late_layers", "late_ns",
)  # fmt: skip
STATE = Kind.of(
    "StateRow",
    (
        "now_ns", "end_ns", "phase",
        "routed",  # requests come one by one: none before the time up to which the loop may run
        "wake_ns",  # an arrival wakes the idle server at this time; NEVER: none does
        "started_ns",  # of the latest iteration; NEVER: the server was idle since
        "acted_ns",  # the latest turn
        "waited",  # iterations for which prompts have been held back
        "warm_up_ns",  # the next iteration takes so much longer
        "asked",  # the policy has been asked in this turn
        "turn_wanted",  # something outside has acted: the server takes a turn of its own
        "idle",  # woken by an arrival: 1 + those that waited before it; 0: not so
        "eager",  # departures are handed over before anything else is scheduled: a closed loop outside reacts to them
        "model",  # number of the active one
        "run_layers",
        # the batch and the waiting line
        "running", "decoding", "waiting", "waiting_slots", "free", "left", "lingering",
        "fewer",  # with the number completed so far: most that may run at once, after an OOM; FOREVER_NS: no limit
        # arrivals
        "first_row", "arrived", "known", "exhausted", "to_release",
        # memory: KV blocks and weights
        "used_blocks", "total_blocks", "freed_first", "freed_end",
        "block_bytes", "weight_bytes",  # of weights resident or on the way, with the activation reserve
        "peak_bytes",  # most of both
        # those that are shared (`prefix`)
        "free_seats", "queued_blocks", "queue_first", "queue_end", "made_blocks", "spare_block",
        "widest_request",  # most blocks of a request that has asked for some
        "made_known",  # how often blocks became known that another request may look for
        "blocked_seq", "blocked_free", "blocked_known",  # who lacked blocks last, and what was there then
        # admission and what a change waits for
        "starts_left", "completed", "completed_before", "pending", "draining", "migrating", "loading",
        "room_blocks", "awaits_answers", "awaits_completion",
        # the books; `away`: what a router counts besides, where it is to send nothing here
        "in_system", "away", "changed_ns", "presence_ns", "sojourn_ns", "arrivals", "departures",
        # what is to be handed over
        "seen", "samples", "sample_interval_ns", "sample_room",
        "sampled_ns", "sampled_model", "sampled_layers",  # the latest
        "gaps", "gaps_ns", "shortest_gap_ns", "longest_gap_ns",
        "gap_bucket",  # of the latest
        "drawn_ns", "marks",  # what has been drawn in all, and how many marks were made of it (`power`)
        "placed_decode_ns", "placed_decode_batch_ns",  # since the placement last changed
        *SUMS,  # the last: `take_sums`
    ),
)  # fmt: skip
RULES = Kind.of(  # what holds as long as a deployment is in force; exits by their place among the trace's
    "RulesRow",
    (
        "block_tokens",
        "block_mask",  # block_tokens - 1 where that is a power of two, else NEVER: a division takes its time
        "batch_tokens", "running_limit", "context_limit",
        "place_tokens",  # most tokens of a request that the engine has room for; NEVER: no such limit
        "order", "closed_loop", "live",
        "vllm_v1",  # who is done ahead of a plan keeps its place in it
        "prefill_first",  # an iteration has prompts or decodes, and prompts come first
        "keeps_answers",  # a request enters only when there is memory for its whole answer
        "wait_iterations", "wait_tokens",  # how long prompts wait for more of them beside decodes; 0: they do not
        "whole_prompts",  # no chunks: a prompt waits until the token budget has room for all of it
        "shares",  # equal beginnings of texts are computed once (`prefix`)
        "rule_layers",  # to which K and V of tokens are computed and read
        "loaded_layers",  # the same of tokens that are observed
        "refinds",  # freed blocks keep what they hold until they are taken, for a preempted request
        "ahead",  # the next iteration is planned while one runs
        "observe_tokens",  # NEVER: none
        "per_token", "clairvoyant", "planned",
        "head_checks",  # a token that leaves is sampled by the check's own pass through the head
        "looks",  # each token is looked at alone, at exits of its own or through words that the first exit proposed
        "proposes",  # the latter
        "always_checks",  # a bit for each exit that looks at every token, where tokens are looked at alone
        "recent_mask",  # of `recent`; 0: no other exit does
        "watches_cap", "lazy", "propagates", "repays", "owes",
        "draft_tokens",  # that a request drafts in one iteration, to be verified in the same one; 0: none
        "draft_batch",  # where more requests decode, none drafts
        "draft_exit",  # where drafts leave
        "drafts_apart",  # another model drafts
        "draft_parts",  # on a card of its own, for one of so many parts of the batch at a time; 0: on the same card
        "exchange_ns",  # what passing tokens from card to card takes
        "draft_cards",  # that draft side by side: with several, each draft is passed too
        "regroups",  # a batch is split at an exit where enough of it wants to leave, and the rest waits for others
        "flush_requests",  # so many that wait at an exit run on; NEVER: as many as do not wait
        "flush_ns",  # and so long they wait at most
        "releases",  # an answer leaves at a ramp, and its token runs all layers all the same
        "tells_all",  # with each answer that is complete, the policy is told of all its tokens
        "reads_trace",  # 0: every token is the same
        "scores",  # the trace has microbits
        "spread",  # a price depends on the shortest and the longest context of a batch
        "rule_exit",  # the deepest of the rule
        "loaded_exit", "n_layers",  # of the whole model
        "idle_mw", "drawn_mw",  # of the card (`power`); 0 where they are not known
        "draws_evenly",  # as long as an iteration runs, whatever it does
        "ttft_ns", "tpot_ns", "e2e_ns",  # the SLOs; NEVER: no such bound
        "bands",
    ),
)  # fmt: skip


class Lists(NamedTuple):
    """Lists of slots; their lengths are in the state."""

    batch: Numbers  # running requests in order of admission: those that decode, then those that prefill
    free: Numbers
    left: Numbers  # requests that left and are not handed over yet
    leaving: Numbers  # of the commit in progress
    needy: Numbers  # that decode and have filled their last block, as the scheduler last saw them
    lingering_key: Numbers  # requests that are done but keep their place until the next iteration is planned
    lingering_seq: Numbers
    lingering_blocks: Numbers  # how many they hold; where blocks are shared, their seats


class Line(NamedTuple):
    """The waiting line: a binary heap by (order key, order of arrival)."""

    key: Numbers
    seq: Numbers
    ref: Numbers  # the number of an arrival that has not started, or -1 - slot of a request that lost its place


class Trace(NamedTuple):
    """E exits, T tokens as the exit rule replays them."""

    exits: Numbers  # (E,) depths
    leaves: Numbers  # (T,) of each token in one number, since each look at a trace takes its time:
    # its exit << LEAF_BITS, BREACHES_THERE if it is a breach, AGREES_THERE if its exit says what full depth says
    agree: Numbers  # (T, E)
    microbits: Numbers  # (T, E), or (0, 0)
    planned: Numbers  # exits of the tokens that a service plan names
    checks: Numbers  # (E,) 1 where tokens are checked: they may leave there, or their answers may
    split_above: Numbers  # (E,) in millionths: the share of a batch that has to want to leave at an exit to split it
    sure: Numbers  # (T,) a bit for each exit that is sure of the token; (0,) where tokens are not looked at alone
    in_vain: Numbers  # (T,) a bit for each exit that asks its head in vain
    near: Numbers  # (E,) a bit for each exit near enough to look, where one of the latest tokens left at that exit


class Watch(NamedTuple):
    triggers: Table
    windows: Table
    flags: Numbers  # (windows, length) rings


class Counts(NamedTuple):
    seen: Table
    samples: Table
    depths: Numbers  # (layers + 1,) tokens by the layers that they ran
    gaps: Numbers  # of the histogram of gaps between tokens
    gap_edges_ns: Numbers
    marks: Table  # a ring
    latest: Table  # of `RECENT` requests, a ring: the n-th that completed is in row n % RECENT


class Drafter(NamedTuple):
    """What the model runs that drafts for another one. Its tables are among the other's, its scalars the second row."""

    spans: Any  # one band
    layers: Any  # of each class of both


class Tables(NamedTuple):
    """All that the loop knows of one replica.

    `uniform` and `banded` are the bands of iterations in which all tokens run the same layers, and of the others, each
    with its layers by class. `states`, `rules`, `iterations` and `scalars` have one row each.
    """

    states: Table
    rules: Table
    iterations: Table
    requests: Table
    lists: Lists
    line: Line
    arrivals: Table  # that are known and have not all started
    tokens: Table  # what the active model makes of each of them
    coming: Table  # arrivals that a router may send here
    coming_tokens: Table
    chunks: Table
    freed: Table
    prefix: Any  # core.prefix.Prefix
    owed: Numbers  # (slots, bands)
    counts: Counts
    watch: Watch
    trace: Any  # Trace; from here on None where a device runs the iterations
    prices: Any  # core.price.PriceTables
    scalars: Any
    work: Any
    uniform: Any
    uniform_layers: Any
    banded: Any
    banded_layers: Any
    drafter: Any  # Drafter; without one, of the model itself


@dataclass(frozen=True, slots=True)
class Storage:
    """Makes records and arrays, for compiled functions or for the interpreter."""

    compiled: bool

    def rows(self, kind: Kind, n: int) -> Table:
        """A table of n records, all zeros."""
        if self.compiled:
            return np.zeros(n, kind.dtype)
        return [kind.row() for _ in range(n)]

    def record(self, kind: Kind) -> Record:
        """One record, all zeros, for plain Python; the loop takes `raw` of it."""
        return kind.view.of(self.rows(kind, 1)) if self.compiled else kind.row()

    def views(self, kind: Kind, table: Table) -> Sequence[Record]:
        """The records of a table for plain Python, which the table itself would give ten times as slowly."""
        if not self.compiled:
            return table
        views: Any = kind.view * len(table)
        return views.from_buffer(table)

    def filled(self, kind: Kind, rows: Iterable[Sequence[float]]) -> Table:
        """A table of records, each with its fields in the kind's order."""
        if not self.compiled:
            return [kind.row(*row) for row in rows]
        return np.array([tuple(row) for row in rows], kind.dtype)

    def of_columns(self, kind: Kind, columns: Sequence[IntArray]) -> Table:
        """A table of records from the columns of its fields, each (n,)."""
        if not self.compiled:
            return [kind.row(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
        table = np.zeros(len(columns[0]), kind.dtype)
        for name, column in zip(kind.dtype.names or (), columns, strict=True):
            table[name] = column
        return table

    def joined(self, kind: Kind, first: Table, second: Table) -> Table:
        """Two tables one after the other; records are not copied where they are objects."""
        if not self.compiled:
            return first + second
        numbers = np.concatenate([first.view(np.int64), second.view(np.int64)])  # quicker than of records
        return numbers.view(kind.dtype)

    def grown(self, kind: Kind, table: Table, n: int) -> Table:
        """The same records and further ones, n in all."""
        return self.joined(kind, table, self.rows(kind, n - len(table)))

    def numbers(self, *shape: int) -> Numbers:
        """An array of whole numbers, all zeros."""
        return self.array(np.zeros(shape, np.int64))

    def array(self, values: NDArray[Any]) -> Any:
        """An array as the loop reads it; the memory is shared."""
        return values if self.compiled else memoryview(values)  # type: ignore[arg-type]

    def more_numbers(self, values: Numbers, n: int) -> Numbers:
        """The same numbers and further zeros, n in all."""
        found = np.zeros(n, np.int64)
        found[: len(values)] = values
        return self.array(found)

    def group(self, arrays: _Group) -> _Group:
        """A named tuple of arrays (or of such tuples) as the loop reads it."""
        if self.compiled:
            return arrays
        read = (self.array(each) if isinstance(each, np.ndarray) else self.group(each) for each in arrays)
        return type(arrays)(*read)


def take_sums(state: Record) -> list[int]:
    """The state's `SUMS`, which start from 0 again."""
    if isinstance(state, View):
        return state.take_last(len(SUMS))
    found = [getattr(state, name) for name in SUMS]
    for name in SUMS:
        setattr(state, name, 0)
    return found


def tuples(table: Table, rows: Sequence[int] | slice, fields: Sequence[str]) -> list[Sequence[int]]:
    """These fields of these rows, two or more fields that are whole numbers, as plain numbers."""
    if isinstance(table, np.ndarray):
        found: list[Sequence[int]] = numbers_of(table, rows, fields).tolist()
        return found
    read = attrgetter(*fields)
    return [read(row) for row in (table[rows] if isinstance(rows, slice) else (table[row] for row in rows))]


def number_of(table: Table, row: int, field: str) -> int:
    """A field that is a whole number: of one record, NumPy's own would take ten times as long."""
    return int(table[field][row]) if isinstance(table, np.ndarray) else int(getattr(table[row], field))


def numbers_of(table: Table, rows: Sequence[int] | slice, fields: Sequence[str]) -> IntArray:
    """The same as an array, (rows, fields)."""
    if isinstance(table, np.ndarray):
        numbers = np.frombuffer(table, np.int64).reshape(len(table), -1)
        picked = numbers[rows] if isinstance(rows, slice) else numbers.take(rows, 0)  # quicker than by indexing
        return picked.take(_columns(table.dtype, tuple(fields)), 1)
    return np.array(tuples(table, rows, fields), np.int64).reshape(-1, len(fields))


@lru_cache(maxsize=32)
def _columns(dtype: np.dtype[Any], fields: tuple[str, ...]) -> IntArray:
    """Where these fields stand, in a record of 64-bit numbers."""
    return np.array([(dtype.names or ()).index(field) for field in fields])
