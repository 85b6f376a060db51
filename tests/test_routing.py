"""Where requests go: what each router promises, whatever the load, and that the books balance at every replica."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import rig
from helios_sim.profile.synthetic import flat_profile
from helios_sim.request import Request
from helios_sim.routing import Router, Routing
from helios_sim.simulation import System
from helios_sim.workload import AllAtOnce, Arrivals, ClosedLoop, Constant, Exponential, Poisson, TaskMix, Workload
from rig import Served, full_depth, serve

SLOW = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TASKS = ("prose", "code", "sums")
HOMES = ((0, 2), (1,), (1, 2))


def workload(arrivals: Arrivals, n: int = 120) -> Workload:
    return rig.workload(n, output=Exponential(20), arrivals=arrivals, mix=TaskMix(TASKS, (1.0, 1.0, 1.0)))


@pytest.fixture
def sent(monkeypatch) -> list[tuple[int, list[int]]]:
    """Of every request: where it went, and how many requests each replica held just before."""
    seen: list[tuple[int, list[int]]] = []
    dispatch = System.dispatch

    def watched(self, request, from_replica=None) -> None:
        held = list(self._requests_in)
        choose = self._choose

        def noting(asked: Request) -> int:
            number = choose(asked)
            seen.append((number, held))
            return number

        self._choose = noting
        try:
            dispatch(self, request, from_replica)
        finally:
            self._choose = choose

    monkeypatch.setattr(System, "dispatch", watched)
    return seen


def nothing_cached(replica: int, request: Request) -> float:
    return 0.0


def outcome(served: Served) -> list[object]:
    """Everything about every request but the number of its replica."""
    return [replace(record, replica=0) for record in served.by_request()]


ARRIVALS = [Poisson(60.0), Constant(1000.0), AllAtOnce(), ClosedLoop(7)]


@pytest.mark.slow
@pytest.mark.parametrize("arrivals", ARRIVALS)
@pytest.mark.parametrize("router", [Router.POWER_OF_TWO, Router.LEAST_LOADED, Router.BY_TASK])
def test_with_one_replica_every_router_is_round_robin(arrivals, router: Router) -> None:
    work = workload(arrivals)
    assert serve(work, full_depth(batch_limit=4), router=router).records == (
        serve(work, full_depth(batch_limit=4), router=Router.ROUND_ROBIN).records
    )


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_round_robin_takes_turns(sent, arrivals) -> None:
    serve(workload(arrivals), full_depth(batch_limit=2), replicas=3, router=Router.ROUND_ROBIN, stepwise=True)
    assert [number for number, _ in sent] == [turn % 3 for turn in range(120)]


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_least_loaded_never_sends_to_a_fuller_replica(sent, arrivals) -> None:
    serve(workload(arrivals), full_depth(batch_limit=2), replicas=4, router=Router.LEAST_LOADED, stepwise=True)
    assert len(sent) == 120
    for number, held in sent:
        assert number == held.index(min(held))


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_power_of_two_never_sends_to_the_fullest_alone(sent, arrivals) -> None:
    """Whoever is fuller than every other replica can only be drawn beside one that has fewer."""
    serve(workload(arrivals), full_depth(batch_limit=2), replicas=5, router=Router.POWER_OF_TWO, stepwise=True)
    assert len(sent) == 120
    for number, held in sent:
        assert held[number] < max(held) or held.count(max(held)) > 1
    assert len({number for number, _ in sent}) == 5


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_by_task_never_sends_a_task_elsewhere_and_there_to_the_emptiest(sent, arrivals) -> None:
    served = serve(
        workload(arrivals), full_depth(batch_limit=2), replicas=3, router=Router.BY_TASK, homes=HOMES, stepwise=True
    )
    for record in served.records:
        assert record.replica in HOMES[record.task]
    sent_by_task = Counter((r.task, r.replica) for r in served.records)
    assert all(sent_by_task[task, home] for task, homes in enumerate(HOMES) for home in homes)
    for number, held in sent:
        assert any(number in homes and held[number] == min(held[home] for home in homes) for homes in HOMES)


def test_power_of_two_draws_every_pair_alike_and_the_same_again() -> None:
    loads = [0, 0, 0, 0]
    choose = Routing(Router.POWER_OF_TWO, seed=5).choice(loads, nothing_cached)
    request = Request(0, 0, 1, 1, 0, 0)
    drawn = [choose(request) for _ in range(20_000)]  # all are equal: the first of each pair
    assert np.bincount(drawn) / len(drawn) == pytest.approx([0.25] * 4, abs=0.015)
    again = Routing(Router.POWER_OF_TWO, seed=5).choice(loads, nothing_cached)
    assert drawn == [again(request) for _ in range(20_000)]
    other = Routing(Router.POWER_OF_TWO, seed=6).choice(loads, nothing_cached)
    assert drawn != [other(request) for _ in range(20_000)]
    loads[:] = [3, 0, 3, 3]  # the empty one is in half of the pairs
    fuller = [choose(request) for _ in range(20_000)]
    assert fuller.count(1) / len(fuller) == pytest.approx(0.5, abs=0.015)


@pytest.mark.slow
def test_two_choices_spread_load_better_than_turns_and_nearly_as_well_as_looking_at_all() -> None:
    """Mean wait with requests of very unequal length, at 85 % load of 8 servers that take one request at a time."""
    work = workload(Poisson(0.85 * 8 / 0.02), 1500)
    waits = {}
    for router in (Router.ROUND_ROBIN, Router.POWER_OF_TWO, Router.LEAST_LOADED):
        served = serve(work, full_depth(batch_limit=1), {"flat": flat_profile(0.001)}, replicas=8, router=router)
        waits[router] = np.mean([r.scheduled_ns - r.arrival_ns for r in served.records])
    assert waits[Router.LEAST_LOADED] < waits[Router.POWER_OF_TWO] < 0.8 * waits[Router.ROUND_ROBIN]


@pytest.mark.slow
@SLOW
@given(
    arrivals=st.sampled_from(ARRIVALS),
    replicas=st.integers(1, 4),
    router=st.sampled_from([Router.ROUND_ROBIN, Router.LEAST_LOADED, Router.POWER_OF_TWO]),
    seed=st.integers(0, 3),
    limit=st.sampled_from([1, 3, None]),
)
def test_littles_law_holds_at_every_replica_and_in_total(arrivals, replicas, router, seed, limit) -> None:
    """L = lambda W from records alone, against the integral that the run kept: exact, in ns."""
    served = serve(workload(arrivals, 40), full_depth(batch_limit=limit), replicas=replicas, router=router, seed=seed)
    sojourn_ns = [0] * replicas
    for record in served.records:
        sojourn_ns[record.replica] += record.last_token_ns - record.arrival_ns
    assert list(served.run.presence_ns) == sojourn_ns
    assert sum(served.run.presence_ns) == sum(r.last_token_ns - r.arrival_ns for r in served.records)


@pytest.mark.slow
@pytest.mark.parametrize("router", [Router.ROUND_ROBIN, Router.LEAST_LOADED, Router.POWER_OF_TWO])
@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_the_same_seed_gives_the_same_bits_ahead_of_the_clock_and_step_by_step(arrivals, router: Router) -> None:
    runs = [
        serve(workload(arrivals, 60), full_depth(batch_limit=3), replicas=3, router=router, stepwise=stepwise)
        for stepwise in (False, False, True)
    ]
    assert runs[0].records == runs[1].records
    assert runs[0].by_request() == runs[2].by_request()


def test_a_closed_loop_keeps_its_users_busy_across_replicas() -> None:
    """As many requests as users are in the system until the last ones leave, wherever each is served."""
    served = serve(workload(ClosedLoop(6), 60), full_depth(batch_limit=2), replicas=3, router=Router.LEAST_LOADED)
    came, went = Counter(r.arrival_ns for r in served.records), Counter(r.last_token_ns for r in served.records)
    inside = 0
    for time_ns in sorted({*came, *went}):
        inside += came[time_ns] - went[time_ns]
        assert inside == 6 or time_ns >= max(came)
    assert len(served.records) == 60


@pytest.mark.slow
@pytest.mark.parametrize("router", [Router.ROUND_ROBIN, Router.LEAST_LOADED])
def test_records_come_in_the_order_in_which_requests_leave_whatever_runs_ahead(router: Router, monkeypatch) -> None:
    """Replicas hand their records over at different times, and far apart; what is merged is merged often here."""
    monkeypatch.setattr("helios_sim.simulation._MERGED_AT_ONCE", 8)
    monkeypatch.setattr("helios_sim.core.advance.FLUSH_REQUESTS", 16)
    work = workload(Poisson(900.0), 600)
    ahead, stepwise = (
        serve(work, full_depth(batch_limit=3), replicas=9, router=router, stepwise=each) for each in (False, True)
    )
    left_ns = [record.last_token_ns for record in ahead.records]
    assert left_ns == sorted(left_ns)
    assert ahead.records == stepwise.records
