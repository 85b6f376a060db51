"""Replicas that come and go with load: the rule, what the router does, what is paid for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from helios_sim.api import simulate, study_config
from helios_sim.errors import UserError
from helios_sim.request import NS_PER_S, RequestRecord
from helios_sim.serving.autoscale import Autoscaler, Scaled, Scaling
from helios_sim.simulation import Run
from helios_sim.study.fleet import build_fleet
from helios_sim.study.jobs import Job, serve
from helios_sim.study.plan import plan_study

RULE = Scaling(
    least=1, requests_per_replica=10, every_ns=15 * NS_PER_S, down_after_ns=60 * NS_PER_S, start_ns=40 * NS_PER_S
)
WORDS = (
    "models=[opt-1.3b]", "policy=full_depth", "exits.source=none", "server.router=least_loaded", "profile_band=none",
    "pictures=false", "workload.n_requests=300", "workload.arrivals.rate_per_s=40",
)  # fmt: skip
AUTO = (
    "server.replicas=4", "autoscale.least=1", "autoscale.requests_per_replica=5", "autoscale.start_s=0.7",
    "autoscale.every_s=0.5", "autoscale.down_after_s=2",
)  # fmt: skip


@pytest.mark.parametrize(("requests", "wanted"), [(0, 1), (10, 1), (11, 2), (20, 2), (35, 4), (1000, 4)])
def test_there_are_as_many_as_kubernetes_would_have(requests: int, wanted: int) -> None:
    """desiredReplicas = ceil(sum of the metric / target average value), within the limits."""
    assert RULE.wanted(requests, 4) == wanted


def looks(requests: dict[int, list[int]], until_s: int) -> tuple[Autoscaler, list[tuple[int, list[bool]]]]:
    """An autoscaler that finds these requests in its replicas from each second on; who serves after each look."""
    now_s, found = 0, []
    scaler = Autoscaler(
        RULE, 4, lambda number: next(rows[number] for at, rows in sorted(requests.items(), reverse=True) if at <= now_s)
    )
    while scaler.next_ns <= until_s * NS_PER_S:
        now_s = scaler.next_ns // NS_PER_S
        scaler.look(scaler.next_ns)
        found.append((now_s, [scaler.serves(number) for number in range(4)]))
    return scaler, found


def test_a_load_that_rises_and_falls() -> None:
    """More at once, after the time to start; fewer when no more were wanted for the whole window; off when empty."""
    requests = {0: [2, 0, 0, 0], 20: [25, 0, 0, 0], 80: [3, 1, 2, 0], 170: [3, 0, 2, 0], 190: [3, 0, 0, 0]}
    scaler, found = looks(requests, 200)
    serves = dict(found)
    assert serves[15] == [True, False, False, False]
    assert serves[30] == [True, False, False, False]  # 25 requests: two more are started
    assert serves[70] == [True, True, True, False]  # 40 s later
    assert serves[120] == [True, True, True, False]  # since 90 one is enough, but at 75 three were wanted
    assert serves[150] == [True, False, False, False]  # those with the fewest drain
    done = scaler.finish(200 * NS_PER_S)
    spans = [[(a // NS_PER_S, b // NS_PER_S) for a, b in of] for of in done.on_ns]
    assert spans == [[(0, 200)], [(30, 180)], [(30, 195)], []]  # paid for until a look finds them empty
    assert done.starts == 2
    assert done.mean(0, 200 * NS_PER_S) == (200 + 150 + 165) / 200
    assert done.mean(100 * NS_PER_S, 200 * NS_PER_S) == (100 + 80 + 95) / 100


def test_one_that_drains_serves_on_before_another_starts() -> None:
    scaler, found = looks({0: [25, 0, 0, 0], 60: [9, 4, 1, 0], 140: [29, 4, 1, 0]}, 240)
    serves = dict(found)
    assert serves[135] == [True, True, False, False]
    assert serves[150] == [True, True, True, False]
    assert scaler.finish(0).starts == 2 + 1  # 34 requests want a fourth, which starts


def ran(*words: str, **how: Any) -> tuple[list[RequestRecord], Run]:
    job = the_job(*words)
    records: list[RequestRecord] = []
    return records, serve(job, build_fleet(job.config, job.seed), records.append, **how)


def the_job(*words: str) -> Job:
    (job,) = plan_study(study_config("own", *WORDS, *words)).jobs
    return job


@pytest.mark.slow
@pytest.mark.parametrize("router", ["least_loaded", "round_robin", "power_of_two"])
def test_every_way_to_run_gives_the_same(router: str) -> None:
    words = (*AUTO, f"server.router={router}")
    (records, run), *others = (ran(*words, **how) for how in ({}, {"compiled": False}, {"stepwise": True}))
    assert run.scaled is not None
    assert run.scaled.starts > 1
    for other, its in others:
        assert other == records
        assert its.scaled == run.scaled
        assert its.stats == run.stats


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 4), st.floats(0.5, 20), st.sampled_from([0.0, 0.3, 5.0]), st.sampled_from([0.1, 1.0]),
    st.integers(0, 9),
)
def test_what_always_holds(least: int, per: float, start_s: float, every_s: float, seed: int) -> None:
    words = (
        "server.replicas=4", f"autoscale.least={least}", f"autoscale.requests_per_replica={per}", f"seeds=[{seed}]",
        f"autoscale.start_s={start_s}", f"autoscale.every_s={every_s}", "autoscale.down_after_s=0.5",
        "workload.n_requests=80",
    )  # fmt: skip
    records, run = ran(*words)
    scaled = run.scaled
    assert scaled is not None
    assert len(records) == 80
    assert all(1 <= serve <= on <= 4 for _, serve, on in scaled.counts)
    assert all(serve >= min(least, 1) for _, serve, _ in scaled.counts)
    for record in records:  # no replica serves while it is off
        assert record.scheduled_ns is not None
        spans = scaled.on_ns[record.replica]
        assert any(since <= record.arrival_ns and record.last_token_ns <= until for since, until in spans)


def test_a_fleet_may_begin_with_more_than_the_least() -> None:
    """And they stay for as long as fewer have not been wanted for the whole window."""
    scaler = Autoscaler(replace(RULE, first=3), 4, lambda number: 1)
    serves = {}
    while scaler.next_ns <= 120 * NS_PER_S:
        now_ns = scaler.next_ns
        scaler.look(now_ns)
        serves[now_ns // NS_PER_S] = sum(scaler.serves(number) for number in range(4))
    assert [serves[at] for at in (15, 45, 60, 75, 120)] == [3, 3, 3, 1, 1]


SHARED = (
    "server.enable_prefix_caching=true", "+workload.system_prompts={sharegpt: 300}", "workload.mix.tasks={sharegpt: 1}",
)  # fmt: skip


@pytest.mark.parametrize("scheduler", ["plain", "vllm_v1"])
def test_a_replica_that_went_off_has_forgotten_its_prefixes_in_every_way_to_run(scheduler: str) -> None:
    """A burst, a pause, and so on: those that come again find nothing, so they hit less than replicas that stay."""
    ahead = ("server.schedule_ahead=1",) if scheduler == "vllm_v1" else ()
    words = (*AUTO, *SHARED, *ahead, f"server.scheduler={scheduler}", "autoscale.down_after_s=0.5",
             "workload.arrivals.kind=gamma", "workload.arrivals.cv=6", "workload.arrivals.rate_per_s=8")  # fmt: skip
    (records, run), *others = (ran(*words, **how) for how in ({}, {"compiled": False}, {"stepwise": True}))
    assert run.scaled is not None
    assert run.scaled.starts > 9
    for other, its in others:
        assert other == records
        assert its.scaled == run.scaled
        assert its.stats == run.stats
    served = [record for record in records if record.scheduled_ns is not None]
    first = {}
    for record in sorted(served, key=lambda r: (r.scheduled_ns, r.cached_tokens)):  # of one batch the first
        for since, until in run.scaled.on_ns[record.replica]:
            if since <= record.arrival_ns <= until:
                first.setdefault((record.replica, since), record)
    assert len(first) > 9
    assert all(record.cached_tokens == 0 for record in first.values())


@pytest.mark.slow
def test_where_the_least_is_all_nothing_changes() -> None:
    words = ("server.replicas=3", "autoscale.requests_per_replica=1", "autoscale.start_s=1")
    records, run = ran(*words, "autoscale.least=3")
    plain, without = ran("server.replicas=3")
    assert records == plain
    assert run.stats == without.stats
    assert without.scaled is None


@pytest.mark.slow
def test_cards_are_paid_for_while_they_are_on() -> None:
    price = "cost.usd_per_card_hour=2"
    auto = simulate("own", *WORDS, *AUTO, price).arms["full_depth"].metrics
    fixed = simulate("own", *WORDS, "server.replicas=4", price).arms["full_depth"].metrics
    on = auto["replicas_on_mean"]
    assert fixed["replicas_on_mean"] == 4
    assert 1 < on < 4
    assert auto["usd_per_hour"] == pytest.approx(2 * on)
    assert fixed["usd_per_hour"] == 8
    idle_w = 60.0  # of the A100 in the profile
    saved_j = idle_w * (fixed["span_s"] * 4 - auto["span_s"] * on)
    assert saved_j > 0
    low = {name: metrics["energy_wh_per_request"].low for name, metrics in (("auto", auto), ("fixed", fixed))}
    assert low["auto"] < low["fixed"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("server.replicas=4", "autoscale.least=1", "autoscale.start_s=1"), "autoscale.requests_per_replica=None"),
        (("server.replicas=4", "autoscale.least=1", "autoscale.requests_per_replica=5"), "autoscale.start_s=None"),
        ((*AUTO, "autoscale.least=5"), "at most server.replicas=4"),
        ((*AUTO, "autoscale.every_s=0"), "autoscale.every_s"),
        ((*AUTO, "autoscale.first=5"), "from autoscale.least=1 to server.replicas=4"),
        ((*AUTO, "server.enable_prefix_caching=true", "server.router=prefix_aware"), "where replicas come and go"),
        ((*AUTO, "workload.faults.replica_dies.rate_per_hour=3"), "struck by faults"),
        ((*AUTO, "workload.arrivals.kind=closed_loop", "workload.arrivals.users=5"), "do not wait for answers"),
        (("autoscale.least=1", *AUTO[2:], "server.replicas=1"), "server.replicas=2 or more"),
        (("server.replicas=4", "autoscale.every_s=3"), "only with autoscale.least"),
    ],
)
def test_what_cannot_be_is_one_message(words: tuple[str, ...], part: str) -> None:
    closed = any("closed_loop" in word for word in words)
    alone = "server.replicas=1" in words  # without a router, which would do nothing
    rest = [word for word in WORDS if not (closed and "rate_per_s" in word) and not (alone and "router" in word)]
    with pytest.raises(UserError) as error:
        simulate("own", *rest, *words)
    assert part in str(error.value)


def test_a_mean_over_a_part_of_the_time() -> None:
    scaled = Scaled(on_ns=(((0, 100),), ((20, 40), (60, 80))), counts=(), starts=2)
    assert scaled.mean(0, 100) == 1.4
    assert scaled.mean(30, 70) == 1.5
    assert replace(scaled, on_ns=(((0, 100),),)).mean(10, 20) == 1
