"""When a policy is asked, against counters that look at one token, one request or one millisecond at a time."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from helios_sim.errors import UserError
from helios_sim.exits.artificial import no_exits, synthetic_trace
from helios_sim.exits.rule import Confidence, FixedCap
from helios_sim.policy.deployment import (
    AtTime,
    BreachLimit,
    Completed,
    Deployment,
    Drained,
    KvAbove,
    KvRule,
    Placement,
    QueueAbove,
    RunningAbove,
    Trigger,
)
from helios_sim.policy.telemetry import Telemetry
from helios_sim.profile.synthetic import flat_profile
from helios_sim.workload import AllAtOnce, ClosedLoop, Constant, Exponential, Workload
from helios_sim.workload.arrivals import ArrivalSampler
from rig import WAYS_TO_RUN, Scripted, full_depth, serve, workload

MS = 1_000_000


def capped(*triggers, layers: int = 2, **other) -> Deployment:
    return Deployment(Placement("flat", layers), FixedCap(0.7), kv_rule=KvRule.NONE, triggers=triggers, **other)


def asked(policy: Scripted, kind: type) -> list[int]:
    return [telemetry.now_ns for cause, telemetry in policy.asked if isinstance(cause, kind)]


@dataclass(frozen=True)
class Bursts:
    """Arrivals at these moments, in ms."""

    moments_ms: tuple[int, ...]

    def sampler(self, rng: np.random.Generator) -> ArrivalSampler:
        return lambda first, n: MS * np.array(self.moments_ms[first : first + n], np.int64)


# --- breaches


def breach_times(limit: BreachLimit, policy: Scripted, work: Workload) -> list[tuple[int, int]]:
    """(time, breaches in the window) at which the limit should fire, token by token; serves `policy` meanwhile."""
    trace = synthetic_trace("flat", (2, 4), tokens=300, seed=9, chars_per_token=1)
    window: deque[bool] = deque(maxlen=limit.window_tokens)
    expected: list[tuple[int, int]] = []

    def count(server, plan, start_ns: int, end_ns: int) -> None:
        deployment = server._replica.deployment
        cap = trace.exits.index(plan.run_layers)
        for member in plan.members[: plan.decoding]:
            if deployment.observe_tokens is not None and member.generated < deployment.observe_tokens:
                continue
            row = member.span.first + (member.span.start + member.generated) % member.span.length
            window.append(cap == 0 and bool(trace.recorded(Confidence.MAX_PROBABILITY)[row, cap] < 0.7))
        if len(window) == limit.window_tokens and sum(window) > limit.limit:
            expected.append((end_ns, sum(window)))
            window.clear()

    serve(work, policy, traces={"flat": trace}, on_plan=count)
    return expected


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    window=st.integers(1, 60),
    share=st.floats(0.3, 0.75),
    arrivals=st.sampled_from([AllAtOnce(), ClosedLoop(1), ClosedLoop(7), Constant(90.0)]),
    requests=st.integers(1, 15),
    observe=st.sampled_from([None, None, 3]),
)
def test_the_breach_limit_fires_at_the_iteration_that_exceeds_it(
    window, share, arrivals, requests, observe
) -> None:
    """With windows shorter and longer than an iteration's tokens, and again after it was cleared."""
    limit = BreachLimit(window, int(window * share))
    policy = Scripted(capped(limit, observe_tokens=observe))
    expected = breach_times(limit, policy, workload(requests, arrivals=arrivals, output=Exponential(30)))
    assert [(t.now_ns, t.breaches_in_window) for _, t in policy.asked] == expected


