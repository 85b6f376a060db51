"""The router `prefix_aware`: its choices are those of a plain reference that knows arrivals, departures and prompts."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import takewhile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from helios_sim.core.machine import is_made
from helios_sim.core.route import score
from helios_sim.exits.rule import FixedCap
from helios_sim.policy.deployment import Deployment, KvRule, Placement
from helios_sim.request import RequestBlock
from helios_sim.routing import DOWN, Router, Routing
from helios_sim.workload import Constant, Fixed, generate
from helios_sim.workload.prefixes import SharedPrefixes
from rig import Scripted, Served, full_depth, serve, workload

BLOCK = 4
ROWS = SharedPrefixes.of([[(0, 40)], [(1, 24)], [(0, 16), (2, 24)], [(3, 8)]])
SLOW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def served(rows: list[int], gaps_ms: list[int], lengths: list[int], replicas: int, **ways) -> Served:
    """Requests that come so many ms apart, each with a prompt longer than its row, and far more memory than needed."""
    n = len(rows)
    shared = np.array(rows)
    whole = [sum(_tokens(row)) for row in rows]
    prompts = np.maximum(np.array(lengths), np.array(whole) + 1)
    zeros, numbers = np.zeros(n, np.int64), np.arange(n)
    arrivals = np.cumsum(np.array(gaps_ms)) * 1_000_000 + 1009 * numbers  # so that nothing ends when a request comes
    block = RequestBlock(numbers, arrivals, prompts, np.full(n, 12), zeros, zeros, zeros, shared)
    return serve(
        workload(n), full_depth(), blocks=iter([block]), shares=True, prefixes=ROWS, block_tokens=BLOCK,
        replicas=replicas, router=Router.PREFIX_AWARE, max_batch_tokens=4096, **ways,
    )  # fmt: skip


def _tokens(row: int) -> list[int]:
    ends = ROWS.end_chars[ROWS.starts[row] : ROWS.starts[row + 1]].tolist()
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def blocks_of(row: int) -> list[tuple]:
    """What the full blocks within the shared part of a row's prompts hold, each with all before it."""
    texts = ROWS.ids[ROWS.starts[row] : ROWS.starts[row + 1]].tolist()
    tokens = [(text, place) for text, n in zip(texts, _tokens(row), strict=True) for place in range(n)]
    return [tuple(tokens[:end]) for end in range(BLOCK, len(tokens) + 1, BLOCK)]


def check(run: Served, rows: list[int], replicas: int) -> None:
    """Every request went to the best replica by what each had begun and not finished then, of equals to the first."""
    records = run.by_request()
    for record in records:
        before = [other for other in records if other.request_id < record.request_id]
        inside, shares = [], []
        for number in range(replicas):
            here = [other for other in before if other.replica == number]
            inside.append(sum(other.last_token_ns > record.arrival_ns for other in here))
            begun = [other for other in here if other.scheduled_ns < record.arrival_ns]
            known = {block for other in begun for block in blocks_of(rows[other.request_id])}
            hits = sum(1 for _ in takewhile(known.__contains__, blocks_of(rows[record.request_id])))
            shares.append(Fraction(hits * BLOCK, record.prompt_tokens))
        mean = Fraction(sum(inside), replicas)
        scores = [share - (n - mean) / max(1, mean) for share, n in zip(shares, inside, strict=True)]
        seen = list(zip(shares, inside, strict=True))
        assert scores[record.replica] > max(scores) - Fraction(1, 10**12)
        assert seen.index(seen[record.replica]) == record.replica


cases = {
    "rows": st.lists(st.integers(0, 3), min_size=4, max_size=30),
    "gaps": st.lists(st.integers(0, 40), min_size=30, max_size=30),
    "lengths": st.lists(st.integers(1, 90), min_size=30, max_size=30),
    "replicas": st.integers(2, 4),
}


@pytest.mark.slow
@SLOW
@given(**cases)
def test_each_request_goes_where_the_reference_sends_it(rows, gaps, lengths, replicas) -> None:
    n = len(rows)
    for way in ({"stepwise": True}, {"stepwise": False}, {"compiled": True}):
        if "compiled" in way and not is_made():
            continue
        run = served(rows, gaps[:n], lengths[:n], replicas, **way)
        check(run, rows, replicas)


def test_a_full_replica_gives_way_to_an_empty_one_even_if_it_has_the_whole_prompt() -> None:
    """Twice the mean takes off as much as a prompt that is wholly cached adds."""
    assert score(1.0, 4, 4, 2) == 0.0 < score(0.0, 0, 4, 2) == 1.0
    assert score(0.9, 2, 4, 2) > score(0.0, 2, 4, 2)  # of equals in load, where the prefix is
    assert score(0.5, 1, 1, 4) == 0.5 - 3 / 4  # a mean below 1 counts as 1


def test_turns_of_a_session_stay_together_while_load_is_even() -> None:
    n, users = 40, 4
    long_apart = workload(n, prompt=Fixed(64), output=Fixed(8), arrivals=Constant(1.0))
    (block,) = generate(long_apart, 0)
    turns = np.arange(n) // users
    block = replace(block, stream=np.arange(n) % users, prompt_chars=64 + 72 * turns)
    run = serve(long_apart, full_depth(), blocks=iter([block]), shares=True, replicas=3, router=Router.PREFIX_AWARE)
    homes = {user: {r.replica for r in run.records if r.request_id % users == user} for user in range(users)}
    assert all(len(home) == 1 for home in homes.values())
    assert run.run.stats.prefix_cache_hits > 0.8 * run.run.stats.prefix_cache_queries


def test_what_a_lower_cap_cached_draws_no_request_that_runs_deeper() -> None:
    """Both replicas start alike; the one whose cache reaches as deep as the request runs is preferred."""
    two = workload(3, prompt=Fixed(64), output=Fixed(4), arrivals=Constant(1.0))
    (block,) = generate(two, 0)
    block = replace(block, shared=np.zeros(3, np.int64))
    capped = Deployment(Placement("flat", 2), FixedCap(0.7), kv_rule=KvRule.NONE)
    arguments = {"shares": True, "prefixes": SharedPrefixes.of([[(0, 48)]]), "replicas": 2}
    run = serve(two, Scripted(capped), blocks=iter([block]), router=Router.PREFIX_AWARE, **arguments)
    assert [record.replica for record in run.by_request()] == [0, 0, 0]
    assert [record.cached_tokens for record in run.by_request()] == [0, 48, 48]


def test_a_replica_that_is_down_is_not_chosen_and_does_not_count() -> None:
    (block,) = generate(workload(1), 0)
    (request,) = block.rows()
    choose = Routing(Router.PREFIX_AWARE).choice([3 + DOWN, 3, 1], lambda number, _: (1.0, 0.9, 0.0)[number])
    assert choose(request) == 2  # 3 of a mean of 2: 0.9 - 0.5 is less than 0 + 0.5
    choose = Routing(Router.PREFIX_AWARE).choice([3 + DOWN, 2, 2], lambda number, _: (1.0, 0.9, 0.0)[number])
    assert choose(request) == 1


@pytest.mark.parametrize("stepwise", [True, False])
def test_without_prefixes_it_is_the_router_by_load(stepwise) -> None:
    work = workload(60, prompt=Fixed(20), output=Fixed(30), arrivals=Constant(300.0))
    runs = [serve(work, full_depth(batch_limit=2), replicas=3, router=router, stepwise=stepwise)
            for router in (Router.PREFIX_AWARE, Router.LEAST_LOADED)]  # fmt: skip
    assert runs[0].by_request() == runs[1].by_request()
