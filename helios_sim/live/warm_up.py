"""Runs an engine before time starts, so that one-off costs (choice of kernels, allocations, threads) do not fall on the
first requests. Importing this loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import numpy as np

from helios_sim.policy.deployment import Deployment
from helios_sim.request import Request
from helios_sim.serving.batch import Column, RunningBatch, Sequence
from helios_sim.serving.iteration import Engine, Plan, PrefillPart


def warm_up(
    engine: Engine, deployment: Deployment, requests: SequenceOf[Request], batch_tokens: int, times: int
) -> int:
    """Run the prompts of these requests one after the other, with `times` decodes after each.

    Returns the number of iterations. The requests get numbers below 0, which no request of a workload has.
    """
    batch, ran = RunningBatch(), 0
    for number, request in enumerate(requests if times else ()):
        ghost = replace(request, request_id=-1 - number)
        tokens, span = engine.tokenize(deployment.active.model, ghost)
        tokens = min(tokens, batch_tokens)
        batch.append(Sequence(ghost, deployment.active.model, tokens, span.n_tokens, span))
        engine.execute(_plan(deployment, batch, (PrefillPart(number, tokens, 0, finishes=True),)), 0)
        _note(batch, slice(number, number + 1), tokens)
        batch.decoding = number + 1
        for _ in range(min(times, int(batch.column(Column.REMAINING).min()))):
            engine.execute(_plan(deployment, batch, ()), 0)
            _note(batch, slice(0, batch.decoding), 1)
            ran += 1
        ran += 1
    for number in range(len(batch)):
        engine.forget(-1 - number)
    return ran


def _note(batch: RunningBatch, rows: slice, tokens: int) -> None:
    batch.column(Column.CONTEXT)[rows] += tokens
    batch.column(Column.PREFILL_LEFT)[rows] = 0
    batch.column(Column.GENERATED)[rows] += 1
    batch.column(Column.REMAINING)[rows] -= 1


def _plan(deployment: Deployment, batch: RunningBatch, prefill: tuple[PrefillPart, ...]) -> Plan:
    return Plan(
        model=deployment.active.model,
        loaded_layers=deployment.active.layers,
        run_layers=deployment.run_layers or deployment.active.layers,
        exit_rule=deployment.exit_rule,
        batching=deployment.batching,
        kv_rule=deployment.kv_rule,
        batch=batch,
        decoding=batch.decoding,
        prefill=prefill,
        observe_tokens=None,
        service_plan=None,
        max_iterations=1,
        new_blocks=np.zeros(1, np.int64),
        host_ahead=False,
        loading=False,
    )
