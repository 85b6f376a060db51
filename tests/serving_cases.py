"""Random workloads, deployments and profiles for the invariants of the serving loop."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.rule import Clairvoyant, FixedCap, FullDepth, PerToken
from helios_sim.policy.deployment import BatchingRule, Deployment, InFlight, Placement, Probe
from helios_sim.policy.trigger import AtTime, BreachLimit, Completed, Drained, Probed, QueueAbove
from helios_sim.profile.synthetic import flat_profile
from helios_sim.routing import Router
from helios_sim.workload import AllAtOnce, ClosedLoop, Constant, Exponential, Poisson, Workload
from priced import priced_profile
from rig import EXITS, Scripted, Served, kv_rules, serve, workload

arrivals = st.one_of(
    # With iterations of 1 ms, whole milliseconds between arrivals make every arrival a tie.
    st.sampled_from([Constant(1000.0), Constant(500.0), Constant(100.0), AllAtOnce(), ClosedLoop(3), ClosedLoop(40)]),
    st.floats(20, 400).map(Poisson),
)
workloads = st.builds(
    workload,
    st.integers(1, 40),
    st.sampled_from([1, 16, 40, Exponential(30)]),
    st.sampled_from([1, 2, 33, Exponential(20)]),
    arrivals,
)
rules = st.sampled_from(
    [
        (FullDepth(), 4),
        (FixedCap(0.7), 2),
        (FixedCap(0.7), 4),
        (PerToken(0.7), 4),
        (PerToken(0.7), 2),
        (Clairvoyant(0.05), 4),
    ]
)
triggers = st.lists(
    st.sampled_from(
        [
            BreachLimit(10, 3),
            BreachLimit(100, 20),
            Completed(1),
            Completed(4),
            AtTime(7_000_000),
            AtTime(30_500_000),
            QueueAbove(2),
            Drained(),
            Probed(),
        ]
    ),
    max_size=3,
    unique=True,
).map(tuple)


@st.composite
def deployments(draw: st.DrawFn) -> Deployment:
    rule, layers = draw(rules)
    deployment = Deployment(
        active=Placement(draw(st.sampled_from(["a", "b"])), layers),
        exit_rule=rule,
        batching=draw(st.sampled_from(BatchingRule)),
        kv_rule=draw(st.sampled_from(kv_rules(rule))),
        batch_limit=draw(st.sampled_from([None, 1, 3])),
        in_flight=draw(st.sampled_from(InFlight)),
        standby=draw(st.sampled_from([(), (), (Placement("a", 4),), (Placement("b", 2),), (Placement("b", 4),)])),
        admit_limit=draw(st.sampled_from([None, None, None, 0, 2])),
        observe_tokens=draw(st.sampled_from([None, None, 1, 5])),
        probe=draw(st.sampled_from([None, None, Probe(("a", "b"), 2)])),
        triggers=draw(triggers),
    )
    if isinstance(rule, FullDepth | FixedCap) and layers == 4 and draw(st.booleans()):
        deployment = replace(deployment, run_layers=2)
    return deployment


@st.composite
def scripts(draw: st.DrawFn) -> Scripted:
    return Scripted(draw(deployments()), draw(st.lists(st.one_of(st.none(), deployments()), max_size=5)))


def profiles(iteration_s: float, hbm_bytes: int) -> dict:
    """Two models; a transfer of all their weights takes about 5 iterations."""
    return {
        name: flat_profile(s, name=name, hbm_bytes=hbm_bytes, load_bytes_per_s=60_000.0)
        for name, s in (("a", iteration_s), ("b", iteration_s * 1.5))
    }


def uneven_profiles(sync_s: float) -> dict:
    """Two models that no iteration costs the same on: rows, KV, depth, checks and loads all take time."""
    costs = {"row_s": 3.1e-5, "kv_projection_s": 7e-5, "kv_token_s": 1.3e-6, "prefill_token_s": 2.9e-6, "head_s": 2e-4}
    return {
        name: priced_profile(
            name, layer_s=layer_s, check_s=check_s, sync_s=sync_s, load_slowdown=1.3, load_bytes_per_s=60_000.0, **costs
        )
        for name, layer_s, check_s in (("a", 2.1e-4, None), ("b", 3.7e-4, 5e-5))
    }


def run(
    workload: Workload,
    script: Scripted,
    replicas: int,
    router: Router,
    pool_blocks: int,
    leap: bool,
    made: dict | None = None,
    schedule_ahead: int = 0,
    ahead: bool = True,
) -> Served:
    made = made or profiles(0.001, 2**30)
    traces = {
        name: synthetic_trace(name, EXITS, tokens=400, seed=seed, chars_per_token=1) for seed, name in enumerate(made)
    }
    block_bytes = 16 * made["a"].kv_bytes_per_token(4)
    hbm_bytes = made["a"].weight_bytes(4) + made["b"].weight_bytes(4) + pool_blocks * block_bytes
    return serve(
        workload,
        Scripted(script.first, list(script.then)),
        made,
        traces,
        hbm_bytes=hbm_bytes,
        utilisation=1.0,
        max_batch_tokens=64,
        max_running_requests=32,
        replicas=replicas,
        router=router,
        leap=leap,
        schedule_ahead=schedule_ahead,
        ahead=ahead,
    )


cases = {
    "workload": workloads,
    "script": scripts(),
    "replicas": st.sampled_from([1, 2]),
    "router": st.sampled_from(Router),
    "pool_blocks": st.sampled_from([4, 9, 40, 1000]),
}
