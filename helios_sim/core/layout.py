"""The data of the serving loop: named records, and arrays in small groups.

A record is one row with named fields, nearly all of them whole numbers: `request.context_tokens`. The same code runs
interpreted and compiled. Interpreted, a record is a Python object, and an array is a memoryview, which yields plain
numbers. Compiled, a table of records is a NumPy record array. `Storage` makes either kind.
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

NEVER = -1  # no time yet, no limit, or no index
FOREVER_NS = 2**62

# Phases of a replica: at a turn, during admission, while an iteration runs, and while nothing can run.
TURN, ADMITTING, RUNNING, WAITING = range(4)
GO_ON = -1
# Why `advance` returns.
(
    HORIZON,  # the next turn is at or after the time until which nothing else can act on this replica
    ARRIVALS,  # the next arrivals are not known yet
    FLUSH,  # results must be handed over before they fill their tables
    ASK,  # a trigger has fired, or the condition that a pending change waits for holds
    IDLE,  # nothing can run, and no known arrival or alarm changes that
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
MILLIONTHS = 1_000_000  # unit of shares in whole numbers, such as the argument of KV_ABOVE
LEAF_BITS, BREACHES_THERE, AGREES_THERE = 2, 2, 1  # bits of `Trace.leaves`
EXIT_BITS, EXIT_MASK = 6, 63  # bits of one exit in `request.recent`

RECENT = 256  # latest completed requests and arrivals that policies see
FLUSH_REQUESTS = 4096  # departed requests after which records are handed over


@dataclass(frozen=True)
class Kind:
    """A kind of record: its fields as a NumPy dtype, as a Python class, and as a view of a NumPy record."""

    name: str
    dtype: np.dtype[Any]
    view: type[View]

    @cached_property
    def row(self) -> type[Any]:
        """The Python class, made at first use, since compiled code does not need it."""
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
    """A view of one NumPy record for plain Python: reads and writes fields far faster than NumPy does."""

    raw: Table  # the record as a table of one row, which Numba takes more quickly than a record

    @classmethod
    def of(cls, raw: Table) -> View:
        view = cls.from_buffer(raw)
        object.__setattr__(view, "raw", raw)
        return view

    def __setattr__(self, name: str, value: int) -> None:
        """Set a field. Accepts NumPy's whole numbers, which ctypes refuses."""
        _set_field(self, name, index(value))

    def take_last(self, n: int) -> list[int]:
        """Return the last n numbers and set them to 0."""
        last = self.raw.view(np.int64)[-n:]
        found: list[int] = last.tolist()
        last[:] = 0
        return found


_set_field = ctypes.Structure.__setattr__


def raw(record: Record) -> Table:
    """Return the record as the loop's entry points take it: a table of one row."""
    return record.raw if isinstance(record, View) else [record]


