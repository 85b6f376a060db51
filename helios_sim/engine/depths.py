"""How deep each token of a batch runs, and what that means for every band of layers. Knows no time.

The batching rule and the KV rule act here: a trace says where a token would leave alone, the rules say where it
leaves in this batch and what the layers that it skipped still have to do for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from helios_sim.exits.replay import Replay
from helios_sim.exits.rule import Confidence, ExitRule, FixedCap, FullDepth, PerToken
from helios_sim.exits.trace import ExitTrace
from helios_sim.policy.deployment import BatchingRule, KvRule, ServicePlan
from helios_sim.serving.batch import Column
from helios_sim.serving.iteration import BoolArray, IntArray, Plan, Tokens


@dataclass(frozen=True, slots=True)
class Depths:
    """k iterations over S bands; the fields that a `Composition` needs, and what became of the tokens."""

    bounds: tuple[int, ...]
    decode_tokens: IntArray  # (k, S)
    decode_kv_tokens: IntArray  # (k, S)
    sampled_tokens: IntArray  # (k,)
    check_tokens: IntArray | None  # (k, S)
    classifier_tokens: IntArray | None  # (k, S)
    propagated_tokens: IntArray | None  # (k, S)
    tokens: Tokens


def decode_depths(plan: Plan, trace: ExitTrace, replayed: Replay) -> Depths:
    """Depths of the plan's decoding requests in up to `plan.max_iterations` iterations.

    An exit check through the LM head gives the token that leaves there; after a classifier's check it has to pass
    the head besides. To observe an exit takes the head whatever the rule: agreement is between tokens.
    """
    k = plan.max_iterations
    observing = False
    if plan.observe_tokens is not None:
        observing = bool((plan.batch.column(Column.GENERATED) < plan.observe_tokens).any())
    if plan.service_plan is not None:
        return _planned(plan, plan.service_plan, trace, k)
    if isinstance(plan.exit_rule, FullDepth | FixedCap) and not observing:
        return _uniform(plan, trace, replayed, k)
    return _banded(plan, trace, replayed, k)


def _uniform(plan: Plan, trace: ExitTrace, replayed: Replay, k: int) -> Depths:
    """All tokens run the same layers: one band."""
    context = plan.batch.decoding_column(Column.CONTEXT)
    n = len(context)
    tokens = np.full((k, 1), n, np.int64)
    kv = (int(context.sum()) + n * np.arange(1, k + 1, dtype=np.int64))[:, None]
    whole = replayed.layers == trace.n_layers
    breach = agrees = microbits = None
    if n and not (whole and trace.microbits is None):
        rows = _rows(plan, k)
        if not whole:
            agrees = replayed.agreed[rows]
            breach = replayed.breach[rows] if isinstance(plan.exit_rule, FixedCap) else None
        if trace.microbits is not None:
            microbits = trace.microbits[rows, len(replayed.exits) - 1]
    classified = tokens if watches_cap(plan.exit_rule, whole) else None
    became = Tokens(replayed.layers, breach, agrees, microbits)
    return Depths((replayed.layers,), tokens, kv, tokens[:, 0], None, classified, None, became)


def watches_cap(rule: ExitRule, whole: bool) -> bool:
    """Whether every token passes a classifier at the cap: its own logits do not give that confidence."""
    return isinstance(rule, FixedCap) and rule.confidence is Confidence.CLASSIFIER and not whole


def _planned(plan: Plan, service_plan: ServicePlan, trace: ExitTrace, k: int) -> Depths:
    """The oracle's depths: nothing is checked, and K and V of skipped layers cost nothing."""
    batch, bounds, n = plan.batch, trace.exits, plan.decoding
    layers = np.zeros((k, n), np.int64)
    for index, sequence in enumerate(batch.members[:n]):
        generated = int(batch.column(Column.GENERATED)[index])
        depths = service_plan.layers(sequence.request.request_id)
        layers[:, index] = depths[generated : generated + k]
    leaves = np.searchsorted(bounds, layers)
    context = batch.decoding_column(Column.CONTEXT) + np.arange(1, k + 1, dtype=np.int64)[:, None]
    runs = leaves[:, :, None] >= np.arange(len(bounds))
    tokens = _became(trace, _rows(plan, k), leaves, None)
    decode_kv = np.einsum("kns,kn->ks", runs, context)
    return Depths(bounds, runs.sum(axis=1), decode_kv, np.full(k, n, np.int64), None, None, None, tokens)


