"""The segments, heads and passes that a deployment's iterations run, to be captured before time starts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from helios_sim.exits.rule import Confidence, FixedCap, PerToken, ReleaseEarly
from helios_sim.live.one_pass import Rule
from helios_sim.policy.deployment import Deployment


def segments(exits: Sequence[int], deployment: Deployment | None) -> list[tuple[int, int]]:
    """The segments (start, end) of layers that decodes run: from exit to exit, or up to an exit at once.

    Without a deployment, the segments of any deployment. Late layers are not captured; each is launched when it comes.
    """
    if deployment is None:
        return sorted({*pairwise((0, *exits)), *((0, end) for end in exits)})
    stay = deployment.active.resident_layers
    found = _segments(exits, deployment)
    return found if stay is None else [(start, min(end, stay)) for start, end in found if start < stay]


def _segments(exits: Sequence[int], deployment: Deployment) -> list[tuple[int, int]]:
    layers = deployment.active.layers
    if isinstance(deployment.exit_rule, ReleaseEarly):
        return list(pairwise((0, *deployment.exit_rule.ramps, layers)))
    if isinstance(deployment.exit_rule, PerToken) or deployment.observe_tokens is not None:
        return list(pairwise((0, *exits[: exits.index(layers) + 1])))
    return [(0, deployment.run_layers or layers)]


def measures(deployment: Deployment | None) -> list[Confidence | None]:
    """The confidences that are computed together with a token: None for no confidence, and that of the exit rule."""
    rule = None if deployment is None else deployment.exit_rule
    return [None, rule.confidence] if isinstance(rule, FixedCap | PerToken | ReleaseEarly) else [None]


def passes(exits: Sequence[int], deployment: Deployment | None, n_layers: int) -> list[Rule]:
    """The rules of passes through several exits: up to the deployment's layers, or to any exit if those may change.

    Without a deployment, or if layers come late, there are no passes.
    """
    if deployment is None or deployment.active.resident_layers is not None:
        return []
    ends = exits if deployment.triggers else [deployment.active.layers]
    up_to = [exits[: exits.index(end) + 1] for end in ends]
    found = [Rule.of(deployment.exit_rule, deployment.batching, deployment.kv_rule, of, n_layers) for of in up_to]
    return [rule for rule in found if rule is not None]
