"""Exit rules as the loop's rules in whole numbers, for simulated and live engines alike."""

from __future__ import annotations

import numpy as np

from helios_sim.core.layout import FOREVER_NS, MILLIONTHS, NEVER, IntArray
from helios_sim.exits.rule import PerToken, ReleaseEarly
from helios_sim.policy.deployment import BatchingRule, Deployment, Regrouping
from helios_sim.request import to_ns


def split_above(how: Regrouping, exits: int) -> IntArray:
    """The share of a batch, in millionths, above which it is split at each exit before the last, (exits,)."""
    shares = (how.split_above,) * exits if isinstance(how.split_above, float | int) else how.split_above
    above = np.zeros(max(exits, 1), np.int64)
    above[:exits] = [round(MILLIONTHS * min(share, 1.0)) for share in shares[:exits]]
    return above


def flushes(deployment: Deployment) -> dict[str, int]:
    """The rules (`core.layout.RULES`) on split batches: whether they are split, and when waiting tokens run on."""
    per_token = isinstance(deployment.exit_rule, PerToken) and deployment.plan is None
    if not per_token or deployment.batching is not BatchingRule.REBATCH:
        return {"regroups": 0, "flush_requests": NEVER, "flush_ns": FOREVER_NS}
    how = deployment.regrouping
    return {
        "regroups": 1,
        "flush_requests": NEVER if how.flush_requests is None else how.flush_requests,
        "flush_ns": FOREVER_NS if how.flush_s is None else to_ns(how.flush_s, "flush_s"),
    }


def released(deployment: Deployment) -> dict[str, int]:
    """The rules (`core.layout.RULES`) on released answers: whether ramps release them, and whether all are observed."""
    rule = deployment.exit_rule
    releases = isinstance(rule, ReleaseEarly) and deployment.plan is None
    return {"releases": int(releases), "tells_all": int(isinstance(rule, ReleaseEarly) and releases and rule.tells_all)}


def of_device(deployment: Deployment, exits: tuple[int, ...]) -> dict[str, int]:
    """The rules (`core.layout.RULES`) that the loop reads if a device runs a model with these exits."""
    last = exits.index(deployment.active.layers)
    return {"bands": last + 1, "rule_exit": last, **flushes(deployment), **released(deployment)}
