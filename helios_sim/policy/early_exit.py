"""The policy early_exit: one model, all layers loaded, and each token leaves at its first confident exit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from helios_sim.errors import UserError
from helios_sim.exits.rule import MEASURES, MOST_NEAR_TOKENS, Confidence, Near, PerToken, require_threshold
from helios_sim.policy.checks import check_not_negative, check_positive, find_model, whole_model
from helios_sim.policy.deployment import (
    MOST_FLUSH_S,
    BatchingRule,
    Cause,
    Completed,
    Deployment,
    KvRule,
    Regrouping,
)
from helios_sim.policy.prediction import Load, decode_time_s, expected_load, fixed_depth, predict, seen_load
from helios_sim.policy.regroup import split_shares
from helios_sim.policy.telemetry import Candidate, Situation, Telemetry

NEAR_LAYERS = 2
LONGEST_WAIT = 10  # longest wait of a token at an exit, in predicted decode iterations at full depth


@dataclass(frozen=True, slots=True)
class EarlyExitParameters:
    """Settings of `policy=early_exit`.

    `batching` lazy is the rule of Miao et al., arXiv 2407.20272: the batch leaves only if all its tokens may. With
    rebatch a batch is split at an exit if that pays by the profile, DREX's rule (`policy/regroup.py`). `most_checks`
    and `near_tokens` are SpecEE's offline and online schedules. With both, the exits named by either check;
    `checkpoints` may stand in place of `most_checks`.
    """

    threshold: float  # may be above 1: no token leaves then
    model: str | None = None  # None means the only candidate
    confidence: Confidence = Confidence.MAX_PROBABILITY
    checkpoints: list[int] | None = None  # depths of the exits that check; None means all exits
    most_checks: int | None = None  # number of exits that check, those at which most tokens leave; None means all
    near_tokens: int | None = None  # exits near those of so many latest tokens check; None means no such exits
    near_layers: int | None = None  # how near; None means 2, as in SpecEE's code
    batching: BatchingRule = BatchingRule.EACH_TOKEN
    kv_rule: KvRule | None = None  # None means propagate, or copy with rebatch, as in DREX
    batch_limit: int | None = None  # None means the server's own limit
    resident_layers: int | None = None  # on the card; layers above come from host memory in iterations that run them
    flush_requests: int | None = None  # rebatch: requests at an exit that run on; None means as many as decode
    flush_s: float | None = None  # rebatch: the longest wait; None means that of LONGEST_WAIT iterations
    review_requests: int | None = None  # rebatch: completed requests between two reviews; None means no review

    def __post_init__(self) -> None:
        for name in ("batch_limit", "flush_requests", "flush_s", "review_requests", "most_checks", "near_tokens"):
            check_positive(name, getattr(self, name))
        require_threshold("policy.threshold", self.threshold)
        if self.checkpoints is not None and (not self.checkpoints or sorted(set(self.checkpoints)) != self.checkpoints):
            allowed = "null, or layers of exits in their order, such as [8, 16]"
            raise UserError("policy.checkpoints", self.checkpoints, allowed, "correct it")
        if self.most_checks is not None and self.checkpoints is not None:
            allowed = "null with policy.checkpoints, which names the exits"
            raise UserError("policy.most_checks", self.most_checks, allowed, "leave one of them out")
        self._check_looks()
        if self.flush_s is not None and self.flush_s > MOST_FLUSH_S:
            allowed = f"seconds, at most {MOST_FLUSH_S:g}"
            raise UserError("policy.flush_s", self.flush_s, allowed, "leave it out")
        if self.kv_rule is KvRule.NONE:
            allowed = "propagate, recompute or copy: later tokens that go deeper read K and V of the layers left out"
            raise UserError("policy.kv_rule", str(self.kv_rule), allowed, "set policy.kv_rule=propagate")
        if self.batching is BatchingRule.LAZY and self.filled is not KvRule.PROPAGATE:
            allowed = "propagate with policy.batching=lazy, which fills K and V in the same iteration"
            raise UserError("policy.kv_rule", str(self.kv_rule), allowed, "set policy.kv_rule=propagate")
        for name in ("flush_requests", "flush_s", "review_requests"):
            if self.batching is not BatchingRule.REBATCH and getattr(self, name) is not None:
                allowed = "null without policy.batching=rebatch, where no batch is split"
                raise UserError(f"policy.{name}", getattr(self, name), allowed, "set policy.batching=rebatch")

    def _check_looks(self) -> None:
        """Raises UserError for settings that contradict a rule which checks each token alone."""
        check_not_negative("near_layers", self.near_layers)
        if self.near_tokens is None and self.near_layers is not None:
            allowed = "null without policy.near_tokens"
            raise UserError("policy.near_layers", self.near_layers, allowed, "set policy.near_tokens=5")
        alone = self.most_checks is None and self.checkpoints is None and not MEASURES[self.confidence].proposes
        if self.near_tokens is not None and alone:
            allowed = "beside policy.most_checks or policy.checkpoints: without exits that always check no token leaves"
            raise UserError("policy.near_tokens", self.near_tokens, allowed, "set policy.most_checks=1")
        if self.near_tokens is not None and self.near_tokens > MOST_NEAR_TOKENS:
            allowed = f"from 1 to {MOST_NEAR_TOKENS}"
            raise UserError("policy.near_tokens", self.near_tokens, allowed, "correct it")
        if self.batching is BatchingRule.EACH_TOKEN:
            return
        allowed = "each_token where a predictor, or exits near those of earlier tokens, look at each token alone"
        if MEASURES[self.confidence].proposes or self.near_tokens is not None:
            raise UserError("policy.batching", self.batching.value, allowed, "set policy.batching=each_token")

    @property
    def filled(self) -> KvRule:
        """The rule for K and V of the layers that a token skipped: the setting, or the default of the batching."""
        if self.kv_rule is not None:
            return self.kv_rule
        return KvRule.COPY if self.batching is BatchingRule.REBATCH else KvRule.PROPAGATE


class EarlyExitPolicy:
    """The paper's baseline (with batch_limit 1) and its batched descendants."""

    def __init__(self, parameters: EarlyExitParameters) -> None:
        self.parameters = parameters

    def start(self, situation: Situation) -> Deployment:
        """Deploys the model. Raises UserError if it is not among the candidates, or settings do not fit its exits."""
        self._model = find_model(situation, self.parameters.model)
        situation, self._placement = whole_model(situation, self._model, self.parameters.resident_layers)
        self._situation, exits = situation, situation.candidates[self._model].offline.exits[:-1]
        if not set(self.parameters.checkpoints or ()) <= set(exits):
            allowed = f"{self._model} has exits before its last layer at {', '.join(map(str, exits)) or 'none'}"
            raise UserError("policy.checkpoints", self.parameters.checkpoints, allowed, "choose among these")
        first_asked = MEASURES[self.parameters.confidence].proposes
        if first_asked and exits and exits[0] not in (self.parameters.checkpoints or exits):
            allowed = f"{exits[0]} among them: its head proposes the words that predictors look at"
            raise UserError("policy.checkpoints", self.parameters.checkpoints, allowed, "add it")
        if self.parameters.batching is BatchingRule.REBATCH:
            load, placement = expected_load(situation), self._placement
            predicted = predict(situation, placement, fixed_depth(placement.layers), load)
            self._regrouping = self._paying(load, 1 if predicted is None else round(max(1.0, predicted.batch)))
        return self._deployment()

    def decide(self, cause: Cause, telemetry: Telemetry) -> Deployment | None:
        """Reviews at which exits batches are split; None if that stays."""
        if not isinstance(cause, Completed):
            return None
        load = seen_load(self._situation, telemetry, self._model)
        found = self._paying(load, max(1, telemetry.running_requests))
        if found == self._regrouping:
            return None
        self._regrouping = found
        return self._deployment()

    @property
    def _candidate(self) -> Candidate:
        return self._situation.candidates[self._model]

    def _paying(self, load: Load, batch: int) -> Regrouping:
        """The splits that pay by the profile, for batches of `batch` requests."""
        p, candidate = self.parameters, self._candidate
        context = round(load.prompt_tokens(candidate) + load.output_tokens(candidate) / 2)
        flush_s = p.flush_s
        if flush_s is None:
            whole = fixed_depth(candidate.profile.model.n_layers)
            flush_s = LONGEST_WAIT * float(decode_time_s(candidate.profile, whole, np.array([batch]), context)[0])
        shares = split_shares(candidate.profile, candidate.offline.exits, batch, context)
        return Regrouping(tuple(round(share, 6) for share in shares), p.flush_requests, flush_s)

    def _checks(self) -> tuple[int, ...] | None:
        """The exits that check every token: the named ones, or those at which most tokens leave in the trace; None
        means all."""
        p, offline = self.parameters, self._candidate.offline
        if p.checkpoints is not None:
            return tuple(p.checkpoints)
        if p.most_checks is None:
            return None
        share = offline.exit_share[:-1]
        if p.most_checks >= len(share):
            allowed = f"below {len(share)}: {self._candidate.profile.model.name} has no more exits, and all check"
            raise UserError("policy.most_checks", p.most_checks, allowed, "lower it, or leave it out")
        chosen = set(np.argsort(-share, kind="stable")[: p.most_checks].tolist())
        if MEASURES[p.confidence].proposes:
            chosen.add(0)  # the first exit's head is run in any case
        return tuple(depth for e, depth in enumerate(offline.exits[:-1]) if e in chosen)

    def _deployment(self) -> Deployment:
        p, exits = self.parameters, self._candidate.offline.exits
        named, near = self._checks(), None
        checks = exits[:-1] if named is None else named
        if p.near_tokens is not None:
            near = Near(p.near_tokens, NEAR_LAYERS if p.near_layers is None else p.near_layers)
            checks = () if named is None else named
        reason = (
            f"{self._model}: a token leaves at the first of the exits {', '.join(map(str, (*checks, exits[-1])))} "
            f"where {p.confidence.value} reaches {p.threshold:g}"
        )
        if near is not None:
            reason += f"; exits within {near.layers} layers of where the last {near.tokens} tokens left check as well"
        if p.resident_layers is not None:
            reason += f"; layers above {p.resident_layers} come from host memory"
        deployment = Deployment(
            active=self._placement,
            exit_rule=PerToken(p.threshold, p.confidence, named, near),
            batching=p.batching,
            kv_rule=p.filled,
            batch_limit=p.batch_limit,
            reason=reason,
            evidence={"exits": [*checks, exits[-1]], "threshold": p.threshold},
        )
        if p.batching is not BatchingRule.REBATCH:
            return deployment
        shares = self._regrouping.split_above
        assert isinstance(shares, tuple)
        told = ", ".join(f"{100 * share:.3g} % at {layers}" for share, layers in zip(shares, exits, strict=False))
        return replace(
            deployment,
            regrouping=self._regrouping,
            triggers=() if p.review_requests is None else (Completed(p.review_requests),),
            reason=f"{reason}; a batch is split where more of it leaves than {told or 'at no exit'}",
            evidence={**deployment.evidence, "split_above": list(shares), "flush_s": self._regrouping.flush_s},
        )
