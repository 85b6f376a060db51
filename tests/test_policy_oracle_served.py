"""One request at a time, no policy that keeps to the quality floor is done before the oracle: through the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from numpy.typing import NDArray

from helios_sim.engine.simulated import ModelData, SimulatedEngine
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.replay import offline_exits
from helios_sim.exits.rule import Confidence
from helios_sim.policy.registry import make_policy
from helios_sim.policy.telemetry import Candidate, ExpectedLoad, Goal, Objective, Situation
from helios_sim.profile.profile import MemoryBudget
from helios_sim.request import Request, RequestRecord, Status
from helios_sim.serving.server import Server
from helios_sim.simulation import simulate
from helios_sim.workload import ClosedLoop, DrawnLengths, Exponential, TaskMix, Workload, generate
from policy_example import layered_profile

pytestmark = pytest.mark.slow

THRESHOLD = 0.7
ROUND = {"round_requests": 8, "prompts_per_candidate": 2, "window_tokens": 20, "limit": 10, "evaluated_tokens": 4}
ARMS: list[tuple[str, dict]] = [
    ("full_depth", {"model": "a"}),
    ("full_depth", {"model": "b"}),
    ("early_exit", {"model": "a", "threshold": THRESHOLD}),
    ("early_exit", {"model": "b", "threshold": THRESHOLD, "kv_rule": "recompute"}),
    ("static_cap", {"threshold": THRESHOLD}),
    ("static_cap", {"threshold": THRESHOLD, "model": "a", "cap_layers": 2}),
    ("static_cap", {"threshold": THRESHOLD, "model": "b", "cap_layers": 4}),
    ("helios", {"threshold": THRESHOLD, **ROUND}),
    ("helios", {"threshold": THRESHOLD, **ROUND, "on_breach": "switch_only"}),
    ("helios", {"threshold": THRESHOLD, **ROUND, "evaluation": "off", "standby": "whole"}),
    ("helios_probe", {"threshold": THRESHOLD, **ROUND}),
]


class Foreseen:
    def __init__(self, requests: Sequence[Request], models: Mapping[str, ModelData]) -> None:
        self._requests, self._models = requests, models

    def requests(self) -> Sequence[Request]:
        return self._requests

    def agreement(self, model: str, request: Request) -> NDArray[np.bool_]:
        bound = self._models[model].trace
        span = bound.locate(request.task, request.text_start, request.output_chars)
        return bound.trace.agree[span.indices()]

    def bits(self, model: str, request: Request) -> None:
        return None


@cache
def models(ratio: float, launch_s: float, nested: bool) -> dict[str, ModelData]:
    """`a` has exits after 2, 4 and 8 layers, `b` after 4 and 12; a check and a host sync cost as much as a layer."""
    made = {}
    for seed, (name, exits, layer_s) in enumerate((("a", (2, 4, 8), 0.001), ("b", (4, 12), 0.001 * ratio))):
        profile = layered_profile(name, layer_s, exits[-1], load_bytes_per_s=50_000.0)
        profile = profile.with_runtime(replace(profile.runtime, launch_s_per_graph=launch_s, sync_s=launch_s))
        trace = synthetic_trace(name, exits, tokens=300, seed=seed, chars_per_token=1, nested=nested)
        made[name] = ModelData(profile, trace.bind(("text",)))
    return made


def serve(
    workload: Workload, arms: list[tuple[str, dict]], known: dict[str, ModelData], epsilon: float, seed: int
) -> list[list[RequestRecord]]:
    requests = [request for block in generate(workload, seed) for request in block.rows()]
    situation = Situation(
        candidates={
            n: Candidate(m.profile, offline_exits(m.trace.trace, THRESHOLD, Confidence.MAX_PROBABILITY))
            for n, m in known.items()
        },
        memory=MemoryBudget(10**6, 1.0),
        objective=Objective(Goal.THROUGHPUT, epsilon),
        max_running_requests=1,
        max_batch_tokens=64,
        seed=seed,
        expected=ExpectedLoad(20.0, 30.0, closed_loop_users=1),
        outlook=Foreseen(requests, known),
    )
    served = []
    for name, chosen in arms:
        records: list[RequestRecord] = []

        def make_server(env, number, on_left, name=name, chosen=chosen):
            return Server(env, number, SimulatedEngine(env, known), make_policy(name, chosen), situation, on_left)

        simulate(make_server, generate(workload, seed), len(requests), records.append, users=1)
        served.append(records)
    return served


def end_s(records: Sequence[RequestRecord]) -> float:
    return max(r.last_token_ns for r in records) / 1e9


def changed_share(records: Sequence[RequestRecord]) -> float:
    return 1 - sum(r.agreed_tokens for r in records) / sum(r.output_tokens for r in records)


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(
    n=st.integers(1, 40),
    prompt=st.sampled_from([1.0, 20.0, 150.0]),
    output=st.sampled_from([1.0, 30.0]),
    ratio=st.sampled_from([0.4, 0.7, 1.5]),
    launch_s=st.sampled_from([0.0, 0.001]),
    nested=st.booleans(),
    epsilon=st.sampled_from([0.0, 0.05, 0.2, 0.5]),
    seed=st.integers(0, 1000),
)
def test_no_policy_within_the_floor_beats_the_oracle(n, prompt, output, ratio, launch_s, nested, epsilon, seed) -> None:
    workload = Workload(
        ClosedLoop(1), DrawnLengths(Exponential(prompt), Exponential(output)), TaskMix.single("text"), n,
        chars_per_token=None,
    )  # fmt: skip
    known = models(ratio, launch_s, nested)
    oracle, *others = serve(workload, [("oracle", {"batch_limit": 1}), *ARMS], known, epsilon, seed)
    assert {r.status for r in oracle} == {Status.COMPLETED}
    tokens = sum(r.output_tokens for r in oracle)
    longest = max(r.output_tokens for r in oracle)
    assert changed_share(oracle) <= epsilon + (longest + 1) / tokens
    for (name, chosen), records in zip(ARMS, others, strict=True):
        assert all(r.status is Status.COMPLETED for r in records)
        if changed_share(records) <= epsilon:
            assert end_s(oracle) <= end_s(records) + 1e-9 * tokens, (name, chosen)  # iterations are whole nanoseconds
