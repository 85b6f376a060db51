"""What a model, a card and a deployment are to iterations that are computed ahead. Knows no state of a replica."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.engine.depths import watches_cap
from helios_sim.exits.replay import replay
from helios_sim.exits.rule import Clairvoyant, Confidence, FixedCap, PerToken
from helios_sim.exits.trace import BoundTrace, ExitTrace
from helios_sim.policy.deployment import BatchingRule, Deployment, KvRule
from helios_sim.policy.telemetry import Situation
from helios_sim.profile.composition import IntArray
from helios_sim.profile.price_tables import band_table
from helios_sim.profile.profile import Profile
from helios_sim.serving.ahead.contract import Terms
from helios_sim.serving.ahead.layout import (
    NEVER,
    OF_TASK,
    OUTPUT,
    PROMPT,
    RULES,
    TEXT,
    TOKENS_COLUMNS,
    TOKENS_FIRST,
    TOKENS_LENGTH,
    TOKENS_OUTPUT,
    TOKENS_PROMPT,
    TOKENS_START,
    Trace,
)


def terms_of(
    profile: Profile,
    trace: ExitTrace,
    deployment: Deployment,
    situation: Situation,
    running_limit: int,
    closed_loop: bool,
) -> Terms | None:
    """None where the compiled steps do not know all that the deployment or the profile asks for."""
    rule, loaded = deployment.exit_rule, deployment.active.layers
    priced = profile.price_tables
    if priced is None or deployment.plan is not None or isinstance(rule, Clairvoyant):
        return None
    per_token = isinstance(rule, PerToken)
    replayed = replay(trace, rule, loaded if per_token else deployment.run_layers or loaded)
    whole = replayed.layers == trace.n_layers
    lazy, kv_rule = deployment.batching is BatchingRule.LAZY, deployment.kv_rule
    classifier = isinstance(rule, FixedCap | PerToken) and rule.confidence is Confidence.CLASSIFIER
    if classifier:
        profile.check_table(Confidence.CLASSIFIER)  # refuses where its cost is not known
    propagates = per_token and (kv_rule is KvRule.PROPAGATE or (lazy and kv_rule is not KvRule.NONE))
    loaded_exit = trace.exits.index(loaded)
    rules = np.zeros(1, RULES)
    for name, value in {
        "block_tokens": situation.memory.block_tokens,
        "batch_tokens": situation.max_batch_tokens,
        "running_limit": running_limit,
        "context_limit": profile.model.max_context_tokens,
        "observe_tokens": NEVER if deployment.observe_tokens is None else deployment.observe_tokens,
        "closed_loop": closed_loop,
        "per_token": per_token,
        "head_checks": per_token and not classifier,
        "watches_cap": watches_cap(rule, whole),
        "lazy": lazy,
        "propagates": propagates,
        "repays": per_token and not propagates and kv_rule is KvRule.RECOMPUTE,
        "owes": kv_rule is KvRule.RECOMPUTE,
        "reads_trace": per_token or not whole or trace.microbits is not None,
        "rule_exit": len(replayed.exits) - 1,
        "loaded_exit": loaded_exit,
        "n_layers": profile.model.n_layers,
    }.items():
        rules[name] = value
    microbits = np.zeros((0, 0), np.int64) if trace.microbits is None else trace.microbits
    seen = Trace(
        _frozen(np.array(trace.exits, np.int64)), _frozen(replayed.exit_index), _frozen(replayed.breach),
        trace.agree, _frozen(microbits),
    )  # fmt: skip
    bands = profile.pricing.bands
    uniform, banded = band_table(bands((replayed.layers,))), band_table(bands(trace.exits[: loaded_exit + 1]))
    return Terms(rules[0], seen, *priced, uniform, banded)


def _frozen(values: NDArray[Any]) -> NDArray[Any]:
    """One type of array, whether it may be written or not: each type would be compiled anew."""
    view = values.view()
    view.flags.writeable = False
    return view


def tokens_of(profile: Profile, trace: BoundTrace, arrivals: IntArray) -> IntArray:
    """What the model makes of requests, shape (n, TOKENS_COLUMNS)."""
    found = np.zeros((len(arrivals), TOKENS_COLUMNS), np.int64)
    found[:, TOKENS_PROMPT] = profile.model.tokens_of_many(arrivals[:, PROMPT])
    spans = trace.locate_many(arrivals[:, OF_TASK], arrivals[:, TEXT], arrivals[:, OUTPUT])
    for column, values in zip((TOKENS_FIRST, TOKENS_START, TOKENS_LENGTH, TOKENS_OUTPUT), spans.T, strict=True):
        found[:, column] = values
    return found