REQUEST = Kind.of(
    "RequestRow",
    (
        # changed by each output token, so side by side in memory
        "context_tokens",  # tokens with K and V in the cache
        "remaining", "generated",  # output tokens still to produce, and produced
        "last_token_ns",
        # sums over the output tokens
        "layers_run", "early_tokens", "breach_tokens", "agreed_tokens", "evaluated_tokens", "microbits",
        # the output token of the iteration in progress; not filled in if the iteration is `alike`
        "observed", "token_exit", "token_layers", "token_breach", "token_agrees", "token_microbits",
        "drafts",  # tokens that the request may draft in this iteration; it has blocks for them
        "drafted", "accepted",  # tokens drafted, and drafts that became tokens; `token_microbits` sums over all of them
        "unread",  # tokens before the latest that the drafter has not read yet
        "held",  # band before which the next token waits, with K and V in the cache up to there; 0 if it does not wait.
        # With a drafter on its own card: 1 if the request waits for verification
        "held_ns",  # since when the token waits
        "earlier_ns",  # the token is delivered so long before the iteration ends
        "recent",  # exits of the latest tokens, each + 1, the latest in the lowest EXIT_BITS (`depths.look`)
        # place of the output tokens in the exit trace
        "trace_first", "trace_start", "trace_length",
        # progress
        "prefill_left", "started", "preemptions",
        "seq",  # order of arrival at this replica
        "order_key",  # first key of the waiting line's order, before `seq`
        "cached_tokens",  # `context_tokens` when the request was last preempted
        "freed_at",  # entry of `freed` with the blocks that it lost then
        "seat",  # row of its shared blocks (`prefix`)
        "hit_tokens",  # prompt tokens found in the prefix cache when it first entered
        "earlier_chars", "earlier_tokens",  # part of the answer that another model produced, before a migration
        "scheduled_ns", "first_token_ns", "left_ns", "why",
        # the request in the tokens of a model
        "model",  # number of the candidate that tokenized it
        "prompt_tokens", "output_tokens",
        "planned_model", "planned_first",  # NEVER without a service plan
        # the request as it arrived
        "request_id", "arrival_ns", "prompt_chars", "output_chars", "task", "text_start", "priority",
        "shared", "stream",
    ),
)  # fmt: skip
ARRIVAL = Kind.of(
    "ArrivalRow",
    (
        "request_id", "arrival_ns", "prompt_chars", "output_chars", "task", "text_start", "priority",
        "shared",  # row of the segments with which its prompt begins; NEVER if it shares none
        "stream",  # session of the rest of the prompt and of the answer; NEVER if it has none
        "planned_model", "planned_first",  # NEVER without a service plan
        "model",  # active model at its arrival
    ),
)  # fmt: skip
TOKENS = Kind.of(  # an arrival in the tokens of one model
    "TokensRow",
    ("prompt_tokens", "output_tokens", "trace_first", "trace_start", "trace_length"),
)
CHUNK = Kind.of("ChunkRow", ("slot", "tokens", "context_tokens", "layers"))
WORK = Kind.of(  # rows that run one band of layers in one iteration
    "WorkRow",
    (
        "decode_tokens", "kv_tokens", "checked_tokens", "classified_tokens", "propagated_tokens",
        "verified_tokens",  # further rows of the requests that decode; they read the same K and V in the same pass
        "done_ns",  # time after the start of the iteration at which an answer that leaves after this band is delivered
    ),
)
SPAN = Kind.of("SpanRow", ("start", "end"))  # first layer of a band, and the layer after its last
ITERATION = Kind.of(
    "IterationRow",
    (
        "decodes",  # requests that decode: the first ones of the batch
        "chunks", "finishing",
        "sampled_tokens",  # rows that pass the LM head
        "kv_tokens",  # sum of the decodes' contexts, without the new tokens
        "kv_least", "kv_most",  # shortest and longest context of the decodes, with the new token; NEVER if not known
        "banded",  # tokens run to different layers
        "alike",  # every token runs `token_layers` and agrees with full depth; requests' token fields are not filled in
        "token_layers",
        "syncs",  # the host must see a check's answer before it launches the next band
        "host_ahead",  # the host prepares the next iteration meanwhile
        "loading",  # weights stream into the card meanwhile
        "done",  # requests that complete with this iteration
        "drafts",  # most tokens that one request drafts; 0 if none drafts
        "drafted",  # tokens that all requests draft together
        "drafting",  # the pass being priced is a draft, which the host launches together with the rest of the iteration
        "draft_ns",  # part of the iteration's time that is drafting
        "late_layers", "late_ns",  # layers that came from host memory meanwhile, and the time that this added
        "members",  # requests that decode if not all do: the others wait at an exit, or for their drafts
        "drafting_apart",  # requests after the members in the batch for which another card drafts meanwhile
        "verify_ns", "draft_floor_ns",  # time of the verification, and floor of the drafts, each on its own card
        "first_band",  # first band that the decodes run; above 0 they go on from an exit
        "splits",  # not all decodes leave at the exit; the others wait there
        "due_blocks", "floor_ns", "outside",
        "budget", "blocked", "lingering",  # state of the admission in progress
    ),
)  # fmt: skip
TRIGGER = Kind.of("TriggerRow", ("kind", "argument", "spent", "window", "span_ns"))
WINDOW = Kind.of(  # a ring of tokens (breach or not), or of completed requests (SLOs missed or not)
    "WindowRow", ("length", "limit", "filled", "next", "breaches", "of_requests")
)
MARK = Kind.of("MarkRow", ("time_ns", "drawn_ns"))  # `state.drawn_ns` at a time (`power`)
LATEST = Kind.of(  # a completed request, as policies see it
    "LatestRow",
    (
        "arrival_ns", "scheduled_ns", "first_token_ns", "last_token_ns", "output_tokens", "prompt_tokens", "hit_tokens",
    ),
)  # fmt: skip
SEEN = Kind.of("SeenRow", ("slot", "tokens", "time_ns"))  # an observation to be handed over
SAMPLE = Kind.of(  # a point of the timeline
    "SampleRow", ("time_ns", "model", "run_layers", "running", "waiting", "kv_bytes", "weight_bytes")
)
FREED = Kind.of("FreedRow", ("owner", "blocks"))  # owner: id of a request, or NEVER
# Integrals and counts that start from 0 again when they are handed over.
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
        "routed",  # a router sends requests one by one, and none before the time until which the loop may run
        "wake_ns",  # time at which an arrival wakes the idle server; NEVER if none does
        "started_ns",  # start of the latest iteration; NEVER if the server has been idle since
        "acted_ns",  # time of the latest turn
        "waited",  # iterations for which prompts have been held back
        "warm_up_ns",  # extra time of the next iteration
        "asked",  # the policy has been asked in this turn
        "turn_wanted",  # something outside has acted: the server takes a turn of its own
        "idle",  # 1 + requests that waited before the arrival that woke the server; 0 if no arrival woke it
        "eager",  # hand departures over before anything else is scheduled, since a closed loop outside reacts to them
        "model",  # number of the active model
        "run_layers",
        # the batch and the waiting line
        "running", "decoding", "waiting", "waiting_slots", "free", "left", "lingering",
        "fewer",  # after an OOM `fewer` + `completed` requests may run at once; FOREVER_NS if there was none
        # arrivals
        "first_row", "arrived", "known", "exhausted", "to_release",
        # memory: KV blocks and weights
        "used_blocks", "total_blocks", "freed_first", "freed_end",
        "block_bytes", "weight_bytes",  # weight_bytes: weights resident or being loaded, and the activation reserve
        "peak_bytes",  # peak of weights and used blocks together
        # shared blocks (`prefix`)
        "free_seats", "queued_blocks", "queue_first", "queue_end", "made_blocks", "spare_block",
        "widest_request",  # most blocks that one request has asked for
        "made_known",  # times that blocks became known which another request may share
        # the last request that lacked blocks, and the free blocks and `made_known` at that time
        "blocked_seq", "blocked_free", "blocked_known",
        # admission, and the conditions that a pending change waits for
        "starts_left", "completed", "completed_before", "pending", "draining", "migrating", "loading",
        "room_blocks", "awaits_answers", "awaits_completion",
        # integrals for Little's law; `away` is added to the router's count of a replica that gets no requests
        "in_system", "away", "changed_ns", "presence_ns", "sojourn_ns", "arrivals", "departures",
        # results to be handed over
        "seen", "samples", "sample_interval_ns", "sample_room",
        "sampled_ns", "sampled_model", "sampled_layers",  # the latest sample
        "gaps", "gaps_ns", "shortest_gap_ns", "longest_gap_ns",
        "gap_bucket",  # bucket of the latest gap
        "drawn_ns", "marks",  # energy drawn so far, and marks made of it (`power`)
        "placed_decode_ns", "placed_decode_batch_ns",  # since the placement last changed
        *SUMS,  # must come last (`take_sums`)
    ),
)  # fmt: skip
RULES = Kind.of(  # constants of the deployment in force; an exit is given by its index in the trace
    "RulesRow",
    (
        "block_tokens",
        "block_mask",  # block_tokens - 1 if block_tokens is a power of two, which avoids slow divisions; else NEVER
        "batch_tokens", "running_limit", "context_limit",
        "place_tokens",  # most tokens of one request that the engine has room for; NEVER if there is no such limit
        "order", "closed_loop", "live",
        "vllm_v1",  # a request that completes while the next iteration is planned lingers until it is planned
        "prefill_first",  # an iteration has prompts or decodes, never both, and prompts come first
        "keeps_answers",  # a request enters only if there is memory for its whole answer
        "wait_iterations", "wait_tokens",  # how long prompts wait for more prompts while others decode; 0: not at all
        "whole_prompts",  # no chunked prefill: a prompt waits until the token budget has room for all of it
        "shares",  # prefix caching (`prefix`)
        "rule_layers",  # layers up to which K and V of tokens are computed and read
        "loaded_layers",  # the same for observed tokens
        "refinds",  # a preempted request may find its freed blocks again (`blocks`)
        "ahead",  # the next iteration is planned while one runs
        "observe_tokens",  # first tokens of each answer that are observed at every exit; NEVER if none is
        "per_token", "clairvoyant", "planned",
        "head_checks",  # a token that leaves is sampled by the check's own pass through the head
        "looks",  # tokens are checked one by one (`depths.look`): at exits of their own, or by predictors
        "proposes",  # by predictors, through the words that the first exit proposed
        "always_checks",  # bits of the exits that check every token, with `looks`
        "recent_mask",  # bits of `request.recent` that choose further exits to check; 0 if none does
        "watches_cap", "lazy", "propagates", "repays", "owes",
        "draft_tokens",  # tokens that a request drafts and verifies in one iteration; 0 without drafting
        "draft_batch",  # largest batch that drafts
        "draft_exit",  # exit at which drafts leave
        "drafts_apart",  # another model drafts
        "draft_parts",  # the drafter has its own card and drafts for one of so many parts of the batch; 0: same card
        "exchange_ns",  # time to pass tokens from card to card
        "draft_cards",  # cards that draft side by side; with several, each draft is passed between them too
        "regroups",  # a batch is split at an exit if enough tokens want to leave there; the others wait
        "flush_requests",  # so many requests that wait at an exit run on; NEVER: as many as do not wait
        "flush_ns",  # longest time that a token waits at an exit
        "releases",  # an answer is released at a ramp, while its token runs all layers
        "tells_all",  # the policy observes all tokens of each completed answer
        "reads_trace",  # 0 if all tokens are the same, so the trace need not be read
        "scores",  # the trace has microbits
        "spread",  # prices depend on the shortest and the longest context of a batch
        "rule_exit",  # deepest exit of the rule
        "loaded_exit", "n_layers",  # deepest exit that is loaded; layers of the whole model
        "idle_mw", "drawn_mw",  # power of the card (`power`); 0 if not known
        "draws_evenly",  # an iteration draws the same power whatever it computes
        "ttft_ns", "tpot_ns", "e2e_ns",  # SLOs; NEVER if there is no such bound
        "bands",
    ),
)  # fmt: skip


