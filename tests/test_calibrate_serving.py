"""The host's time is the period of an iteration less its forward pass, and charged so it gives the period back."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import simpy

torch = pytest.importorskip("torch")

from calibrate.measure.ceilings import Ceilings  # noqa: E402
from calibrate.measure.devices import TimedCpu  # noqa: E402
from calibrate.measure.host import PROMPT_TOKENS, Served, ServingCosts, measure_serving, serve  # noqa: E402
from calibrate.measure.subject import Subject, TableLimits  # noqa: E402
from fake_device import VirtualClock  # noqa: E402
from helios_sim.engine.simulated import ModelData, SimulatedEngine  # noqa: E402
from helios_sim.exits.artificial import no_exits  # noqa: E402
from helios_sim.exits.replay import offline_exits  # noqa: E402
from helios_sim.exits.rule import Confidence  # noqa: E402
from helios_sim.live.checkpoint.source import find_checkpoint  # noqa: E402
from helios_sim.live.engine import LiveEngine  # noqa: E402
from helios_sim.live.forward import Forward  # noqa: E402
from helios_sim.live.model.architecture import model_spec  # noqa: E402
from helios_sim.live.model.decoder import SegmentedModel  # noqa: E402
from helios_sim.policy.full_depth import FullDepthParameters, FullDepthPolicy  # noqa: E402
from helios_sim.policy.telemetry import Candidate, Goal, Objective, Situation  # noqa: E402
from helios_sim.profile.profile import MemoryBudget  # noqa: E402
from helios_sim.profile.synthetic import flat_profile  # noqa: E402
from helios_sim.profile.tables import RowsTable  # noqa: E402
from helios_sim.request import RequestBlock, RequestRecord  # noqa: E402
from helios_sim.serving.server import Server  # noqa: E402
from helios_sim.simulation import simulate  # noqa: E402
from tiny_models import write_tiny  # noqa: E402

CEILINGS = Ceilings("float32", 1e12, 1e12, 1e15, 1, 1)
FORWARD_S = 0.010
ENGINE_S, SERVER_S = 0.0002, 0.0003  # of an iteration, around the forward pass and between two iterations
LOOK_S = 1e-8  # which the clock goes on when somebody looks at it, as real ones do
ROUNDING_S = 2e-6


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    checkpoint = find_checkpoint(str(write_tiny("llama", tmp_path_factory.mktemp("tiny"), layers=3)))
    threads = torch.get_num_threads()
    device = TimedCpu.open(memory_bytes=1 << 30, threads=1)
    torch.set_num_threads(threads)
    return Subject(SegmentedModel.load(checkpoint), device, TableLimits(8, 64, 32, 64, 8))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> VirtualClock:
    """Time passes in three places: in the forward pass, in the engine around it, and in the server."""
    clock = VirtualClock()

    def looked_at() -> float:
        clock.pass_s(LOOK_S)
        return clock.now_s

    def slower(function: Any, seconds: float) -> Any:
        @functools.wraps(function)
        def slow(*arguments: Any) -> Any:
            clock.pass_s(seconds)
            return function(*arguments)

        return slow

    for module in ("helios_sim.live.clock", "simpy.rt"):
        monkeypatch.setattr(f"{module}.monotonic", looked_at)
    monkeypatch.setattr(Forward, "run", slower(Forward.run, FORWARD_S))
    monkeypatch.setattr(LiveEngine, "_note", slower(LiveEngine._note, ENGINE_S))
    monkeypatch.setattr(Server, "_run_loop", slower(Server._run_loop, SERVER_S / 2))  # twice an iteration
    return clock


def spec_of(subject: Subject) -> Any:
    return model_spec(subject.architecture, "tiny", 4.0)


def test_it_is_the_period_less_the_forward_pass(subject: Subject, clock: VirtualClock) -> None:
    found = measure_serving(subject, spec_of(subject), CEILINGS)
    assert set(found.host_s) == {1, 2, 8}
    for batch in found.host_s:
        assert found.host_s[batch] == pytest.approx(ENGINE_S + SERVER_S, abs=ROUNDING_S)
        assert found.forward_s[batch] == pytest.approx(FORWARD_S, abs=ROUNDING_S)
        assert found.host_iqr_s[batch] == pytest.approx(0.0, abs=ROUNDING_S)
    assert ServingCosts.from_json(found.to_json()) == found


def test_parts_of_all_iterations_add_up_to_the_whole_run(subject: Subject) -> None:
    """By the real clock: nothing is left out and nothing is counted twice."""
    run = serve(subject, spec_of(subject), CEILINGS, 3, 12)
    ends = [record.last_token_ns for record in run.records]
    assert len(run.decodes(3)) == 11
    assert sum(step.overhead_ns + step.forward_ns for step in run.steps) == max(end for end in ends if end is not None)
    assert all(0 < step.forward_ns < step.engine_ns for step in run.steps)


def test_a_simulation_that_charges_it_serves_as_fast(subject: Subject, clock: VirtualClock) -> None:
    """Time per token, live and simulated with what was measured: the same."""
    batch, tokens = 4, 20
    live = serve(subject, spec_of(subject), CEILINGS, batch, tokens)
    measured = measure_serving(subject, spec_of(subject), CEILINGS)
    simulated = simulated_with(measured, batch, tokens)
    assert tpots_s(simulated.records) == pytest.approx(tpots_s(live.records), abs=ROUNDING_S)
    assert tpots_s(live.records) == pytest.approx([FORWARD_S + ENGINE_S + SERVER_S] * batch, abs=ROUNDING_S)


def tpots_s(records: list[RequestRecord]) -> list[float]:
    return [(r.last_token_ns - r.first_token_ns) / (r.output_tokens - 1) / 1e9 for r in records]  # type: ignore[operator]


def simulated_with(measured: ServingCosts, batch: int, tokens: int) -> Served:
    """A forward pass of one head that takes what it took, and the host's time as measured."""
    flat = flat_profile(measured.middle_host_s, name="tiny")
    profile = replace(flat, head=RowsTable(np.array([1, 4096]), np.full(2, measured.forward_s[2])))
    trace = no_exits(profile.model)
    situation = Situation(
        {"tiny": Candidate(profile, offline_exits(trace, 1.0, Confidence.MAX_PROBABILITY))},
        MemoryBudget(1 << 40, 1.0), Objective(Goal.THROUGHPUT, 1.0), batch, batch * PROMPT_TOKENS, 0,
    )  # fmt: skip
    records: list[RequestRecord] = []

    def make_server(env: simpy.Environment, number: int, on_left: Any) -> Server:
        engine = SimulatedEngine(env, {"tiny": ModelData(profile, trace.bind(("text",)))})
        return Server(env, number, engine, FullDepthPolicy(FullDepthParameters()), situation, on_left)

    nothing = np.zeros(batch, np.int64)
    block = RequestBlock(np.arange(batch), nothing, nothing + PROMPT_TOKENS, nothing + tokens, nothing, nothing)
    simulate(make_server, iter([block]), batch, records.append)
    return Served([], records)
