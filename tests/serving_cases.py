"""Random workloads, deployments, policies and profiles for the invariants of the serving loop.

Everything is drawn by a `Choose`, which picks one of several options. Hypothesis is one source of choices (the
strategies here); the recorded digests take theirs from a plain generator (`digests.serving`), because Hypothesis may
draw differently in another version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.rule import Clairvoyant, Confidence, ExitRule, FixedCap, FullDepth, PerToken
from helios_sim.policy.deployment import (
    AtTime,
    BatchingRule,
    BreachLimit,
    Completed,
    Deployment,
    Drained,
    InFlight,
    Placement,
    Probe,
    Probed,
    QueueAbove,
)
from helios_sim.policy.registry import make_policy
from helios_sim.policy.telemetry import ExpectedLoad, Goal, Objective
from helios_sim.profile.profile import Profile
from helios_sim.profile.synthetic import flat_profile
from helios_sim.profile.tables import MixedTable, RowsTable, UnequalTable
from helios_sim.routing import Router
from helios_sim.workload import AllAtOnce, ClosedLoop, Constant, Exponential, Poisson, TaskMix, Workload
from priced import line, priced_profile
from rig import EXITS, ONE_TASK, Scripted, Served, kv_rules, serve, workload

Choose = Callable[[Sequence[Any]], Any]


def drawn_by(choices: Callable[[Choose], Any]) -> st.SearchStrategy[Any]:
    """The strategy whose every choice is one of Hypothesis."""

    @st.composite
    def made(draw: st.DrawFn) -> Any:
        return choices(lambda options: draw(st.sampled_from(options)))

    return made()


# --- what is asked

TWO_TASKS = TaskMix(("first", "second"), (0.6, 0.4))
REQUESTS = (1, 2, 3, 5, 8, 12, 16, 20, 25, 30, 35, 40)
PROMPTS = (1, 16, 40, Exponential(30))
OUTPUTS = (1, 2, 33, Exponential(20), Exponential(60))
# With iterations of 1 ms, whole milliseconds between arrivals make every arrival a tie.
ARRIVALS = (
    Constant(1000.0), Constant(500.0), Constant(100.0), AllAtOnce(), ClosedLoop(3), ClosedLoop(40),
    Poisson(23.7), Poisson(61.3), Poisson(142.1), Poisson(388.8),
)  # fmt: skip


def choose_workload(choose: Choose, mixes: Sequence[TaskMix] = (ONE_TASK,)) -> Workload:
    return workload(choose(REQUESTS), choose(PROMPTS), choose(OUTPUTS), choose(ARRIVALS), choose(mixes))


# --- what is deployed

RULES: tuple[tuple[ExitRule, int], ...] = (
    (FullDepth(), 4),
    (FixedCap(0.7), 2),
    (FixedCap(0.7), 4),
    (FixedCap(0.5, Confidence.MARGIN), 2),
    (FixedCap(0.7, Confidence.CLASSIFIER), 2),
    (FixedCap(0.7, Confidence.CLASSIFIER), 4),
    (PerToken(0.7), 4),
    (PerToken(0.7), 2),
    (PerToken(0.5, Confidence.MARGIN), 4),
    (PerToken(0.7, Confidence.CLASSIFIER), 4),
    (PerToken(0.7, Confidence.CLASSIFIER), 2),
    (Clairvoyant(0.05), 4),
)
TRIGGERS = (
    BreachLimit(10, 3),
    BreachLimit(100, 20),
    Completed(1),
    Completed(4),
    AtTime(7_000_000),
    AtTime(30_500_000),
    QueueAbove(2),
    Drained(),
    Probed(),
)
STANDBY = ((), (), (Placement("a", 4),), (Placement("b", 2),), (Placement("b", 4),))


def choose_triggers(choose: Choose, least: int = 0) -> tuple[Any, ...]:
    """Up to three different ones."""
    found: list[Any] = []
    for _ in range(choose(range(least, 4))):
        found.append(choose([t for t in TRIGGERS if t not in found]))
    return tuple(found)


def choose_deployment(choose: Choose, standby: Sequence[tuple[Placement, ...]] = STANDBY) -> Deployment:
    rule, layers = choose(RULES)
    deployment = Deployment(
        active=Placement(choose(["a", "b"]), layers),
        exit_rule=rule,
        batching=choose([BatchingRule.EACH_TOKEN, BatchingRule.LAZY]),
        kv_rule=choose(kv_rules(rule)),
        batch_limit=choose([None, 1, 3]),
        in_flight=choose(list(InFlight)),
        standby=choose(standby),
        admit_limit=choose([None, None, None, None, None, 0, 2, 4]),
        observe_tokens=choose([None, None, 1, 5]),
        probe=choose([None, None, Probe(("a", "b"), 2)]),
        triggers=choose_triggers(choose),
    )
    for trigger, possible in ((Probed(), deployment.probe), (Drained(), deployment.admit_limit)):
        if possible is not None and trigger not in deployment.triggers and choose([False, True]):
            deployment = replace(deployment, triggers=(*deployment.triggers, trigger))
    if isinstance(rule, FullDepth | FixedCap) and layers == 4 and choose([False, True]):
        deployment = replace(deployment, run_layers=2)
    return deployment


def choose_script(choose: Choose) -> Scripted:
    return Scripted(
        choose_deployment(choose),
        [choose_deployment(choose) if choose([False, True]) else None for _ in range(choose(range(6)))],
    )


# --- what it costs


def profiles(iteration_s: float, hbm_bytes: int) -> dict[str, Profile]:
    """Two models; a transfer of all their weights takes about 5 iterations, and a classifier's check costs nothing."""
    return {
        name: replace(
            flat_profile(s, name=name, hbm_bytes=hbm_bytes, load_bytes_per_s=60_000.0), check_classifier=line(0.0)
        )
        for name, s in (("a", iteration_s), ("b", iteration_s * 1.5))
    }