class Lists(NamedTuple):
    """Lists of slots. Their lengths are fields of the state."""

    batch: Numbers  # running requests in order of admission: first those that decode, then those that prefill
    free: Numbers
    left: Numbers  # requests that left and are not handed over yet
    leaving: Numbers  # requests that leave in the commit in progress
    needy: Numbers  # decodes that had filled their last block when the scheduler last looked
    lingering_key: Numbers  # order key of requests that are done but keep their place until the next plan
    lingering_seq: Numbers
    lingering_blocks: Numbers  # blocks that they hold; with prefix caching, their seats


class Line(NamedTuple):
    """The waiting line: a binary heap by (order key, order of arrival)."""

    key: Numbers
    seq: Numbers
    ref: Numbers  # number of an arrival that has not started, or -1 - slot of a preempted request


class Trace(NamedTuple):
    """Exits (E) and recorded tokens (T), as the exit rule replays them."""

    exits: Numbers  # (E,) depths
    leaves: Numbers  # (T,) one number for each token, since each read of a trace takes time: exit << LEAF_BITS,
    # plus BREACHES_THERE if the token is a breach, plus AGREES_THERE if its exit predicts what full depth does
    agree: Numbers  # (T, E)
    microbits: Numbers  # (T, E), or (0, 0)
    planned: Numbers  # exits of the tokens that a service plan names
    checks: Numbers  # (E,) 1 if tokens are checked at the exit
    split_above: Numbers  # (E,) share of a batch, in millionths, above which it is split at the exit
    sure: Numbers  # (T,) bits of the exits that are sure of the token; (0,) without `rules.looks`
    in_vain: Numbers  # (T,) bits of the exits that ask their head in vain
    near: Numbers  # (E,) bits of the exits that check the next token after one that left at this exit


