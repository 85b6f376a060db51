"""How long the serving loop takes: an iteration with prefill, one of decodes, a whole workload. Run with -m bench.

Bounds are several times what an idle machine needs; the figures are what the run prints.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import simpy
from pytest_benchmark.fixture import BenchmarkFixture

from helios_sim.engine.simulated import ModelData, SimulatedEngine
from helios_sim.exits.artificial import no_exits
from helios_sim.exits.replay import offline_exits
from helios_sim.exits.rule import Confidence
from helios_sim.policy.telemetry import Candidate, Goal, Objective, Situation
from helios_sim.profile.profile import MemoryBudget
from helios_sim.profile.store import load_profile
from helios_sim.request import Request
from helios_sim.serving.server import Server
from helios_sim.study.fleet import build_fleet
from helios_sim.workload import read_trace
from rig import Scripted, full_depth

MODEL, BATCH = "llama-2-7b", 32
STEPS = {"an iteration with prefill": 5, "an iteration of decodes": 40}  # events of the server before the timed one


@pytest.fixture
def measure(repository: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What experiments/speed/measure.py defines."""
    monkeypatch.setenv("HELIOS_SHARED_DATA", str(shared_data))
    return runpy.run_path(str(repository / "experiments/speed/measure.py"))


def full_server(steps: int) -> tuple[simpy.Environment, Server]:
    """A server after so many steps with 32 prompts of 500 tokens, four of which fit into an iteration."""
    profile = load_profile(f"{MODEL}@a100-40gb")
    trace = no_exits(profile.model)
    situation = Situation(
        candidates={MODEL: Candidate(profile, offline_exits(trace, 0.7, Confidence.MAX_PROBABILITY))},
        memory=MemoryBudget(profile.hardware.hbm_bytes, 0.9, 16),
        objective=Objective(Goal.THROUGHPUT, 0.1),
        max_running_requests=256,
        max_batch_tokens=2048,
        seed=0,
    )
    env = simpy.Environment()
    engine = SimulatedEngine(env, {MODEL: ModelData(profile, trace.bind(("text",)))})
    server = Server(env, 0, engine, Scripted(full_depth(MODEL, profile.model.n_layers)), situation, lambda record: None)
    for i in range(BATCH):  # answers of different lengths
        server.submit(Request(i, 0, prompt_chars=1900, output_chars=380 + 38 * i, task=0, text_start=0))
    for _ in range(steps):
        env.step()
    return env, server


@pytest.mark.bench
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_one_step(benchmark: BenchmarkFixture, steps: int) -> None:
    """Commits what has ended, then plans, prices and starts what comes next."""
    benchmark.pedantic(lambda env, server: env.step(), setup=lambda: (full_server(steps), {}), rounds=100)
    assert benchmark.stats["median"] < 2e-3


@pytest.mark.parametrize(("name", "iterations"), [("an iteration with prefill", 1), ("an iteration of decodes", 1)])
def test_the_timed_steps_are_what_they_are_called(name: str, iterations: int) -> None:
    env, server = full_server(STEPS[name])
    before, batch_mean = server.stats.iterations, server.stats.decode_batch_ns / server.stats.decode_ns
    env.step()
    assert server.stats.iterations - before == iterations
    assert 5 < batch_mean < BATCH


@pytest.mark.bench
def test_1000_requests_of_w1(benchmark: BenchmarkFixture, measure: dict[str, Any]) -> None:
    (job,) = measure["jobs"]("speed_w1", ["workload.n_requests=1000"])
    fleet = build_fleet(job.config, job.seed)
    benchmark.pedantic(measure["served"], (job, fleet), rounds=5, warmup_rounds=1)
    assert benchmark.stats["median"] < 3.0


def test_token_counts_of_w1_are_the_files_own(measure: dict[str, Any]) -> None:
    (job,) = measure["jobs"]("speed_w1", ["workload.n_requests=200"])
    records, run = measure["served"](job, build_fleet(job.config, job.seed))
    file = read_trace(job.config.workload.lengths.trace, limit=200)
    records.sort(key=lambda record: record.request_id)
    assert run.requests == len(records) == 200
    assert [record.prompt_tokens for record in records] == file.prompt_tokens.tolist()
    assert [record.output_tokens for record in records] == file.output_tokens.tolist()
    assert [record.arrival_ns for record in records] == file.arrival_ns.tolist()


@pytest.mark.slow
def test_the_same_run_has_the_same_digest_and_another_has_not(measure: dict[str, Any]) -> None:
    digests = []
    for requests in (30, 30, 31):
        (job,) = measure["jobs"]("speed_w1", [f"workload.n_requests={requests}"])
        digests.append(measure["digest"](*measure["served"](job, build_fleet(job.config, job.seed))))
    assert digests[0] == digests[1] != digests[2]
