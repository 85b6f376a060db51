"""One model that verifies what another, smaller one with the same tokenizer drafts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from helios_sim.errors import UserError
from helios_sim.exits.rule import MOST_DRAFTS, MOST_EXCHANGE_S, DraftModel, OwnCard
from helios_sim.policy.checks import check_positive
from helios_sim.policy.deployment import Cause, Completed, Deployment, KvRule, Placement
from helios_sim.policy.draft_review import DraftReview
from helios_sim.policy.drafts import best_drafts_of, slowest_drafter
from helios_sim.policy.prediction import seen_load
from helios_sim.policy.telemetry import Situation, Telemetry


class DraftsOn(StrEnum):
    """Where drafts are made, if not on the card of the model that verifies them."""

    OWN = "own"  # a card of the same kind: all requests that wait for drafts are drafted for at once
    PIPELINED = "pipelined"  # the same, at most half of the batch at once, so that the other card has the other half


@dataclass(frozen=True, slots=True)
class DraftModelParameters:
    """Settings of `policy=draft_model`."""

    drafter: str | None = None  # None: the other one of two candidates
    model: str | None = None  # None: the candidate with more layers
    draft_tokens: int = 4  # of one pass; with review_requests the most
    largest_batch: int | None = None  # where more requests decode none drafts; None: however many do
    review_requests: int | None = None  # so many completed requests between two choices of the drafts; None: fixed
    drafter_on: DraftsOn | None = None  # a card of its own; None: the model's card
    exchange_s: float | None = None  # with a card of its own: what passing tokens to the other card takes
    fused_with: list[str] | None = None  # drafters that propose each token too, each on a card of its own
    batch_limit: int | None = None  # None: the server's own limit

    def __post_init__(self) -> None:
        for name in ("largest_batch", "review_requests", "batch_limit"):
            check_positive(name, getattr(self, name))
        if not 1 <= self.draft_tokens <= MOST_DRAFTS:
            allowed = f"a whole number from 1 to {MOST_DRAFTS}"
            raise UserError("policy.draft_tokens", self.draft_tokens, allowed, "set policy.draft_tokens=4")
        it, most = self.exchange_s, MOST_EXCHANGE_S
        if self.drafter_on is None:
            if it is not None:
                allowed = "null where both models are on one card"
                raise UserError("policy.exchange_s", it, allowed, "leave it out, or set policy.drafter_on=pipelined")
        elif isinstance(it, bool) or not isinstance(it, int | float) or not 0 <= it <= most:
            allowed = f"seconds from 0 to {most:g} that tokens take from card to card, which nothing here knows"
            raise UserError("policy.exchange_s", it, allowed, "measure it, or state one, such as 0.0001")

        if self.fused_with is not None and (self.drafter is None or self.drafter_on is None):
            allowed = "null, unless policy.drafter and policy.drafter_on are set: fused drafts are made side by side"
            raise UserError("policy.fused_with", self.fused_with, allowed, "set both, or leave it out")
        others = list(dict.fromkeys(name for name in self.fused_with or () if name != self.drafter))
        if self.fused_with is not None and (not others or others != self.fused_with):
            allowed = f"models beside the drafter, {self.drafter}, each once"
            fix = f"set policy.fused_with=[{','.join(others)}]" if others else "leave it out, or name another drafter"
            raise UserError("policy.fused_with", self.fused_with, allowed, fix)

    @property
    def own_card(self) -> OwnCard | None:
        if self.drafter_on is None:
            return None
        assert self.exchange_s is not None
        return OwnCard(float(self.exchange_s), 2 if self.drafter_on is DraftsOn.PIPELINED else 1)

    @property
    def cards(self) -> int:
        """How many times the cards of a server without a drafter."""
        return 1 if self.drafter_on is None else 2 + len(self.fused_with or ())

    def roles(self, layers: Mapping[str, int]) -> tuple[str, str]:
        """The model and its drafter, of candidates with so many layers.

        Raises UserError unless there are two, of which the drafter has no more layers.
        """
        if len(layers) < 2:
            allowed = "two models in `models`: one drafts, the other verifies"
            raise UserError("policy", "draft_model", allowed, "add the drafter to models")
        model = max(layers, key=lambda name: layers[name]) if self.model is None else self.model
        if model not in layers:
            raise UserError("policy.model", model, f"one of {', '.join(layers)}", "name a model of this experiment")
        others = [name for name in layers if name != model and layers[name] <= layers[model]]
        drafter = others[0] if self.drafter is None and len(others) == 1 else self.drafter
        if drafter is None or drafter not in others:
            allowed = f"a model with at most the {layers[model]} layers of {model}: {', '.join(others) or 'none'}"
            raise UserError("policy.drafter", self.drafter, allowed, "name one of these")
        for name in self.fused_with or ():
            if name not in others:
                allowed = f"models with at most the {layers[model]} layers of {model}: {', '.join(others)}"
                raise UserError("policy.fused_with", name, allowed, "name some of these")
        return model, drafter


class DraftModelPolicy:
    """Lossless: every token is the model's own. Both stay in memory with their K and V, on one card or on one each.

    With `review_requests` the number of drafts follows what was accepted since the last review, and the running
    requests, as under self-speculation (`DraftReview`); the first one is the most.
    """

    def __init__(self, parameters: DraftModelParameters) -> None:
        self.parameters = parameters

    def start(self, situation: Situation) -> Deployment:
        """Raises UserError unless there are two candidates, of which the drafter has no more layers."""
        self._situation = situation
        self._layers = {name: it.profile.model.n_layers for name, it in situation.candidates.items()}
        self._model, self._drafter = self.parameters.roles(self._layers)
        self._drafters = (self._drafter, *(self.parameters.fused_with or ()))
        self._review = DraftReview(1.0)
        most = self.parameters.draft_tokens
        return self._deployment(most, f"{self._drafter} drafts {most} tokens, {self._model} verifies them")

    def decide(self, cause: Cause, telemetry: Telemetry) -> Deployment | None:
        """The drafts until the next review; None where they stay."""
        if not isinstance(cause, Completed):
            return None
        candidates, batch = self._situation.candidates, max(1, telemetry.running_requests)
        candidate, load = candidates[self._model], seen_load(self._situation, telemetry, self._model)
        context = round(load.prompt_tokens(candidate) + load.output_tokens(candidate) / 2)
        slowest = slowest_drafter({name: candidates[name].profile for name in self._drafters})
        both, most = (candidate.profile, candidates[slowest].profile), self.parameters.draft_tokens
        own, fused = self.parameters.own_card, len(self._drafters) > 1
        drafts = self._review.next_drafts(
            telemetry, self._drafts, lambda share: best_drafts_of(*both, share, most, batch, context, own, fused)
        )
        if drafts == self._drafts:
            return None
        known = f"acceptance {self._review.acceptance:.3f}, {batch} running"
        return self._deployment(drafts, f"{self._drafter} drafts {drafts} tokens: {known}")

    def _deployment(self, drafts: int, reason: str) -> Deployment:
        p, self._drafts = self.parameters, drafts
        return Deployment(
            active=Placement(self._model, self._layers[self._model]),
            standby=(Placement(self._drafter, self._layers[self._drafter]),) if p.own_card is None else (),
            exit_rule=DraftModel(self._drafter, drafts, p.largest_batch, p.own_card, self._drafters[1:]),
            kv_rule=KvRule.NONE,
            batch_limit=p.batch_limit,
            triggers=() if p.review_requests is None else (Completed(p.review_requests),),
            reason=reason,
            evidence={"drafter": self._drafter, "draft_tokens": drafts},
        )
