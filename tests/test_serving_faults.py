"""Faults: what each kind does, who is told, where requests go, and that no request and no bit is lost."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import islice

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from digests.serving import case, chooser
from fault_cases import ALL_WAYS, MS, check_accounts, checked, choose_plan, signature
from helios_sim.policy.deployment import (
    AtTime,
    Cause,
    Completed,
    Deployment,
    Faulted,
    LoadFailed,
    Probed,
    QueueAbove,
    Trigger,
)
from helios_sim.policy.registry import make_policy
from helios_sim.policy.telemetry import ExpectedLoad, Situation, Telemetry
from helios_sim.profile.synthetic import flat_profile
from helios_sim.request import Status
from helios_sim.routing import Router, Routing
from helios_sim.serving.backoff import Backoff
from helios_sim.simulation import LittlesLawViolated, System
from helios_sim.workload import ClosedLoop, Constant
from helios_sim.workload.faults import Fault, FaultKind, FaultPlan, FaultSpec, Outages
from rig import Scripted, Served, full_depth, serve, workload
from serving_cases import choose_case, drawn_by, profiles

EVERY_20_MS = Constant(50.0)
designs = drawn_by(lambda choose: (choose_case(choose), choose_plan(choose, choose(range(1000)))))


def plan(kind: FaultKind, *at_ms: float, retries: int = 3, **others) -> FaultPlan:
    times = tuple(round(ms * MS) for ms in at_ms)
    return FaultPlan((FaultSpec(kind, times, **others),), retries, seed=0)


def served(faults: FaultPlan | None, **others) -> Served:
    """Requests of 10 tokens, an iteration each ms; both ways, which must agree."""
    arguments = {"workload": workload(8, 5, 10, EVERY_20_MS), "policy": full_depth()} | others
    runs = [serve(**deepcopy(arguments), faults=faults, stepwise=stepwise) for stepwise in (True, False)]
    assert signature(runs[0]) == signature(runs[1])
    check_accounts(runs[0])
    return runs[0]


# --- what each kind does


def test_requests_wait_until_the_only_replica_is_back() -> None:
    """Request 2 begins at 40 ms and dies at 45: it is sent again, and with request 3 waits until 75."""
    run = served(plan(FaultKind.REPLICA_DIES, 45, lasts_ns=30 * MS))
    records = run.by_request()
    assert [r.status for r in records] == [Status.COMPLETED] * 8
    assert [r.first_token_ns // MS for r in records[1:5]] == [21, 76, 76, 81]
    assert records[2].arrival_ns == 40 * MS
    (fault,) = run.run.faults
    assert (fault.hit, fault.retried, fault.lost, fault.wasted_tokens, fault.until_ns) == (True, 1, 0, 4, 75 * MS)
    assert run.run.stats.iterations == 20 + 4 + 15 + 30  # 4 for nothing; requests 2 to 4 run side by side


def test_without_retries_it_is_dropped_with_a_reason() -> None:
    records = served(plan(FaultKind.REPLICA_DIES, 45, lasts_ns=30 * MS, retries=0)).by_request()
    assert records[2].status is Status.DROPPED
    assert records[2].drop_reason == "its replica died, not sent again"
    assert records[2].output_tokens == 4
    assert {r.status for r in records if r.request_id != 2} == {Status.COMPLETED}


@pytest.mark.parametrize("router", [Router.ROUND_ROBIN, Router.LEAST_LOADED, Router.POWER_OF_TWO])
def test_another_replica_serves_meanwhile(router: Router) -> None:
    faults = plan(FaultKind.REPLICA_DIES, 45, lasts_ns=70 * MS, replicas=(0,))
    run = served(faults, workload=workload(12, 5, 10, EVERY_20_MS), replicas=2, router=router)
    records = run.by_request()
    assert {r.status for r in records} == {Status.COMPLETED}
    assert all(r.replica == 1 for r in records if 45 * MS < r.arrival_ns <= 115 * MS)
    assert any(r.replica == 0 for r in records if r.arrival_ns > 115 * MS)
    assert all(r.first_token_ns < r.arrival_ns + 20 * MS for r in records)


def test_an_iteration_that_fails_loses_those_who_ran() -> None:
    run = served(plan(FaultKind.ITERATION_FAILS, 45.5, 72), workload=workload(5, 5, 10, EVERY_20_MS))
    hit, missed = run.run.faults
    assert (hit.hit, hit.retried, hit.wasted_tokens) == (True, 1, 5)
    assert (missed.hit, missed.retried) == (False, 0)  # nothing ran at 72 ms
    assert run.by_request()[2].last_token_ns == 55.5 * MS


def test_an_iteration_that_ends_just_then_is_still_in_progress() -> None:
    assert served(plan(FaultKind.ITERATION_FAILS, 45)).run.faults[0].wasted_tokens == 4


def test_out_of_memory_halves_the_batch_and_keeps_the_text() -> None:
    at_once = workload(8, 5, 10)
    run = served(plan(FaultKind.OUT_OF_MEMORY, 4.5), workload=at_once)
    assert run.run.stats.preemptions == 8
    assert sorted(r.last_token_ns for r in run.records)[3] == int(10.5 * MS)  # four at a time, 4 tokens are done
    assert {r.output_tokens for r in run.records} == {10}
    assert run.run.faults[0].wasted_tokens == 0


def test_a_slow_card_slows_iterations_that_begin_meanwhile() -> None:
    run = served(plan(FaultKind.SLOW_CARD, 2.5, lasts_ns=4 * MS, factor=3.0), workload=workload(1, 5, 10))
    assert run.records[0].last_token_ns == (3 + 2 * 3 + 5) * MS  # those that begin at 3 and at 6 ms
    assert served(None, workload=workload(1, 5, 10)).records[0].last_token_ns == 10 * MS


# --- loads


def raising(*then: Deployment | None) -> Scripted:
    return Scripted(replace(full_depth("a", 2), triggers=(Completed(2),)), list(then))


def test_the_policy_is_told_of_a_load_that_failed() -> None:
    """After two requests it loads layers 3 and 4, in vain; asked again, it does so once more."""
    policy = raising(full_depth("a", 4), full_depth("a", 4))
    made = profiles(0.001, 2**30)
    run = serve(workload(8, 5, 10, EVERY_20_MS), policy, made, faults=plan(FaultKind.LOAD_FAILS, 10))
    causes = [type(cause) for cause, _ in policy.asked]
    assert causes[:2] == [Completed, LoadFailed]
    assert [r.status for r in run.records] == [Status.COMPLETED] * 8
    (server,) = run.run.servers
    assert [type(d.cause) for d in server.decisions[2:4]] == [Faulted, LoadFailed]
    assert server.decisions[-1].deployment.active.layers == 4
    assert server.stats.loads == 2


def test_a_policy_that_says_nothing_stays_with_what_it_had() -> None:
    policy = raising(full_depth("a", 4))
    run = serve(workload(8, 5, 10, EVERY_20_MS), policy, profiles(0.001, 2**30), faults=plan(FaultKind.LOAD_FAILS, 10))
    assert run.run.servers[0].decisions[-1].deployment.active.layers == 2
    assert {r.layers_run for r in run.records} == {2 * 10}


class Stubborn:
    """Wants the other model after two requests, and again whenever it cannot be loaded."""

    def __init__(self, *triggers: Trigger) -> None:
        self.triggers = triggers or (Completed(2),)
        self.told_ns: list[int] = []  # of loads that failed

    def start(self, situation: Situation) -> Deployment:
        return replace(full_depth("a"), triggers=self.triggers)

    def decide(self, cause: Cause, telemetry: Telemetry) -> Deployment:
        if isinstance(cause, LoadFailed):
            self.told_ns.append(telemetry.now_ns)
        return full_depth("b")


NO_LOAD_COMES_THROUGH = FaultPlan((FaultSpec(FaultKind.LOAD_FAILS, rate_per_hour=3600 * 5000.0),), 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("triggers", [(), (AtTime(30 * MS),), (QueueAbove(0),), (Completed(1), AtTime(5 * MS))])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_policy_that_loads_again_and_again_lets_requests_be_served(triggers, replicas: int) -> None:
    run = served(
        NO_LOAD_COMES_THROUGH, workload=workload(16, 5, 10, EVERY_20_MS), policy=Stubborn(*triggers),
        profiles=profiles(0.001, 2**30), replicas=replicas,
    )  # fmt: skip
    assert {record.status for record in run.records} == {Status.COMPLETED}
    for server in run.run.servers:
        assert server.stats.loads <= 2  # the second at once, the third not within ten seconds
        reasons = [decision.deployment.reason for decision in server.decisions]
        assert any("b is not loaded (its loads failed 2 times in a row, not tried before 10.0" in r for r in reasons)
        assert len(reasons) < 5 * 16


def test_a_model_whose_loads_failed_is_loaded_later() -> None:
    """Two loads fail. The policy is told at once of both, and again when the time is over; nothing else asks it."""
    policy = Stubborn(AtTime(30 * MS))
    faults = plan(FaultKind.LOAD_FAILS, 1, 35)
    run = serve(workload(8, 5, 10, Constant(0.5)), policy, profiles(0.001, 2**30), faults=faults)
    (server,) = run.run.servers
    assert [type(d.cause) for d in server.decisions if d.deployment.active.model == "b"][-1] is LoadFailed
    last = policy.told_ns[-1]
    assert last == policy.told_ns[1] + 10_000 * MS
    assert [(r.arrival_ns > last, r.model) for r in run.by_request()] == [(False, "a")] * 6 + [(True, "b")] * 2
    assert server.stats.loads == 3


def test_waits_double_up_to_five_minutes_and_a_load_that_comes_through_ends_them() -> None:
    backoff, waits_s = Backoff(), []
    for k in range(9):
        backoff.note_failed("b", k * MS)
        until_ns = backoff.until_ns("b", k * MS)
        waits_s.append(0.0 if until_ns is None else (until_ns - k * MS) / (1000 * MS))
    assert waits_s == [0, 10, 20, 40, 80, 160, 300, 300, 300]
    assert backoff.until_ns("a", 0) is None
    backoff.note_loaded("b")
    assert backoff.until_ns("b", 0) is None
    assert backoff.told("b", 0) == ""


def test_a_probe_passes_over_a_model_that_cannot_be_streamed() -> None:
    """Without it the stream would come again for ever, and the round would never end."""
    constants = {"round_requests": 8, "prompts_per_candidate": 2, "window_tokens": 20, "limit": 10}
    policy = make_policy("helios_probe", {"threshold": 0.7, **constants})
    run = serve(
        workload(40, 20, 20, EVERY_20_MS), policy, profiles(0.001, 2**30), faults=NO_LOAD_COMES_THROUGH,
        expected=ExpectedLoad(20.0, 20.0, arrival_rate_per_s=50.0),
    )  # fmt: skip
    (server,) = run.run.servers
    assert {record.status for record in run.records} == {Status.COMPLETED}
    told = [d.cause.what for d in server.decisions if isinstance(d.cause, Faulted)]
    assert any("is not probed: its loads failed 2 times in a row" in what for what in told)
    assert sum(isinstance(d.cause, Probed) for d in server.decisions) >= 2


def test_a_transfer_that_stalls_takes_so_much_longer() -> None:
    ends = []
    for faults in (None, plan(FaultKind.TRANSFER_STALLS, 10, lasts_ns=50 * MS)):
        run = served(faults, policy=raising(full_depth("a", 4)), profiles=profiles(0.001, 2**30))
        ends.append(run.run.stats.switch_time_ns)
    assert 49 * MS <= ends[1] - ends[0] <= 60 * MS  # it comes into force when an iteration ends


@pytest.mark.slow
@pytest.mark.parametrize(("name", "others"), [
    ("helios", {}), ("helios", {"on_breach": "switch_only"}), ("helios", {"on_breach": "load_only"}),
    ("helios", {"evaluation": "off", "standby": "whole"}), ("helios_probe", {}),
])  # fmt: skip
def test_shipped_policies_go_on_after_loads_that_failed(name: str, others: dict[str, str]) -> None:
    """With a fault each 20 ms hardly a load comes through; they serve with what is there, and try again."""
    constants = {"round_requests": 8, "prompts_per_candidate": 2, "window_tokens": 20, "limit": 10}
    made, told = profiles(0.001, 2**30), 0
    for seed in range(6):
        policy = make_policy(name, {"threshold": 0.7, **constants, **others})
        faults = FaultPlan((FaultSpec(FaultKind.LOAD_FAILS, rate_per_hour=3600 * 50.0),), 0, seed)
        run = serve(
            workload(40, 20, 20, EVERY_20_MS), policy, made, seed=seed, faults=faults,
            expected=ExpectedLoad(20.0, 20.0, arrival_rate_per_s=50.0),
        )  # fmt: skip
        assert {r.status for r in run.records} == {Status.COMPLETED}
        told += sum(isinstance(d.cause, LoadFailed) for d in run.run.servers[0].decisions)
    assert told or name == "helios_probe" or others.get("evaluation") == "off"  # which stay where they are here


# --- the plan


def faults_of(plan: FaultPlan, kind: FaultKind, n: int = 20) -> list[Fault]:
    return list(islice((f for f in plan.faults(2) if f.kind is kind), n))


def test_to_add_a_fault_moves_no_other() -> None:
    slow = FaultSpec(FaultKind.SLOW_CARD, rate_per_hour=60.0, lasts_ns=MS, factor=2.0)
    dies = FaultSpec(FaultKind.REPLICA_DIES, rate_per_hour=30.0, lasts_ns=MS)
    alone, both = FaultPlan((slow,), 3, 5), FaultPlan((dies, slow), 3, 5)
    assert faults_of(alone, FaultKind.SLOW_CARD) == faults_of(both, FaultKind.SLOW_CARD)
    assert faults_of(alone, FaultKind.SLOW_CARD) != faults_of(FaultPlan((slow,), 3, 6), FaultKind.SLOW_CARD)
    first_only = FaultPlan((replace(slow, replicas=(0,)),), 3, 5)
    expected = [f for f in faults_of(alone, FaultKind.SLOW_CARD) if f.replica == 0]
    assert faults_of(first_only, FaultKind.SLOW_CARD, len(expected)) == expected


def test_faults_come_in_order_and_a_replica_dies_only_while_it_is_up() -> None:
    spec = FaultSpec(FaultKind.REPLICA_DIES, (3, 50), 3.6e12 / 40, lasts_ns=30)
    found = list(islice(FaultPlan((spec,), 0, 1).faults(3), 300))
    assert [f.time_ns for f in found] == sorted(f.time_ns for f in found)
    for replica in range(3):
        ends = [f.ends for f in found if f.replica == replica]
        assert ends == [bool(i % 2) for i in range(len(ends))]


def test_outages_are_those_of_the_plan() -> None:
    plan = FaultPlan((FaultSpec(FaultKind.REPLICA_DIES, (10, 100), lasts_ns=20, replicas=(1,)),), 0, 0)
    outages = Outages(plan, 2)
    assert [outages.back_ns(1, at) for at in (9, 10, 11, 30, 31, 100, 101, 120, 121)] == [
        None, None, 30, 30, None, None, 120, 120, None,
    ]  # fmt: skip
    assert outages.back_ns(0, 15) is None


def test_the_mean_gap_is_that_of_the_rate() -> None:
    each_s = FaultPlan((FaultSpec(FaultKind.OUT_OF_MEMORY, rate_per_hour=3600.0),), 0, 3)
    found = faults_of(each_s, FaultKind.OUT_OF_MEMORY, 4000)
    assert found[-1].time_ns / 2000 / 1e9 == pytest.approx(1.0, rel=0.06)  # of two replicas


@pytest.mark.slow
def test_every_policy_meets_the_same_faults() -> None:
    faults = FaultPlan((FaultSpec(FaultKind.SLOW_CARD, (30 * MS,), 36_000.0, lasts_ns=MS, factor=2.0),), 3, 9)
    met = []
    for policy in (full_depth(), full_depth(layers=2), full_depth(batch_limit=1)):
        found = served(faults, policy=policy, profiles={"flat": flat_profile(0.001)}).run.faults
        met.append([(f.time_ns, f.kind, f.until_ns) for f in found if f.hit][:10])
    assert met[0] == met[1] == met[2]


# --- nothing is lost


@pytest.mark.parametrize("users", [1, 4])
@pytest.mark.parametrize("retries", [0, 2])
def test_users_of_a_closed_loop_go_on(users: int, retries: int) -> None:
    specs = (
        FaultSpec(FaultKind.REPLICA_DIES, rate_per_hour=3600 * 20.0, lasts_ns=7 * MS),
        FaultSpec(FaultKind.ITERATION_FAILS, rate_per_hour=3600 * 50.0),
        FaultSpec(FaultKind.OUT_OF_MEMORY, rate_per_hour=3600 * 50.0),
    )
    run = served(FaultPlan(specs, retries, 4), workload=workload(60, 5, 10, ClosedLoop(users)))
    assert run.run.requests == 60
    assert sum(f.lost for f in run.run.faults) > 0


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(design=designs)
def test_the_same_bits_under_faults_in_every_way(design) -> None:
    checked(*design, ways=ALL_WAYS)


@pytest.mark.parametrize("stepwise", [False, True])
def test_a_request_that_is_not_sent_again_is_noticed(monkeypatch: pytest.MonkeyPatch, stepwise: bool) -> None:
    monkeypatch.setattr(System, "send_again", lambda self, lost, lost_by: None)
    with pytest.raises(LittlesLawViolated, match="8 arrived, 0 of them sent again, 7 left"):
        serve(
            workload(8, 5, 10, EVERY_20_MS), full_depth(), faults=plan(FaultKind.ITERATION_FAILS, 45.5),
            stepwise=stepwise,
        )  # fmt: skip


@pytest.mark.parametrize("number", [2052, 1_001_053])
def test_designs_that_once_differed(number: int) -> None:
    """A request that was dropped while the replica was down, and one that arrived when a fault struck."""
    checked(case(number), choose_plan(chooser(f"faults {number}"), number))


@given(st.integers(0, 3), st.sets(st.integers(0, 3)), st.integers(0, 7))
def test_what_a_replica_loses_goes_to_those_that_are_up(lost_by: int, down: set[int], place: int) -> None:
    back_ns = [100 + r if r in down else None for r in range(4)]
    for router in (Router.ROUND_ROBIN, Router.LEAST_LOADED):
        chosen = Routing(router).again(place, 0, lost_by, [3, 1, 4, 1], back_ns)
        assert chosen not in down or (len(down) == 4 and chosen == 0)
