"""Simulates a logged run, and estimates quantities that kernel tables lack from its first requests.

- `warm_up_s`: the very first iteration is slower (lazy loading, first use of kernels). Seen in the first request's time
  to first token.
- `prefill_gap_s`: additional time of an iteration with prefill, which is launched without a captured graph. Seen in the
  time from a request's scheduling to its first token, which does not include its wait in the queue.
- `gap_s`: time between two iterations in which the device waits for the host. Seen in the time per output token.
- `unequal_kv_part`: the share of the measured excess of unequal KV lengths that applies. The profiler's batches have
  two lengths, the long ones first; a served batch has many, in any order. It is 1 unless time per output token is
  longer in the simulation than in the log even without any gap.

The last two affect the same figure, so only one of them differs from its default (no gap, the whole excess)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from helios_sim.profile.profile import MemoryBudget
from helios_sim.profile.tables import FloatArray
from helios_sim.provenance import Assumption
from helios_sim.request import NS_PER_S, RequestBlock, RequestRecord, Status, all_to_ns, to_ns
from helios_sim.serving.replica import OnLeft
from helios_sim.serving.server import Server
from helios_sim.serving.stats import RunStats, Timeline
from helios_sim.simulation import simulate
from helios_sim.validate.logs import IntColumn, ServingLog, Times
from helios_sim.validate.setup import Setup
from helios_sim.workload.prefixes import SharedPrefixes

TASK = "log"
ROUNDS = 7
CLOSE = 3e-3  # relative miss of a measured figure that is close enough
PLAIN = 4e-3  # relative miss of the time per output token below which the last two keep their defaults
STEP_S = 4e-3  # large enough for the slope to outweigh the effect of single arrivals
_FROM = "estimated from the first {n} requests: {seen}"


@dataclass(frozen=True, slots=True)
class Simulated:
    records: tuple[RequestRecord, ...]  # by request, with arrival and scheduling as vLLM stamps them
    times: Times
    stats: RunStats
    timeline: Timeline


@dataclass(frozen=True, slots=True)
class Shared:
    """Shared prefixes of a log's prompts, which the log itself does not contain."""

    prefixes: SharedPrefixes
    rows: IntColumn  # row of each request, -1 for none


def run_once(
    log: ServingLog, setup: Setup, warm_up_s: float = 0.0, rate: float = 1.0, shared: Shared | None = None
) -> Simulated:
    """Serve the log's requests on the setup's engine, `rate` times as fast. Raises UserError if one cannot be served.

    With `shared` prefixes are cached; without, only a preempted request finds its own blocks again.
    """
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
        whole_prompts=setup.whole_prompts,
        prefix_caching=setup.prefix_caching,
        order=setup.order,
        shares=shared is not None,
        prefixes=None if shared is None else shared.prefixes,
    )
    starts: list[int] = []  # of iterations
    ends: list[int] = []
    records: list[RequestRecord] = []

    def note(start_ns: int, end_ns: int) -> None:
        starts.append(start_ns)
        ends.append(end_ns)

    def make_server(env: simpy.Environment, number: int, on_left: OnLeft) -> Server:
        engine = SimulatedEngine(env, models, to_ns(warm_up_s, "warm-up"))
        server = Server(env, number, engine, make_policy("full_depth", {"model": model}), situation, on_left)
        server.on_iteration = note
        return server

    run = simulate(make_server, _blocks(log, rate, shared), len(log), records.append, stepwise=True)
    records.sort(key=lambda record: record.request_id)
    lost = [record for record in records if record.status is not Status.COMPLETED]
    if lost:
        fix = "set fidelity.kv_blocks or fidelity.memory_bytes"
        raise UserError("requests.jsonl", f"request {lost[0].request_id}", f"served: {lost[0].drop_reason}", fix)
    times, stamped = stamp_times(records, np.array(starts, np.int64), np.array(ends, np.int64))
    return Simulated(stamped, times, run.stats, run.servers[0].timeline)


def _blocks(log: ServingLog, rate: float, shared: Shared | None) -> Iterator[RequestBlock]:
    n = len(log)
    none, rows = np.zeros(n, np.int64), np.full(n, -1, np.int64) if shared is None else shared.rows
    arrival_ns = all_to_ns(log.arrival_ns / rate, "arrivals", ns_per=1)
    yield RequestBlock(np.arange(n), arrival_ns, log.prompt_tokens, log.output_tokens, none, none, log.priority, rows)


