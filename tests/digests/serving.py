"""Random runs of the serving loop from plain seeds, their digests, and which features they have."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from digests.canonical import digest
from helios_sim.exits.rule import Confidence
from helios_sim.policy.deployment import Deployment
from helios_sim.policy.telemetry import Telemetry
from helios_sim.request import RequestRecord, Status
from rig import Scripted, Served, serve
from serving_cases import Choose, choose_case

CASES = 500
# Of a case, each with a digest of its own. `end`: the last moment and requests integrated until then; where requests
# are left unfinished, timers that nobody waits for any more may move it.
PARTS = ("records", "decisions", "stats", "told", "end")

# How the loop gets to the same result: each turn an event of its own, ahead of the clock, and that as machine code.
WAYS: dict[str, dict[str, bool]] = {
    "step_by_step": {"stepwise": True}, "ahead": {"stepwise": False}, "compiled": {"compiled": True},
}  # fmt: skip

RECORD = (
    "request_id", "replica", "task", "model", "status", "drop_reason", "arrival_ns", "scheduled_ns", "first_token_ns",
    "last_token_ns", "prompt_tokens", "output_tokens", "prompt_chars", "output_chars", "layers_run", "early_tokens",
    "breach_tokens", "agreed_tokens", "evaluated_tokens", "preemptions", "microbits",
)  # fmt: skip
STATS = (
    "busy_ns", "floor_ns", "iterations", "outside_grid_iterations", "decode_iterations", "decode_ns", "decode_batch_ns",
    "kv_block_ns", "kv_pool_block_ns", "batch_capacity_blocks", "block_tokens", "hbm_peak_bytes", "switches", "loads",
    "switch_time_ns", "load_ns", "evaluation_ns", "preemptions", "tokens_by_depth", "transitions_ns",
)  # fmt: skip
DEPLOYMENT = (
    "active", "exit_rule", "standby", "batching", "kv_rule", "batch_limit", "in_flight", "admit_limit",
    "observe_tokens", "run_layers", "probe", "instant", "triggers", "reason", "evidence",
)  # fmt: skip
TELEMETRY = (
    "now_ns", "completed_requests", "queued_requests", "running_requests", "batch_mean", "prompt_tokens_mean",
    "output_tokens_mean", "arrival_rate_per_s", "breaches_in_window", "observations",
)  # fmt: skip


@dataclass
class Told(Scripted):
    """A script that every replica has a copy of; all copies are kept in the order of their replicas."""

    copies: ClassVar[list[Told]] = []

    def __post_init__(self) -> None:
        self.copies.append(self)


@dataclass
class Run:
    served: Served
    told: list[list[tuple[Any, Telemetry]]]  # of each replica whose policy is a script: causes and what it saw


def case(seed: int) -> dict[str, Any]:
    """Arguments of `rig.serve`. The seed gives the same ones with every version of Python and NumPy."""
    return choose_case(chooser(seed))


def chooser(seed: int | str) -> Choose:
    draw = random.Random(seed).random  # of all that `random` offers, this alone is promised to stay the same

    def choose(options: Sequence[Any]) -> Any:
        return options[int(draw() * len(options))]

    return choose


def run_case(seed: int, **changes: Any) -> Run:
    """Serves a case step by step, unless `changes`, which are arguments of `rig.serve`, say otherwise."""
    arguments = case(seed)
    policy = arguments["policy"]
    if isinstance(policy, Scripted):
        Told.copies = []
        arguments["policy"] = Told(policy.first, list(policy.then))
    served = serve(**(arguments | (changes or WAYS["step_by_step"])))
    return Run(served, [copy.asked for copy in Told.copies] if isinstance(policy, Scripted) else [])


def case_digests(seed: int, **changes: Any) -> list[str]:
    """One digest for each of PARTS."""
    return run_digests(run_case(seed, **changes))


def run_digests(run: Run) -> list[str]:
    served = run.served
    return [
        digest([_named(record, RECORD) for record in served.by_request()]),
        digest([[_decision(d) for d in server.decisions] for server in served.run.servers]),
        digest([*(_stats(server.stats) for server in served.run.servers), _stats(served.run.stats)]),
        digest([[(cause, _telemetry(seen)) for cause, seen in told] for told in run.told]),
        digest([served.run.end_ns, served.run.requests, served.run.presence_ns]),
    ]


def _named(value: Any, names: Sequence[str]) -> dict[str, Any]:
    """These fields and no more: one that is added later changes no digest."""
    return {name: getattr(value, name) for name in names}


def _telemetry(seen: Telemetry) -> dict[str, Any]:
    return {"is": "Telemetry", **_named(seen, TELEMETRY)}


def _decision(decision: Any) -> list[Any]:
    deployment = decision.deployment
    return [
        decision.time_ns, decision.replica, decision.cause, _named(deployment, DEPLOYMENT), deployment.plan is not None,
    ]  # fmt: skip


def _stats(stats: Any) -> dict[str, Any]:
    gaps = stats.itl
    counted = {int(i): int(gaps.counts[i]) for i in gaps.counts.nonzero()[0]}
    found = [counted, gaps.total_count, gaps.total_ns, gaps.shortest_ns, gaps.longest_ns]
    return _named(stats, STATS) | {"itl": found}


# --- what the cases cover


def features(arguments: dict[str, Any]) -> set[str]:
    """What a case asks for, by its arguments alone."""
    policy, work = arguments["policy"], arguments["workload"]
    deployments = [policy.first, *(d for d in policy.then if d is not None)] if isinstance(policy, Scripted) else []
    found = {
        f"policy {type(policy).__name__}",
        f"replicas {arguments['replicas']}",
        f"schedule_ahead {arguments['schedule_ahead']}",
        f"arrivals {type(work.arrivals).__name__}",
        f"tasks {len(work.mix.tasks)}",
    }
    if arguments["vllm_v1"]:
        found |= {"vllm_v1", f"vllm_v1 with schedule_ahead {arguments['schedule_ahead']}"}
    if arguments["replicas"] > 1:
        found.add(f"router {arguments['router'].value}")
    for profile in arguments["profiles"].values():
        found |= _terms(profile)
    for deployment in deployments:
        found |= _asked(deployment)
    return found


def _terms(profile: Any) -> set[str]:
    runtime, tables = profile.runtime, profile.layer_tables
    terms = {
        "mixed_attention": any(t.mixed_attention is not None for t in tables),
        "unequal_kv": any(t.unequal_kv is not None for t in tables),
        "padded_kv": profile.padded_kv,
        "mixed_factor": profile.mixed_factor is not None,
        "unequal_kv_factor": profile.unequal_kv_factor is not None,
        "load_slowdown": profile.load_slowdown > 1,
        "time_factor": profile.time_factor != 1,
        "two layer classes": len(tables) > 1,
        "graph_batch_sizes": runtime.graph_batch_sizes is not None,
        "gap_s": runtime.gap_s > 0,
        "prefill_gap_s": runtime.prefill_gap_s > 0,
        "sync_s": runtime.sync_s > 0,
        "launch_s_per_layer": runtime.launch_s_per_layer > 0,
        "launch_s_per_graph": runtime.launch_s_per_graph > 0,
        "short context": profile.model.max_context_tokens < 100,
    }
    return {f"term {name}" for name, there in terms.items() if there}


def _asked(d: Deployment) -> set[str]:
    rule = d.exit_rule
    confidence = getattr(rule, "confidence", None)
    found = {
        f"rule {type(rule).__name__}",
        f"{type(rule).__name__} with kv {d.kv_rule.value}",
        f"batching {d.batching.value}",
        f"in flight {d.in_flight.value}",
        *(f"trigger {type(trigger).__name__}" for trigger in d.triggers),
    }
    if confidence is not None:
        found.add(f"confidence {confidence.value}")
    if confidence is Confidence.CLASSIFIER and d.observe_tokens is not None:
        found.add("classifier and observed tokens")
    for name in ("observe_tokens", "admit_limit", "batch_limit", "run_layers", "probe"):
        if getattr(d, name) is not None:
            found.add(name)
    if d.standby:
        found.add("standby")
    return found


def outcomes(run: Run) -> set[str]:
    """What came of a case."""
    stats, records = run.served.run.stats, run.served.records
    happened = {
        "preemptions": stats.preemptions > 0,
        "switches": stats.switches > 0,
        "loads": stats.loads > 0,
        "beyond the grid": stats.outside_grid_iterations > 0,
        "evaluation": stats.evaluation_ns > 0,
        "dropped: context": _dropped(records, "context"),
        "dropped: pool": _dropped(records, "pool"),
        "unfinished": any(r.status is Status.UNFINISHED for r in records),
        "breaches": any(r.breach_tokens for r in records),
        "evaluated tokens": any(r.evaluated_tokens for r in records),
        "several depths": any(len(depths) > 1 for depths in stats.tokens_by_depth.values()),
        "observations told": any(t.observations for asked in run.told for _, t in asked),
    }
    found = {f"came: {name}" for name, it_did in happened.items() if it_did}
    for server in run.served.run.servers:
        for before, decision in zip(server.decisions, server.decisions[1:], strict=False):
            old, new = before.deployment.active, decision.deployment.active
            found.add(f"came: decided on {type(decision.cause).__name__}")
            if old.model == new.model and old.layers < new.layers:
                found.add("came: raise of a cap decided")
            if old.model != new.model:
                found.add(f"came: switch decided with {decision.deployment.in_flight.value}")
    return found


def _dropped(records: Sequence[RequestRecord], why: str) -> bool:
    return any(r.status is Status.DROPPED and why in (r.drop_reason or "") for r in records)
