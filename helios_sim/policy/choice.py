"""The choice of the placement to serve with, after a round and after a breach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from helios_sim.policy.assess import Assessor
from helios_sim.policy.cap import CapChoice
from helios_sim.policy.deployment import Deployment, KvRule, Placement
from helios_sim.policy.helios_parameters import BreachAction, Evaluation, HeliosParameters, Raised, Standby
from helios_sim.policy.options import COST_UNITS, Option, answer
from helios_sim.policy.prediction import Load
from helios_sim.policy.telemetry import Situation
from helios_sim.policy.transition import NO_TRANSITION, Underway, transition


@dataclass(frozen=True, slots=True)
class Moment:
    """State of the server when a choice is made."""

    load: Load
    batch: float  # mean running requests, for the constants
    running_requests: int
    in_system: int
    completed_requests: int
    in_force: Deployment | None  # None if nothing is loaded yet, and loading is free
    cached_tokens: int = 0  # tokens in the prefix cache, held by no request


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen option, and the figures behind the choice."""

    option: Option
    evidence: dict[str, Any]
    next_best: Option | None  # the cheapest of the other options


class Chooser:
    """Chooser of placements. It keeps the shortlist of the latest round and the caps of the latest choice."""

    def __init__(self, parameters: HeliosParameters, situation: Situation) -> None:
        """Raises UserError if a given cap is not an exit of every candidate."""
        self._parameters = parameters
        self._situation = situation
        self.assessor = Assessor(
            situation,
            half_life_requests=parameters.half_life_requests,
            cap_layers=parameters.cap_layers,
            batch_limit=parameters.batch_limit,
        )
        self.shortlist: list[Option] = []  # best predicted first
        self._load: Load  # the load for which the shortlist was made
        self._caps: dict[str, CapChoice] = {}

    def renew_shortlist(self, load: Load, batch: float, completed_requests: int) -> None:
        """Makes a new shortlist, or keeps the last one if no candidate qualifies. Raises UserError if none ever did.

        Places that are left go to candidates above the floor in bits per character: they missed it on the text seen so
        far, and only an evaluated candidate can come back. Evaluation by serving needs room for the whole model.
        """
        p = self._parameters
        self._load = load
        ranked = self.assessor.ranked(
            load,
            p.at_batch(batch).round_requests,
            completed_requests,
            whole_must_fit=p.evaluation is Evaluation.SERVE,
        )
        if not self.shortlist:
            self.assessor.require(ranked)
        self.shortlist = [*ranked, *self.assessor.above_floor][: p.shortlist] or self.shortlist

    @property
    def models(self) -> list[str]:
        return [option.placement.model for option in self.shortlist]

    def is_whole(self, placement: Placement) -> bool:
        return placement.layers == self._situation.candidates[placement.model].profile.model.n_layers

    def whole(self, model: str) -> Placement:
        return Placement(model, self._situation.candidates[model].profile.model.n_layers)

    def after_round(self, moment: Moment) -> Choice:
        """Chooses the shortlisted candidate with the least cost until the next round, at its cap as known now.

        Staying with the loaded placement costs no transition, so another candidate is chosen only if its predicted gain
        until the next round exceeds the cost of the transition.
        """
        models = self.models
        if moment.in_force is not None:  # at equal cost the active model stays
            active = moment.in_force.active.model
            models.sort(key=lambda model: model != active)
        self._caps = {model: self.assessor.cap(model) for model in models}
        within = [model for model in models if self.assessor.meets_quality_floor(model)]
        caps = [self._caps[model] for model in within or models]
        placements = [Placement(model, cap.layers) for model, cap in zip(within or models, caps, strict=True)]
        found = [self._option(placement, moment, cap=cap) for placement, cap in zip(placements, caps, strict=True)]
        options = [option for option in found if option is not None]
        # Requests may have become so long that no option has room for one of mean length: then serve the best ranked.
        options = self.assessor.quick_enough(options) or self.shortlist[:1]
        for option in options:
            self.assessor.history.note(option.placement.model, option.prediction, moment.completed_requests)
        costs = self._costs(options, moment, self._parameters.at_batch(moment.batch).round_requests)
        evidence = {
            **self._evidence(options, costs),
            "bits_floor": self.assessor.bits_floor(),
            "above_quality_floor": [model for model in models if model not in within],
            "history": self.assessor.history.rows(moment.completed_requests),
        }
        chosen = options[costs.index(min(costs))]
        return Choice(chosen, evidence, _cheapest_but(chosen, options, costs))

    def after_breach(self, moment: Moment, remaining_requests: int) -> Choice | None:
        """Chooses to load the active model's other layers or to switch to another model; None if neither is possible.

        Another model is loaded up to its cap.
        """
        assert moment.in_force is not None
        active = moment.in_force.active.model
        leave_early = self._parameters.raised_kv_rule if self._parameters.raised is Raised.EARLY_EXIT else None
        raised = self._option(self.whole(active), moment, leave_early)
        switches = [
            option
            for model in self.models
            if model != active
            and self._may_switch_to(model)
            and (option := self._option(Placement(model, self._caps[model].layers), moment)) is not None
        ]
        options = self.assessor.quick_enough([*([] if raised is None else [raised]), *switches])
        costs = self._costs(options, moment, remaining_requests)
        cost_of = {option.placement: cost for option, cost in zip(options, costs, strict=True)}
        load = raised if raised in options else None
        switches = [option for option in switches if option in options]
        chosen = answer(self._parameters.on_breach, load, switches, lambda option: cost_of[option.placement])
        if chosen is None:
            return None
        evidence = {"requests_until_next_round": remaining_requests, **self._evidence(options, costs)}
        return Choice(chosen, evidence, _cheapest_but(chosen, options, costs))

    def standby(self, active: Placement) -> tuple[Placement, ...]:
        """Placements of other shortlisted candidates to keep in memory, in rank order, while one request still fits."""
        kept: tuple[Placement, ...] = ()
        if self._parameters.standby is Standby.NONE:
            return kept
        for option in self.shortlist:
            placement = option.placement
            if placement.model == active.model:
                continue
            other = self.whole(placement.model) if self._parameters.standby is Standby.WHOLE else placement
            if self.assessor.fits(active, (*kept, other), self._load):
                kept = (*kept, other)
        return kept

    def _may_switch_to(self, model: str) -> bool:
        """Whether the model is within the quality floor and not expected to breach at once, which would rule it out.

        A model that breached earlier may qualify again: the history table tells what to expect of it. With switch_only
        there is no alternative, so an expected breach is no obstacle.
        """
        if not self.assessor.meets_quality_floor(model):
            return False
        if self._parameters.on_breach is BreachAction.SWITCH_ONLY:
            return True
        limit = self._parameters.limit / self._parameters.window_tokens
        return self.assessor.breach_share(Placement(model, self._caps[model].layers)) <= limit

    def _option(
        self, placement: Placement, moment: Moment, leave_early: KvRule | None = None, cap: CapChoice | None = None
    ) -> Option | None:
        """The option of going to `placement` from the deployment in force; None if it does not fit."""
        horizon = self._parameters.at_batch(moment.batch).round_requests
        step = NO_TRANSITION
        if moment.in_force is not None:
            at, standby = moment.in_force.active, moment.in_force.standby
            decode_iteration_s = 0.0
            if placement.model != at.model and moment.running_requests:  # these requests may have to finish first
                here = self.assessor.option(at, moment.load, horizon, standby=standby)
                decode_iteration_s = 0.0 if here is None else here.prediction.decode_iteration_s
            now = Underway(at, standby, moment.running_requests, decode_iteration_s, moment.cached_tokens)
            step = transition(self._situation, now, placement, moment.load, self._parameters.in_flight, horizon)
        standby = self.standby(placement)
        return self.assessor.option(
            placement, moment.load, horizon, cap=cap, transition=step, standby=standby, leave_early=leave_early
        )

    def _costs(self, options: Sequence[Option], moment: Moment, requests: int) -> list[float]:
        if not options:
            return []
        horizon_s = requests / options[0].prediction.throughput_requests_per_s
        return [self.assessor.cost(option, moment.load, moment.in_system, requests, horizon_s) for option in options]

    def _evidence(self, options: Sequence[Option], costs: Sequence[float]) -> dict[str, Any]:
        goal = self._situation.objective.goal
        names = [f"{option.placement.model}@{option.placement.layers}" for option in options]
        return {
            "goal": goal.value,
            "cost_unit": COST_UNITS[goal],
            "cost_until_next_round": dict(zip(names, costs, strict=True)),
            "options": {name: option.to_json() for name, option in zip(names, options, strict=True)},
        }


def _cheapest_but(chosen: Option, options: Sequence[Option], costs: Sequence[float]) -> Option | None:
    others = [(cost, n) for n, (option, cost) in enumerate(zip(options, costs, strict=True)) if option is not chosen]
    return options[min(others)[1]] if others else None
