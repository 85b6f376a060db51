"""Parts of the loop at their edges, which few runs meet: limits reached exactly, entries removed from the middle."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helios_sim.core import arrive, blocks, depths, layout, machine, power, schedule, triggers
from helios_sim.core.layout import FREED, NEVER, REQUEST, RULES, STATE, Line, Lists, Storage, Trace
from helios_sim.core.prefix import Prefix
from helios_sim.policy.deployment import Drained
from rig import Scripted, full_depth, serve, workload

STORAGE = Storage(compiled=False)
MARK_NS = power.MARK_EVERY_NS


def record(kind: layout.Kind, **values: int) -> Any:
    found = STORAGE.record(kind)
    for name, value in values.items():
        setattr(found, name, value)
    return found


def lists(n: int = 8) -> Lists:
    return Lists(*(STORAGE.numbers(n) for _ in Lists._fields))


@pytest.mark.parametrize("compiled", [False, True])
def test_records_for_plain_python_are_those_of_the_table(compiled: bool) -> None:
    storage = Storage(compiled)
    table = storage.rows(layout.MARK, 3)
    views = storage.views(layout.MARK, table)
    views[1].time_ns = np.int64(2**62)
    views[2].drawn_ns = NEVER
    names = layout.MARK.dtype.names or ()
    assert [list(row) for row in layout.tuples(table, [0, 1, 2], names)] == [[0, 0], [2**62, 0], [0, NEVER]]
    assert layout.numbers_of(table, [], names).shape == (0, 2)


def test_a_record_of_whole_numbers_takes_no_fraction() -> None:
    with pytest.raises(TypeError):
        Storage(compiled=True).record(STATE).now_ns = 0.5


@pytest.mark.parametrize(
    ("tokens", "why"),
    [(64, 0), (65, layout.CONTEXT_EXCEEDED)],
)
def test_a_context_may_be_full(tokens: int, why: int) -> None:
    rules = record(RULES, context_limit=64, place_tokens=NEVER, block_tokens=16)
    assert arrive.cannot_run(record(STATE, total_blocks=99), rules, 4, tokens - 4) == why


@pytest.mark.parametrize(("tokens", "why"), [(32, 0), (33, layout.PLACES_EXCEEDED)])
def test_a_place_may_be_full(tokens: int, why: int) -> None:
    rules = record(RULES, context_limit=64, place_tokens=32, block_tokens=16)
    assert arrive.cannot_run(record(STATE, total_blocks=99), rules, 4, tokens - 4) == why


@pytest.mark.parametrize(("tokens", "why"), [(33, 0), (34, layout.POOL_EXCEEDED)])
def test_the_last_token_needs_no_memory(tokens: int, why: int) -> None:
    rules = record(RULES, context_limit=64, place_tokens=NEVER, block_tokens=16)
    assert arrive.cannot_run(record(STATE, total_blocks=2), rules, 4, tokens - 4) == why


def test_after_a_lack_of_memory_each_that_completes_lets_one_more_run() -> None:
    rules = record(RULES, running_limit=8)
    limits = [schedule.running_limit(record(STATE, fewer=3, completed=n), rules) for n in (0, 2, 9)]
    assert limits == [3, 5, 8]


moves = st.lists(
    st.tuples(st.sampled_from(["give", "give to owner", "forget"]), st.integers(1, 4)), min_size=1, max_size=40
)


@given(moves)
def test_freed_blocks_are_a_queue_from_which_the_longest_free_go_first(plan: list[tuple[str, int]]) -> None:
    """The reference holds every block on its own, with its owner."""
    state, rules = record(STATE, used_blocks=1000), record(RULES, refinds=1)
    freed = STORAGE.rows(FREED, 64)
    plain: list[int] = []
    entries: dict[int, int] = {}
    for owner, (what, n) in enumerate(plan, 1):
        if what == "forget":
            blocks.forget_blocks(state, freed, n)
            del plain[:n]
        else:
            of = owner if what == "give to owner" else NEVER
            entry = blocks.give_blocks(state, rules, freed, n, of)
            plain += [of] * n
            if of != NEVER:
                entries[of] = entry
        assert {of: blocks.kept_blocks(state, freed, entry, of) for of, entry in entries.items()} == {
            of: plain.count(of) for of in entries
        }


@given(moves)
def test_where_a_ring_is_full_the_longest_free_blocks_lose_their_owners_and_none_is_lost(
    plan: list[tuple[str, int]],
) -> None:
    """Four entries: a fifth joins the two that were freed longest ago, which are then nobody's."""
    state, rules = record(STATE, used_blocks=1000), record(RULES, refinds=1)
    freed = STORAGE.rows(FREED, 4)
    plain: list[tuple[int, int]] = []
    for owner, (what, n) in enumerate(plan, 1):
        if what == "forget":
            blocks.forget_blocks(state, freed, n)
            while plain and n:
                (of, held), *later = plain
                plain = [(of, held - n), *later] if held > n else later
                n -= min(n, held)
            continue
        of = owner if what == "give to owner" else NEVER
        entry = blocks.give_blocks(state, rules, freed, n, of)
        if plain and of == NEVER == plain[-1][0]:
            plain[-1] = (NEVER, plain[-1][1] + n)
        else:
            if len(plain) == len(freed):
                plain = [(NEVER, plain[0][1] + plain[1][1]), *plain[2:]]
            plain.append((of, n))
            assert of == NEVER or blocks.kept_blocks(state, freed, entry, of) == n
        ring = [freed[at % len(freed)] for at in range(state.freed_first, state.freed_end)]
        assert [(each.owner, each.blocks) for each in ring] == plain


