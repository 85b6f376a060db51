"""Simulates a logged run once. Knows how vLLM stamps times, nothing of what is estimated or shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import simpy

from helios_sim.engine.simulated import ModelData, SimulatedEngine
from helios_sim.errors import UserError
from helios_sim.exits.artificial import no_exits
from helios_sim.exits.replay import offline_exits
from helios_sim.exits.rule import Confidence
from helios_sim.policy.registry import make_policy
from helios_sim.policy.telemetry import Candidate, Goal, Objective, Situation
from helios_sim.profile.memory import MemoryBudget
from helios_sim.request import RequestBlock, RequestRecord, Status
from helios_sim.serving.replica import OnLeft
from helios_sim.serving.server import Server
from helios_sim.serving.stats import RunStats
from helios_sim.serving.timeline import Timeline
from helios_sim.simulation import simulate
from helios_sim.study.fidelity_log import IntColumn, ServingLog, Times
from helios_sim.study.fidelity_setup import Setup

TASK = "log"


@dataclass(frozen=True, slots=True)
class Simulated:
    records: tuple[RequestRecord, ...]  # by request, with arrival and scheduling as vLLM stamps them
    times: Times
    stats: RunStats
    timeline: Timeline


def run_once(log: ServingLog, setup: Setup, warm_up_s: float = 0.0, rate: float = 1.0) -> Simulated:
    """The log's requests on the setup's engine; arrivals `rate` times as fast. UserError where one cannot be served."""
    profile = setup.profile
    model, layers = profile.model.name, profile.model.n_layers
    trace = no_exits(profile.model)
    models = {model: ModelData(profile, trace.bind((TASK,)))}
    pool_bytes = setup.kv_blocks * setup.block_tokens * profile.kv_bytes_per_token(layers)
    capacity = profile.weight_bytes(layers) + profile.activation_reserve_bytes + pool_bytes
    situation = Situation(
        candidates={model: Candidate(profile, offline_exits(trace, 0.5, Confidence.MAX_PROBABILITY))},
        memory=MemoryBudget(capacity, 1.0, setup.block_tokens),
        objective=Objective(Goal.THROUGHPUT, 0.0),
        max_running_requests=setup.max_running_requests,
        max_batch_tokens=setup.max_batch_tokens,
        seed=0,
        schedule_ahead=setup.schedule_ahead,
        vllm_v1=setup.vllm_v1,
    )
    starts: list[int] = []  # of iterations
    ends: list[int] = []
    records: list[RequestRecord] = []

    def note(start_ns: int, end_ns: int) -> None:
        starts.append(start_ns)
        ends.append(end_ns)

    def make_server(env: simpy.Environment, number: int, on_left: OnLeft) -> Server:
        engine = SimulatedEngine(env, models, round(warm_up_s * 1e9))
        server = Server(env, number, engine, make_policy("full_depth", {"model": model}), situation, on_left)
        server.on_iteration = note
        return server

    run = simulate(make_server, _blocks(log, rate), len(log), records.append, stepwise=True)
    records.sort(key=lambda record: record.request_id)
    lost = [record for record in records if record.status is not Status.COMPLETED]
    if lost:
        fix = "set fidelity.kv_blocks or fidelity.memory_bytes"
        raise UserError("requests.jsonl", f"request {lost[0].request_id}", f"served: {lost[0].drop_reason}", fix)
    times, stamped = _stamp(records, np.array(starts, np.int64), np.array(ends, np.int64))
    return Simulated(stamped, times, run.stats, run.servers[0].timeline)


def _blocks(log: ServingLog, rate: float) -> Iterator[RequestBlock]:
    n = len(log)
    none = np.zeros(n, np.int64)
    arrival_ns = np.rint(log.arrival_ns / rate).astype(np.int64)
    yield RequestBlock(np.arange(n), arrival_ns, log.prompt_tokens, log.output_tokens, none, none)


def _stamp(records: list[RequestRecord], starts: IntColumn, ends: IntColumn) -> tuple[Times, tuple[RequestRecord, ...]]:
    """vLLM's stamps. Its loop takes in new requests between iterations only: that is when one is queued. It is
    scheduled when the plan is made, which is one iteration before it runs unless the engine was idle."""
    turns = np.unique(np.concatenate([starts, ends]))
    arrival = np.array([record.arrival_ns for record in records])
    queued = np.maximum(turns[np.minimum(np.searchsorted(turns, arrival), len(turns) - 1)], arrival)
    began = np.array([record.scheduled_ns for record in records], np.int64)
    at = np.searchsorted(starts, began)
    before = starts[np.maximum(at - 1, 0)]
    planned = np.where((at > 0) & (ends[np.maximum(at - 1, 0)] == began) & (before >= queued), before, began)
    zero = queued.min()
    times = Times(
        queued - zero, planned - zero,
        np.array([record.first_token_ns for record in records], np.int64) - zero,
        np.array([record.last_token_ns for record in records], np.int64) - zero,
    )  # fmt: skip
    return times, tuple(stamped(record, times, i) for i, record in enumerate(records))


def stamped(record: RequestRecord, times: Times, i: int) -> RequestRecord:
    """The record with these times; what counts as its arrival is when it was queued."""
    return replace(
        record, arrival_ns=int(times.queued_ns[i]), scheduled_ns=int(times.scheduled_ns[i]),
        first_token_ns=int(times.first_ns[i]), last_token_ns=int(times.last_ns[i]),
    )  # fmt: skip
