"""The policy static_cap: HELIOS's cap, chosen once from offline records, to show what adaptation adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from helios_sim.exits.rule import Confidence, FixedCap, require_threshold
from helios_sim.policy.assess import Assessor
from helios_sim.policy.checks import check_cap, check_positive, find_model
from helios_sim.policy.deployment import Cause, Deployment, KvRule, Placement
from helios_sim.policy.prediction import expected_load
from helios_sim.policy.telemetry import Situation, Telemetry


@dataclass(frozen=True, slots=True)
class StaticCapParameters:
    """Settings of `policy=static_cap`."""

    threshold: float  # below it a token that leaves at the cap counts as a breach
    model: str | None = None  # None means the candidate with the best predicted objective at its cap
    cap_layers: int | None = None  # None means by the cap rule
    confidence: Confidence = Confidence.MAX_PROBABILITY
    batch_limit: int | None = None  # None means the server's own limit

    def __post_init__(self) -> None:
        require_threshold("policy.threshold", self.threshold)
        check_positive("cap_layers", self.cap_layers)
        check_positive("batch_limit", self.batch_limit)


class StaticCapPolicy:
    """A fixed decision: it loads one model up to one cap and stays there."""

    def __init__(self, parameters: StaticCapParameters) -> None:
        self.parameters = parameters

    def start(self, situation: Situation) -> Deployment:
        """Chooses model and cap. Raises UserError if the model is unknown, the cap is no exit, or nothing fits."""
        p = self.parameters
        if p.cap_layers is not None:
            model = find_model(situation, p.model)
            placement = Placement(model, check_cap(situation.candidates[model], p.cap_layers))
            return self._deployment(placement, f"{model} is cut at layer {p.cap_layers}, as given", {})
        if p.model is not None:
            named = find_model(situation, p.model)
            situation = replace(situation, candidates={named: situation.candidates[named]})
        assessor = Assessor(situation, half_life_requests=1.0, batch_limit=p.batch_limit)
        options = assessor.ranked(expected_load(situation), 1, 0, whole_must_fit=False)
        assessor.require(options)
        best = options[0]
        reason = (
            f"{best.placement.model} is cut at layer {best.placement.layers}, the shallowest exit within "
            f"{situation.objective.max_disagreement:g} disagreement"
        )
        evidence = {option.placement.model: option.to_json() for option in options}
        return self._deployment(best.placement, reason, evidence)

    def _deployment(self, placement: Placement, reason: str, evidence: Mapping[str, Any]) -> Deployment:
        return Deployment(
            active=placement,
            exit_rule=FixedCap(self.parameters.threshold, self.parameters.confidence),
            kv_rule=KvRule.NONE,
            batch_limit=self.parameters.batch_limit,
            reason=reason,
            evidence=evidence,
        )

    def decide(self, cause: Cause, telemetry: Telemetry) -> Deployment | None:
        return None
