"""One model that verifies what another, smaller one with the same tokenizer drafts."""

from __future__ import annotations

from dataclasses import dataclass

from helios_sim.errors import UserError
from helios_sim.exits.rule import MOST_DRAFTS, DraftModel
from helios_sim.policy.checks import check_positive, find_model
from helios_sim.policy.deployment import Cause, Deployment, KvRule, Placement
from helios_sim.policy.telemetry import Situation, Telemetry


@dataclass(frozen=True, slots=True)
class DraftModelParameters:
    drafter: str | None = None  # None: the other one of two candidates
    model: str | None = None  # None: the candidate with more layers
    draft_tokens: int = 4  # of one pass
    largest_batch: int | None = None  # where more requests decode none drafts; None: however many do
    batch_limit: int | None = None  # None: the server's own limit

    def __post_init__(self) -> None:
        for name in ("largest_batch", "batch_limit"):
            check_positive(name, getattr(self, name))
        if not 1 <= self.draft_tokens <= MOST_DRAFTS:
            allowed = f"a whole number from 1 to {MOST_DRAFTS}"
            raise UserError("policy.draft_tokens", self.draft_tokens, allowed, "set policy.draft_tokens=4")


class DraftModelPolicy:
    """Lossless: every token is the model's own. Both stay in memory with their K and V."""

    def __init__(self, parameters: DraftModelParameters) -> None:
        self.parameters = parameters

    def start(self, situation: Situation) -> Deployment:
        """Raises UserError unless there are two candidates, of which the drafter has no more layers."""
        p = self.parameters
        layers = {name: it.profile.model.n_layers for name, it in situation.candidates.items()}
        if len(layers) < 2:
            allowed = "two models in `models`: one drafts, the other verifies"
            raise UserError("policy", "draft_model", allowed, "add the drafter to models")
        model = max(layers, key=lambda name: layers[name]) if p.model is None else find_model(situation, p.model)
        others = [name for name in layers if name != model and layers[name] <= layers[model]]
        drafter = others[0] if p.drafter is None and len(others) == 1 else p.drafter
        if drafter is None or drafter not in others:
            allowed = f"a model with at most the {layers[model]} layers of {model}: {', '.join(others) or 'none'}"
            raise UserError("policy.drafter", p.drafter, allowed, "name one of these")
        return Deployment(
            active=Placement(model, layers[model]),
            standby=(Placement(drafter, layers[drafter]),),
            exit_rule=DraftModel(drafter, p.draft_tokens, p.largest_batch),
            kv_rule=KvRule.NONE,
            batch_limit=p.batch_limit,
            reason=f"{drafter} drafts {p.draft_tokens} tokens, {model} verifies them",
            evidence={"drafter": drafter, "draft_tokens": p.draft_tokens},
        )

    def decide(self, cause: Cause, telemetry: Telemetry) -> Deployment | None:
        return None