def test_of_those_that_linger_the_one_last_in_order_gives_way_and_the_others_stay() -> None:
    state = record(STATE, running=1, lingering=3, used_blocks=20)
    requests, held = STORAGE.rows(REQUEST, 4), lists()
    requests[0].order_key, requests[0].seq = 0, 1
    for place, (key, seq, size) in enumerate([(0, 9, 4), (0, 7, 5), (0, 8, 6)]):
        held.lingering_key[place], held.lingering_seq[place], held.lingering_blocks[place] = key, seq, size
    line = Line(*(STORAGE.numbers(4) for _ in Line._fields))
    prefix = Prefix(*(STORAGE.numbers(1) for _ in Prefix._fields))
    freed, owed = STORAGE.rows(FREED, 4), STORAGE.numbers(4, 1)
    schedule.preempt(state, record(RULES), requests, held, line, freed, prefix, owed)
    assert (state.running, state.lingering, state.preemptions, state.used_blocks) == (1, 2, 0, 16)
    left = zip(held.lingering_key, held.lingering_seq, held.lingering_blocks, strict=True)
    assert list(left)[:2] == [(0, 7, 5), (0, 8, 6)]


@pytest.mark.parametrize(
    ("running", "waiting", "ref", "generated", "model", "expected"),
    [
        (1, 0, 0, 0, 0, True),
        (0, 0, -1, 3, 0, False),
        (0, 1, -1, 3, 0, True),  # preempted, at the head of the line
        (0, 1, -1, 0, 0, False),  # it had no token yet
        (0, 1, -1, 1, 0, True),  # one token begins it
        (0, 1, -1, 3, 1, False),  # begun by another model
        (0, 1, 0, 3, 0, False),  # the first arrival, not the last slot
    ],
)
def test_an_answer_is_in_flight(
    running: int, waiting: int, ref: int, generated: int, model: int, expected: bool
) -> None:
    state = record(STATE, running=running, waiting=waiting, model=0)
    requests, line = STORAGE.rows(REQUEST, 1), Line(*(STORAGE.numbers(2) for _ in Line._fields))
    requests[0].generated, requests[0].model, line.ref[0] = generated, model, ref
    assert bool(triggers.in_flight(state, requests, line)) == expected


@pytest.mark.parametrize(("ref", "expected"), [(-1, False), (0, True)])
def test_what_waits_and_has_started_is_no_arrival(ref: int, expected: bool) -> None:
    """All of a batch are done, and one waits: the first arrival, or a request that lost its place."""
    state = record(STATE, waiting=1, waiting_slots=1, starts_left=0)
    requests, line = STORAGE.rows(REQUEST, 1), Line(*(STORAGE.numbers(2) for _ in Line._fields))
    requests[0].started, line.ref[0] = 1, ref
    watch = layout.Watch(
        STORAGE.filled(layout.TRIGGER, [[layout.DRAINED, 0, 0, 0, 0]]), STORAGE.filled(layout.WINDOW, []),
        STORAGE.numbers(0, 0),
    )  # fmt: skip
    marks = STORAGE.rows(layout.MARK, 1)
    assert (triggers.first_fired(state, record(RULES), requests, line, watch, marks, 0) == 0) == expected


