"""Invariants of the serving loop over random workloads, profiles, deployments and numbers of replicas."""

from __future__ import annotations

from copy import deepcopy

from hypothesis import HealthCheck, given, settings, strategies as st

from helios_sim.request import Status
from rig import AHEAD, STEPWISE, full_depth, serve
from serving_cases import cases, orders, run, uneven_profiles, whole_cases, workloads

SLOW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@SLOW
@given(**cases, schedule_ahead=st.sampled_from([0, 1]), order=orders)
def test_ahead_of_the_clock_and_step_by_step_the_bits_are_the_same(
    workload, script, replicas, router, pool_blocks, schedule_ahead, order
) -> None:
    case = workload, script, replicas, router, pool_blocks, None, schedule_ahead
    ahead, stepwise = (run(*case, order=order, **how) for how in (AHEAD, STEPWISE))
    assert ahead.everything() == stepwise.everything()


@SLOW
@given(arguments=whole_cases, order=orders)
def test_so_they_are_with_everything_that_a_run_can_hold(arguments, order) -> None:
    ahead, stepwise = (serve(**deepcopy(arguments), order=order, **how) for how in (AHEAD, STEPWISE))
    assert ahead.everything() == stepwise.everything()


@SLOW
@given(**cases, sync_s=st.sampled_from([0.0, 2e-5]), schedule_ahead=st.sampled_from([0, 1]))
def test_so_they_are_where_every_iteration_costs_something_else(
    workload, script, replicas, router, pool_blocks, sync_s, schedule_ahead
) -> None:
    case = workload, script, replicas, router, pool_blocks, uneven_profiles(sync_s), schedule_ahead
    ahead, stepwise = (run(*case, **how) for how in (AHEAD, STEPWISE))
    assert ahead.everything() == stepwise.everything()


@SLOW
@given(**cases, order=orders)
def test_every_request_leaves_once_and_memory_returns(workload, script, replicas, router, pool_blocks, order) -> None:
    served = run(workload, script, replicas, router, pool_blocks, order=order)
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
