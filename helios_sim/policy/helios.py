"""The policy helios: rounds of evaluation that end in a choice, and answers to breaches.

A round evaluates the shortlisted candidates and ends in the choice of a placement, which serves until the next round.
In between, a breach of the limit is answered by loading the remaining layers or by switching the model. `Evaluation`
says how candidates are assessed: each serves in turn (the paper's way), each is probed while serving goes on (ours), or
not at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from helios_sim.exits.rule import FixedCap, PerToken
from helios_sim.policy.choice import Chooser, Moment
from helios_sim.policy.deployment import (
    BreachLimit,
    Cause,
    Completed,
    Deployment,
    Drained,
    KvRule,
    LoadFailed,
    Placement,
    Probe,
    Probed,
    Trigger,
)
from helios_sim.policy.helios_parameters import Evaluation, HeliosParameters, Raised, RoundConstants
from helios_sim.policy.options import Option
from helios_sim.policy.prediction import expected_load, seen_load
from helios_sim.policy.telemetry import Situation, Telemetry
from helios_sim.request import NS_PER_S


class HeliosPolicy:
    """HELIOS's decisions. Its state: the latest deployment, the rest of the current round, the start of the next."""

    def __init__(self, parameters: HeliosParameters) -> None:
        self.parameters = parameters
        self._before: Deployment  # the deployment in force when the latest one was decided
        self._batch = 1.0  # mean running requests as last seen
        self._left: deque[str] = deque()  # candidates that this round has still to evaluate
        self._round_ends = 0  # completed requests at which the next round begins
        self._answered_ns: int | None = None  # time of the latest answer to a breach

    def start(self, situation: Situation) -> Deployment:
        """Begins the first round. Raises UserError if no candidate fits or meets the quality floor."""
        self._situation = situation
        self._chooser = Chooser(self.parameters, situation)
        load = expected_load(situation)
        self._chooser.renew_shortlist(load, self._batch, 0)
        self._batch = self._chooser.shortlist[0].prediction.batch
        if self.parameters.evaluation is Evaluation.SERVE:
            # The best predicted candidate serves last: if it stays the choice, its weights are already loaded.
            self._left.extend(reversed(self._chooser.models))
            self._deployment = self._evaluate_next()
        else:
            self._deployment = self._conclude(Moment(load, self._batch, 0, 0, 0, None))
        self._before = self._deployment
        return self._deployment

    def decide(self, cause: Cause, telemetry: Telemetry) -> Deployment | None:
        """Takes the next step of the round, or answers a breach or a failed load."""
        failed = self._deployment
        if isinstance(cause, LoadFailed):
            self._deployment = self._before
        for observation in telemetry.observations:
            self._chooser.assessor.history.add(observation, telemetry.completed_requests)
        # The constants scale with the usual batch, not with that of a round or a drain, which limit admission.
        if telemetry.batch_mean is not None and self._deployment.admit_limit is None:
            self._batch = telemetry.batch_mean
        moment = Moment(
            load=seen_load(self._situation, telemetry, self._deployment.active.model),
            batch=self._batch,
            running_requests=telemetry.running_requests,
            in_system=telemetry.queued_requests + telemetry.running_requests,
            completed_requests=telemetry.completed_requests,
            in_force=self._deployment,
            cached_tokens=telemetry.prefix_cached_tokens,
        )
        decided: Deployment | None = None
        match cause:
            case Completed():
                decided = self._begin_round(moment)
            case Drained() if self._left:
                decided = self._evaluate_next()
            case Drained() | Probed():
                decided = self._conclude(moment)
            case BreachLimit():
                decided = self._answer_breach(cause, moment, telemetry)
            case LoadFailed() if self._left:
                decided = self._evaluate_next()
            case LoadFailed() if failed.observe_tokens is not None:
                decided = self._conclude(moment)
            case LoadFailed():
                decided = self._stay(cause, moment)
        if decided is not None:
            self._before, self._deployment = self._deployment, decided
        return decided

    def _stay(self, cause: LoadFailed, moment: Moment) -> Deployment:
        """Serves with the loaded placement until the next round, or until the next breach."""
        active, remaining = self._deployment.active, max(1, self._round_ends - moment.completed_requests)
        reason = f"{cause.model} could not be loaded: {active.model} at layer {active.layers} serves on"
        return self._serve(active, remaining, reason, {})

    def _begin_round(self, moment: Moment) -> Deployment | None:
        now, prompts = self._deployment, self.parameters.prompts_per_candidate
        self._chooser.renew_shortlist(moment.load, moment.batch, moment.completed_requests)
        models = self._chooser.models
        reason = f"round after {moment.completed_requests} requests: "
        history = self._chooser.assessor.history.rows(moment.completed_requests)
        match self.parameters.evaluation:
            case Evaluation.OFF:
                decided = self._conclude(moment)
                return None if _same(decided, now) else decided
            case Evaluation.PROBE:
                return replace(
                    now,
                    probe=Probe(tuple(models), prompts),
                    triggers=(Probed(),),
                    reason=reason + f"{', '.join(models)} score the latest {prompts} answers",
                    evidence={"history": history},
                    next_best=None,
                )
            case Evaluation.SERVE:
                # The active model serves first, since part of it is loaded; the best predicted last, as it may stay.
                incumbent = [model for model in models if model == now.active.model]
                others = [model for model in reversed(models) if model != now.active.model]
                self._left.extend(incumbent + others)
                return replace(
                    now,
                    admit_limit=0,
                    triggers=(Drained(),),
                    reason=reason + f"{now.active.model} drains before {', '.join(self._left)} are evaluated",
                    evidence={"history": history},
                    next_best=None,
                )

    def _evaluate_next(self) -> Deployment:
        p, model = self.parameters, self._left.popleft()
        active = self._chooser.whole(model)
        cap = self._chooser.assessor.cap(model).layers
        # No answer is longer than the model's context, so this limit observes every token.
        all_tokens = self._situation.candidates[model].profile.model.max_context_tokens
        tokens = all_tokens if p.evaluated_tokens is None else p.evaluated_tokens
        observed = "every token" if p.evaluated_tokens is None else f"the first {tokens} tokens of each"
        deployment = self._deployment_of(
            active,
            triggers=(Drained(),),
            reason=f"{model} serves {p.prompts_per_candidate} requests whole, {observed} observed at every exit",
            evidence={"provisional_cap": cap, "left_to_evaluate": list(self._left)},
        )
        run_layers = None if cap == active.layers or p.evaluated_tokens is None else cap
        return replace(deployment, admit_limit=p.prompts_per_candidate, observe_tokens=tokens, run_layers=run_layers)

    def _conclude(self, moment: Moment) -> Deployment:
        """Ends a round with a choice."""
        choice = self._chooser.after_round(moment)
        requests = self._constants.round_requests
        self._round_ends = moment.completed_requests + requests
        placement = choice.option.placement
        where = "whole" if self._chooser.is_whole(placement) else f"cut at layer {placement.layers}"
        reason = f"{placement.model}, {where}, has the least predicted cost of the next {requests} requests"
        return self._serve(placement, requests, reason, choice.evidence, choice.next_best)

    def _answer_breach(self, cause: BreachLimit, moment: Moment, telemetry: Telemetry) -> Deployment | None:
        p, now = self.parameters, self._deployment.active
        if self._answered_ns is not None:
            since_s = (telemetry.now_ns - self._answered_ns) / NS_PER_S
            if since_s < self._constants.cooldown_s:
                return None
        remaining = max(1, self._round_ends - moment.completed_requests)
        choice = self._chooser.after_breach(moment, remaining)
        if choice is None:
            return None
        self._answered_ns = telemetry.now_ns
        placement = choice.option.placement
        if placement.model == now.model:
            action = f"{now.model} loads its remaining layers"
        else:
            action = f"switch to {placement.model} cut at layer {placement.layers}"
        reason = (
            f"more than {cause.limit} of {cause.window_tokens} tokens left {now.model} at layer {now.layers} "
            f"without confidence: {action}"
        )
        evidence = {"breaches_in_window": telemetry.breaches_in_window, **choice.evidence}
        decided = self._serve(placement, remaining, reason, evidence, choice.next_best)
        if p.raised is Raised.EARLY_EXIT:
            other = None if decided.next_best is None else self._leaving_early(decided.next_best)
            return replace(self._leaving_early(decided), next_best=other)
        return decided

    def _leaving_early(self, decided: Deployment) -> Deployment:
        """The deployment with per-token exits if it serves the whole model, else unchanged."""
        p = self.parameters
        if not self._chooser.is_whole(decided.active):
            return decided
        return replace(decided, exit_rule=PerToken(p.threshold, p.confidence), kv_rule=p.raised_kv_rule)

    @property
    def _constants(self) -> RoundConstants:
        return self.parameters.at_batch(self._batch)

    def _serve(
        self,
        placement: Placement,
        requests: int,
        reason: str,
        evidence: Mapping[str, Any],
        next_best: Option | None = None,
    ) -> Deployment:
        """A deployment for the next `requests` completed requests, with a breach limit if it is below full depth."""
        triggers: tuple[Trigger, ...] = (Completed(requests),)
        if not self._chooser.is_whole(placement):
            triggers = (BreachLimit(self._constants.window_tokens, self._constants.limit), *triggers)
        other = None if next_best is None else self._serve(next_best.placement, requests, "next best", {})
        return self._deployment_of(placement, triggers, reason, evidence, other)

    def _deployment_of(
        self,
        active: Placement,
        triggers: tuple[Trigger, ...],
        reason: str,
        evidence: Mapping[str, Any],
        next_best: Deployment | None = None,
    ) -> Deployment:
        p = self.parameters
        return Deployment(
            active=active,
            exit_rule=FixedCap(p.threshold, p.confidence),
            standby=self._chooser.standby(active),
            kv_rule=KvRule.NONE,
            batch_limit=p.batch_limit,
            in_flight=p.in_flight,
            triggers=triggers,
            reason=reason,
            evidence=evidence,
            next_best=next_best,
        )


def _same(a: Deployment, b: Deployment) -> bool:
    """Whether two deployments are equal, apart from reason and evidence for the log."""
    return replace(a, reason="", evidence={}) == replace(b, reason="", evidence={})