def stamp_times(
    records: Sequence[RequestRecord], starts: IntColumn, ends: IntColumn
) -> tuple[Times, tuple[RequestRecord, ...]]:
    """The stamps that vLLM would make. A request is queued between two iterations, when vLLM's loop takes in new ones,
    and scheduled when the plan is made, one iteration before it runs unless the engine was idle."""
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
    """The record with these times. Its arrival is the time at which it was queued."""
    return replace(
        record, arrival_ns=int(times.queued_ns[i]), scheduled_ns=int(times.scheduled_ns[i]),
        first_token_ns=int(times.first_ns[i]), last_token_ns=int(times.last_ns[i]),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Quantities:
    warm_up_s: float = 0.0
    prefill_gap_s: float = 0.0
    gap_s: float = 0.0
    unequal_kv_part: float = 1.0

    def applied(self, setup: Setup) -> Setup:
        """The setup with these quantities in its profile, except for the warm-up, which belongs to a run."""
        profile = setup.profile
        runtime = replace(profile.runtime, gap_s=self.gap_s, prefill_gap_s=self.prefill_gap_s)
        tables = tuple(
            t if t.unequal_kv is None else replace(t, unequal_kv=t.unequal_kv.part(self.unequal_kv_part))
            for t in profile.layer_tables
        )
        return setup.with_profile(replace(profile, runtime=runtime, layer_tables=tables))

    def assumptions(self, n: int) -> tuple[Assumption, ...]:
        """The quantities as assumptions for the report, with the figures that they are estimated from."""
        first_token, output = "their time from schedule to first token", "their time per output token"
        seen = {
            "warm_up_s": "the first one's time to first token", "prefill_gap_s": first_token, "gap_s": output,
            "unequal_kv_part": output,
        }  # fmt: skip
        return tuple(
            Assumption(name, float(getattr(self, name)), _FROM.format(n=n, seen=text), "fidelity.estimate")
            for name, text in seen.items()
        )


def estimated_from(log: ServingLog, wanted: int) -> int:
    """The first requests to arrive that quantities may be estimated from: at most half of the log."""
    return max(min(wanted, len(log) // 2), 1)


def estimate(log: ServingLog, setup: Setup, n: int, note: Callable[[str], None] = lambda text: None) -> Quantities:
    """Fit the measured times of the first `n` requests; the engine knows arrivals and lengths of all."""
    plain = run_once(log, setup).times
    first = int(np.argmin(log.measured.queued_ns))
    warm_up_s = max(float(_ttft_ns(log.measured)[first] - _ttft_ns(plain)[first]) / NS_PER_S, 0.0)
    measured = _seen(log, log.measured, n)
    unit_s = 0.0  # of the second number below: what the whole excess adds to the time per output token

    def quantities(point: FloatArray) -> Quantities:
        """`point`: the prefill gap; and the gap in units, or below 0 the part of the excess that is taken away."""
        gap_s, part = max(point[1], 0.0) * unit_s, 1.0 + min(point[1], 0.0)
        return Quantities(warm_up_s, float(point[0]), float(gap_s), float(part))

    def miss(point: FloatArray) -> FloatArray:
        found = quantities(point)
        note(f"prefill gap {found.prefill_gap_s * 1e3:.2f} ms, gap {found.gap_s * 1e3:.3f} ms, "
             f"excess {found.unequal_kv_part:.2f}")  # fmt: skip
        return _seen(log, run_once(log, found.applied(setup), warm_up_s).times, n) - measured

    point = np.zeros(2)
    missed = miss(point)
    tried = [(_worst(point, missed, measured), quantities(point))]
    slope = 1.0  # of the service time by the prefill gap
    if missed[0] < -CLOSE * measured[0]:
        slope = max(float(miss(np.array([STEP_S, 0.0]))[0] - missed[0]) / STEP_S, 0.5)
    without: FloatArray | None = None
    for _ in range(ROUNDS):
        wanted = point.copy()
        if abs(missed[0]) >= CLOSE * measured[0]:
            wanted[0] = max(point[0] - missed[0] / slope, 0.0)
        if abs(wanted[0] - point[0]) < 2e-5 and abs(missed[1]) >= PLAIN * measured[1]:  # the other one's turn
            if without is None and _has_excess(setup):
                without = miss(np.array([point[0], -1.0]))
            unit_s = unit_s or (max(float(missed[1] - without[1]), 0.0) if without is not None else 0.0) or 1e-3
            least = -1.0 if without is not None and without[1] < missed[1] else 0.0
            wanted[1] = max(point[1] - missed[1] / unit_s, least)
        if np.allclose(wanted, point, rtol=0.0, atol=1e-5):
            break
        point, missed = wanted, miss(wanted)
        tried.append((_worst(point, missed, measured), quantities(point)))
    return min(tried, key=lambda found: found[0])[1]


def _worst(point: FloatArray, missed: FloatArray, measured: FloatArray) -> float:
    """The larger of the two relative misses, without those that nothing can be done about or that are small enough."""
    service, output = np.abs(missed / np.where(measured > 0, measured, 1.0))
    too_slow_anyway = point[0] == 0.0 and missed[0] > 0.0
    return float(max(0.0 if too_slow_anyway else service, output if output >= PLAIN else 0.0))


def _ttft_ns(times: Times) -> IntColumn:
    return times.first_ns - times.queued_ns


def _seen(log: ServingLog, times: Times, n: int) -> FloatArray:
    """Means over the first n requests, s: from schedule to first token (without the very first), per output token."""
    service_ns = (times.first_ns - times.scheduled_ns)[1:n] if n > 1 else (times.first_ns - times.scheduled_ns)[:1]
    several = log.output_tokens[:n] > 1
    decode_ns = (times.last_ns - times.first_ns)[:n][several] / (log.output_tokens[:n][several] - 1)
    return np.array([service_ns.mean(), decode_ns.mean() if several.any() else 0.0]) / NS_PER_S


def _has_excess(setup: Setup) -> bool:
    return any(tables.unequal_kv is not None for tables in setup.profile.layer_tables)
