"""Prefix caching: hits equal a plain reference to the block, invariants hold, and depth decides what can be shared."""

from __future__ import annotations

import gzip
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from helios_sim.core import prefix
from helios_sim.core.machine import is_made
from helios_sim.exits.rule import FixedCap, FullDepth
from helios_sim.policy.deployment import Completed, Deployment, KvRule, Placement
from helios_sim.profile.synthetic import flat_profile
from helios_sim.request import RequestBlock
from helios_sim.routing import Router
from helios_sim.shared_data import shared_data_folder
from helios_sim.workload import AllAtOnce, Constant, Fixed, generate
from helios_sim.workload.prefixes import SharedPrefixes
from rig import Scripted, Served, full_depth, serve, workload
from serving_cases import choose_case, drawn_by

SLOW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TRACE = shared_data_folder() / "traces" / "mooncake_conversation.jsonl.gz"
Segments = Sequence[tuple[int, int]]  # whose text, and how many tokens of it


def reference(prompts: Sequence[Segments], answers: Sequence[int], block: int, total: int) -> list[int]:
    """Tokens that each request finds, one served after the other: a queue of free blocks, the longest free first."""
    queue: OrderedDict[int, tuple | None] = OrderedDict.fromkeys(range(total))  # number of a block: what it holds
    where: dict[tuple, dict[int, None]] = {}
    hits = []
    for segments, answer in zip(prompts, answers, strict=True):
        tokens = [(text, place) for text, n in segments for place in range(0, n, block)]  # each stands for a block
        length, chain, texts = sum(n for _, n in segments), [], ()
        for token in tokens[: length // block]:
            texts = (hash((texts, token)),)
            chain.append(texts)
        found = []
        for key in chain[: (length - 1) // block]:
            if not where.get(key):
                break
            found.append(next(iter(where[key])))
            del queue[found[-1]]
        hits.append(len(found) * block)
        held = [(number, chain[i]) for i, number in enumerate(found)]
        for i in range(len(found), -(-(length + answer - 1) // block)):
            number, old = queue.popitem(last=False)
            if old is not None:
                del where[old][number]
            held.append((number, chain[i] if i < len(chain) else None))
            if held[-1][1] is not None:
                where.setdefault(held[-1][1], {})[number] = None
        queue.update(reversed(held))
    return hits


def served(prompts: Sequence[Segments], answers: Sequence[int], block: int, total: int | None, **more) -> Served:
    """The same requests, of one character a token, with so many blocks (None: more than ever needed)."""
    n = len(prompts)
    lengths = np.array([sum(tokens for _, tokens in segments) for segments in prompts])
    zeros, numbers = np.zeros(n, np.int64), np.arange(n)
    requests = RequestBlock(numbers, zeros, lengths, np.array(answers), zeros, zeros, zeros, numbers)
    profile = flat_profile(0.001)
    blocks = 10**7 if total is None else total
    hbm_bytes = profile.weight_bytes(4) + blocks * block * profile.kv_bytes_per_token(4)
    return serve(
        workload(n), full_depth(), {"flat": profile}, blocks=iter([requests]), shares=True, block_tokens=block,
        prefixes=SharedPrefixes.of(prompts), hbm_bytes=hbm_bytes, utilisation=1.0,
        **({"max_running_requests": 1} | more),
    )  # fmt: skip


def found(run: Served) -> list[int]:
    return [record.cached_tokens for record in run.by_request()]


# --- the Mooncake trace, where each of the hash_ids stands for 512 tokens


def mooncake() -> tuple[list[Segments], list[int]]:
    if not TRACE.is_file():
        pytest.skip(f"{TRACE} is not there")
    with gzip.open(TRACE) as lines:
        rows = [json.loads(line) for line in lines]
    prompts = [
        [(text, min(512, row["input_length"] - 512 * i)) for i, text in enumerate(row["hash_ids"])] for row in rows
    ]
    return prompts, [min(row["output_length"], 3) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("total", [None, 20_000, 2_000])
def test_hits_on_the_mooncake_trace_equal_the_reference_to_the_block(total: int | None) -> None:
    prompts, answers = mooncake()
    run = served(prompts, answers, 512, total, compiled=None)
    expected = reference(prompts, answers, 512, total or 10**6)
    assert found(run) == expected
    assert sum(expected) == run.run.stats.prefix_cache_hits > 0
    assert run.run.stats.prefix_cache_queries == sum(n for segments in prompts for _, n in segments)


@pytest.mark.slow
@pytest.mark.parametrize("total", [None, 30_000])
def test_blocks_of_sixteen_tokens_lie_within_its_ids(total: int | None) -> None:
    prompts, answers = (part[:300] for part in mooncake())
    assert found(served(prompts, answers, 16, total)) == reference(prompts, answers, 16, total or 10**6)


# --- any prompts


texts = st.lists(st.sampled_from([(0, 8), (1, 8), (2, 12), (3, 4), (4, 40)]), min_size=1, max_size=6)


@pytest.mark.slow
@SLOW
@given(prompts=st.lists(texts, min_size=1, max_size=25), block=st.sampled_from([1, 2, 4]), total=st.integers(60, 400),
       answers=st.lists(st.integers(1, 9), min_size=25, max_size=25))  # fmt: skip
def test_any_prompts_find_what_the_reference_finds(prompts, block, total, answers) -> None:
    answers = answers[: len(prompts)]
    total = max(total, max(sum(n for _, n in segments) for segments in prompts) + 9)
    run = served(prompts, answers, block, total)
    assert found(run) == reference(prompts, answers, block, total)
    assert run.run.servers[0].used_blocks == 0


# --- invariants, in all ways to run


def sharing(blocks: Iterator[RequestBlock], rows: int, sessions: int) -> Iterator[RequestBlock]:
    """The same requests, most of which begin alike or belong to a session."""
    for block in blocks:
        streams = block.request_id % (sessions + 1) - 1
        yield replace(block, shared=block.request_id * 7 % (rows + 1) - 1, stream=streams)


def check(server) -> None:
    """Every block is held, queued or empty; what is known is found in its bucket; and seats hold what they count.

    Blocks have numbers while they are known, or were until their iteration was given up while two requests held them.
    """
    replica = server._replica if server._opened else None
    if replica is None or not replica.prefix.shares:
        return
    s, c = replica.state, replica.prefix._tables
    made = int(s.made_blocks)
    blocks = c.blocks[: made + 1]
    holders = blocks[1:, prefix.HOLDERS]
    held, unknown = np.zeros(made + 1, np.int64), 0
    free = set(c.seats[: int(s.free_seats), prefix.FREE].tolist())
    for seat in set(range(len(c.seats))) - free:
        held[c.table[seat, : c.seats[seat, prefix.KNOWN]]] += 1
        unknown += c.seats[seat, prefix.HELD] - c.seats[seat, prefix.KNOWN]
    assert (holders == held[1:]).all()
    assert (holders >= 0).all()
    assert s.used_blocks == (holders > 0).sum() + unknown
    places = np.arange(int(s.queue_first), int(s.queue_end))
    assert len(places) <= len(c.queue)
    entries = c.queue[places & (len(c.queue) - 1)]
    numbers, places = entries[entries > 0], places[entries > 0]
    queue = numbers[blocks[numbers, prefix.PLACE] == places].tolist()
    assert len(queue) == len(set(queue)) == s.queued_blocks + entries[entries < 0].sum()
    assert (holders[np.array(queue, int) - 1] == 0).all()
    assert (blocks[np.array(queue, int), prefix.HASH] >= 0).all()
    spare, block = [], int(s.spare_block)
    while block:
        spare.append(block)
        block = int(c.rings[block, prefix.AFTER])
    assert set(spare) == set(range(1, made + 1)) - set(queue) - set(np.flatnonzero(held).tolist())
    assert s.used_blocks + s.queued_blocks <= s.total_blocks
    known = set()
    for bucket, first in enumerate(c.buckets.tolist()):
        block = first
        while block:
            known.add(block)
            assert blocks[block, prefix.HASH] & (len(c.buckets) - 1) == bucket
            assert c.rings[c.rings[block, prefix.AFTER], prefix.BEFORE] == block
            block = int(c.rings[block, prefix.AFTER])
            block = 0 if block == first else block
    assert known == set((np.flatnonzero(blocks[1:, prefix.HASH] >= 0) + 1).tolist())


TEXTS = SharedPrefixes.of([[(0, 20)], [(0, 9), (1, 11)], [(2, 33)], [(0, 64)]])


@pytest.mark.slow
@SLOW
@given(case=drawn_by(choose_case), sessions=st.integers(0, 4), by_prefix=st.booleans())
def test_invariants_and_the_same_bits_in_all_ways_to_run(case, sessions, by_prefix) -> None:
    runs = []
    if by_prefix:
        case = case | {"router": Router.PREFIX_AWARE}
    for way in ({"stepwise": True, "watch": check}, {"stepwise": False}, {"compiled": True}):
        if "compiled" in way and not is_made():
            continue  # to compile takes longer than all of this
        policy = case["policy"]
        own = Scripted(policy.first, list(policy.then)) if isinstance(policy, Scripted) else policy
        if runs and not isinstance(policy, Scripted):
            return  # a policy that learns is asked once
        blocks = sharing(generate(case["workload"], case.get("seed", 0)), 4, sessions)
        arguments = case | {"policy": own, "blocks": blocks, "shares": True, "prefixes": TEXTS} | way
        runs.append(serve(**arguments))
    for run in runs:
        assert all(server.used_blocks == 0 for server in run.run.servers)
        assert run.by_request() == runs[0].by_request()
        assert asdict(run.run.stats) == asdict(runs[0].run.stats)


# --- rules, one by one


def test_at_least_one_token_is_computed_and_only_full_blocks_are_found() -> None:
    same = [[(7, 32)]] * 3
    assert found(served(same, [1, 1, 1], 16, None)) == [0, 16, 16]
    assert found(served([[(7, 40)]] * 2, [1, 1], 16, None)) == [0, 32]


def test_a_request_that_enters_beside_another_finds_its_blocks_at_once() -> None:
    run = served([[(7, 40)]] * 3, [5, 5, 5], 16, None, max_running_requests=8)
    assert found(run) == [0, 32, 32]
    assert len({record.first_token_ns for record in run.records}) == 1


def test_shared_blocks_are_counted_once() -> None:
    """Ten requests of ten blocks, nine of them shared: 9 + 10 blocks run together, and without sharing just one."""
    prompts = [[(0, 144), (request + 1, 15)] for request in range(10)]
    run = served(prompts, [1] * 10, 16, 19, max_running_requests=10)
    assert len({record.first_token_ns for record in run.records}) == 1
    assert run.run.stats.preemptions == 0


def test_an_answer_is_found_by_the_next_prompt_of_its_session() -> None:
    two = workload(2, prompt=Fixed(16), output=Fixed(33), arrivals=Constant(1.0))
    (block,) = generate(two, 0)
    block = replace(block, prompt_chars=np.array([16, 64]), stream=np.array([5, 5]))
    run = serve(two, full_depth(), blocks=iter([block]), shares=True)
    assert found(run) == [0, 48]
    run = serve(two, full_depth(), blocks=iter([replace(block, stream=np.array([5, 6]))]), shares=True)
    assert found(run) == [0, 0]


def stages(*deployments: Deployment) -> Scripted:
    """Each deployment for one request, then the next one."""
    first, *then = (replace(d, triggers=(Completed(1),)) for d in deployments)
    return Scripted(first, list(then))


def capped(layers: int, model: str = "flat") -> Deployment:
    rule = FullDepth() if layers == 4 else FixedCap(0.7)
    return Deployment(Placement(model, layers), rule, kv_rule=KvRule.NONE)


@pytest.mark.parametrize(
    ("deployments", "expected"),
    [
        ([capped(4), capped(4)], [0, 48]),
        ([capped(2), capped(2)], [0, 48]),  # a cap serves the same cap
        ([capped(4), capped(2)], [0, 48]),  # and what reaches deeper serves a lower one
        ([capped(2), capped(4)], [0, 0]),  # a raise needs layers that were not computed
        ([capped(4), capped(2), capped(4)], [0, 48, 0]),  # the lower cap has given the memory of deeper ones away
        ([capped(4), capped(4, "other"), capped(4)], [0, 0, 0]),  # another model keeps nothing
    ],
)
def test_depth_and_model_decide_what_is_found(deployments, expected) -> None:
    n = len(deployments)
    apart = workload(n, prompt=Fixed(50), output=Fixed(2), arrivals=Constant(1.0))
    (block,) = generate(apart, 0)
    profiles = {name: flat_profile(0.001, name=name) for name in ("flat", "other")}
    run = serve(
        apart, stages(*deployments), profiles, blocks=iter([replace(block, shared=np.zeros(n, np.int64))]),
        shares=True, prefixes=SharedPrefixes.of([[(0, 50)]]),
    )  # fmt: skip
    assert found(run) == expected


def test_a_policy_is_told_what_was_found_lately_and_what_is_cached() -> None:
    """Three prompts of 40 tokens begin alike, of which 32 are two full blocks: 64 of 120 tokens are found."""
    n = 3
    apart = workload(n, prompt=Fixed(40), output=Fixed(2), arrivals=Constant(1.0))
    (block,) = generate(apart, 0)
    policy = Scripted(replace(capped(4), triggers=(Completed(1),)), [None] * n)
    arguments = {"blocks": iter([replace(block, shared=np.zeros(n, np.int64))])}
    serve(apart, policy, shares=True, prefixes=SharedPrefixes.of([[(0, 40)]]), **arguments)
    assert [seen.prefix_hit_share for _, seen in policy.asked] == [0.0, 32 / 80, 64 / 120]
    assert [seen.prefix_cached_tokens for _, seen in policy.asked] == [32] * n
    policy = Scripted(replace(capped(4), triggers=(Completed(1),)), [None] * n)
    serve(apart, policy)
    assert {(seen.prefix_hit_share, seen.prefix_cached_tokens) for _, seen in policy.asked} == {(None, 0)}


def test_a_preempted_request_finds_its_blocks_again_and_that_is_counted_apart() -> None:
    run = served([[(request, 100)] for request in range(2)], [40] * 2, 16, 15, max_running_requests=2)
    stats = run.run.stats
    assert stats.preemptions > 0
    assert stats.prefix_cache_refound > 0
    assert (stats.prefix_cache_hits, stats.prefix_cache_queries) == (0, 200)


def test_without_the_setting_nothing_is_looked_for() -> None:
    run = serve(workload(2, arrivals=AllAtOnce()), full_depth())
    assert found(run) == [None, None]
    assert run.run.stats.prefix_cache_queries == 0
