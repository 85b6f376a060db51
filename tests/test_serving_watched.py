"""What an operator watches, as a policy sees it: SLO attainment and power, against counts made from records alone."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from helios_sim.core import layout, power
from helios_sim.core.layout import MARK, RULES, STATE, Storage
from helios_sim.policy.answers import fault_of
from helios_sim.policy.deployment import AtTime, Completed, Deployment, KvRule, Placement, PowerAbove, SloBelow
from helios_sim.policy.telemetry import LatestRequests
from helios_sim.profile.profile import Profile
from helios_sim.profile.synthetic import flat_profile
from helios_sim.report.metrics import meets
from helios_sim.report.records import RecordLog
from helios_sim.request import NS_PER_S, RequestRecord, Slo
from helios_sim.workload import AllAtOnce, ClosedLoop, Constant, Exponential, Poisson, Workload
from policy_example import situation
from rig import WAYS_TO_RUN, Scripted, full_depth, serve, workload

MS = 1_000_000
WAYS = pytest.mark.parametrize("way", WAYS_TO_RUN)
IDLE_W, LIMIT_W = 60.0, 400.0
TIGHT = Slo(ttft_s=0.02, tpot_s=0.0015, e2e_s=0.05)


def on_a_card(iteration_s: float = 0.001) -> dict[str, Profile]:
    profile = flat_profile(iteration_s)
    return {"flat": replace(profile, hardware=replace(profile.hardware, idle_w=IDLE_W, tdp_w=LIMIT_W))}


def asking(*triggers: Any, **other: Any) -> Scripted:
    return Scripted(replace(full_depth(**other), triggers=triggers))


def is_good(record: RequestRecord, slo: Slo) -> bool:
    log = RecordLog()
    log.add(record)
    return bool(meets(log.records(), slo)[0])


# --- SLO attainment


def missed_at(records: list[RequestRecord], slo: Slo, trigger: SloBelow) -> list[int]:
    """When the trigger should fire, request by request in their order of completion."""
    window: deque[bool] = deque(maxlen=trigger.requests)
    expected: list[int] = []
    done = sorted(records, key=lambda r: r.last_token_ns or 0)
    for k, record in enumerate(done):
        window.append(is_good(record, slo))
        at_once = k + 1 < len(done) and done[k + 1].last_token_ns == record.last_token_ns
        full = len(window) == trigger.requests
        if full and not at_once and sum(window) < trigger.share * trigger.requests - 1e-9:
            assert record.last_token_ns is not None
            expected.append(record.last_token_ns)
            window.clear()
    return expected


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    requests=st.integers(1, 20),
    share=st.sampled_from([0.0, 0.25, 0.5, 0.9, 0.99, 1.0]),
    arrivals=st.sampled_from([AllAtOnce(), ClosedLoop(3), Constant(90.0), Poisson(120.0)]),
    slo=st.sampled_from([TIGHT, Slo(ttft_s=0.03), Slo(tpot_s=0.001), Slo(e2e_s=0.02)]),
    limit=st.sampled_from([1, 2, None]),
    stepwise=st.booleans(),
)
def test_it_fires_when_too_many_of_the_last_requests_missed_the_slos(
    requests: int, share: float, arrivals: Any, slo: Slo, limit: int | None, stepwise: bool
) -> None:
    trigger = SloBelow(share, requests)
    policy = asking(trigger, batch_limit=limit)
    work = workload(40, arrivals=arrivals, output=Exponential(12))
    served = serve(work, policy, on_a_card(), others={"slo": slo}, stepwise=stepwise)
    assert [seen.now_ns for _, seen in policy.asked] == missed_at(served.records, slo, trigger)


@WAYS
def test_a_new_placement_begins_a_new_window_and_the_same_one_goes_on(way: dict[str, bool]) -> None:
    """All miss: after four the policy is asked, whatever it decides in between at the same depth."""
    never = Slo(ttft_s=1e-9)
    trigger = SloBelow(0.5, 4)

    def asked(layers: list[int]) -> list[int]:
        first, *then = (
            Deployment(Placement("flat", depth), full_depth().exit_rule, kv_rule=KvRule.NONE,
                       triggers=(trigger, Completed(3)), reason=f"{n}")
            for n, depth in enumerate(layers)
        )  # fmt: skip
        policy = Scripted(first, then)
        serve(workload(12, arrivals=ClosedLoop(1)), policy, on_a_card(), others={"slo": never}, **way)
        return [seen.completed_requests for cause, seen in policy.asked if cause == trigger]

    assert asked([4, 4]) == [4, 8, 12]
    assert asked([4, 2]) == [7, 11]


def test_telemetry_tells_the_attainment_of_the_latest_requests() -> None:
    policy = asking(Completed(300), batch_limit=2)
    served = serve(
        workload(310, output=Exponential(6.0), arrivals=Poisson(280.0)), policy, on_a_card(), others={"slo": TIGHT}
    )
    ((_, seen),) = policy.asked
    done = [r for r in sorted(served.records, key=lambda r: r.last_token_ns) if r.last_token_ns <= seen.now_ns][-256:]
    assert seen.slo_attainment == pytest.approx(np.mean([is_good(record, TIGHT) for record in done]))
    assert 0 < seen.slo_attainment < 1
    assert LatestRequests(seen.latest.moments_ns).slo_attainment is None
    assert LatestRequests(slo=TIGHT).slo_attainment is None


# --- power


def power_asked(
    trigger: PowerAbove, work: Workload, way: dict[str, bool], profiles: dict[str, Profile] | None = None
) -> list[tuple[int, float]]:
    """When it fired, and the mean power of its window by the integrals of the telemetry."""
    policy = asking(trigger)
    serve(work, policy, profiles or on_a_card(), others={"power_w": (IDLE_W, LIMIT_W)}, **way)
    return [(seen.now_ns, seen.energy.watts) for _, seen in policy.asked]


@WAYS
def test_power_is_reported_once_until_it_has_been_low_again(way: dict[str, bool]) -> None:
    """Iterations of 1 ms, whose floor is next to nothing: (60 + 400) / 2 W while they run. A request of 10 ms comes
    every 20 ms for two seconds, so the mean is 145 W; one that comes every 10 ms keeps the card busy, with 230 W."""
    half, whole = workload(100, arrivals=Constant(50.0)), workload(200, arrivals=Constant(100.0))
    assert power_asked(PowerAbove(150, 1.0), half, way) == []
    ((fired_ns, _),) = power_asked(PowerAbove(140, 1.0), half, way)
    assert fired_ns == pytest.approx(1.01 * NS_PER_S, abs=20 * MS)
    ((_, watts),) = power_asked(PowerAbove(225, 1.0), whole, way)
    assert watts == pytest.approx(230, rel=0.02)
    assert power_asked(PowerAbove(231, 1.0), whole, way) == []


@WAYS
def test_all_ways_to_run_fire_at_the_same_moments(way: dict[str, bool]) -> None:
    """Bursts with pauses: up and down again and again."""
    work = workload(300, arrivals=Poisson(30.0), output=Exponential(30))
    found = power_asked(PowerAbove(170, 0.5), work, way)
    assert len(found) > 3
    assert found == power_asked(PowerAbove(170, 0.5), work, {"stepwise": True})


@WAYS
@pytest.mark.parametrize("busy_w", [None, (120.0, 300.0)])
def test_energy_is_the_middle_of_the_band_that_a_report_shows(
    way: dict[str, bool], busy_w: tuple[float, float] | None
) -> None:
    end_ns = 3 * NS_PER_S
    policy = asking(AtTime(end_ns))
    profiles = on_a_card()
    others = {"power_w": (IDLE_W, LIMIT_W), "busy_w": busy_w}
    served = serve(workload(60, arrivals=Constant(30.0)), policy, profiles, others=others, **way)
    if not policy.asked:  # the run is over before
        policy = asking(Completed(60))
        served = serve(workload(60, arrivals=Constant(30.0)), policy, profiles, others=others, **way)
    ((_, seen),) = policy.asked
    stats = served.run.stats
    above_w = LIMIT_W - IDLE_W
    low, high = stats.floor_ns / NS_PER_S * above_w, stats.busy_ns / NS_PER_S * above_w
    if busy_w is not None:
        low, high = (stats.busy_ns / NS_PER_S * (watts - IDLE_W) for watts in busy_w)
    assert seen.energy.joules == pytest.approx(IDLE_W * seen.now_ns / NS_PER_S + (low + high) / 2)
    assert seen.energy.watts == pytest.approx(seen.energy.joules / (seen.now_ns / NS_PER_S))  # less than 10 s


def test_without_known_power_there_is_no_energy() -> None:
    policy = asking(Completed(1))
    serve(workload(1), policy)
    assert policy.asked[0][1].energy is None


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 400 * MS), st.integers(1, 400 * MS)), min_size=1, max_size=60),
    st.integers(1, 20 * NS_PER_S),
)
def test_what_was_drawn_in_a_window(steps: list[tuple[int, int]], window_ns: int) -> None:
    """Against the integral, where a card draws evenly while it is busy; what lies between two marks is spread."""
    storage = Storage(compiled=False)
    s, marks = storage.record(STATE), storage.rows(MARK, power.MARKS)
    busy: list[tuple[int, int]] = []
    now_ns = 0
    for idle_ns, busy_ns in steps:
        start_ns = now_ns + idle_ns
        now_ns = start_ns + busy_ns
        power.note_drawn(s, marks, start_ns, now_ns, busy_ns)
        busy.append((start_ns, now_ns))
    s.now_ns = now_ns
    since_ns = max(0, now_ns - window_ns)
    exact = sum(max(0, end - max(start, since_ns)) for start, end in busy)
    assert power.drawn_since(s, marks, since_ns) == pytest.approx(exact, abs=power.MARK_EVERY_NS)
    assert power.drawn_since(s, marks, 0) == sum(end - start for start, end in busy)


def test_marks_reach_back_as_far_as_a_window_may() -> None:
    storage = Storage(compiled=False)
    s, marks = storage.record(STATE), storage.rows(MARK, power.MARKS)
    r = storage.record(RULES)
    r.idle_mw, r.drawn_mw = 60_000, 170_000
    step_ns = power.MARK_EVERY_NS
    for n in range(3 * power.MARKS):
        power.note_drawn(s, marks, n * step_ns, (n + 1) * step_ns, step_ns)
    s.now_ns = 3 * power.MARKS * step_ns
    assert power.drawn_since(s, marks, s.now_ns - power.LONGEST_WINDOW_NS) == power.LONGEST_WINDOW_NS
    assert power.is_above(s, r, marks, 229_000, power.LONGEST_WINDOW_NS)
    assert not power.is_above(s, r, marks, 230_000, power.LONGEST_WINDOW_NS)
    s.now_ns = 0
    assert not power.is_above(s, r, marks, 0, step_ns)


# --- what is refused


@pytest.mark.parametrize(
    ("trigger", "allowed"),
    [
        (SloBelow(0.9), "SloBelow only where the study has SLOs"),
        (SloBelow(1.1), "share, a number from 0 to 1"),
        (SloBelow(0.9, 0), "requests, a whole number from 1"),
        (SloBelow(0.9, 10**7), "requests, a whole number from 1"),
        (PowerAbove(100.0), "PowerAbove only where power is known"),
    ],
)
def test_a_trigger_that_could_never_fire_is_refused(trigger: Any, allowed: str) -> None:
    found = fault_of(replace(full_depth("small"), triggers=(trigger,)), situation())
    assert found is not None
    assert allowed in found[2]


@pytest.mark.parametrize(
    ("trigger", "allowed"),
    [
        (PowerAbove(400.0), "watts, a number from 60 (idle) to less than 400"),
        (PowerAbove(59.0), "watts"), (PowerAbove(float("nan")), "watts"), (PowerAbove("100"), "watts"),
        (PowerAbove(100.0, 0.0), "window_s, a number from 0.1 to 50"), (PowerAbove(100.0, 51), "window_s"),
        (PowerAbove(100.0), None), (SloBelow(0.9), None),
    ],
)  # fmt: skip
def test_watts_that_the_card_cannot_reach_are_refused(trigger: Any, allowed: str | None) -> None:
    at = replace(situation(), power_w=(60.0, 400.0), slo=Slo(ttft_s=1.0))
    found = fault_of(replace(full_depth("small"), triggers=(trigger,)), at)
    assert (found is None) == (allowed is None)
    assert found is None or (allowed or "") in found[2]


def test_the_longest_window_is_one_that_marks_cover() -> None:
    from helios_sim.policy import answers

    assert answers._WINDOWS_S[1] * NS_PER_S <= power.LONGEST_WINDOW_NS
    assert layout.POWER_ABOVE not in (layout.QUEUE_ABOVE, layout.RUNNING_ABOVE, layout.KV_ABOVE)
