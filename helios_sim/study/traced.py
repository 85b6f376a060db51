"""Runs the arms of a study once more, under their first seed and stepwise, and notes every iteration (`trace=true`)."""

from __future__ import annotations

from helios_sim.errors import UserError
from helios_sim.report.decisions import in_words
from helios_sim.report.perfetto import Instant, Iteration, Served, TracedArm, encode, require_perfetto
from helios_sim.report.records import RecordLog, Records
from helios_sim.serving.decider import Decision
from helios_sim.serving.server import Server
from helios_sim.study.fleet import Fleet, shared_fleet
from helios_sim.study.jobs import Job, serve
from helios_sim.study.modes import SIMULATE
from helios_sim.study.plan import StudyPlan
from helios_sim.study.workload import task_names

MOST_REQUESTS = 20_000  # of an arm: some 10 s and 100 MB
FILE = "trace.perfetto-trace"


def check_trace(plan: StudyPlan) -> None:
    """Raise UserError if a trace cannot be written, before anything runs."""
    require_perfetto()
    for name, jobs in plan.headline.jobs.items():
        if jobs[0].config.mode != SIMULATE:
            allowed = f"a trace of simulated arms: {name} is served by a device"
            raise UserError("trace", True, allowed, "leave it out")
        requests = shared_fleet(jobs[0].config, jobs[0].seed).parts.workload.requests
        if requests > MOST_REQUESTS:
            allowed = f"a trace of at most {MOST_REQUESTS:,} requests, not of {requests:,}"
            raise UserError("trace", True, allowed, f"set workload.n_requests={MOST_REQUESTS}, or leave it out")


def trace_of(plan: StudyPlan) -> bytes:
    """Return the trace of all arms at the study's own settings."""
    return encode([traced(jobs[0]) for jobs in plan.headline.jobs.values()])


def traced(job: Job) -> TracedArm:
    """Run one arm under one seed and note its iterations, which does not change its results."""
    fleet, log = shared_fleet(job.config, job.seed), RecordLog()
    iterations: list[Iteration] = []

    def watch(server: Server) -> None:
        server.on_iteration = lambda start_ns, end_ns: iterations.append(_iteration(server, start_ns, end_ns))

    run = serve(job, fleet, log.add, pictures=False, stepwise=True, on_server=watch)
    return TracedArm(
        name=job.arm.name,
        iterations=iterations,
        requests=_served(log.records(), task_names(job.config.workload.mix)),
        instants=[_instant(decision) for server in run.servers for decision in server.decisions],
        power_w=_power_w(fleet),
    )


def _iteration(server: Server, start_ns: int, end_ns: int) -> Iteration:
    s, scheduled, placement = server.state, server.scheduled, server.placement
    return Iteration(
        replica=server.number, start_ns=start_ns, end_ns=end_ns, decodes=scheduled.decodes, prompts=scheduled.prompts,
        prompt_tokens=scheduled.prompt_tokens, running=int(s.running), waiting=int(s.waiting),
        kv_blocks=int(s.used_blocks), model=placement.model, layers=placement.layers,
        utilisation=scheduled.floor_ns / max(1, end_ns - start_ns),
    )  # fmt: skip


def _served(records: Records, tasks: tuple[str, ...]) -> list[Served]:
    """Return the requests that got a last token."""
    scheduled, first, last = records.scheduled_ns, records.first_token_ns, records.last_token_ns
    return [
        Served(
            replica=int(records.replica[k]),
            request_id=int(records.request_id[k]),
            arrival_ns=int(records.arrival_ns[k]),
            scheduled_ns=int(scheduled.values[k]),
            first_token_ns=int(first.values[k]) if first.present[k] else None,
            left_ns=int(last.values[k]),
            prompt_tokens=int(records.prompt_tokens[k]),
            output_tokens=int(records.output_tokens[k]),
            preemptions=int(records.preemptions[k]),
            task=tasks[int(records.task[k])] if int(records.task[k]) < len(tasks) else "",
            status=str(records.status.names[int(records.status.codes[k])]),
        )
        for k in range(len(records))
        if scheduled.present[k] and last.present[k]
    ]


def _instant(decision: Decision) -> Instant:
    deployment = decision.deployment
    active = deployment.active
    name = f"{active.model} at layer {active.layers}"
    return Instant(
        decision.replica, decision.time_ns, name, {"cause": in_words(decision.cause), "reason": deployment.reason}
    )


def _power_w(fleet: Fleet) -> dict[int, tuple[float, float, float]]:
    known: dict[int, tuple[float, float, float]] = {}
    for kind in fleet.kinds:
        idle_w, least, most = kind.card.idle_w, kind.card.busy_w(0.0), kind.card.busy_w(1.0)
        if idle_w is not None and least is not None and most is not None:
            known |= dict.fromkeys(kind.numbers, (idle_w, least[0], most[0]))
    return known
