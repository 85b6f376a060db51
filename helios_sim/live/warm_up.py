"""Runs an engine before time starts, so that one-off costs (choice of kernels, allocations, threads) do not fall on the
first requests. Importing this loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from helios_sim.policy.deployment import Deployment
from helios_sim.request import Request
from helios_sim.serving.iteration import Executes, Member, Plan, PrefillPart


def warm_up(
    engine: Executes, deployment: Deployment, requests: Sequence[Request], batch_tokens: int, times: int
) -> int:
    """Run the prompts of these requests one after the other, with `times` decodes after each.

    Returns the number of iterations. The requests get numbers below 0, which no request of a workload has.
    """
    model, ran = deployment.active.model, 0
    batch: list[Member] = []
    for number, request in enumerate(requests if times else ()):
        ghost = replace(request, request_id=-1 - number)
        tokens, span = engine.tokenize(model, ghost)
        tokens = min(tokens, batch_tokens)
        batch.append(Member(ghost, model, tokens, span.n_tokens, span, generated=0, context_tokens=0))
        engine.execute(_plan(deployment, batch, number, (PrefillPart(number, tokens, 0, finishes=True),)), 0)
        batch[number] = _after(batch[number], tokens)
        for _ in range(min(times, min(member.output_tokens - member.generated for member in batch))):
            engine.execute(_plan(deployment, batch, len(batch), ()), 0)
            batch = [_after(member, 1) for member in batch]
            ran += 1
        ran += 1
    for number in range(len(batch)):
        engine.forget(-1 - number)
    return ran


def _after(member: Member, tokens: int) -> Member:
    """The request after an iteration that put so many of its tokens into the cache."""
    return replace(member, generated=member.generated + 1, context_tokens=member.context_tokens + tokens)


def _plan(
    deployment: Deployment, batch: Sequence[Member], decoding: int, prefill: tuple[PrefillPart, ...]
) -> Plan:
    return Plan(
        model=deployment.active.model,
        loaded_layers=deployment.active.layers,
        run_layers=deployment.run_layers or deployment.active.layers,
        exit_rule=deployment.exit_rule,
        batching=deployment.batching,
        kv_rule=deployment.kv_rule,
        members=tuple(batch),
        decoding=decoding,
        prefill=prefill,
        observe_tokens=None,
        service_plan=None,
        host_ahead=False,
        loading=False,
    )
