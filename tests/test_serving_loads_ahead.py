"""Iterations computed ahead while weights load and requests drain: the same bits, and no step in Python."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from helios_sim.engine.simulated import SimulatedEngine
from helios_sim.exits.rule import FixedCap
from helios_sim.policy.deployment import Deployment, InFlight, KvRule, Placement, Probe
from helios_sim.policy.trigger import BreachLimit, Completed, Probed
from helios_sim.workload import AllAtOnce, Constant, DrawnLengths, Exponential, Fixed, TaskMix, Workload
from priced import priced_profile
from rig import Scripted, serve

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
def test_weights_on_their_way_end_no_stretch(change: str, room: bool, arrivals, monkeypatch) -> None:
    steps: list[int] = []
    execute = SimulatedEngine.execute

    def counted(self, plan, now_ns):
        steps.append(now_ns)
        return execute(self, plan, now_ns)

    monkeypatch.setattr(SimulatedEngine, "execute", counted)
    workload = Workload(
        arrivals, DrawnLengths(Fixed(20), Exponential(25)), TaskMix.single("text"), 40, chars_per_token=None
    )
    weights = sum(profile.weight_bytes(4) for profile in PROFILES.values())
    pool_bytes = 400 * 16 * PROFILES["a"].kv_bytes_per_token(4)
    runs = []
    for ahead in (True, False):
        steps.clear()
        script = Scripted(deployed("a", 2, BreachLimit(60, 50), Completed(6)), list(CHANGES[change]))
        hbm_bytes = pool_bytes + (weights if room else PROFILES["a"].weight_bytes(4))
        run = serve(workload, script, PROFILES, hbm_bytes=hbm_bytes, utilisation=1.0, ahead=ahead, leap=ahead)
        assert run.run.stats.loads
        assert bool(steps) != ahead
        runs.append((run.records, run.run.servers[0].decisions, asdict(run.run.stats), run.run.end_ns))
    assert runs[0] == runs[1]


def test_who_moves_with_the_model_is_served_step_by_step() -> None:
    """Whether somebody starts during such a change depends on who runs: the compiled steps do not know that."""
    workload = Workload(AllAtOnce(), DrawnLengths(Fixed(20), Fixed(30)), TaskMix.single("text"), 20, None)
    runs = [
        serve(
            workload,
            Scripted(deployed("a", 2, Completed(3)), [deployed("b", 4, in_flight=InFlight.MIGRATE)]),
            PROFILES,
            ahead=ahead,
            leap=ahead,
            max_running_requests=8,
        )
        for ahead in (True, False)
    ]
    assert runs[0].records == runs[1].records
