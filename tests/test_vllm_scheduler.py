"""vLLM v1's scheduler as an option: places held by requests that are done, prefixes found again, and its invariants."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from helios_sim.core.blocks import free_blocks, give_blocks, kept_blocks, resize_pool, take_back, take_blocks
from helios_sim.core.layout import FREED, NEVER, RULES, STATE, Storage
from helios_sim.profile.synthetic import flat_profile
from helios_sim.profile.tables import LayerTables, MixedTable, UnequalTable
from helios_sim.request import Status
from helios_sim.workload import AllAtOnce, Constant, DrawnLengths, Exponential, Fixed, Poisson, TaskMix, Workload
from priced import priced_profile
from rig import Served, full_depth, serve

ITERATION_NS = 1_000_000
SLOW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
workloads = st.builds(
    lambda arrivals, prompt, output, n: Workload(
        arrivals, DrawnLengths(prompt, output), TaskMix.single("text"), n, chars_per_token=None
    ),
    st.sampled_from([Constant(1000.0), Constant(100.0), AllAtOnce(), Poisson(300.0)]),
    st.sampled_from([Fixed(1), Fixed(40), Exponential(30)]),
    st.sampled_from([Fixed(1), Fixed(33), Exponential(20)]),
    st.integers(1, 40),
)


def with_terms(tables: LayerTables) -> LayerTables:
    """The same with decodes that cost more beside a chunk, and more where lengths differ."""
    grid = np.array([1, 8, 64])
    times = 1e-6 * grid[:, None, None, None] + 1e-5 * grid[None, None, :, None] + 1e-7 * grid[None, None, None, :]
    mixed = MixedTable(grid, np.array([0, 50]), grid, grid, np.broadcast_to(times, (3, 2, 3, 3)).copy())
    share = np.array([0.0, 0.3, 1.0])
    excess = np.broadcast_to(np.array([0.7, 0.4, 0.0]), (2, 3, 3, 3)) * np.array([0.5, 1.0])[:, None, None, None]
    return replace(tables, mixed_attention=mixed, unequal_kv=UnequalTable(np.array([0, 16]), grid, grid, share, excess))


def priced(terms: bool = True):
    profile = priced_profile("flat", layer_s=2.1e-4, row_s=3.1e-5, kv_token_s=1.3e-6, prefill_token_s=2.9e-6)
    return replace(profile, layer_tables=tuple(map(with_terms, profile.layer_tables))) if terms else profile


def run(workload: Workload, stepwise: bool, blocks: int, ahead: int = 1, terms: bool = True, places: int = 8) -> Served:
    profile = priced(terms)
    hbm_bytes = profile.weight_bytes(4) + profile.activation_reserve_bytes + blocks * 16 * profile.kv_bytes_per_token(4)
    return serve(
        workload, full_depth(), {"flat": profile}, hbm_bytes=hbm_bytes, utilisation=1.0, max_batch_tokens=64,
        max_running_requests=places, stepwise=stepwise, schedule_ahead=ahead, vllm_v1=True,
    )  # fmt: skip


@pytest.mark.slow
@SLOW
@given(workload=workloads, blocks=st.sampled_from([4, 9, 40, 1000]), ahead=st.sampled_from([0, 1]))
def test_ahead_of_the_clock_and_step_by_step_give_the_same_bits(workload, blocks, ahead) -> None:
    running_ahead, stepping = (run(workload, stepwise, blocks, ahead) for stepwise in (False, True))
    assert running_ahead.records == stepping.records
    assert asdict(running_ahead.run.stats) == asdict(stepping.run.stats)


@pytest.mark.slow
@SLOW
@given(workload=workloads, blocks=st.sampled_from([4, 9, 40]), ahead=st.sampled_from([0, 1]))
def test_every_request_leaves_once_and_memory_returns(workload, blocks, ahead) -> None:
    served = run(workload, True, blocks, ahead)
    assert sorted(r.request_id for r in served.records) == list(range(workload.requests))
    assert served.run.servers[0].used_blocks == 0
    for record in served.records:
        if record.status is Status.COMPLETED:
            assert record.arrival_ns <= record.scheduled_ns < record.first_token_ns <= record.last_token_ns


def several(n: int, output: int, prompt: int = 4) -> Workload:
    lengths = DrawnLengths(Fixed(prompt), Fixed(output))
    return Workload(AllAtOnce(), lengths, TaskMix.single("text"), n, chars_per_token=None)


@pytest.mark.parametrize(("vllm_v1", "waits"), [(False, 0), (True, 1)])
def test_a_place_is_free_one_iteration_after_its_request_is_done(vllm_v1: bool, waits: int) -> None:
    """Three requests, two places: the plan for the next iteration was made before anyone had seen the last tokens.

    Request 1 has one token more than request 0, so something runs meanwhile.
    """
    lengths = DrawnLengths(Fixed(4), Exponential(20))
    three = Workload(AllAtOnce(), lengths, TaskMix.single("text"), 3, chars_per_token=None)
    served = serve(three, full_depth(batch_limit=2), schedule_ahead=1, vllm_v1=vllm_v1).by_request()
    first_done = min(served[0].last_token_ns, served[1].last_token_ns)
    assert served[0].last_token_ns != served[1].last_token_ns
    assert served[2].scheduled_ns == first_done + waits * ITERATION_NS


@pytest.mark.slow
@SLOW
@given(workload=workloads, blocks=st.sampled_from([9, 40, 1000]), ahead=st.sampled_from([0, 1]))
def test_whole_prompts_are_computed_at_once_in_any_way_to_run(workload, blocks, ahead) -> None:
    """A prompt that fits into the budget of 64 tokens runs in one piece; all ways to run give the same bits."""
    profile = priced()
    hbm_bytes = profile.weight_bytes(4) + profile.activation_reserve_bytes + blocks * 16 * profile.kv_bytes_per_token(4)
    pieces: list[tuple[int, bool]] = []  # tokens of each chunk, and whether it finished

    def note(server, plan, start_ns, end_ns) -> None:
        pieces.extend((part.tokens, part.finishes) for part in plan.prefill)

    same = {}
    for way in ("noted", "ahead", "compiled"):
        same[way] = serve(
            workload, full_depth(), {"flat": profile}, hbm_bytes=hbm_bytes, utilisation=1.0, max_batch_tokens=64,
            max_running_requests=8, schedule_ahead=ahead, vllm_v1=True, whole_prompts=True,
            compiled=way == "compiled", on_plan=note if way == "noted" else None,
        )  # fmt: skip
    assert all(finishes or tokens == 64 for tokens, finishes in pieces)
    assert same["noted"].by_request() == same["ahead"].by_request() == same["compiled"].by_request()


def test_a_prompt_that_does_not_fit_waits_for_the_next_iteration() -> None:
    """Two prompts of 40 tokens and a budget of 64: in chunks both begin at once, whole the second one waits."""
    scheduled_ns = []
    for whole_prompts in (False, True):
        served = serve(several(2, 2, prompt=40), full_depth(), max_batch_tokens=64, whole_prompts=whole_prompts)
        scheduled_ns.append([record.scheduled_ns for record in served.by_request()])
    assert scheduled_ns == [[0, 0], [0, ITERATION_NS]]


def test_nobody_waits_for_a_place_when_nothing_else_runs() -> None:
    served = serve(several(2, 5), full_depth(batch_limit=1), schedule_ahead=1, vllm_v1=True).by_request()
    assert served[1].scheduled_ns == served[0].last_token_ns


def test_a_returning_request_finds_its_prefix() -> None:
    """With memory for fewer tokens than two answers need, one is preempted; what it computes again is less."""
    work = several(3, 40, prompt=40)
    spans = {}
    for vllm_v1 in (False, True):
        profile = priced(terms=False)
        hbm = profile.weight_bytes(4) + profile.activation_reserve_bytes + 12 * 16 * profile.kv_bytes_per_token(4)
        served = serve(work, full_depth(), {"flat": profile}, hbm_bytes=hbm, utilisation=1.0, vllm_v1=vllm_v1)
        assert served.run.stats.preemptions > 0
        spans[vllm_v1] = max(r.last_token_ns for r in served.records)
    assert spans[True] < spans[False]


def freed_pool(blocks: int, vllm_v1: bool = True):
    """A pool of so many free blocks: state, rules, and the ring of what was freed."""
    storage = Storage(compiled=False)
    state, rules, freed = storage.record(STATE), storage.record(RULES), storage.rows(FREED, 8)
    rules.refinds = int(vllm_v1)
    resize_pool(state, rules, freed, blocks)
    return state, rules, freed


def test_freed_blocks_are_taken_longest_free_first_and_last_ones_first() -> None:
    state, rules, freed = freed_pool(10)
    take_blocks(state, rules, freed, 10)
    a, b = (give_blocks(state, rules, freed, blocks, owner) for blocks, owner in ((4, 1), (3, 2)))
    assert (kept_blocks(state, freed, a, 1), kept_blocks(state, freed, b, 2)) == (4, 3)
    take_blocks(state, rules, freed, 3)
    assert (kept_blocks(state, freed, a, 1), kept_blocks(state, freed, b, 2)) == (1, 3)
    take_back(state, freed, b, 2)
    assert (kept_blocks(state, freed, b, 2), free_blocks(state)) == (0, 2)
    take_blocks(state, rules, freed, 2)
    assert kept_blocks(state, freed, a, 1) == 0


def test_a_pool_that_does_not_remember_keeps_nothing() -> None:
    state, rules, freed = freed_pool(4, vllm_v1=False)
    take_blocks(state, rules, freed, 2)
    assert give_blocks(state, rules, freed, 2, 1) == NEVER


@pytest.mark.slow
@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(["take", "give", "back"]), st.integers(1, 5)), max_size=60))
def test_freed_blocks_are_those_of_a_plain_list(moves: list[tuple[str, int]]) -> None:
    """The reference is a list of single blocks, the longest free first, each with the request that it was of."""
    state, rules, freed = freed_pool(20)
    plain: list[int | None] = [None] * 20
    entries: dict[int, int] = {}  # request -> entry
    for number, (move, blocks) in enumerate(moves, start=1):
        if move == "take" and blocks <= len(plain):
            take_blocks(state, rules, freed, blocks)
            del plain[:blocks]
        elif move == "give" and blocks <= 20 - len(plain) and len(entries) < 3:
            entries[number] = give_blocks(state, rules, freed, blocks, number)
            plain += [number] * blocks
        elif move == "back" and entries:
            owner, entry = entries.popitem()
            kept = kept_blocks(state, freed, entry, owner)
            assert kept == plain.count(owner)
            if kept:
                back = min(blocks, kept)
                take_back(state, freed, entry, back)
                for _ in range(back):
                    plain.remove(owner)
                plain = [None if each == owner else each for each in plain]
        assert free_blocks(state) == len(plain)
    for owner, entry in entries.items():
        assert kept_blocks(state, freed, entry, owner) == plain.count(owner)


def test_gaps_add_to_every_iteration_and_more_to_those_with_prefill() -> None:
    flat = flat_profile(0.001)
    gaps = flat.with_runtime(replace(flat.runtime, gap_s=0.0003, prefill_gap_s=0.002))
    for stepwise in (True, False):
        record = serve(several(1, 5), full_depth(), {"flat": gaps}, schedule_ahead=1, stepwise=stepwise).records[0]
        assert record.last_token_ns == 5 * 1_300_000 + 2_000_000
