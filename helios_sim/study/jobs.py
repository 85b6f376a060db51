"""One job: one arm, one seed, one setting. It runs on any machine, and jobs with equal keys have equal results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING, Any

import simpy

import helios_sim
from helios_sim.core.machine import is_made
from helios_sim.engine.simulated import SimulatedEngine
from helios_sim.errors import BeyondRoofline
from helios_sim.policy.deployment import Judged
from helios_sim.policy.draft_model import DraftModelParameters
from helios_sim.policy.registry import PolicyConfig
from helios_sim.policy.telemetry import Policy
from helios_sim.profile.precision import served_as
from helios_sim.profile.runtimes import FIT, HOST_TIME
from helios_sim.profile.spec import Basis, HardwareSpec, RuntimeConfig
from helios_sim.provenance import NOT_READ, Assumption, Provenance, ProvenanceClass
from helios_sim.report.breakdown import ReplicaFigures, replica_figures
from helios_sim.report.metrics import Cards, MetricValue, Power, compute_metrics
from helios_sim.report.records import RecordLog, Records
from helios_sim.report.result import ExitDepths, Replicate
from helios_sim.request import RequestRecord, Slo, to_ns
from helios_sim.serving.autoscale import Scaled
from helios_sim.serving.decider import Decision
from helios_sim.serving.faults import with_faults
from helios_sim.serving.iteration import Engine
from helios_sim.serving.replica import OnLeft
from helios_sim.serving.server import Server
from helios_sim.serving.stats import Timeline
from helios_sim.simulation import BlockSink, Run, simulate
from helios_sim.study.build import Arm, arm_of
from helios_sim.study.cost import card_sets, costs_of
from helios_sim.study.fleet import Fleet, digest, shared_fleet, what_counts
from helios_sim.study.inputs import made_of
from helios_sim.study.modes import SIMULATE
from helios_sim.study.schema import Config
from helios_sim.study.watched import LiveNotes
from helios_sim.workload import TraceArrivals, TraceLengths, generate, up_to
from helios_sim.workload.faults import Struck

if TYPE_CHECKING:
    from helios_sim.study.live import LiveRun

ROOFLINE = 1.001  # largest utilisation of a card, since sums over iterations are rounded to nanoseconds
WORTH_COMPILING = 15_000  # requests: compiling takes some 10 s, and saves 0.2 s on 300 requests of the quickstart


@dataclass(frozen=True)
class Job:
    """One run: an arm at a point of a sweep, with one seed."""

    arm: Arm
    config: Config
    seed: int

    @cached_property
    def key(self) -> str:
        """A key of the result, by settings and the files' first contents: two sweeps that share a job run it once."""
        return digest([self.settings_key, self.made_of])

    @cached_property
    def settings_key(self) -> str:
        """A key of settings and seed alone, whatever is in the files that the settings name."""
        shown = what_counts(self.config)
        shown["workload"] = {name: value for name, value in vars(self.config.workload).items() if name != "statement"}
        if self.config.mode == SIMULATE:
            del shown["live"]
        return digest([helios_sim.__version__, shown, self.arm.policy, self.seed])

    @property
    def made_of(self) -> dict[str, str]:
        """Digests by name of code and files that the result depends on, as they are now."""
        return made_of(self.config, self.arm.policy)


def make_job(arm: str, entry: Mapping[str, Any], config: Config, seed: int) -> Job:
    """Make a job from an arm's entry in the settings. UserError if its policy does not take a setting."""
    return Job(arm_of(arm, entry, config), config, seed)


@dataclass(frozen=True, slots=True)
class JobResult:
    """The results of one run that are kept."""

    replicate: Replicate
    timeline: Timeline  # of the first replica
    timeline_transitions_ns: tuple[int, ...]
    replicas: tuple[ReplicaFigures, ...]
    decisions: tuple[Decision, ...]
    exit_depths: tuple[ExitDepths, ...]
    capacity_bytes: int
    inputs: Mapping[str, Provenance]
    assumptions: tuple[Assumption, ...]
    notices: tuple[str, ...]  # such as what the reader of a trace has changed, or a live run could not measure
    wall_s: float
    live: LiveNotes | None = None  # of a run on a device
    decisions_left_out: int = 0
    faults: tuple[Struck, ...] | None = None  # what each fault did; None if none was planned
    scaled: Scaled | None = None  # None if all replicas were always on


