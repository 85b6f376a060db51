"""The loop's parts against plain references: the waiting line, counts beyond the grid, loads beside serving, spans."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from helios_sim.core import layout, line
from helios_sim.core.layout import RULES, STATE, Line, Storage
from helios_sim.exits.artificial import no_exits, synthetic_trace
from helios_sim.exits.rule import Confidence, ExitRule, FixedCap, FullDepth, PerToken
from helios_sim.policy.deployment import BreachLimit, Completed, Deployment, InFlight, KvRule, Placement, Probe, Probed
from helios_sim.profile.profile import Profile
from helios_sim.profile.store import load_profile
from helios_sim.profile.tables import RowsTable
from helios_sim.workload import AllAtOnce, Constant, DrawnLengths, Exponential, Fixed, TaskMix, Workload
from priced import priced_profile
from rig import Scripted, composition_of, full_depth, serve, workload

MS = 1_000_000


# --- the waiting line


@pytest.mark.slow
@settings(max_examples=200)
@given(st.lists(st.one_of(st.tuples(st.integers(-3, 3), st.booleans()), st.none()), max_size=80))
def test_the_waiting_line_is_a_sorted_list(moves: list[tuple[int, bool] | None]) -> None:
    """Pushes with a key, of arrivals or of requests with a slot, and pops (None)."""
    storage = Storage(compiled=False)
    state, waiting = storage.record(STATE), Line(*(storage.numbers(100) for _ in Line._fields))
    plain: list[tuple[int, int, int]] = []
    for seq, move in enumerate(moves):
        if move is not None:
            key, has_slot = move
            ref = -1 - seq if has_slot else seq
            line.push(state, waiting, key, seq, ref)
            plain = sorted([*plain, (key, seq, ref)])
        elif plain:
            assert (waiting.key[0], waiting.seq[0], waiting.ref[0]) == plain.pop(0)
            line.pop(state, waiting)
        assert state.waiting == len(plain)
        assert state.waiting_slots == sum(ref < 0 for _, _, ref in plain)


@pytest.mark.parametrize(
    ("order", "key"), [(layout.FCFS, 0), (layout.PRIORITY, 7), (layout.SHORTEST_PROMPT, 30)], ids=str
)
def test_an_order_is_a_key(order: int, key: int) -> None:
    rules = Storage(compiled=False).record(RULES)
    rules.order = order
    assert line.order_key(rules, 7, 30) == key


def two_classes(priorities: tuple[int, int], requests: int = 4) -> Workload:
    """Every other request is of the second task."""
    mix = TaskMix(("slow", "quick"), (0.5, 0.5), priorities=priorities)
    return Workload(AllAtOnce(), DrawnLengths(Fixed(4), Fixed(10)), mix, requests, chars_per_token=None)


@pytest.mark.parametrize("stepwise", [False, True])
def test_the_lowest_priority_number_is_served_first(stepwise: bool) -> None:
    """One at a time, all there at once: those of the second task, in order of arrival, then the others."""
    served = serve(two_classes((5, -1), 12), full_depth(batch_limit=1), order="priority", stepwise=stepwise)
    by_start = sorted(served.records, key=lambda r: r.scheduled_ns)
    assert [(r.task, r.request_id) for r in by_start] == sorted(
        ((r.task, r.request_id) for r in served.records), key=lambda each: (-each[0], each[1])
    )
    assert [r.scheduled_ns for r in by_start] == [10 * MS * i for i in range(12)]


def test_the_shortest_prompt_is_served_first() -> None:
    unequal = Workload(AllAtOnce(), DrawnLengths(Exponential(40), Fixed(5)), TaskMix.single("text"), 15, None)
    served = serve(unequal, full_depth(batch_limit=1), order="shortest_prompt")
    by_start = sorted(served.records, key=lambda r: r.scheduled_ns)
    lengths = [r.prompt_tokens for r in by_start]
    assert lengths == sorted(lengths)
    assert lengths != [r.prompt_tokens for r in served.by_request()]


@pytest.mark.parametrize(("priorities", "preempted"), [((0, 1), 1), ((1, 0), 0)])
def test_preemption_takes_the_last_by_the_same_rule(priorities: tuple[int, int], preempted: int) -> None:
    """Room for 20 tokens; two requests of different tasks need 14 each. Under fcfs it is always the newer."""
    rig = {"hbm_bytes": 228 + 20 * 16, "utilisation": 1.0, "block_tokens": 1}
    seed = next(
        seed for seed in range(99)
        if [r.task for r in serve(two_classes((0, 0), 2), full_depth(), seed=seed).by_request()] == [0, 1]
    )  # fmt: skip
    served = serve(two_classes(priorities, 2), full_depth(), order="priority", seed=seed, **rig).by_request()
    assert [r.preemptions for r in served] == [int(i == preempted) for i in range(2)]
    assert [r.preemptions for r in serve(two_classes(priorities, 2), full_depth(), seed=seed, **rig).by_request()] == [
        0, 1,
    ]  # fmt: skip


# --- beyond the measured grid


def with_small_classifier_table() -> Profile:
    """The classifier was measured up to two rows."""
    return replace(
        priced_profile("flat"), check_classifier=RowsTable(np.array([1, 2], np.int64), np.array([1e-5, 2e-5]))
    )


def with_small_padded_attention() -> Profile:
    """Decode attention was measured up to 30 tokens of context, and every context counts like the longest."""
    profile = priced_profile("flat", kv_token_s=1e-6)
    tables = profile.layer_tables[0]
    attention = replace(
        tables.decode_attention, second=np.array([0, 30]), time_s=tables.decode_attention.time_s[:, :2] * [1.0, 1e-3]
    )
    return replace(profile, layer_tables=(replace(tables, decode_attention=attention),), padded_kv=True)


def with_small_head_and_check_tables() -> Profile:
    """The head and a check through it were measured up to two rows, so that an iteration can exceed both."""
    two = RowsTable(np.array([1, 2], np.int64), np.array([1e-5, 2e-5]))
    return replace(priced_profile("flat"), head=two, check=two)


CLASSIFIED = FixedCap(0.7, Confidence.CLASSIFIER)
BEYOND: dict[str, tuple[Profile, ExitRule, KvRule, int]] = {
    "a classifier at the cap": (with_small_classifier_table(), CLASSIFIED, KvRule.NONE, 2),
    "a classifier at every exit": (
        with_small_classifier_table(), PerToken(0.7, Confidence.CLASSIFIER), KvRule.PROPAGATE, 4,
    ),
    "the head and each check": (with_small_head_and_check_tables(), PerToken(0.7), KvRule.PROPAGATE, 4),
    "contexts that are padded": (with_small_padded_attention(), FullDepth(), KvRule.NONE, 4),
}  # fmt: skip


@pytest.mark.parametrize("case", BEYOND)
def test_iterations_beyond_the_grid_and_their_floor_are_counted(case: str) -> None:
    """Against what the profile says of each iteration by itself."""
    profile, rule, kv_rule, layers = BEYOND[case]
    deployment = Deployment(Placement("flat", layers), rule, kv_rule=kv_rule)
    outside: list[bool] = []
    floor_ns: list[int] = []

    def note(server, plan, start_ns: int, end_ns: int) -> None:
        composition = composition_of(server)
        outside.append(bool(profile.outside_grid(composition)[0]))
        floor_ns.append(max(round(float(profile.iteration_floor_s(composition)[0]) * 1e9), 1))

    unequal = workload(12, Exponential(10), Exponential(20), AllAtOnce())
    stepwise = serve(unequal, deployment, {"flat": profile}, max_running_requests=5, on_plan=note).run.stats
    assert 0 < stepwise.outside_grid_iterations == sum(outside) < stepwise.iterations
    assert stepwise.floor_ns == sum(floor_ns)
    ahead = serve(unequal, deployment, {"flat": profile}, max_running_requests=5).run.stats
    assert asdict(ahead) == asdict(stepwise)


# --- loads beside serving

LOADING = {
    name: priced_profile(
        name, layer_s=layer_s, row_s=3.1e-5, kv_token_s=1.3e-6, prefill_token_s=2.9e-6, head_s=2e-4, load_slowdown=1.3,
        load_bytes_per_s=20_000.0,
    )
    for name, layer_s in (("a", 2.1e-4), ("b", 3.7e-4))
}  # fmt: skip


def deployed(model: str, layers: int, *triggers: object, **others: object) -> Deployment:
    return Deployment(Placement(model, layers), FixedCap(0.7), kv_rule=KvRule.NONE, triggers=triggers, **others)


CHANGES = {
    "more layers load beside serving": [deployed("a", 4)],
    "another model loads while requests drain": [deployed("b", 4)],
    "requests move with the model": [deployed("b", 4, in_flight=InFlight.MIGRATE)],
    "there and back": [deployed("b", 2, Completed(4)), deployed("a", 4)],
    "a probe streams": [deployed("a", 2, Probed(), probe=Probe(("b", "a"), 3)), deployed("b", 2)],
}


@pytest.mark.parametrize("arrivals", [Constant(400.0), AllAtOnce()], ids=["open", "queued"])
@pytest.mark.parametrize("room", [True, False], ids=["beside", "in turn"])
@pytest.mark.parametrize("change", CHANGES)
def test_loads_are_the_same_ahead_of_the_clock_and_step_by_step(change: str, room: bool, arrivals) -> None:
    work = Workload(arrivals, DrawnLengths(Fixed(20), Exponential(25)), TaskMix.single("text"), 40, None)
    weights = sum(profile.weight_bytes(4) for profile in LOADING.values())
    pool_bytes = 400 * 16 * LOADING["a"].kv_bytes_per_token(4)
    hbm_bytes = pool_bytes + (weights if room else LOADING["a"].weight_bytes(4))
    runs = []
    for stepwise in (True, False):
        script = Scripted(deployed("a", 2, BreachLimit(60, 50), Completed(6)), list(CHANGES[change]))
        run = serve(work, script, LOADING, hbm_bytes=hbm_bytes, utilisation=1.0, stepwise=stepwise)
        assert run.run.stats.loads
        runs.append((run.records, run.run.servers[0].decisions, asdict(run.run.stats), run.run.end_ns))
    assert runs[0] == runs[1]


# --- spans of tokens


@given(task=st.lists(st.integers(0, 1), min_size=1, max_size=20), seed=st.integers(0, 99), exits=st.booleans())
def test_spans_of_many_answers_are_those_of_each(task, seed, exits) -> None:
    rng = np.random.default_rng(seed)
    model = load_profile("llama-2-7b@a100-40gb").model
    trace = synthetic_trace("m", (2, 4), tokens=50, seed=seed) if exits else no_exits(model)
    bound = trace.bind(("a", "b"))
    starts, chars = rng.integers(0, 2**62, len(task)), rng.integers(1, 500, len(task))
    spans = bound.locate_many(np.array(task), starts, chars)
    for row, one_task, start, n in zip(spans.tolist(), task, starts.tolist(), chars.tolist(), strict=True):
        span = bound.locate(one_task, start, n)
        assert row == [span.first, span.start, span.length, span.n_tokens]