def uneven_profiles(sync_s: float, **other: Any) -> dict[str, Profile]:
    """Two models that no iteration costs the same on: rows, KV, depth, checks and loads all take time."""
    costs: dict[str, Any] = {
        "row_s": 3.1e-5, "kv_projection_s": 7e-5, "kv_token_s": 1.3e-6, "prefill_token_s": 2.9e-6, "head_s": 2e-4,
        "classifier_s": 1.7e-5, "load_slowdown": 1.3, "load_bytes_per_s": 60_000.0,
    }  # fmt: skip
    return {
        name: priced_profile(name, layer_s=layer_s, check_s=check_s, sync_s=sync_s, **(costs | other))
        for name, layer_s, check_s in (("a", 2.1e-4, None), ("b", 3.7e-4, 5e-5))
    }


def choose_profiles(choose: Choose) -> dict[str, Profile]:
    """Flat, uneven, or uneven with further terms, as profiles from measurements have them."""
    kind = choose(["flat", "uneven", "measured", "measured", "measured"])
    context = choose([1 << 20, 1 << 20, 70])
    if kind == "flat":
        return {
            name: replace(p, model=replace(p.model, max_context_tokens=context))
            for name, p in profiles(0.001, 2**30).items()
        }
    made = uneven_profiles(choose([0.0, 2e-5]), max_context_tokens=context)
    if kind == "uneven":
        return made
    return {name: measured(profile, choose) for name, profile in made.items()}


def measured(profile: Profile, choose: Choose) -> Profile:
    """The profile with terms that only some measurements yield, on grids that some iterations leave."""
    (tables,) = profile.layer_tables
    spread = choose(["mean", "unequal", "padded"])
    if choose([False, True]):
        tables = replace(tables, mixed_attention=MIXED)
    if spread == "unequal":
        tables = replace(tables, unequal_kv=UNEQUAL)
    if choose([False, True]):  # decode attention measured up to 3 requests of 40 tokens
        grid = tables.decode_attention
        time_s = np.array([[1.1e-6, 5e-5], [3.3e-6, 1.6e-4]])
        tables = replace(
            tables, decode_attention=replace(grid, first=np.array([1, 3]), second=np.array([0, 40]), time_s=time_s)
        )
    layers, classes = (tables,), (0,) * profile.model.n_layers
    if choose([False, True]):  # the second half of the layers is of another class
        layers = (tables, replace(tables, dense=line(2.9e-4, 2.3e-5)))
        classes = (0, 0, 1, 1)
    runtime = replace(
        profile.runtime,
        host_overhead_s=choose([0.0, 1.3e-4, 9e-4]),
        launch_s_per_layer=choose([0.0, 4.3e-5]),
        launch_s_per_graph=choose([0.0, 2e-5, 1.1e-3]),
        graph_batch_sizes=choose([None, (1, 2, 4, 8)]),
        gap_s=choose([0.0, 1.9e-4]),
        prefill_gap_s=choose([0.0, 7.7e-4]),
    )
    return replace(
        profile,
        layer_tables=layers,
        layer_class=classes,
        runtime=runtime,
        check_classifier=choose([profile.check_classifier, SMALL_CLASSIFIER]),
        load_slowdown=choose([1.0, 1.3, 2.4]),
        mixed_factor=choose([None, 1.17]),
        unequal_kv_factor=choose([None, 1.09]),
        padded_kv=spread == "padded",
        time_factor=choose([1.0, 1.0, 0.9]),
    )


SMALL_CLASSIFIER = RowsTable(np.array([1, 2], dtype=np.int64), np.array([1.3e-5, 1.9e-5]))  # up to two rows
_CHUNK, _CONTEXT, _BATCH, _KV = np.array([1, 16, 64]), np.array([0, 30]), np.array([1, 2, 8]), np.array([1, 24, 90])
MIXED = MixedTable(
    _CHUNK, _CONTEXT, _BATCH, _KV,
    1e-7 * (1 + _CHUNK[:, None, None, None]) + 3e-8 * _CONTEXT[:, None, None]
    + 1.7e-6 * _BATCH[:, None] * (3 + 0.1 * _KV),
)  # fmt: skip
UNEQUAL = UnequalTable(
    np.array([0, 16, 64]), np.array([1, 4, 9]), np.array([8, 40]), np.array([0.0, 0.4, 1.0]),
    np.array([0.05, 0.02, -0.01])[:, None, None, None] + np.array([0.0, 0.11, 0.19])[:, None, None]
    * np.array([0.3, 0.8])[:, None] * np.array([0.0, 1.0, 0.2]),
)  # fmt: skip


