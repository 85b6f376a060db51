"""The books of a run: Little's law, time that never goes back, runs that cannot finish; and that errors are noticed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import simpy
from hypothesis import HealthCheck, given, settings
from simpy.core import EmptySchedule

from helios_sim.core import arrive
from helios_sim.core.line import push
from helios_sim.exits.rule import FullDepth
from helios_sim.policy.deployment import AtTime, Deployment, Placement, Probe
from helios_sim.request import Status
from helios_sim.routing import Router, Routing
from helios_sim.serving.server import Server
from helios_sim.simulation import LittlesLawViolated, System
from helios_sim.workload import AllAtOnce, ClosedLoop, Constant, Exponential
from rig import Scripted, full_depth, serve, workload
from serving_cases import cases, run, uneven_profiles

MS = 1_000_000


def never(**other) -> Deployment:
    return replace(full_depth(), admit_limit=0, **other)


ARRIVALS = [AllAtOnce(), Constant(100.0), ClosedLoop(1), ClosedLoop(3), ClosedLoop(50)]


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("arrivals", ARRIVALS)
@pytest.mark.parametrize("router", Router)
def test_a_server_that_admits_nobody_ends_with_all_unfinished(arrivals, replicas: int, router: Router) -> None:
    served = serve(workload(7, arrivals=arrivals), Scripted(never()), replicas=replicas, router=router)
    sent = 7 if not isinstance(arrivals, ClosedLoop) else min(7, arrivals.users)  # nobody sends after no answer
    assert sorted(r.request_id for r in served.records) == list(range(sent))
    for record in served.records:
        assert (record.status, record.scheduled_ns, record.output_tokens) == (Status.UNFINISHED, None, 0)
        assert record.preemptions == 0
    assert served.run.requests == sent
    assert served.run.stats.iterations == 0


@pytest.mark.parametrize("arrivals", [AllAtOnce(), ClosedLoop(2)])
def test_a_server_that_stops_admitting_finishes_what_runs(arrivals) -> None:
    policy = Scripted(replace(full_depth(batch_limit=2), triggers=(AtTime(15 * MS),)), [never()])
    served = serve(workload(9, arrivals=arrivals), policy)
    status = [r.status for r in served.by_request()]
    assert status[:4] == [Status.COMPLETED] * 4
    assert set(status[4:]) == {Status.UNFINISHED}
    assert served.run.end_ns == 20 * MS
    assert served.run.stats.preemptions == 0
    assert served.run.servers[0].used_blocks == 0


def test_a_run_cut_short_gives_back_what_it_held() -> None:
    """What runs when a run is stopped leaves as unfinished with its tokens, and was not preempted."""

    class Stops(simpy.Environment):
        def step(self):
            if self.now >= 4 * MS:
                raise EmptySchedule
            super().step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("helios_sim.simulation.simpy.Environment", Stops)
        served = serve(workload(3), full_depth(), stepwise=True)
    assert [r.status for r in served.records] == [Status.UNFINISHED] * 3
    assert {r.output_tokens for r in served.records} <= {3, 4}
    assert [r.preemptions for r in served.records] == [0] * 3
    assert served.run.stats.preemptions == 0
    assert served.run.servers[0].used_blocks == 0


@pytest.mark.slow
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(**cases)
def test_the_clock_and_what_hangs_on_it_never_go_back(workload, script, replicas, router, pool_blocks) -> None:
    served = run(workload, script, replicas, router, pool_blocks, stepwise=False)
    for server in served.run.servers:
        times = [d.time_ns for d in server.decisions]
        assert times == sorted(times)
        assert server.stats.transitions_ns == sorted(server.stats.transitions_ns)
        assert server.stats.busy_ns <= served.run.end_ns
        assert server.stats.kv_block_ns <= server.stats.kv_pool_block_ns
        assert server.stats.decode_ns <= server.stats.busy_ns
    for record in served.records:
        moments = [record.arrival_ns, record.scheduled_ns, record.first_token_ns, record.last_token_ns]
        seen = [t for t in moments if t is not None]
        assert seen == sorted(seen)
        assert not seen or seen[-1] <= served.run.end_ns
    # Every gap between two tokens of a request is in the histogram, once.
    tokens = sum(r.output_tokens - 1 for r in served.records if r.output_tokens)
    gaps = served.run.stats.itl
    assert gaps.total_count == tokens
    assert gaps.total_ns == sum(
        r.last_token_ns - r.first_token_ns for r in served.records if r.first_token_ns is not None
    )


# --- books that are wrong are noticed


def test_a_request_that_leaves_twice_is_noticed(monkeypatch) -> None:
    def twice(s, r, requests, lists, line, arrivals, tokens, slot, now_ns, why) -> None:
        for _ in range(1 + (requests[slot].request_id == 2)):
            arrive.leave(s, r, requests, lists, line, arrivals, tokens, slot, now_ns, why)

    monkeypatch.setattr("helios_sim.core.commit.leave", twice)
    with pytest.raises((LittlesLawViolated, IndexError)):  # its slot is given back twice
        serve(workload(4, arrivals=Constant(50.0)), full_depth(), stepwise=True)


def test_a_request_that_is_lost_is_noticed(monkeypatch) -> None:
    """It has arrived and counts, but it waits nowhere."""

    def loses(s, line, key, seq, ref) -> None:
        if seq != 1:
            push(s, line, key, seq, ref)

    monkeypatch.setattr("helios_sim.core.arrive.push", loses)
    with pytest.raises(LittlesLawViolated, match=r"4 arrived, .* 3 left"):
        serve(workload(4, arrivals=Constant(50.0)), full_depth(), stepwise=True)


def test_a_request_that_never_reaches_its_replica_is_noticed(monkeypatch) -> None:
    submit = Server.submit

    def loses(self, request, from_replica=None) -> None:
        if request.request_id != 1:
            submit(self, request, from_replica)

    monkeypatch.setattr(Server, "submit", loses)
    with pytest.raises(LittlesLawViolated, match="4 sent, 3 arrived, 3 left"):
        serve(workload(4, arrivals=Constant(50.0)), full_depth(), stepwise=True)


def test_an_arrival_that_is_written_down_wrong_is_noticed(monkeypatch) -> None:
    """Arrived earlier than it was counted: its time in the system is not the system's time with it."""
    submit = Server.submit

    def early(self, request, from_replica=None) -> None:
        submit(self, replace(request, arrival_ns=request.arrival_ns - (request.request_id == 3)), from_replica)

    monkeypatch.setattr(Server, "submit", early)
    with pytest.raises(LittlesLawViolated):
        serve(workload(4, arrivals=Constant(50.0)), full_depth(), stepwise=True)


def test_an_arrival_without_a_request_is_noticed() -> None:
    class Counts:
        books = 0, 0, 1, 0  # one has arrived, and there is none

    system = System(simpy.Environment(initial_time=0), Routing(), lambda record: None)
    system.connect((Counts(),))
    with pytest.raises(LittlesLawViolated):
        system.check_littles_law()


def test_an_unfinished_evaluation_is_as_long_ahead_of_the_clock_as_step_by_step() -> None:
    """The third request may never start."""
    few = workload(3, 1, Exponential(20), Constant(1000.0))
    probing = Deployment(Placement("a", 4), FullDepth(), admit_limit=2, probe=Probe(("a", "b"), 2))
    spent = [
        run(few, Scripted(probing), 1, Router.ROUND_ROBIN, 4, stepwise, uneven_profiles(0.0)).run.stats.evaluation_ns
        for stepwise in (True, False)
    ]
    assert spent[0] == spent[1] > 0