@pytest.mark.parametrize(
    ("awaits_answers", "running", "expected"), [(1, 0, True), (1, 1, False), (0, 0, False), (0, 1, False)]
)
def test_a_change_that_waits_for_answers_goes_on_once_all_are_there(
    awaits_answers: int, running: int, expected: bool
) -> None:
    """What waits for a load instead is told by the load, not by an empty card."""
    state = record(STATE, pending=1, room_blocks=NEVER, awaits_answers=awaits_answers, running=running)
    line = Line(*(STORAGE.numbers(2) for _ in Line._fields))
    watch = layout.Watch(
        STORAGE.filled(layout.TRIGGER, []), STORAGE.filled(layout.WINDOW, []), STORAGE.numbers(0, 0)
    )  # fmt: skip
    requests, marks = STORAGE.rows(REQUEST, 1), STORAGE.rows(layout.MARK, 1)
    assert triggers.turn_is_due(state, record(RULES), requests, lists(), line, watch, marks) == expected


@pytest.mark.parametrize(
    ("start_ns", "end_ns", "times_ns"),
    [(0, MARK_NS - 1, []), (0, MARK_NS, [MARK_NS]), (MARK_NS, MARK_NS + 1, [MARK_NS]),
     (MARK_NS - 1, MARK_NS, [MARK_NS]), (MARK_NS, 2 * MARK_NS, [MARK_NS, 2 * MARK_NS])],
)  # fmt: skip
def test_what_was_drawn_is_marked_after_so_much_time_and_no_earlier(
    start_ns: int, end_ns: int, times_ns: list[int]
) -> None:
    state, marks = record(STATE), STORAGE.rows(layout.MARK, power.MARKS)
    power.note_drawn(state, marks, start_ns, end_ns, 7)
    assert [marks[k].time_ns for k in range(state.marks)] == times_ns
    assert state.drawn_ns == 7


def test_a_preempted_request_starts_no_second_time() -> None:
    """Two may start, in memory for one and a half: the one that loses its place comes back, and then all are done."""
    from helios_sim.profile.synthetic import flat_profile

    first = replace(full_depth(), admit_limit=2, triggers=(Drained(),))
    policy = Scripted(first, [full_depth()])
    profile = flat_profile(0.001)
    served = serve(
        workload(3, prompt=20, output=60), policy, {"flat": profile},
        hbm_bytes=profile.weight_bytes(4) + 7 * 16 * profile.kv_bytes_per_token(4), utilisation=1.0,
    )  # fmt: skip
    assert served.run.stats.preemptions > 0
    assert [r.status.value for r in served.by_request()] == ["completed"] * 3
    (cause, seen), *_ = policy.asked
    assert isinstance(cause, Drained)
    assert seen.completed_requests == 2


def test_a_planned_token_is_no_breach_even_after_a_cap() -> None:
    """The token before left a capped model without confidence; this one runs as a service plan says."""
    requests, held = STORAGE.rows(REQUEST, 1), lists()
    requests[0].token_breach, requests[0].planned_first, requests[0].trace_length = 1, 0, 1
    state = record(STATE, running=1, decoding=1, run_layers=4)
    rules = record(RULES, planned=1, bands=2, observe_tokens=NEVER, loaded_exit=1, rule_exit=1, n_layers=4)
    trace = Trace(
        STORAGE.array(_whole([2, 4])), STORAGE.array(_whole([1 << layout.LEAF_BITS | layout.BREACHES_THERE])),
        STORAGE.array(_whole([[1, 1]])), STORAGE.numbers(0, 0), STORAGE.array(_whole([0])),
        STORAGE.numbers(1), STORAGE.numbers(1), *(STORAGE.numbers(1) for _ in range(3)),
    )  # fmt: skip
    iteration, work = record(layout.ITERATION, decodes=1), STORAGE.rows(layout.WORK, 2)
    depths.lay_out(
        state, rules, iteration, requests, held, STORAGE.rows(layout.CHUNK, 1), trace, STORAGE.numbers(1, 3), work
    )
    assert (requests[0].token_exit, requests[0].token_breach) == (0, 0)


def _whole(values: list[Any]) -> Any:
    import numpy as np

    return np.array(values, np.int64)


@pytest.mark.parametrize("name", machine._MODULES)
def test_no_index_counts_from_the_end(name: str) -> None:
    """Compiled code would read before the array's beginning."""
    tree = ast.parse((Path(machine.__file__).parent / f"{name}.py").read_text())
    indices = [node.slice for node in ast.walk(tree) if isinstance(node, ast.Subscript)]
    parts = [part for index in indices for part in (index.elts if isinstance(index, ast.Tuple) else [index])]
    assert not [ast.unparse(part) for part in parts if isinstance(part, ast.UnaryOp) and isinstance(part.op, ast.USub)]
