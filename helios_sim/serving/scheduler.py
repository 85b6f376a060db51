"""Chooses what the next iteration runs, as the v1 scheduler of vLLM 0.19 does. Knows neither time nor models.

Decodes first, then the rest of prompts that were begun, then new prompts first come first served, all within one
token budget. A prompt enters only when blocks for all of it are free; when a decode finds no block, the newest
running request is preempted, and it is computed again from its text later. There is no watermark.

Two things more are as in vLLM 0.19 (vllm/v1/core/sched/scheduler.py, async_scheduler.py, core/block_pool.py) where the
situation says `vllm_v1`:
- Planned ahead, an iteration is settled when the one before it begins. Whoever produces its last token in between is
  known not to run again, but still holds its place among the running requests and its blocks (`Limits.lingering`).
- A preempted request finds those of its blocks in the prefix cache that nobody has taken since: the longest free are
  taken first, of one request its last ones first. It computes the rest again.

One thing is simpler: blocks of a whole prompt are taken when it enters. vLLM checks that all of them are free but takes
them chunk by chunk, so that a decode can take one between two chunks of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from helios_sim.serving.batch import Column, RunningBatch, Sequence
from helios_sim.serving.iteration import PrefillPart
from helios_sim.serving.kv import BlockDemand, KvPool, blocks_for
from helios_sim.serving.line import WaitingLine

LEAP_ITERATIONS = 256  # bounds the memory of one leap; results do not depend on it


class Admission(Enum):
    READY = auto()
    DROPPED = auto()  # left the queue: it can never run
    LATER = auto()  # it waits for another model, for the end of a drain, or for room that a change may bring


@dataclass(frozen=True, slots=True)
class Limits:
    batch_tokens: int  # token budget of an iteration
    running_requests: int
    starts_left: int | None  # requests that may still start; None: no limit
    admission_open: bool
    observe_tokens: int | None  # a leap ends where a request has been observed for long enough
    leap: bool
    lingering: int  # requests that are done but still count as running
    seen_until_ns: int | None  # only requests that had arrived by then are known to the planner; None: all are


@dataclass(frozen=True, slots=True)
class Schedule:
    prefill: tuple[PrefillPart, ...]
    max_iterations: int
    new_blocks: NDArray[np.int64]  # (max_iterations,) that the decodes take up by the end of each iteration


def schedule(
    batch: RunningBatch,
    waiting: WaitingLine,
    pool: KvPool,
    limits: Limits,
    admit: Callable[[Sequence], Admission],
    preempt: Callable[[], None],
) -> Schedule | None:
    """The next iteration, or a leap of decode iterations; None when there is nothing to run.

    `admit` prepares the head of the queue for the active model, and drops from the queue what can never run;
    `preempt` moves the newest running request back to the head of the queue.
    """
    preempted = False
    demand = _demand(batch, pool)
    while demand.next_iteration > pool.free_blocks:
        preempt()
        preempted = True
        demand = _demand(batch, pool)
    decoding, blocks_due = batch.decoding, demand.next_iteration

    budget = limits.batch_tokens - decoding
    prefill: list[PrefillPart] = []
    for index in range(decoding, len(batch)):
        if budget <= 0:
            break
        left, context = batch.column(Column.PREFILL_LEFT)[index], batch.column(Column.CONTEXT)[index]
        part = _part(index, int(left), int(context), budget)
        prefill.append(part)
        budget -= part.tokens

    starts_left = limits.starts_left
    blocked = preempted or not limits.admission_open
    unseen = False
    while waiting and not blocked and budget > 0 and len(batch) + limits.lingering < limits.running_requests:
        sequence = waiting[0]
        if not sequence.started and starts_left == 0:
            break
        if limits.seen_until_ns is not None and sequence.request.arrival_ns > limits.seen_until_ns:
            unseen = True
            break
        admission = admit(sequence)
        if admission is Admission.DROPPED:
            continue
        if admission is Admission.LATER:
            break
        blocks = blocks_for(sequence.prefill_tokens, pool.block_tokens)
        if blocks > pool.free_blocks - blocks_due:
            break
        waiting.popleft()
        if not sequence.started and starts_left is not None:
            starts_left -= 1
        kept = _blocks_kept(sequence, pool)
        pool.take_back(sequence.request.request_id, kept)
        pool.take(blocks - kept)
        cached_tokens = kept * pool.block_tokens
        batch.append(sequence, cached_tokens)
        part = _part(len(batch) - 1, sequence.prefill_tokens - cached_tokens, cached_tokens, budget)
        prefill.append(part)
        budget -= part.tokens

    if not decoding and not prefill:
        return None
    iterations = 1
    alone = not prefill and decoding == len(batch) and not limits.lingering
    if limits.leap and alone and not preempted and not unseen:
        iterations = _leap_iterations(batch, demand.iterations_that_fit(pool.free_blocks), limits.observe_tokens)
    return Schedule(tuple(prefill), iterations, demand.after(iterations))


def _demand(batch: RunningBatch, pool: KvPool) -> BlockDemand:
    return BlockDemand(batch.decoding_column(Column.CONTEXT), pool.block_tokens)


def _blocks_kept(sequence: Sequence, pool: KvPool) -> int:
    """Whole blocks of a returning request that are still in the cache. Its last token is computed in any case."""
    if not sequence.cached_tokens:
        return 0
    known = min(sequence.cached_tokens, sequence.prefill_tokens - 1)
    return min(pool.kept(sequence.request.request_id), known // pool.block_tokens)


def _part(index: int, tokens_left: int, context_tokens: int, budget: int) -> PrefillPart:
    tokens = min(tokens_left, budget)
    return PrefillPart(index, tokens, context_tokens, finishes=tokens == tokens_left)


def _leap_iterations(batch: RunningBatch, fit: int, observe_tokens: int | None) -> int:
    """Decode iterations until the first completion, the last that fits into memory, or the end of an observation."""
    iterations = min(int(batch.column(Column.REMAINING).min()), fit, LEAP_ITERATIONS)
    if observe_tokens is not None:
        observed_left = observe_tokens - batch.column(Column.GENERATED)
        observed_left = observed_left[observed_left > 0]
        if len(observed_left):
            iterations = min(iterations, int(observed_left.min()))
    return iterations
