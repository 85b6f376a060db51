"""Changes of placement while the loop runs ahead of the clock: the same bits as step by step, in fewer events."""

from __future__ import annotations

import pytest
import simpy

from helios_sim.exits.rule import FixedCap
from helios_sim.policy.deployment import Deployment, InFlight, KvRule, Placement, Probe
from helios_sim.policy.trigger import BreachLimit, Completed, Probed
from helios_sim.workload import AllAtOnce, Constant, DrawnLengths, Exponential, Fixed, TaskMix, Workload
from priced import priced_profile
from rig import AHEAD, STEPWISE, Scripted, serve

PROFILES = {
    name: priced_profile(
        name, layer_s=layer_s, row_s=3.1e-5, kv_token_s=1.3e-6, prefill_token_s=2.9e-6, head_s=2e-4, load_slowdown=1.3,
        load_bytes_per_s=20_000.0,
    )
    for name, layer_s in (("a", 2.1e-4), ("b", 3.7e-4))
}  # fmt: skip


def deployed(model: str, layers: int, *triggers: object, **others: object) -> Deployment:
    return Deployment(Placement(model, layers), FixedCap(0.7), kv_rule=KvRule.NONE, triggers=triggers, **others)


CHANGES = {
    "more layers load beside serving": [deployed("a", 4)],
    "another model loads while requests drain": [deployed("b", 4)],
    "there and back": [deployed("b", 2, Completed(4)), deployed("a", 4)],
    "a probe streams": [deployed("a", 2, Probed(), probe=Probe(("b", "a"), 3)), deployed("b", 2)],
}


@pytest.mark.parametrize("arrivals", [Constant(400.0), AllAtOnce()], ids=["open", "queued"])
@pytest.mark.parametrize("room", [True, False], ids=["beside", "in turn"])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_on_their_way_stop_the_loop_only_when_they_arrive(change: str, room: bool, arrivals, monkeypatch) -> None:
    events: list[float] = []
    step = simpy.Environment.step

    def counted(env) -> None:
        step(env)
        events.append(env.now)

    monkeypatch.setattr(simpy.Environment, "step", counted)
    workload = Workload(
        arrivals, DrawnLengths(Fixed(20), Exponential(25)), TaskMix.single("text"), 40, chars_per_token=None
    )
    weights = sum(profile.weight_bytes(4) for profile in PROFILES.values())
    pool_bytes = 400 * 16 * PROFILES["a"].kv_bytes_per_token(4)
    runs, counts = [], []
    for how in (AHEAD, STEPWISE):
        events.clear()
        script = Scripted(deployed("a", 2, BreachLimit(60, 50), Completed(6)), list(CHANGES[change]))
        hbm_bytes = pool_bytes + (weights if room else PROFILES["a"].weight_bytes(4))
        run = serve(workload, script, PROFILES, hbm_bytes=hbm_bytes, utilisation=1.0, **how)
        assert run.run.stats.loads
        counts.append(len(events))
        runs.append(run.everything())
    assert runs[0] == runs[1]
    assert counts[0] < 100 < runs[1][2][0]["iterations"] < counts[1]


@pytest.mark.parametrize("in_flight", InFlight)
def test_who_drains_or_moves_with_the_model_does_so_at_the_same_time(in_flight: InFlight) -> None:
    workload = Workload(AllAtOnce(), DrawnLengths(Fixed(20), Fixed(30)), TaskMix.single("text"), 20, None)
    runs = [
        serve(
            workload,
            Scripted(deployed("a", 2, Completed(3)), [deployed("b", 4, in_flight=in_flight)]),
            PROFILES,
            max_running_requests=8,
            **how,
        )
        for how in (AHEAD, STEPWISE)
    ]
    assert runs[0].everything() == runs[1].everything()
    assert {record.model for record in runs[0].records} == {"a", "b"}
