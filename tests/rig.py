"""A small assembly of workload, profile, trace and policy for tests of the serving loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import simpy

from helios_sim.by_answer import ByAnswer
from helios_sim.engine.simulated import ModelData, SimulatedEngine
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.replay import offline_exits
from helios_sim.exits.rule import Confidence, ExitRule, FullDepth, PerToken
from helios_sim.exits.trace import ExitTrace
from helios_sim.policy.deployment import Cause, Deployment, KvRule, Placement
from helios_sim.policy.telemetry import Candidate, ExpectedLoad, Goal, Objective, Policy, Situation, Telemetry
from helios_sim.profile.composition import Composition, PrefillChunk
from helios_sim.profile.profile import MemoryBudget, Profile
from helios_sim.profile.synthetic import flat_profile
from helios_sim.request import RecordBlock, RequestBlock, RequestRecord
from helios_sim.routing import Router, Routing
from helios_sim.serving.device_plan import plan_of
from helios_sim.serving.faults import with_faults
from helios_sim.serving.iteration import Plan
from helios_sim.serving.server import Server
from helios_sim.simulation import Run, simulate
from helios_sim.study.workload import Foresight
from helios_sim.workload import AllAtOnce, Arrivals, DrawnLengths, Fixed, Length, TaskMix, Workload, generate
from helios_sim.workload.faults import FaultPlan
from helios_sim.workload.prefixes import SharedPrefixes

EXITS = (2, 4)
AT_ONCE, ONE_TASK = AllAtOnce(), TaskMix.single("text")


@dataclass
class Scripted:
    """A policy that starts with one deployment and then returns the given ones, one for each question."""

    first: Deployment
    then: list[Deployment | None] = field(default_factory=list)
    asked: list[tuple[Cause, Telemetry]] = field(default_factory=list)

    def start(self, situation: Situation) -> Deployment:
        return self.first

    def decide(self, cause: Cause, telemetry: Telemetry) -> Deployment | None:
        self.asked.append((cause, telemetry))
        return self.then.pop(0) if self.then else None


def kv_rules(rule: ExitRule) -> list[KvRule]:
    """Those that a deployment with this exit rule may have."""
    both = [KvRule.PROPAGATE, KvRule.RECOMPUTE]
    return both if isinstance(rule, PerToken) else [*both, KvRule.NONE]


def full_depth(model: str = "flat", layers: int = 4, batch_limit: int | None = None) -> Deployment:
    return Deployment(Placement(model, layers), FullDepth(), kv_rule=KvRule.NONE, batch_limit=batch_limit)


def workload(
    requests: int,
    prompt: int | Length = 5,
    output: int | Length = 10,
    arrivals: Arrivals = AT_ONCE,
    mix: TaskMix = ONE_TASK,
) -> Workload:
    """A whole number is the length of every text, in characters; the models here make a token of each."""
    lengths = DrawnLengths(*(Fixed(each) if isinstance(each, int) else each for each in (prompt, output)))
    return Workload(arrivals, lengths, mix, requests, chars_per_token=None)


class Watched(simpy.Environment):
    """Shows every server to `watch` after every event."""

    def __init__(self, watch: Callable[[Server], None]) -> None:
        super().__init__(initial_time=0)
        self.watch = watch
        self.servers: list[Server] = []

    def step(self) -> None:
        super().step()
        for server in self.servers:
            self.watch(server)


def composition_of(server: Server) -> Composition:
    """What the iteration in progress runs, as the loop has laid it out."""
    replica, it = server._replica, server._replica.iteration
    spans, _ = replica.terms.banded if it.banded else replica.terms.uniform
    names = ("decode_tokens", "kv_tokens", "checked_tokens", "classified_tokens", "propagated_tokens")
    work = {name: np.array([[getattr(replica.work[s], name) for s in range(len(spans))]]) for name in names}
    chunks = [replica.chunks[p] for p in range(it.chunks)]
    return Composition(
        bounds=tuple(int(span.end) for span in spans),
        decode_tokens=work["decode_tokens"],
        decode_kv_tokens=work["kv_tokens"],
        sampled_tokens=np.array([it.sampled_tokens]),
        check_tokens=work["checked_tokens"],
        classifier_tokens=work["classified_tokens"],
        decode_kv_least=None if it.kv_least < 0 else np.array([it.kv_least]),
        decode_kv_most=None if it.kv_most < 0 else np.array([it.kv_most]),
        propagated_tokens=work["propagated_tokens"],
        prefill=tuple(PrefillChunk(int(c.tokens), int(c.context_tokens), int(c.layers)) for c in chunks),
        host_sync_at_checks=bool(it.syncs),
        host_ahead=bool(it.host_ahead),
        loading=bool(it.loading),
    )


@dataclass
class Served:
    records: list[RequestRecord]
    run: Run

    def by_request(self) -> list[RequestRecord]:
        return sorted(self.records, key=lambda r: r.request_id)

    def seconds_in_system(self) -> np.ndarray:
        return np.array([(r.last_token_ns - r.arrival_ns) / 1e9 for r in self.by_request()])


WAYS_TO_RUN = (  # `serve` with them gives the same; on a fresh machine the code is compiled first
    pytest.param({"stepwise": True}, id="stepwise"), pytest.param({}, id="ahead"),
    pytest.param({"compiled": True}, id="compiled", marks=pytest.mark.slow),
)  # fmt: skip


def serve(
    workload: Workload,
    policy: Policy | Deployment,
    profiles: Mapping[str, Profile] | None = None,
    traces: Mapping[str, ExitTrace] | None = None,
    *,
    seed: int = 0,
    hbm_bytes: int = 40 * 2**30,
    utilisation: float = 0.9,
    block_tokens: int = 16,
    max_running_requests: int = 256,
    max_batch_tokens: int = 2048,
    replicas: int = 1,
    router: Router = Router.ROUND_ROBIN,
    homes: tuple[tuple[int, ...], ...] | None = None,
    by_answer: ByAnswer | None = None,
    deployments: Sequence[Deployment] | None = None,
    compiled: bool | None = False,
    stepwise: bool = False,
    order: str = "fcfs",
    schedule_ahead: int = 0,
    vllm_v1: bool = False,
    whole_prompts: bool = False,
    others: Mapping[str, Any] | None = None,
    shares: bool = False,
    prefixes: SharedPrefixes | None = None,
    threshold: float = 0.7,
    objective: Objective | None = None,
    expected: ExpectedLoad | None = None,
    foresight: bool = False,
    blocks: Iterator[RequestBlock] | None = None,
    faults: FaultPlan | None = None,
    watch: Callable[[Server], None] | None = None,
    on_plan: Callable[[Server, Plan, int, int], None] | None = None,
) -> Served:
    """`blocks`: these requests, as many as the workload says, in place of those that it would generate.

    `deployments`: of each replica, in place of the policy.

    `others`: further fields of the situation.
    """
    profiles = profiles or {"flat": flat_profile(0.001)}
    traces = traces or {name: synthetic_trace(name, EXITS, chars_per_token=1) for name in profiles}
    tasks = workload.mix.tasks
    candidates = {
        name: Candidate(profile, offline_exits(traces[name], threshold, Confidence.MAX_PROBABILITY))
        for name, profile in profiles.items()
    }
    models = {name: ModelData(profile, traces[name].bind(tasks)) for name, profile in profiles.items()}
    situation = Situation(
        candidates=candidates,
        memory=MemoryBudget(hbm_bytes, utilisation, block_tokens),
        objective=objective or Objective(Goal.THROUGHPUT, 0.1),
        max_running_requests=max_running_requests,
        schedule_ahead=schedule_ahead,
        vllm_v1=vllm_v1,
        **{"whole_prompts": whole_prompts, **(others or {})},
        shares=shares,
        prefixes=prefixes,
        order=order,
        max_batch_tokens=max_batch_tokens,
        seed=seed,
        expected=expected,
        outlook=Foresight(workload, seed, models) if foresight else None,
    )
    env = None if watch is None else Watched(watch)
    made: list[Policy] = []

    def make_server(env, number, on_left):
        own = policy if deployments is None else deployments[number]
        if isinstance(own, Deployment):
            own = Scripted(own)
        elif number:
            own = type(policy)(policy.first, list(policy.then)) if isinstance(policy, Scripted) else policy
        made.append(own)
        engine = SimulatedEngine(env, models)
        server = Server(env, number, with_faults(engine, env) if faults else engine, own, situation, on_left)
        if on_plan is not None:  # told of each iteration before it is committed: who runs, its start and its end
            server.on_iteration = lambda start, end: on_plan(server, plan_of(server._replica, False), start, end)
        if isinstance(env, Watched):
            env.servers.append(server)
        return server

    records: list[RequestRecord] = []
    run = simulate(
        make_server,
        generate(workload, seed) if blocks is None else blocks,
        workload.requests,
        records.append,
        users=workload.users,
        replicas=replicas,
        routing=Routing(router, seed, homes or (tuple(range(replicas)),) * len(tasks), by_answer),
        env=env,
        compiled=compiled,
        stepwise=stepwise or on_plan is not None,
        faults=faults,
        block_sink=lambda block: records.extend(records_in(block)),
    )
    return Served(records, run)


def records_in(block: RecordBlock) -> Iterator[RequestRecord]:
    """The records that a block holds as columns, one by one."""
    for row in range(len(block)):
        values: dict[str, object] = {name: int(column[row]) for name, column in block.numbers.items()}
        values |= {name: int(column[row]) if known[row] else None for name, (column, known) in block.maybe.items()}
        values |= {name: names[codes[row]] for name, (codes, names) in block.labels.items()}
        yield RequestRecord(**values)


def rows_of(work: Workload, trace: ExitTrace) -> list[list[int]]:
    """The rows of the trace that each request's answer reads."""
    bound = trace.bind(work.mix.tasks)
    columns = [(b.task, b.text_start, b.output_chars) for b in generate(work, 0)]
    each = zip(*(np.concatenate(column).tolist() for column in zip(*columns, strict=True)), strict=True)
    return [bound.locate(*one).indices().tolist() for one in each]
