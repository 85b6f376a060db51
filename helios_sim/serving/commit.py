"""Makes iterations that have ended part of the replica's state: tokens, memory, telemetry, completions."""

from __future__ import annotations

import numpy as np

from helios_sim.policy.deployment import KvRule
from helios_sim.request import Status
from helios_sim.serving.batch import Column
from helios_sim.serving.iteration import IntArray, Outcome, Plan, Tokens
from helios_sim.serving.kv import blocks_for
from helios_sim.serving.replica import Replica


def commit(replica: Replica, plan: Plan, outcome: Outcome, iterations: int, started_ns: int) -> None:
    """Folds in the first `iterations` of the outcome. Times are absolute; nothing here reads the clock."""
    ends = outcome.end_ns[:iterations]
    end_ns = int(ends[-1])
    durations = ends.copy()
    durations[1:] -= ends[:-1]
    durations[0] -= started_ns
    _account(replica, plan, outcome, durations, started_ns)
    if plan.decoding:
        _decoded(replica, plan, outcome, ends, durations)
    replica.note_memory()
    finished = _prefilled(replica, plan, outcome.prefilled, end_ns) if plan.prefill else range(0)
    if plan.observe_tokens is not None:
        _observe(replica, plan, plan.observe_tokens, iterations, finished)
    _complete(replica, plan)
    replica.timeline.sample(
        end_ns,
        replica.deployment.active.model,
        replica.run_layers,
        len(replica.batch),
        len(replica.waiting),
        replica.pool.used_blocks * replica.block_bytes,
        replica.weight_bytes,
    )


def _account(replica: Replica, plan: Plan, outcome: Outcome, durations: IntArray, started_ns: int) -> None:
    stats, iterations = replica.stats, len(durations)
    busy_ns = int(outcome.end_ns[iterations - 1]) - started_ns
    stats.busy_ns += busy_ns
    stats.iterations += iterations
    replica.utilisation.add(outcome.profile, outcome.composition, iterations)
    grown_block_ns = int(plan.new_blocks[:iterations].dot(durations))
    stats.kv_block_ns += replica.pool.used_blocks * busy_ns + grown_block_ns
    stats.kv_pool_block_ns += replica.pool.total_blocks * busy_ns
    if plan.decoding:
        stats.decode_iterations += iterations
        stats.decode_ns += busy_ns
        stats.decode_batch_ns += busy_ns * plan.decoding
        replica.decode_ns += busy_ns
        replica.decode_batch_ns += busy_ns * plan.decoding


def _decoded(replica: Replica, plan: Plan, outcome: Outcome, ends: IntArray, durations: IntArray) -> None:
    """Tokens of the decoding requests, with the memory that they take."""
    batch, iterations = replica.batch, len(ends)
    replica.pool.take(int(plan.new_blocks[iterations - 1]))
    _count(replica, plan, range(plan.decoding), outcome.decoded, iterations, cached_tokens=iterations)
    if plan.kv_rule is KvRule.RECOMPUTE and not isinstance(outcome.decoded.layers, int):
        batch.settle_kv_debt(outcome.decoded.layers[:iterations], outcome.composition.bounds)

    last = batch.decoding_column(Column.LAST_TOKEN_NS)
    replica.gaps.add(ends[0] - last)
    if iterations > 1:
        replica.gaps.add(durations[1:], plan.decoding)
    last[:] = ends[-1]


def _count(
    replica: Replica, plan: Plan, indices: range, tokens: Tokens, iterations: int, cached_tokens: int = 0
) -> None:
    """Adds what became of `iterations` tokens of each of these requests, and their tokens that went into the cache."""
    batch, rows = replica.batch, slice(indices.start, indices.stop)
    n_layers = replica.situation.candidates[plan.model].profile.model.n_layers
    if plan.observe_tokens is not None:
        observed = np.clip(plan.observe_tokens - batch.column(Column.GENERATED)[rows], 0, iterations)
        batch.column(Column.EVALUATED)[rows] += observed
    changes = [0] * len(Column)
    changes[Column.CONTEXT], changes[Column.REMAINING], changes[Column.GENERATED] = (
        cached_tokens, -iterations, iterations,
    )  # fmt: skip
    layers = tokens.layers if isinstance(tokens.layers, int) else tokens.layers[:iterations]
    replica.stats.count_depths(plan.model, layers, len(indices) * iterations)
    if isinstance(layers, int):
        changes[Column.LAYERS_RUN] = layers * iterations
        changes[Column.EARLY] = iterations if layers < n_layers else 0
    else:
        batch.column(Column.LAYERS_RUN)[rows] += layers.sum(axis=0)
        batch.column(Column.EARLY)[rows] += (layers < n_layers).sum(axis=0)
    if tokens.breach is not None:
        batch.column(Column.BREACH)[rows] += tokens.breach[:iterations].sum(axis=0)
    if tokens.agrees is None:
        changes[Column.AGREED] = iterations
    else:
        batch.column(Column.AGREED)[rows] += tokens.agrees[:iterations].sum(axis=0)
    if tokens.microbits is not None:
        batch.column(Column.MICROBITS)[rows] += tokens.microbits[:iterations].sum(axis=0)
    batch.add(rows, changes)


def _prefilled(replica: Replica, plan: Plan, tokens: Tokens, end_ns: int) -> range:
    """Chunks of prompts; a prompt's last one yields a token. Returns the indices that finished: the first ones."""
    batch = replica.batch
    for part in plan.prefill:
        batch.column(Column.CONTEXT)[part.index] += part.tokens
        batch.column(Column.PREFILL_LEFT)[part.index] -= part.tokens
    finished = range(plan.decoding, plan.decoding + sum(part.finishes for part in plan.prefill))
    if finished:
        _count(replica, plan, finished, tokens, 1)
        last = batch.column(Column.LAST_TOKEN_NS)
        for index in finished:
            sequence = batch.members[index]
            if sequence.first_token_ns is None:
                sequence.first_token_ns = end_ns
            else:
                replica.gaps.add(end_ns - last[index : index + 1])
            last[index] = end_ns
        batch.decoding += len(finished)
    return finished


def _observe(replica: Replica, plan: Plan, limit: int, iterations: int, finished: range) -> None:
    """Hands over observations of requests that were observed for long enough or are complete."""
    generated = replica.batch.column(Column.GENERATED)
    complete = replica.batch.column(Column.REMAINING) == 0
    grew = [(index, iterations) for index in range(plan.decoding)] + [(index, 1) for index in finished]
    for index, tokens in grew:
        before, after = int(generated[index]) - tokens, int(generated[index])
        if before < limit and (after >= limit or complete[index]):
            sequence = replica.batch.members[index]
            replica.observations.append(
                replica.engine.observe(sequence, min(limit, after), replica.deployment.exit_rule)
            )


def _complete(replica: Replica, plan: Plan) -> None:
    """Where the next iteration was planned before anyone knew, who is done keeps place and blocks until then."""
    remaining = replica.batch.column(Column.REMAINING)
    if remaining.all():
        return
    for sequence, reserved_tokens in replica.batch.remove(np.flatnonzero(remaining == 0).tolist()):
        blocks = blocks_for(reserved_tokens, replica.pool.block_tokens)
        if plan.host_ahead and replica.situation.vllm_v1:
            replica.lingering.append((sequence.admitted, blocks))
        else:
            replica.pool.give(blocks)
        replica.leave(sequence, Status.COMPLETED)
