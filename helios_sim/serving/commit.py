"""Makes iterations that have ended part of the replica's state: tokens, memory, telemetry, completions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from helios_sim.policy.deployment import KvRule
from helios_sim.request import Status
from helios_sim.serving.batch import Column
from helios_sim.serving.iteration import IntArray, Outcome, Plan, Tokens
from helios_sim.serving.kv import new_blocks
from helios_sim.serving.replica import Replica


def commit(replica: Replica, plan: Plan, outcome: Outcome, iterations: int, started_ns: int) -> None:
    """Folds in the first `iterations` of the outcome. Times are absolute; nothing here reads the clock."""
    ends = outcome.end_ns[:iterations]
    durations = np.diff(ends, prepend=started_ns)
    used_before = replica.pool.used_blocks
    if len(plan.decoding):
        grown = _decoded(replica, plan, outcome, ends, durations, iterations)
    else:
        grown = np.zeros(iterations, np.int64)
    _account(replica, plan, outcome, durations, used_before + grown)
    finished = _prefilled(replica, plan, outcome.prefilled, int(ends[-1]))
    _observe(replica, plan, iterations, finished)
    _complete(replica)
    active = replica.deployment.active
    replica.timeline.sample(
        int(ends[-1]),
        active.model,
        replica.run_layers,
        len(replica.batch),
        len(replica.waiting),
        replica.pool.used_blocks * replica.block_bytes,
        replica.weight_bytes,
    )


def _decoded(
    replica: Replica, plan: Plan, outcome: Outcome, ends: IntArray, durations: IntArray, iterations: int
) -> IntArray:
    """Tokens of the decoding requests. Returns the blocks added up to each iteration, (iterations,)."""
    batch, decoding = replica.batch, plan.decoding
    everyone = len(decoding) == len(batch)
    rows: slice | IntArray = slice(None) if everyone else decoding
    context = batch.column(Column.CONTEXT)
    before = context[rows].copy()
    block_tokens = replica.pool.block_tokens
    added = new_blocks(before, iterations, block_tokens)
    due_at = np.bincount((-before) % block_tokens, minlength=block_tokens)
    steps = np.arange(iterations)
    grown = np.cumsum(due_at[steps % block_tokens])
    replica.pool.take(int(grown[-1]))
    replica.note_memory()
    batch.column(Column.BLOCKS)[rows] += added
    context[rows] += iterations
    batch.column(Column.REMAINING)[rows] -= iterations
    _count(replica, plan, rows, outcome.decoded, iterations)
    if plan.kv_rule is KvRule.RECOMPUTE and not isinstance(outcome.decoded.layers, int):
        batch.settle_kv_debt(decoding, outcome.decoded.layers[:iterations], outcome.bounds)

    last = batch.column(Column.LAST_TOKEN_NS)
    gaps = replica.stats.itl
    gaps.add(ends[0] - last[rows])
    if iterations > 1:
        gaps.add(durations[1:], len(decoding))
    last[rows] = ends[-1]

    decode_ns = int(durations.sum())
    replica.stats.decode_iterations += iterations
    replica.stats.decode_ns += decode_ns
    replica.stats.decode_batch_ns += decode_ns * len(decoding)
    replica.decode_ns += decode_ns
    replica.decode_batch_ns += decode_ns * len(decoding)
    return grown


def _count(replica: Replica, plan: Plan, rows: slice | IntArray | list[int], tokens: Tokens, iterations: int) -> None:
    """Adds what became of `iterations` tokens of each of these requests."""
    batch = replica.batch
    n_layers = replica.situation.candidates[plan.model].profile.model.n_layers
    generated = batch.column(Column.GENERATED)
    if plan.observe_tokens is not None:
        observed = np.clip(plan.observe_tokens - generated[rows], 0, iterations)
        batch.column(Column.EVALUATED)[rows] += observed
    generated[rows] += iterations
    layers = tokens.layers if isinstance(tokens.layers, int) else tokens.layers[:iterations]
    replica.stats.count_depths(plan.model, layers, generated[rows].size * iterations)
    if isinstance(layers, int):
        batch.column(Column.LAYERS_RUN)[rows] += layers * iterations
        batch.column(Column.EARLY)[rows] += iterations if layers < n_layers else 0
    else:
        batch.column(Column.LAYERS_RUN)[rows] += layers.sum(axis=0)
        batch.column(Column.EARLY)[rows] += (layers < n_layers).sum(axis=0)
    if tokens.breach is not None:
        batch.column(Column.BREACH)[rows] += tokens.breach[:iterations].sum(axis=0)
    agreed: int | NDArray[np.int64] = iterations
    if tokens.agrees is not None:
        agreed = tokens.agrees[:iterations].sum(axis=0)
    batch.column(Column.AGREED)[rows] += agreed


def _prefilled(replica: Replica, plan: Plan, tokens: Tokens, end_ns: int) -> list[int]:
    """Chunks of prompts; a prompt's last one yields a token. Returns the indices that finished."""
    batch = replica.batch
    finished = [part.index for part in plan.prefill if part.finishes]
    for part in plan.prefill:
        batch.column(Column.CONTEXT)[part.index] += part.tokens
        batch.column(Column.PREFILL_LEFT)[part.index] -= part.tokens
    if finished:
        batch.column(Column.REMAINING)[finished] -= 1
        _count(replica, plan, finished, tokens, 1)
        last = batch.column(Column.LAST_TOKEN_NS)
        for index in finished:
            sequence = batch.members[index]
            if sequence.first_token_ns is None:
                sequence.first_token_ns = end_ns
            else:
                replica.stats.itl.add(end_ns - int(last[index]))
            last[index] = end_ns
    return finished


def _observe(replica: Replica, plan: Plan, iterations: int, finished: list[int]) -> None:
    """Hands over observations of requests that were observed for long enough or are complete."""
    limit = plan.observe_tokens
    if limit is None:
        return
    generated = replica.batch.column(Column.GENERATED)
    complete = replica.batch.column(Column.REMAINING) == 0
    grew = [(index, iterations) for index in plan.decoding.tolist()] + [(index, 1) for index in finished]
    for index, tokens in sorted(grew):
        before, after = int(generated[index]) - tokens, int(generated[index])
        if before < limit and (after >= limit or complete[index]):
            sequence = replica.batch.members[index]
            replica.observations.append(
                replica.engine.observe(sequence, min(limit, after), replica.deployment.exit_rule)
            )


def _complete(replica: Replica) -> None:
    done = np.flatnonzero(replica.batch.column(Column.REMAINING) == 0).tolist()
    if not done:
        return
    for sequence, blocks in replica.batch.remove(done):
        replica.pool.give(blocks)
        replica.leave(sequence, Status.COMPLETED)


def _account(replica: Replica, plan: Plan, outcome: Outcome, durations: IntArray, used_blocks: IntArray) -> None:
    stats, iterations = replica.stats, len(durations)
    busy_ns = int(durations.sum())
    stats.busy_ns += busy_ns
    stats.floor_ns += int(outcome.floor_ns[:iterations].sum())
    stats.iterations += iterations
    stats.outside_grid_iterations += int(np.count_nonzero(outcome.outside_grid[:iterations]))
    stats.kv_block_ns += int(np.dot(used_blocks, durations))
    stats.kv_pool_block_ns += replica.pool.total_blocks * busy_ns