def run_job(job: Job) -> JobResult:
    """Run the job, simulated or live. UserError if its settings cannot be run."""
    started_s = perf_counter()
    config = job.config
    fleet = shared_fleet(config, job.seed)
    live = None if config.mode == SIMULATE else open_live(config, fleet, job.seed)
    log = RecordLog(fleet.parts.workload.requests)
    try:
        run = serve(job, fleet, log.add, live, block_sink=log.add_block)
        notes = None if live is None else live.end()
    finally:
        if live is not None:
            live.close()
    records = log.records() if live is None else live.as_known(log.records())
    metrics = measure(job, fleet, records, run)
    if live is not None:
        metrics = live.measured(metrics, records)
    return JobResult(
        replicate=Replicate(job.seed, records, run.stats, metrics),
        timeline=run.servers[0].timeline,
        timeline_transitions_ns=tuple(run.servers[0].stats.transitions_ns),
        replicas=replicas_of(fleet, records, run),
        decisions=_decisions(fleet, run),
        exit_depths=tuple(
            ExitDepths(model, fleet.models[model].profile.model.n_layers, dict(sorted(counts.items())))
            for model, counts in run.stats.tokens_by_depth.items()
        ),
        capacity_bytes=fleet.kinds[0].card.hbm_bytes,
        inputs=inputs_of(fleet) | ({} if live is None else live.inputs()),
        assumptions=assumptions_of(config, fleet, job.arm.policy),
        notices=notices_of(fleet, job.config) + _without_exits(job, fleet) + (() if live is None else live.notices()),
        wall_s=perf_counter() - started_s,
        live=notes,
        decisions_left_out=sum(server.decisions_left_out for server in run.servers),
        faults=run.faults,
        scaled=run.scaled,
    )


def serve(
    job: Job,
    fleet: Fleet,
    sink: Callable[[RequestRecord], None],
    live: LiveRun | None = None,
    pictures: bool = True,
    compiled: bool | None = None,
    stepwise: bool = False,
    block_sink: BlockSink | None = None,
    on_server: Callable[[Server], None] | None = None,
    warm_up_s: float = 0.0,
    policy_of: Callable[[int, Policy], Policy] | None = None,
    until_ns: int | None = None,
) -> Run:
    """Run the loop alone: arrivals, scheduling, pricing. `sink` gets each record as its request leaves.

    `fleet` is that of the job's configuration. `live`: on a device and by the wall clock. `pictures`: keep samples of
    the first server's state over time. `compiled`, `stepwise`, `block_sink`: as in `simulate`. `on_server` is called
    with each server before it begins. `warm_up_s`: how much longer the first iteration of each replica takes.
    `policy_of` replaces a replica's policy. `until_ns`: the end of the time of interest. Requests that arrive later are
    left out, except the first, which keeps the run going until then; in a closed loop none is left out.
    """

    def make_server(env: simpy.Environment, number: int, on_left: OnLeft) -> Server:
        kind = fleet.kind_of(number)
        parts, policy = kind.parts, (kind.policy or job.arm.policy).make()
        if policy_of is not None:
            policy = policy_of(number, policy)

        def server_of(engine: Engine) -> Server:
            used = engine if fleet.faults is None else with_faults(engine, env)
            return Server(env, number, used, policy, parts.situation, on_left)

        if live is not None:
            server = live.begin(number, server_of)
        else:
            server = server_of(SimulatedEngine(env, parts.models, to_ns(warm_up_s, "warm-up")))
        if not pictures or number:  # pictures show the first replica
            server.keep_few_samples()
        if on_server is not None:
            on_server(server)
        return server

    workload = fleet.parts.workload
    blocks, requests = generate(workload, job.seed), workload.requests
    if until_ns is not None and workload.users is None:
        blocks, requests = up_to(blocks, until_ns)
    return simulate(
        make_server,
        blocks,
        requests,
        sink,
        users=workload.users,
        replicas=fleet.replicas,
        routing=fleet.routing if live is None else live.routing(fleet.routing),
        env=None if live is None else live.clock,
        compiled=compiled,
        stepwise=stepwise,
        block_sink=block_sink,
        faults=fleet.faults,
        scaling=fleet.scaling,
    )