def test_several_limits_are_each_watched() -> None:
    """Alone and together they fire at the same times, in whichever order they stand."""
    limits = [BreachLimit(10, 6), BreachLimit(40, 20)]
    work = workload(12, arrivals=ClosedLoop(3), output=Exponential(40))
    alone = {}
    for limit in limits:
        policy = Scripted(capped(limit))
        alone[limit] = breach_times(limit, policy, work)
        assert len(alone[limit]) > 1
    for together in (limits, limits[::-1]):
        policy = Scripted(capped(*together))
        serve(work, policy, traces={"flat": synthetic_trace("flat", (2, 4), tokens=300, seed=9, chars_per_token=1)})
        for limit in limits:
            times = [(t.now_ns, t.breaches_in_window) for cause, t in policy.asked if cause == limit]
            assert times == alone[limit]


@pytest.mark.parametrize("keeps_placement", [True, False])
def test_only_a_deployment_that_changes_the_placement_clears_the_window(keeps_placement: bool) -> None:
    """A new deployment after each request, with the same limit. Back and forth between two caps nothing is counted."""
    limit = BreachLimit(25, 12)
    work = workload(12, arrivals=ClosedLoop(1), output=20)
    steady = Scripted(capped(limit))
    expected = breach_times(limit, steady, work)
    assert len(expected) > 2
    renewed = [capped(limit, Completed(1), reason=f"{i}", layers=2) for i in range(100)]
    if not keeps_placement:
        renewed = [replace(d, active=Placement("flat", 4 if i % 2 else 2)) for i, d in enumerate(renewed)]
    policy = Scripted(renewed[0], renewed[1:])
    breach_times(limit, policy, work)
    assert asked(policy, BreachLimit) == ([time_ns for time_ns, _ in expected] if keeps_placement else [])


def test_full_depth_never_breaches() -> None:
    """No exits are known, so an iteration's tokens are all alike."""
    profile = flat_profile(0.001)
    policy = Scripted(full_depth_with(BreachLimit(1, 0)))
    serve(workload(3, output=5), policy, {"flat": profile}, {"flat": no_exits(profile.model)})
    assert policy.asked == []


# --- the others


def test_completed_counts_since_the_decision_and_since_it_last_fired() -> None:
    policy = Scripted(full_depth_with(Completed(3)))
    serve(workload(10, arrivals=ClosedLoop(1)), policy)
    assert [t.completed_requests for _, t in policy.asked] == [3, 6, 9]
    policy = Scripted(full_depth_with(Completed(3)), [full_depth_with(Completed(2))])
    serve(workload(10, arrivals=ClosedLoop(1)), policy)
    assert [t.completed_requests for _, t in policy.asked] == [3, 5, 7, 9]


def full_depth_with(*triggers, **other) -> Deployment:
    return replace(full_depth(), triggers=triggers, **other)


@pytest.mark.parametrize("stepwise", [False, True])
def test_a_time_fires_once_exactly_when_idle_and_at_the_end_of_the_iteration_when_busy(stepwise: bool) -> None:
    """Requests come at 100, 200, 300 ms and run for 10."""
    times = (0, 50_300_000, 103_300_000, 104 * MS, 150 * MS, 205_000_001)
    policy = Scripted(full_depth_with(*map(AtTime, times)))
    serve(workload(3, arrivals=Constant(10.0)), policy, stepwise=stepwise)
    assert [(cause.time_ns, t.now_ns) for cause, t in policy.asked] == [
        (0, 0),
        (50_300_000, 50_300_000),
        (103_300_000, 104 * MS),
        (104 * MS, 104 * MS),
        (150 * MS, 150 * MS),
        (205_000_001, 206 * MS),
    ]


@pytest.mark.parametrize("stepwise", [False, True])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_time_fires_at_an_idle_server_although_a_request_is_rejected_then(replicas: int, stepwise: bool) -> None:
    """Requests that can never run come every 10 ms; the alarm is at the moment of one of them."""
    policy = Scripted(full_depth_with(AtTime(30 * MS)))
    profiles = {"flat": flat_profile(0.001, max_context_tokens=8)}
    served = serve(workload(6, arrivals=Constant(100.0)), policy, profiles, replicas=replicas, stepwise=stepwise)
    assert {r.drop_reason for r in served.records} == {"context of flat exceeded"}
    assert [t.now_ns for _, t in policy.asked] == [30 * MS]


