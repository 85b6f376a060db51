"""One model, all layers resident, each token leaves at the first exit that is confident."""

from __future__ import annotations

from dataclasses import dataclass

from helios_sim.errors import UserError
from helios_sim.exits.rule import Confidence, PerToken, require_threshold
from helios_sim.policy.checks import check_positive, find_model
from helios_sim.policy.deployment import BatchingRule, Cause, Deployment, KvRule, Placement
from helios_sim.policy.telemetry import Situation, Telemetry


@dataclass(frozen=True, slots=True)
class EarlyExitParameters:
    """`batching` lazy is the rule of Miao et al., arXiv 2407.20272: the batch leaves only when all of it may."""

    threshold: float  # may be above 1: no token leaves then
    model: str | None = None  # None: the only candidate
    confidence: Confidence = Confidence.MAX_PROBABILITY
    batching: BatchingRule = BatchingRule.EACH_TOKEN
    kv_rule: KvRule = KvRule.PROPAGATE
    batch_limit: int | None = None  # None: the server's own limit

    def __post_init__(self) -> None:
        check_positive("batch_limit", self.batch_limit)
        require_threshold("policy.threshold", self.threshold)
        if self.kv_rule is KvRule.NONE:
            allowed = "propagate or recompute: later tokens that go deeper read K and V of the layers left out"
            raise UserError("policy.kv_rule", str(self.kv_rule), allowed, "set policy.kv_rule=propagate")
        if self.batching is BatchingRule.LAZY and self.kv_rule is not KvRule.PROPAGATE:
            allowed = "propagate with policy.batching=lazy, which fills K and V in the same iteration"
            raise UserError("policy.kv_rule", str(self.kv_rule), allowed, "set policy.kv_rule=propagate")


class EarlyExitPolicy:
    """The paper's baseline (with batch_limit 1) and its batched descendants."""

    def __init__(self, parameters: EarlyExitParameters) -> None:
        self.parameters = parameters

    def start(self, situation: Situation) -> Deployment:
        """Raises UserError if the model is not among the candidates."""
        p = self.parameters
        model = find_model(situation, p.model)
        candidate = situation.candidates[model]
        exits = candidate.offline.exits
        return Deployment(
            active=Placement(model, candidate.profile.model.n_layers),
            exit_rule=PerToken(p.threshold, p.confidence),
            batching=p.batching,
            kv_rule=p.kv_rule,
            batch_limit=p.batch_limit,
            reason=f"{model}: a token leaves at the first of the exits {', '.join(map(str, exits))} "
            f"where {p.confidence.value} reaches {p.threshold:g}",
            evidence={"exits": list(exits), "threshold": p.threshold},
        )

    def decide(self, cause: Cause, telemetry: Telemetry) -> Deployment | None:
        return None