def open_live(config: Config, fleet: Fleet, seed: int) -> LiveRun:
    """Open a live run; torch is imported here, and only for a live run."""
    from helios_sim.study.live import LiveRun

    return LiveRun(config, fleet, seed)


def measure(job: Job, fleet: Fleet, records: Records, run: Run) -> dict[str, MetricValue]:
    """Compute the metrics that the job's settings ask for. UserError if iterations are quicker than the card can be."""
    cards = []
    for kind in fleet.kinds:
        power = _power(kind.card)
        stats = [run.servers[number].stats for number in kind.numbers]
        beside = card_sets(kind.policy or job.arm.policy) - 1
        busy_ns = sum(s.verify_ns if beside else s.busy_ns for s in stats)
        cards.append(Cards(power, len(stats), busy_ns, sum(s.floor_ns for s in stats)))
        if beside:  # if several cards draft side by side, each counts as busy as the slowest
            draft_ns, floor_ns = sum(s.draft_ns for s in stats), sum(s.draft_floor_ns for s in stats)
            cards.append(Cards(power, beside * len(stats), beside * draft_ns, beside * floor_ns, beside=True))
    transitions = {number: server.stats.transitions_ns for number, server in enumerate(run.servers)}
    slo = Slo(**asdict(job.config.slo))
    metrics = compute_metrics(
        records, run.stats, slo=slo, cards=cards, transitions=transitions, faults=run.faults,
        costs=costs_of(job.config, fleet, job.arm.policy), scaled=run.scaled, answered=run.answered,
    )  # fmt: skip
    if job.config.mode == SIMULATE:
        card, fix = fleet.kinds[0].card.name, "correct the profile, or profile_time_factor"
        require_possible(metrics, card, fix, job.arm.name)
    return metrics


def _power(card: HardwareSpec) -> Power | None:
    if card.idle_w is None or card.tdp_w is None:
        return None
    measured = card.least_busy_w is not None
    return Power(card.idle_w, card.tdp_w, card.busy_w(1.0) if measured else None)


def require_possible(metrics: Mapping[str, MetricValue], card: str, fix: str, arm: str | None = None) -> None:
    """Raise BeyondRoofline if iterations were quicker than the card can be."""
    share = metrics["roofline_fraction"]
    if isinstance(share, float) and share > ROOFLINE:
        allowed = f"at most 1 of what the card can do; iterations of this run are {share:.3g} times as fast"
        error = BeyondRoofline("profile", card, allowed, fix)
        error.arm = arm
        raise error


def replicas_of(fleet: Fleet, records: Records, run: Run) -> tuple[ReplicaFigures, ...]:
    return tuple(
        replica_figures(
            records,
            number,
            run.servers[number].stats,
            run.presence_ns[number],
            kind=kind.name,
            card=kind.card.name,
            models=tuple(kind.parts.models),
        )
        for kind in fleet.kinds
        for number in kind.numbers
    )


def inputs_of(fleet: Fleet) -> dict[str, Provenance]:
    found: dict[str, Provenance] = {}
    for kind in fleet.kinds:
        for model, data in kind.parts.models.items():
            profile = data.profile
            found[f"profile {served_as(model, profile.model)}@{profile.hardware.name}"] = profile.provenance
            found[f"exits of {model}"] = data.trace.trace.provenance
            fitted = next((s.text for s in profile.runtime.sources if s.basis is Basis.FITTED), None)
            if fitted is not None:
                found[HOST_TIME] = Provenance(ProvenanceClass.PUBLISHED, fitted, FIT)
    return found


def notices_of(fleet: Fleet, config: Config) -> tuple[str, ...]:
    """Return sentences about parts of inputs that are not used, and settings that find nothing to do."""
    workload = fleet.parts.workload
    recorded = [p for p in (workload.arrivals, workload.lengths) if isinstance(p, TraceArrivals | TraceLengths)]
    notices = [notice for part in recorded for notice in part.trace.notices]
    if config.server.enable_prefix_caching and workload.prefixes is None and workload.sessions is None:
        notices.append(
            "server.enable_prefix_caching finds only what preempted requests lost, since no two prompts begin alike: "
            "set workload.system_prompts or workload.sessions.users, or take a trace with hash_ids"
        )
    notices += [source.details[NOT_READ] for source in inputs_of(fleet).values() if NOT_READ in source.details]
    return tuple(dict.fromkeys(notices))