def _banded(plan: Plan, trace: ExitTrace, replayed: Replay, k: int) -> Depths:
    """Tokens leave at different exits: one band between any two exits that are loaded."""
    bounds = trace.exits[: trace.exits.index(plan.loaded_layers) + 1]
    last, n = len(bounds) - 1, plan.decoding
    rows = _rows(plan, k)
    rule_last = len(replayed.exits) - 1
    leaves = replayed.exit_index[rows].astype(np.int64)  # (k, n) where each token leaves
    breach: BoolArray | None = replayed.breach[rows]
    if plan.batching is BatchingRule.LAZY and n:
        leaves = np.broadcast_to(leaves.max(axis=1, keepdims=True), leaves.shape).copy()
    observed = np.zeros(n, bool)
    if plan.observe_tokens is not None:
        observed = plan.batch.decoding_column(Column.GENERATED) < plan.observe_tokens
        leaves[:, observed] = last
        assert breach is not None
        breach[:, observed] = False
    context = plan.batch.decoding_column(Column.CONTEXT) + np.arange(1, k + 1, dtype=np.int64)[:, None]

    runs = leaves[:, :, None] >= np.arange(last + 1)  # (k, n, S)
    decode_tokens = runs.sum(axis=1)
    decode_kv = np.einsum("kns,kn->ks", runs, context)
    check: IntArray | None = None
    classified: IntArray | None = None
    leaves_at_head = isinstance(plan.exit_rule, PerToken) and plan.exit_rule.confidence is not Confidence.CLASSIFIER
    if isinstance(plan.exit_rule, PerToken):
        checked = decode_tokens.copy()
        checked[:, rule_last:] = 0  # at the last layer there is nothing to decide: the token is sampled there
        check, classified = (checked, None) if leaves_at_head else (None, checked)
    elif watches_cap(plan.exit_rule, replayed.layers == trace.n_layers):
        classified = np.zeros_like(decode_tokens)
        classified[:, rule_last] = n
    if observed.any() and not leaves_at_head:
        check = np.zeros_like(decode_tokens)
        check[:, :last] = int(observed.sum())
    # A token that left at a head's check is sampled from that check's logits; the others pass the head once.
    if leaves_at_head:
        sampled = (leaves >= rule_last).sum(axis=1)
    else:
        sampled = np.full(k, n, np.int64)
    propagated: IntArray | None = None
    # Above a fixed cap nothing reads K and V any more, and a clairvoyant's skipped layers cost nothing.
    if isinstance(plan.exit_rule, PerToken):
        if plan.kv_rule is KvRule.PROPAGATE or (plan.batching is BatchingRule.LAZY and plan.kv_rule is not KvRule.NONE):
            propagated = n - decode_tokens
        elif plan.kv_rule is KvRule.RECOMPUTE:
            repaid = _repaid(plan, runs)
            decode_tokens = decode_tokens + repaid.sum(axis=1)
            decode_kv = decode_kv + np.einsum("kns,kn->ks", repaid, context)
    tokens = _became(trace, rows, leaves, breach)
    return Depths(bounds, decode_tokens, decode_kv, sampled, check, classified, propagated, tokens)


def _became(trace: ExitTrace, rows: IntArray, leaves: IntArray, breach: BoolArray | None) -> Tokens:
    """What tokens at these rows of the trace are when they leave at these exits, each (k, n)."""
    microbits = None if trace.microbits is None else trace.microbits[rows, leaves]
    return Tokens(np.asarray(trace.exits, np.int64)[leaves], breach, trace.agree[rows, leaves], microbits)


def _repaid(plan: Plan, runs: NDArray[np.bool_]) -> IntArray:
    """Tokens left out earlier that run band s together with a token of their request that goes there, (k, n, S).

    Each request owes band s the tokens that left above it since it last ran s; `plan.batch` keeps the debt from
    before these iterations.
    """
    k, n, bands = runs.shape
    debt = plan.batch.kv_debt_of_decoding(bands)  # (n, S)
    steps = np.arange(k)[:, None, None]
    last_run = np.maximum.accumulate(np.where(runs, steps, -1), axis=0)
    before = np.concatenate([np.full((1, n, bands), -1), last_run[:-1]])  # last run strictly before each step
    owed = np.where(before >= 0, steps - before - 1, steps + debt)
    return np.where(runs, owed, 0)


def _rows(plan: Plan, k: int) -> IntArray:
    """Rows of the trace for the next k tokens of each decoding request, (k, n)."""
    column = plan.batch.decoding_column
    next_token = column(Column.START) + column(Column.GENERATED)
    offsets = next_token + np.arange(k, dtype=np.int64)[:, None]
    return column(Column.FIRST) + offsets % column(Column.LENGTH)
