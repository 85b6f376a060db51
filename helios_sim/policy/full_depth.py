"""The policy full_depth: one model, and every token runs all layers."""

from __future__ import annotations

from dataclasses import dataclass

from helios_sim.exits.rule import FullDepth
from helios_sim.policy.checks import check_positive, find_model, whole_model
from helios_sim.policy.deployment import Cause, Deployment, KvRule
from helios_sim.policy.telemetry import Situation, Telemetry


@dataclass(frozen=True, slots=True)
class FullDepthParameters:
    """Settings of `policy=full_depth`."""

    model: str | None = None  # None means the only candidate
    batch_limit: int | None = None  # None means the server's own limit
    resident_layers: int | None = None  # on the card; layers above come from host memory; None means all

    def __post_init__(self) -> None:
        check_positive("batch_limit", self.batch_limit)


class FullDepthPolicy:
    """The baseline without early exit."""

    def __init__(self, parameters: FullDepthParameters) -> None:
        self.parameters = parameters

    def start(self, situation: Situation) -> Deployment:
        """Deploys the whole model. Raises UserError if it is not among the candidates."""
        model = find_model(situation, self.parameters.model)
        _, placement = whole_model(situation, model, self.parameters.resident_layers)
        stay = placement.resident_layers
        late = "" if stay is None else f", those above {stay} from host memory"
        return Deployment(
            active=placement,
            exit_rule=FullDepth(),
            kv_rule=KvRule.NONE,
            batch_limit=self.parameters.batch_limit,
            reason=f"{model} runs all {placement.layers} layers for every token{late}",
        )

    def decide(self, cause: Cause, telemetry: Telemetry) -> Deployment | None:
        return None