def _without_exits(job: Job, fleet: Fleet) -> tuple[str, ...]:
    """Return a notice if an arm is to exit early, but no model has an exit before its last layer."""
    early = job.arm.policy.name in ("early_exit", "early_exit_lazy") and fleet.kinds[0].policy is None
    if not early or any(len(data.trace.trace.exits) > 1 for data in fleet.models.values()):
        return ()
    return (f"arms.{job.arm.name}: no model has an exit before its last layer, so all tokens run all layers here",)


def assumptions_of(config: Config, fleet: Fleet, policy: PolicyConfig | None = None) -> tuple[Assumption, ...]:
    """Return the assumptions of the runtime, which models share unless their profiles bring it, and of the settings.

    `policy` is that of kinds without a policy of their own.
    """
    settable = {f.name for f in fields(RuntimeConfig)}
    found = list(dict.fromkeys(
        Assumption(
            f"runtime: {source.quantity}",
            _plain(getattr(data.profile.runtime, source.quantity)),
            source.text,
            f"runtime.{source.quantity}" if source.quantity in settable else "runtime.preset",
        )
        for kind in fleet.kinds
        for data in kind.parts.models.values()
        for source in data.profile.runtime.sources
        if source.basis not in (Basis.DEFINITION, Basis.MEASURED)
    ))  # fmt: skip
    if config.profile_time_factor != 1.0:
        whole = config.profile_prompt_time_factor is None
        why = f"{'every iteration' if whole else 'what computes few tokens at once'} scaled, to study profile error"
        found.append(Assumption("profile time factor", config.profile_time_factor, why, "profile_time_factor"))
    if config.profile_prompt_time_factor is not None:
        why, key = "what computes many tokens at once scaled, to study profile error", "profile_prompt_time_factor"
        found.append(Assumption("profile time factor of prompts", config.profile_prompt_time_factor, why, key))
    for kind in fleet.kinds:
        own = kind.policy or policy
        drafts = own.parameters if own and isinstance(own.parameters, DraftModelParameters) else None
        if drafts is not None and drafts.exchange_s is not None:
            why = "as stated, at the end of each stage; the card that drafts is of the same kind and has its own host"
            found.append(Assumption("exchange of drafts in s", drafts.exchange_s, why, "policy.exchange_s"))
    return tuple(found)


def _decisions(fleet: Fleet, run: Run) -> tuple[Decision, ...]:
    """Return the decisions of every replica, one replica after the other; with a router that learns, in order of time.

    A decision of such a router is logged as one of the first replica of the kind that it favours from then on.
    """
    found = [_logged(decision) for server in run.servers for decision in server.decisions]
    if run.answered is None or not run.answered.favoured:
        return tuple(found)
    tasks = fleet.parts.workload.mix.tasks
    for it in run.answered.favoured:
        kind = fleet.kinds[it.kind]
        number = kind.numbers[0]
        before = [d.deployment for d in run.servers[number].decisions if d.time_ns <= it.time_ns]
        deployment = replace(
            before[-1], reason=f"the bandit holds {kind.name} for the best",
            evidence=dict(it.verdicts), triggers=(), plan=None, next_best=None,
        )  # fmt: skip
        found.append(Decision(it.time_ns, number, Judged("any" if it.task is None else tasks[it.task]), deployment))
    return tuple(sorted(found, key=lambda decision: decision.time_ns))


def _logged(decision: Decision) -> Decision:
    """Return the decision without the oracle's plan for every request, which no report shows."""
    plain = replace(decision.deployment, plan=None)
    return decision if decision.deployment.plan is None else replace(decision, deployment=plain)


def _plain(value: Any) -> float | str | None:
    if isinstance(value, tuple) and len(value) > 6:
        return f"{value[0]} to {value[-1]}, {len(value)} values"
    return value if isinstance(value, float | str) or value is None else str(value)


def make_ready(job: Job, requests: int) -> None:
    """Run the job once to compile the loop, if many `requests` follow and no machine code is on disk."""
    if requests < WORTH_COMPILING or is_made():
        return
    with suppress(Exception):  # a failure comes again in the run that reports it
        serve(job, shared_fleet(job.config, job.seed), lambda record: None, pictures=False, compiled=True)
