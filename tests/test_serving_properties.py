"""Invariants of the serving loop over random workloads, profiles, deployments and numbers of replicas."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, replace

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from digests.serving import case_digests
from helios_sim.request import Status
from rig import Served, full_depth, serve
from serving_cases import cases, run, uneven_profiles, whole_cases, workloads

pytestmark = pytest.mark.slow

SLOW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def same(one: Served, other: Served) -> None:
    """To the last bit: every record, decision and integral, and when it all ended."""
    assert one.by_request() == other.by_request()
    for fast, slow in zip(one.run.servers, other.run.servers, strict=True):
        assert [(d.time_ns, d.cause, d.deployment.active) for d in fast.decisions] == [
            (d.time_ns, d.cause, d.deployment.active) for d in slow.decisions
        ]
        assert asdict(fast.stats) == asdict(slow.stats)
    assert (one.run.requests, one.run.presence_ns) == (other.run.requests, other.run.presence_ns)
    if all(record.status is not Status.UNFINISHED for record in one.records):  # else a forgotten alarm is the end
        assert one.run.end_ns == other.run.end_ns


@SLOW
@given(**cases, ahead=st.sampled_from([0, 1]))
def test_ahead_of_the_clock_and_step_by_step(workload, script, replicas, router, pool_blocks, ahead) -> None:
    same(*(run(workload, script, replicas, router, pool_blocks, stepwise, None, ahead) for stepwise in (False, True)))


@SLOW
@given(arguments=whole_cases)
def test_the_same_with_everything_that_a_run_can_hold(arguments) -> None:
    same(*(serve(**deepcopy(arguments), stepwise=stepwise) for stepwise in (False, True)))


@pytest.mark.parametrize("seed", [725, 1956, 2227, 4836])
def test_cases_that_once_differed(seed: int) -> None:
    """A time that passed unseen, a rejected arrival that made a turn, a decision at time 0, an end during a probe."""
    assert case_digests(seed, stepwise=False) == case_digests(seed, stepwise=True)


@SLOW
@given(arguments=whole_cases, stepwise=st.booleans())
def test_compiled_and_interpreted(arguments, stepwise) -> None:
    same(*(serve(**deepcopy(arguments), stepwise=stepwise, compiled=compiled) for compiled in (False, True)))


@SLOW
@given(**cases, sync_s=st.sampled_from([0.0, 2e-5]), ahead=st.sampled_from([0, 1]))
def test_the_same_where_every_iteration_costs_something_else(
    workload, script, replicas, router, pool_blocks, sync_s, ahead
) -> None:
    made = uneven_profiles(sync_s)
    same(*(run(workload, script, replicas, router, pool_blocks, stepwise, made, ahead) for stepwise in (False, True)))


@SLOW
@given(**cases, order=st.sampled_from(["fcfs", "priority", "shortest_prompt"]))
def test_the_same_in_every_order_of_the_waiting_line(workload, script, replicas, router, pool_blocks, order) -> None:
    workload = replace(workload, mix=replace(workload.mix, priorities=tuple(range(len(workload.mix.tasks)))))
    same(*(
        run(workload, script, replicas, router, pool_blocks, stepwise, order=order) for stepwise in (False, True)
    ))  # fmt: skip


@SLOW
@given(**cases)
def test_every_request_leaves_once_and_memory_returns(workload, script, replicas, router, pool_blocks) -> None:
    served = run(workload, script, replicas, router, pool_blocks, stepwise=False)
    # In a closed loop whose answers stop coming the rest is never sent.
    assert sorted(r.request_id for r in served.records) == list(range(served.run.requests))
    stopped = any(r.status is Status.UNFINISHED for r in served.records)
    assert served.run.requests == workload.requests or (stopped and workload.users is not None)
    for server in served.run.servers:
        assert server.used_blocks == 0
        assert server.requests_in_system == 0
    for record in served.records:
        if record.status is Status.COMPLETED:
            assert record.arrival_ns <= record.scheduled_ns < record.first_token_ns <= record.last_token_ns
            assert record.output_tokens >= 1
            assert 2 * record.output_tokens <= record.layers_run <= 4 * record.output_tokens
            assert max(record.early_tokens, record.agreed_tokens, record.evaluated_tokens) <= record.output_tokens
        else:
            assert record.status is Status.UNFINISHED or record.drop_reason


@SLOW
@given(workload=workloads, replicas=st.sampled_from([1, 3]))
def test_every_request_completes_when_memory_is_ample(workload, replicas) -> None:
    served = serve(workload, full_depth(), replicas=replicas)
    assert {r.status for r in served.records} == {Status.COMPLETED}
    assert served.run.stats.preemptions == 0