class Watch(NamedTuple):
    triggers: Table
    windows: Table
    flags: Numbers  # (windows, length) rings


class Counts(NamedTuple):
    seen: Table
    samples: Table
    depths: Numbers  # (layers + 1,) tokens by the layers that they ran
    gaps: Numbers  # histogram of the gaps between tokens
    gap_edges_ns: Numbers
    marks: Table  # a ring
    latest: Table  # ring of RECENT completed requests: the n-th is in row n % RECENT


class Drafter(NamedTuple):
    """Bands of a drafter. Its price tables are part of the target model's, its scalars are their second row."""

    spans: Any  # one band
    layers: Any  # layers of each class of both models


class Tables(NamedTuple):
    """All data of one replica that the loop works on.

    `uniform` is the one band of iterations in which all tokens run the same layers, `banded` the bands of all other
    iterations; each has its layers by class. `states`, `rules`, `iterations` and `scalars` have one row each.
    """

    states: Table
    rules: Table
    iterations: Table
    requests: Table
    lists: Lists
    line: Line
    arrivals: Table  # known arrivals from the first on that has not started
    tokens: Table  # the same arrivals in tokens of the active model
    coming: Table  # arrivals that a router may send to this replica
    coming_tokens: Table
    chunks: Table
    freed: Table
    prefix: Any  # core.prefix.Prefix
    owed: Numbers  # (slots, bands)
    counts: Counts
    watch: Watch
    trace: Any  # Trace; this and the following fields are None if a device runs the iterations
    prices: Any  # core.price.PriceTables
    scalars: Any
    work: Any
    uniform: Any
    uniform_layers: Any
    banded: Any
    banded_layers: Any
    drafter: Any  # Drafter; without one, the band of the model itself