# --- policies that decide for themselves

ROUND = {"round_requests": 8, "prompts_per_candidate": 2, "window_tokens": 20, "limit": 10, "evaluated_tokens": 4}
OWN_POLICIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("static_cap", {"threshold": 0.7}),
    ("early_exit", {"model": "a", "threshold": 0.7, "kv_rule": "recompute"}),
    ("helios", {"threshold": 0.7, **ROUND}),
    ("helios", {"threshold": 0.7, **ROUND, "confidence": "classifier", "raised": "early_exit"}),
    ("helios", {"threshold": 0.7, **ROUND, "evaluation": "off", "standby": "whole", "in_flight": "migrate"}),
    ("helios_probe", {"threshold": 0.7, **ROUND}),
)


def choose_case(choose: Choose) -> dict[str, Any]:
    """Arguments of `rig.serve` for one run of two models, `a` and `b`, of anything that a run can hold."""
    made = choose_profiles(choose)
    mix = choose([ONE_TASK, ONE_TASK, TWO_TASKS])
    work = choose_workload(choose, [mix])
    uneven = choose([False, False, True])
    traces = {
        name: synthetic_trace(name, EXITS, tokens=400, seed=seed, chars_per_token=1, uneven=uneven)
        for seed, name in enumerate(made)
    }
    replicas = choose([1, 1, 2, 3])
    others = (Router.SESSION, Router.PREFIX_AWARE)  # for what prompts share, which cases do not say
    drawn = [router for router in Router if router not in others]
    routers = [router for router in drawn if replicas > 1 or router is Router.ROUND_ROBIN]
    block_tokens = choose([16, 16, 4])
    # `tight`: the two models do not fit side by side, so that one has to leave before the other loads.
    tight = choose([False, False, False, True])
    policies = choose(["scripted"] * 6 + ["oracle", "own"])
    whole = [profile.weight_bytes(4) for profile in made.values()]
    # policies that choose a model themselves refuse one that leaves no room for a request
    pool_blocks = choose([40, 1000] if policies == "own" else [4, 9, 40, 1000])
    pool_bytes = pool_blocks * block_tokens * made["a"].kv_bytes_per_token(4)
    arguments = {
        "workload": work,
        "profiles": made,
        "traces": traces,
        "seed": choose(range(1000)),
        "hbm_bytes": (max(whole) if tight else sum(whole)) + pool_bytes,
        "utilisation": 1.0,
        "block_tokens": block_tokens,
        "max_running_requests": choose([2, 8, 32]),
        "max_batch_tokens": choose([16, 64, 2048]),
        "replicas": replicas,
        "router": choose(routers),
        "schedule_ahead": choose([0, 1]),
        "vllm_v1": choose([False, False, True]),
        "objective": Objective(choose(list(Goal)), choose([0.0, 0.1, 0.3])),
    }
    if replicas > 1 and len(mix.tasks) == 2:
        arguments["homes"] = ((0,), tuple(range(1, replicas)))
    if policies == "oracle":
        settings = {"epoch_requests": choose([1, 3]), "batch_limit": choose([None, 1, 4])}
        return arguments | {"policy": make_policy("oracle", settings), "foresight": True}
    if policies == "own" and not tight:  # one policy object, and so one replica
        name, settings = choose(OWN_POLICIES)
        arguments |= {"expected": ExpectedLoad(20.0, 15.0, arrival_rate_per_s=50.0), "replicas": 1}
        return {key: value for key, value in arguments.items() if key != "homes"} | {
            "policy": make_policy(name, settings), "router": Router.ROUND_ROBIN,
        }  # fmt: skip
    standby = [()] if tight else STANDBY
    first = choose_deployment(choose, standby)
    if not first.triggers:  # or else nothing is ever decided
        first = replace(first, triggers=choose_triggers(choose, least=1))
    questions = range(choose(range(6)))
    then = [choose_deployment(choose, standby) if choose([False, True, True]) else None for _ in questions]
    return arguments | {"policy": Scripted(first, then)}


# --- strategies

workloads = drawn_by(choose_workload)
whole_cases = drawn_by(choose_case)


def scripts() -> st.SearchStrategy[Scripted]:
    return drawn_by(choose_script)


cases = {
    "workload": workloads,
    "script": scripts(),
    "replicas": st.sampled_from([1, 2]),
    "router": st.sampled_from(Router),
    "pool_blocks": st.sampled_from([4, 9, 40, 1000]),
}


def run(
    workload: Workload,
    script: Scripted,
    replicas: int,
    router: Router,
    pool_blocks: int,
    stepwise: bool,
    made: dict[str, Profile] | None = None,
    schedule_ahead: int = 0,
    compiled: bool = False,
    order: str = "fcfs",
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
        stepwise=stepwise,
        schedule_ahead=schedule_ahead,
        compiled=compiled,
        order=order,
    )
