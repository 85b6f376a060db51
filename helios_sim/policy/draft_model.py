"""Speculative decoding: a smaller model with the same tokenizer drafts, and one model verifies the drafts."""

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
    """The way drafts are made on a card of their own, which is of the same kind as the verifier's."""

    OWN = "own"  # all requests that wait for drafts are drafted for at once
    PIPELINED = "pipelined"  # at most half of the batch is drafted for at once, while the other half is verified


@dataclass(frozen=True, slots=True)
class DraftModelParameters:
    """Settings of `policy=draft_model`."""

    drafter: str | None = None  # None means the other one of two candidates
    model: str | None = None  # the verifying model; None means the candidate with most layers
    draft_tokens: int = 4  # drafts of one pass; with review_requests, the most
    largest_batch: int | None = None  # if more requests decode, none drafts; None means no such limit
    review_requests: int | None = None  # completed requests between two reviews of the drafts; None means no review
    drafter_on: DraftsOn | None = None  # use of a card of the drafter's own; None means it is on the model's card
    exchange_s: float | None = None  # seconds to pass tokens to the other card, if the drafter has its own
    fused_with: list[str] | None = None  # further drafters that propose each token too, each on its own card
    batch_limit: int | None = None  # None means the server's own limit

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
        """Cards of the server, as a multiple of those of a server without a drafter."""
        return 1 if self.drafter_on is None else 2 + len(self.fused_with or ())

    def roles(self, layers: Mapping[str, int]) -> tuple[str, str]:
        """The model and its drafter, chosen among candidates; `layers` is their number of layers by name.

        Raises UserError unless there are two candidates and the drafter has no more layers than the model.
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
    """Lossless drafting by another model: every token is the verifying model's own.

    Both models stay in memory with their K and V, on one card or on one card each. With `review_requests` the number of
    drafts follows the acceptance since the last review and the number of running requests, as under self-speculation
    (`DraftReview`). It begins with the most.
    """

    def __init__(self, parameters: DraftModelParameters) -> None:
        self.parameters = parameters

    def start(self, situation: Situation) -> Deployment:
        """Deploys both models. Raises UserError unless there are two candidates and the drafter has no more layers."""
        self._situation = situation
        self._layers = {name: it.profile.model.n_layers for name, it in situation.candidates.items()}
        self._model, self._drafter = self.parameters.roles(self._layers)
        self._drafters = (self._drafter, *(self.parameters.fused_with or ()))
        self._review = DraftReview(1.0)
        most = self.parameters.draft_tokens
        return self._deployment(most, f"{self._drafter} drafts {most} tokens, {self._model} verifies them")

    def decide(self, cause: Cause, telemetry: Telemetry) -> Deployment | None:
        """Sets the number of drafts until the next review; None if it stays."""
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