@pytest.mark.parametrize("stepwise", [False, True])
def test_a_queue_is_reported_once_until_it_has_been_short_again(stepwise: bool) -> None:
    """One at a time, 10 ms each; one comes every 4 ms. At 20 ms 4 wait and one of them starts; at 24 ms there are 4
    again, and from then on more."""
    policy = Scripted(replace(full_depth(batch_limit=1), triggers=(QueueAbove(3),)))
    serve(workload(24, arrivals=Constant(250.0)), policy, stepwise=stepwise)
    assert [(t.now_ns, t.queued_requests) for _, t in policy.asked] == [(20 * MS, 4), (24 * MS, 4)]

    twice = Scripted(replace(full_depth(batch_limit=1), triggers=(QueueAbove(0),)))
    serve(workload(4, arrivals=Constant(60.0), output=20), twice, stepwise=stepwise)
    assert [t.queued_requests for _, t in twice.asked] == [1] * 4  # the first one too: it comes to an idle server


@pytest.mark.parametrize("way", WAYS_TO_RUN)
def test_running_and_memory_are_reported_once_until_they_have_been_low_again(way: dict[str, bool]) -> None:
    """Four requests of 10 ms, 4 ms apart, and after a pause four more: the third one that runs is reported, and as the
    first is done by then, so is the fourth. 8 of 20 blocks are two fifths."""
    profile = flat_profile(0.001)
    memory = {"hbm_bytes": profile.weight_bytes(4) + 20 * 4 * profile.kv_bytes_per_token(4), "utilisation": 1.0}

    def asked_by(trigger: Trigger) -> list[Telemetry]:
        policy = Scripted(replace(full_depth(), triggers=(trigger,)))
        work = workload(8, arrivals=Bursts((0, 4, 8, 12, 60, 64, 68, 72)))
        serve(work, policy, {"flat": profile}, block_tokens=4, **memory, **way)
        return [seen for _, seen in policy.asked]

    ran = asked_by(RunningAbove(2))
    assert [(seen.now_ns // (60 * MS), seen.running_requests) for seen in ran] == [(0, 3), (0, 3), (1, 3), (1, 3)]
    full = asked_by(KvAbove(0.4))
    assert [seen.now_ns // (60 * MS) for seen in full] == [0, 0, 1, 1]
    assert all(seen.kv_used_share == 0.45 for seen in full)  # the ninth block
    assert asked_by(KvAbove(1.0)) == []
    assert asked_by(RunningAbove(3)) == []


def test_telemetry_has_the_times_of_the_latest_requests() -> None:
    policy = Scripted(replace(full_depth(batch_limit=2), triggers=(Completed(300),)))
    served = serve(workload(310, output=Exponential(6.0), arrivals=Constant(400.0)), policy)
    ((_, seen),) = policy.asked
    done = [r for r in sorted(served.records, key=lambda r: r.last_token_ns) if r.last_token_ns <= seen.now_ns][-256:]
    assert len(seen.latest) == 256
    assert sorted(seen.latest.e2e_s) == sorted((r.last_token_ns - r.arrival_ns) / 1e9 for r in done)
    assert sorted(seen.latest.ttft_s) == sorted((r.first_token_ns - r.arrival_ns) / 1e9 for r in done)
    assert sorted(seen.latest.queue_s) == sorted((r.scheduled_ns - r.arrival_ns) / 1e9 for r in done)
    gaps = [(r.last_token_ns - r.first_token_ns, r.output_tokens - 1) for r in done]
    defined = [ns / n / 1e9 for ns, n in gaps if n]
    assert np.isnan(seen.latest.tpot_s).sum() == len(gaps) - len(defined)
    assert sorted(seen.latest.tpot_s[~np.isnan(seen.latest.tpot_s)]) == pytest.approx(sorted(defined))


def test_drained_fires_when_the_admitted_are_done_and_nobody_else_starts() -> None:
    """Two may start; a third waits. The second deployment admits nobody, so it is drained at once."""
    first = full_depth_with(Drained(), admit_limit=2)
    policy = Scripted(first, [full_depth_with(Drained(), admit_limit=0), full_depth_with(Drained())])
    served = serve(workload(5), policy)
    assert asked(policy, Drained) == [10 * MS, 10 * MS]
    assert [r.scheduled_ns for r in served.by_request()] == [0, 0, 10 * MS, 10 * MS, 10 * MS]


def test_a_preempted_request_counts_once_against_the_admission_limit() -> None:
    """Room for 30 tokens: both start with 10, one has to go and comes back, and the limit of two is used up."""
    policy = Scripted(full_depth_with(Drained(), admit_limit=2), [full_depth()])
    rig = {"hbm_bytes": 228 + 30 * 16, "utilisation": 1.0, "block_tokens": 1}
    served = serve(workload(3, prompt=10, output=15), policy, **rig)
    assert [r.preemptions > 0 for r in served.by_request()] == [False, True, False]
    third = served.by_request()[2]
    assert third.scheduled_ns == policy.asked[0][1].now_ns == served.by_request()[1].last_token_ns


@pytest.mark.parametrize("observe", [1, 6, 100])
def test_an_evaluation_hands_over_one_observation_of_each_request(observe: int) -> None:
    """Three requests are evaluated on the whole model, then go on at the cap; each yields what its first tokens say."""
    trace = synthetic_trace("flat", (2, 4), tokens=300, seed=4, chars_per_token=1)
    first = Deployment(
        Placement("flat", 4), FixedCap(0.7), kv_rule=KvRule.NONE, run_layers=2, observe_tokens=observe, admit_limit=3,
        triggers=(Drained(),),
    )  # fmt: skip
    policy = Scripted(first, [capped()])
    spans = {}

    def watch(server, plan, start_ns: int, end_ns: int) -> None:
        spans.update({member.request.request_id: member.span for member in plan.members})

    work = workload(6, output=Exponential(20, minimum=2))
    served = serve(work, policy, traces={"flat": trace}, on_plan=watch)
    ((cause, telemetry),) = policy.asked
    assert isinstance(cause, Drained)
    assert sorted(o.request_id for o in telemetry.observations) == [0, 1, 2]
    for observation in telemetry.observations:
        record = served.by_request()[observation.request_id]
        n = min(observe, record.output_tokens)
        rows = spans[observation.request_id].indices()[:n]
        assert record.evaluated_tokens == n
        assert np.array_equal(observation.agrees, trace.agree[rows])
        assert np.array_equal(observation.confident, trace.confident_at(0.7, Confidence.MAX_PROBABILITY)[rows])
        assert observation.chars == n
        assert record.layers_run == 4 * n + 2 * (record.output_tokens - n)
        assert observation.time_ns == n * MS
    assert {r.evaluated_tokens for r in served.by_request()[3:]} == {0}


def test_a_policy_that_contradicts_its_own_triggers_is_told_so() -> None:
    """It decides the same again at once, forever: an error of the user, with its message."""
    always = full_depth_with(QueueAbove(0), batch_limit=1, admit_limit=0)

    class Stubborn(Scripted):
        def decide(self, cause, telemetry) -> Deployment:
            return always

    with pytest.raises(UserError, match="at most 1000 times at one moment"):
        serve(workload(2), Stubborn(always))


def test_a_policy_s_own_error_reaches_its_user_whole() -> None:
    class Refuses(Scripted):
        def decide(self, cause, telemetry) -> Deployment:
            raise UserError("policy.x", 3, "x must be even", "set policy.x=4")

    with pytest.raises(UserError, match=r"policy.x=3: x must be even. Fix: set policy.x=4."):
        serve(workload(2, arrivals=ClosedLoop(1)), Refuses(full_depth_with(Completed(1))))


def test_flat_iterations_take_a_millisecond() -> None:
    assert serve(workload(1), full_depth(), {"flat": flat_profile(0.001)}).run.end_ns == 10 * MS
