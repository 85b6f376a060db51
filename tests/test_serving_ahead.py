"""Planning one iteration ahead, as vLLM v1 does: what it hides, what it delays, and where it cannot."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helios_sim.exits.rule import PerToken
from helios_sim.policy.deployment import Deployment, KvRule, Placement, QueueAbove
from helios_sim.profile.synthetic import flat_profile
from helios_sim.workload import Constant
from rig import Scripted, full_depth, serve, workload

ITERATION_NS = 1_000_000


def test_a_request_that_arrives_in_an_iteration_waits_for_one_more() -> None:
    """Request 1 arrives half-way through iteration 5: planned at its end, or only at the end of the next one."""
    two = workload(2, 4, 20, Constant(1 / 0.0045))
    starts = [serve(two, full_depth(), schedule_ahead=ahead).by_request()[1].scheduled_ns for ahead in (0, 1)]
    assert starts == [5 * ITERATION_NS, 6 * ITERATION_NS]


def test_an_idle_server_sees_a_request_at_once() -> None:
    apart = workload(3, 4, 5, Constant(1 / 0.1))
    for record in serve(apart, full_depth(), schedule_ahead=1).records:
        assert record.scheduled_ns == record.arrival_ns


def test_nothing_to_run_ends_the_wait_for_the_plan() -> None:
    """Request 1 arrives in the last iteration of request 0: it starts when that ends, not never."""
    close = workload(2, 4, 5, Constant(1 / 0.0045))
    served = serve(close, full_depth(batch_limit=1), schedule_ahead=1).by_request()
    assert served[1].scheduled_ns == served[0].last_token_ns


def test_host_overhead_is_hidden_behind_the_device() -> None:
    """All of a flat profile is host overhead: alone it takes as long; with launches beside it, they add to the host's
    side only."""
    profile = flat_profile(0.001)
    launched = profile.with_runtime(replace(profile.runtime, launch_s_per_graph=0.0004))
    at_once = workload(1, 4, 5)
    spans = {}
    for ahead in (0, 1):
        for name, used in (("flat", profile), ("launched", launched)):
            served = serve(at_once, full_depth(), {"flat": used}, schedule_ahead=ahead)
            spans[name, ahead] = served.records[0].last_token_ns
    assert spans["flat", 0] == spans["flat", 1] == 5 * ITERATION_NS
    assert spans["launched", 0] == spans["launched", 1] == 5 * 1_400_000


@pytest.mark.slow
def test_device_time_hides_it_entirely() -> None:
    profile = flat_profile(0.001)
    head = replace(profile.head, time_s=profile.head.time_s + 0.003)
    slower = replace(profile, head=head)
    at_once = workload(1, 4, 5)
    spans = [
        serve(at_once, full_depth(), {"flat": slower}, schedule_ahead=ahead).records[0].last_token_ns
        for ahead in (0, 1)
    ]
    assert spans == pytest.approx([5 * 4_000_000, 5 * 3_000_000], abs=5)


def test_an_exit_check_that_the_host_must_see_is_a_barrier() -> None:
    early = Deployment(Placement("flat", 4), PerToken(0.7), kv_rule=KvRule.PROPAGATE)
    several = workload(8, 4, 12, Constant(300.0))
    runs = [serve(several, early, schedule_ahead=ahead).records for ahead in (0, 1)]
    assert runs[0] == runs[1]


def test_a_policy_that_watches_the_queue_is_asked_at_once_all_the_same() -> None:
    """Planning ahead settles what runs next, not when the policy is asked."""
    watching = replace(full_depth(batch_limit=1), triggers=(QueueAbove(2),))
    many = workload(4, 4, 60, Constant(1 / 0.0105))  # the third to wait comes in the 32nd iteration
    asked = []
    for stepwise in (True, False):
        policy = Scripted(watching)
        serve(many, policy, stepwise=stepwise, schedule_ahead=1)
        asked.append([telemetry.now_ns for _, telemetry in policy.asked])
    assert asked[0] == asked[1] == [32 * ITERATION_NS]
