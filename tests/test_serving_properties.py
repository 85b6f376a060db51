"""Invariants of the serving loop over random workloads, profiles, deployments and numbers of replicas."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict

from hypothesis import HealthCheck, given, settings, strategies as st

from helios_sim.request import Status
from helios_sim.routing import Router
from rig import full_depth, serve
from serving_cases import cases, run, scripts, uneven_profiles, whole_cases, workloads

SLOW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@SLOW
@given(**cases, ahead=st.sampled_from([0, 1]))
def test_leaps_and_single_steps_give_the_same_bits(workload, script, replicas, router, pool_blocks, ahead) -> None:
    leaping = run(workload, script, replicas, router, pool_blocks, True, None, ahead)
    stepping = run(workload, script, replicas, router, pool_blocks, False, None, ahead)
    assert leaping.records == stepping.records
    for fast, slow in zip(leaping.run.servers, stepping.run.servers, strict=True):
        assert fast.decisions == slow.decisions
        assert asdict(fast.stats) == asdict(slow.stats)


@SLOW
@given(arguments=whole_cases)
def test_they_do_so_with_everything_that_a_run_can_hold(arguments) -> None:
    leaping, stepping = (serve(**deepcopy(arguments), leap=leap, ahead=False) for leap in (True, False))
    assert leaping.records == stepping.records
    for fast, slow in zip(leaping.run.servers, stepping.run.servers, strict=True):
        assert [(d.time_ns, d.cause, d.deployment.active) for d in fast.decisions] == [
            (d.time_ns, d.cause, d.deployment.active) for d in slow.decisions
        ]
        assert asdict(fast.stats) == asdict(slow.stats)


@SLOW
@given(**cases, sync_s=st.sampled_from([0.0, 2e-5]), ahead=st.sampled_from([0, 1]))
def test_they_do_so_too_where_every_iteration_costs_something_else(
    workload, script, replicas, router, pool_blocks, sync_s, ahead
) -> None:
    made = uneven_profiles(sync_s)
    leaping = run(workload, script, replicas, router, pool_blocks, True, made, ahead)
    stepping = run(workload, script, replicas, router, pool_blocks, False, made, ahead)
    assert leaping.records == stepping.records
    assert asdict(leaping.run.stats) == asdict(stepping.run.stats)


@SLOW
@given(
    workload=workloads,
    script=scripts(),
    pool_blocks=st.sampled_from([4, 9, 40, 1000]),
    sync_s=st.sampled_from([0.0, 2e-5]),
    ahead=st.sampled_from([0, 1]),
)
def test_iterations_computed_ahead_give_the_same_bits_as_single_steps(
    workload, script, pool_blocks, sync_s, ahead
) -> None:
    made = uneven_profiles(sync_s)
    compiled = run(workload, script, 1, Router.ROUND_ROBIN, pool_blocks, True, made, ahead)
    stepping = run(workload, script, 1, Router.ROUND_ROBIN, pool_blocks, False, made, ahead)
    assert compiled.records == stepping.records
    (fast,), (slow,) = compiled.run.servers, stepping.run.servers
    assert fast.decisions == slow.decisions
    assert asdict(fast.stats) == asdict(slow.stats)
    if all(record.status is not Status.UNFINISHED for record in compiled.records):  # else a forgotten alarm is the end
        assert compiled.run.end_ns == stepping.run.end_ns


@SLOW
@given(**cases)
def test_every_request_leaves_once_and_memory_returns(workload, script, replicas, router, pool_blocks) -> None:
    served = run(workload, script, replicas, router, pool_blocks, leap=True)
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
