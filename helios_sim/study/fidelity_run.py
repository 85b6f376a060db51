"""Simulates a logged run once. Knows how vLLM stamps times, nothing of what is estimated or shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from helios_sim.serving.iteration import Outcome, Plan
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


class StampingEngine(SimulatedEngine):
    """Notes when iterations began and ended, and lets the very first take longer by the warm-up."""

    def __init__(self, env: simpy.Environment, models: dict[str, ModelData], warm_up_ns: int) -> None:
        super().__init__(env, models)
        self.starts: list[int] = []
        self.ends: list[IntColumn] = []
        self._warm_up_ns = warm_up_ns

    def execute(self, plan: Plan, now_ns: int) -> Outcome:
        outcome = super().execute(plan, now_ns)
        if not self.starts and self._warm_up_ns:
            outcome = replace(outcome, end_ns=outcome.end_ns + self._warm_up_ns)
        self.starts.append(now_ns)
        self.ends.append(outcome.end_ns)
        return outcome

    def iterations(self) -> tuple[IntColumn, IntColumn]:
        """Starts and ends of the iterations that were used: a leap that was cut ends where the next begins."""
        starts, ends = [], []
        following = [*self.starts[1:], np.iinfo(np.int64).max]
        for start, of_leap, until in zip(self.starts, self.ends, following, strict=True):
            used = of_leap[of_leap <= until]
            starts.append(np.append(start, used[:-1]))
            ends.append(used)
        return np.concatenate(starts), np.concatenate(ends)


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
    engines: list[StampingEngine] = []
    records: list[RequestRecord] = []

    def make_server(env: simpy.Environment, number: int, on_left: Callable[[RequestRecord], None]) -> Server:
        engines.append(StampingEngine(env, models, round(warm_up_s * 1e9)))
        return Server(env, number, engines[-1], make_policy("full_depth", {"model": model}), situation, on_left)

    run = simulate(make_server, _blocks(log, rate), len(log), records.append)
    records.sort(key=lambda record: record.request_id)
    lost = [record for record in records if record.status is not Status.COMPLETED]
    if lost:
        fix = "set fidelity.kv_blocks or fidelity.memory_bytes"
        raise UserError("requests.jsonl", f"request {lost[0].request_id}", f"served: {lost[0].drop_reason}", fix)
    times, stamped = _stamp(records, *engines[0].iterations())
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
