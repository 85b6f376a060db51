"""The policy self_speculation (LayerSkip, arXiv 2404.16710): the first layers draft, and all layers verify."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from helios_sim.errors import UserError
from helios_sim.exits.rule import MOST_DRAFTS, SelfSpeculation
from helios_sim.policy.checks import check_positive, find_model, whole_model
from helios_sim.policy.deployment import Cause, Completed, Deployment, KvRule
from helios_sim.policy.draft_review import DraftReview
from helios_sim.policy.drafts import Drafting, best_drafting
from helios_sim.policy.prediction import Load, expected_load, seen_load
from helios_sim.policy.telemetry import Candidate, Situation, Telemetry


@dataclass(frozen=True, slots=True)
class SelfSpeculationParameters:
    """Settings of `policy=self_speculation`."""

    draft_tokens: int = 4  # drafts of one pass; with review_requests, the most
    exit_layer: int | None = None  # exit that drafts; None means the one predicted to be best for one request
    largest_batch: int | None = None  # if more requests decode, none drafts; None means no such limit
    review_requests: int | None = None  # completed requests between two reviews of the drafts; None means no review
    model: str | None = None  # None means the only candidate
    batch_limit: int | None = None  # None means the server's own limit
    resident_layers: int | None = None  # on the card; layers above come from host memory for each pass; None means all

    def __post_init__(self) -> None:
        for name in ("exit_layer", "largest_batch", "review_requests", "batch_limit"):
            check_positive(name, getattr(self, name))
        if not 1 <= self.draft_tokens <= MOST_DRAFTS:
            allowed = f"a whole number from 1 to {MOST_DRAFTS}"
            raise UserError("policy.draft_tokens", self.draft_tokens, allowed, "set policy.draft_tokens=4")


class SelfSpeculationPolicy:
    """Lossless drafting by the model's own first layers: every token is the whole model's.

    With `review_requests` the number of drafts follows the acceptance since the last review and the number of running
    requests: it is the number that by the profile gives most tokens a second, which may be 0 (`DraftReview`).
    """

    def __init__(self, parameters: SelfSpeculationParameters) -> None:
        self.parameters = parameters

    def start(self, situation: Situation) -> Deployment:
        """Chooses the exit that drafts. Raises UserError if the model is not among the candidates, or the given layer
        is not one of its exits."""
        p = self.parameters
        self._model = find_model(situation, p.model)
        situation, self._placement = whole_model(situation, self._model, p.resident_layers)
        self._situation = situation
        candidate = situation.candidates[self._model]
        exits = candidate.offline.exits
        if len(exits) == 1:
            raise UserError("policy.model", self._model, "a model with exits before its last layer", "give it exits")
        self._acceptance = dict(zip(exits[:-1], (1.0 - candidate.offline.disagreement[:-1]).tolist(), strict=True))
        load = expected_load(situation)
        if p.exit_layer is None:
            chosen = self._best(self._acceptance.items(), 1, load)
            self._layers, why = chosen.exit_layers, "predicted to be best for one request"
        elif p.exit_layer in self._acceptance:
            self._layers, why = p.exit_layer, "as given"
        else:
            allowed = f"{candidate.profile.name} has exits at {', '.join(map(str, exits[:-1]))} before its last layer"
            raise UserError("policy.exit_layer", p.exit_layer, allowed, "choose one of these")
        share = self._acceptance[self._layers]
        self._review = DraftReview(share)
        reason = f"{self._model} drafts {p.draft_tokens} tokens at layer {self._layers}, {why}"
        return self._deployment(p.draft_tokens, f"{reason}; recorded agreement there {share:.3f}")

    def decide(self, cause: Cause, telemetry: Telemetry) -> Deployment | None:
        """Sets the number of drafts until the next review; None if it stays."""
        if not isinstance(cause, Completed):
            return None
        batch, load = max(1, telemetry.running_requests), seen_load(self._situation, telemetry, self._model)
        drafts = self._review.next_drafts(
            telemetry, self._drafts, lambda share: self._best([(self._layers, share)], batch, load).drafts
        )
        self._acceptance[self._layers] = self._review.acceptance
        if drafts == self._drafts:
            return None
        known = f"acceptance {self._acceptance[self._layers]:.3f}, {batch} running"
        return self._deployment(drafts, f"{drafts} drafts at layer {self._layers}: {known}")

    def _best(self, exits: Iterable[tuple[int, float]], batch: int, load: Load) -> Drafting:
        candidate: Candidate = self._situation.candidates[self._model]
        context = round(load.prompt_tokens(candidate) + load.output_tokens(candidate) / 2)
        return best_drafting(candidate.profile, exits, self.parameters.draft_tokens, batch, context)

    def _deployment(self, drafts: int, reason: str) -> Deployment:
        p, self._drafts = self.parameters, drafts
        return Deployment(
            active=self._placement,
            exit_rule=SelfSpeculation(self._layers, drafts, p.largest_batch),
            kv_rule=KvRule.NONE,
            batch_limit=p.batch_limit,
            triggers=() if p.review_requests is None else (Completed(p.review_requests),),
            reason=reason,
            evidence={"exit_layer": self._layers, "draft_tokens": drafts, "acceptance": self._acceptance[self._layers]},
        )