@dataclass(frozen=True, slots=True)
class Storage:
    """Makes records and arrays for compiled functions, or for the interpreter."""

    compiled: bool

    def rows(self, kind: Kind, n: int) -> Table:
        """A table of n records, all zeros."""
        if self.compiled:
            return np.zeros(n, kind.dtype)
        return [kind.row() for _ in range(n)]

    def record(self, kind: Kind) -> Record:
        """One record, all zeros, for plain Python. The loop takes `raw` of it."""
        return kind.view.of(self.rows(kind, 1)) if self.compiled else kind.row()

    def views(self, kind: Kind, table: Table) -> Sequence[Record]:
        """The records of a table for plain Python, ten times as fast as from the table itself."""
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
        """Two tables one after the other. Records that are Python objects are not copied."""
        if not self.compiled:
            return first + second
        numbers = np.concatenate([first.view(np.int64), second.view(np.int64)])  # faster than joining records
        return numbers.view(kind.dtype)

    def grown(self, kind: Kind, table: Table, n: int) -> Table:
        """The table's records followed by zeros, n in all."""
        return self.joined(kind, table, self.rows(kind, n - len(table)))

    def numbers(self, *shape: int) -> Numbers:
        """An array of whole numbers, all zeros."""
        return self.array(np.zeros(shape, np.int64))

    def array(self, values: NDArray[Any]) -> Any:
        """The array as the loop reads it, sharing its memory."""
        return values if self.compiled else memoryview(values)  # type: ignore[arg-type]

    def more_numbers(self, values: Numbers, n: int) -> Numbers:
        """The numbers followed by zeros, n in all."""
        found = np.zeros(n, np.int64)
        found[: len(values)] = values
        return self.array(found)

    def group(self, arrays: _Group) -> _Group:
        """A named tuple of arrays, or of such tuples, as the loop reads it."""
        if self.compiled:
            return arrays
        read = (self.array(each) if isinstance(each, np.ndarray) else self.group(each) for each in arrays)
        return type(arrays)(*read)


def take_sums(state: Record) -> list[int]:
    """Return the state's `SUMS` and set them to 0."""
    if isinstance(state, View):
        return state.take_last(len(SUMS))
    found = [getattr(state, name) for name in SUMS]
    for name in SUMS:
        setattr(state, name, 0)
    return found


def tuples(table: Table, rows: Sequence[int] | slice, fields: Sequence[str]) -> list[Sequence[int]]:
    """Return two or more whole-number fields of some rows, as plain numbers."""
    if isinstance(table, np.ndarray):
        found: list[Sequence[int]] = numbers_of(table, rows, fields).tolist()
        return found
    read = attrgetter(*fields)
    return [read(row) for row in (table[rows] if isinstance(rows, slice) else (table[row] for row in rows))]


def number_of(table: Table, row: int, field: str) -> int:
    """Return a whole-number field of one record, ten times as fast as NumPy does."""
    return int(table[field][row]) if isinstance(table, np.ndarray) else int(getattr(table[row], field))


def numbers_of(table: Table, rows: Sequence[int] | slice, fields: Sequence[str]) -> IntArray:
    """Return whole-number fields of some rows, (rows, fields)."""
    if isinstance(table, np.ndarray):
        numbers = np.frombuffer(table, np.int64).reshape(len(table), -1)
        picked = numbers[rows] if isinstance(rows, slice) else numbers.take(rows, 0)  # faster than indexing
        return picked.take(_columns(table.dtype, tuple(fields)), 1)
    return np.array(tuples(table, rows, fields), np.int64).reshape(-1, len(fields))


@lru_cache(maxsize=32)
def _columns(dtype: np.dtype[Any], fields: tuple[str, ...]) -> IntArray:
    """The indices of fields in a record of 64-bit numbers."""
    return np.array([(dtype.names or ()).index(field) for field in fields])
