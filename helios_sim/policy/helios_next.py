"""The policy helios_next: our own, which decides by evidence on quality where HELIOS decides by confidence.

It differs from HELIOS in five ways:

- Candidates are assessed by probes alone, which score served text while serving goes on, for a limited share of time.
- A cap is defended by a sequential test of the share of tokens that it changes. The test compares the policy's own
  answers with full depth, where HELIOS counts tokens without confidence.
- Exits are barred and freed by that test, at a stated risk.
- If no cap is allowed, the first layers may draft and all layers verify.
- A change has to pay: its predicted gain over a horizon, after the cost of the transition, must reach a given share of
  the present cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from helios_sim.errors import UserError
from helios_sim.exits.rule import MOST_DRAFTS, Confidence, ExitRule, FixedCap, SelfSpeculation, require_threshold
from helios_sim.policy.assess import Assessor
from helios_sim.policy.bets import CapControl
from helios_sim.policy.checks import check_not_negative, check_positive
from helios_sim.policy.deployment import (
    Cause,
    Completed,
    Deployment,
    InFlight,
    KvRule,
    LoadFailed,
    Placement,
    Probe,
    Probed,
    Trigger,
)
from helios_sim.policy.drafts import Drafts, as_long_as_they_pay, best_drafting
from helios_sim.policy.options import COST_UNITS, Option
from helios_sim.policy.prediction import Load, expected_load, probe_time_s, seen_load
from helios_sim.policy.telemetry import Situation, Telemetry
from helios_sim.policy.transition import NO_TRANSITION, Underway, transition
from helios_sim.request import NS_PER_S

MOST_PROBED = 16  # most texts of one probe
KNOWN_DRAFTS = 200.0  # weight of recorded and probed agreement in the acceptance rate, in verified drafts


@dataclass(frozen=True, slots=True)
class HeliosNextParameters:
    """Settings of `policy=helios_next`."""

    threshold: float  # below it a token that leaves at the cap counts as a breach, which only the report shows
    confidence: Confidence = Confidence.MAX_PROBABILITY
    failure: float = 0.05  # probability that an exit is barred or freed wrongly
    probe_share: float = 0.005  # most share of time for probes; 0 means no probes
    review_requests: int = 50  # completed requests between two reviews, but at least one for each running request
    horizon_requests: int = 300  # requests over which a change has to pay, but at least ten for each running request
    least_gain: float = 0.02  # share of the predicted cost that a change must save
    draft_tokens: int = 4  # most drafts of one pass; 0 means no self-speculation
    half_life_requests: float = 300.0  # age at which evidence on bits and acceptance has half the weight
    in_flight: InFlight = InFlight.DRAIN
    batch_limit: int | None = None  # None means the server's own limit

    def __post_init__(self) -> None:
        require_threshold("policy.threshold", self.threshold)
        for key in ("review_requests", "horizon_requests", "half_life_requests", "batch_limit"):
            check_positive(key, getattr(self, key))
        check_not_negative("least_gain", self.least_gain)
        for key, low in (("failure", "above 0"), ("probe_share", "from 0")):
            value = getattr(self, key)
            if not 0 <= value < 1 or (key == "failure" and value == 0):
                raise UserError(f"policy.{key}", value, f"a share {low} to below 1", f"set policy.{key}=0.05")
        if not 0 <= self.draft_tokens <= MOST_DRAFTS:
            allowed = f"a whole number from 0 to {MOST_DRAFTS}"
            raise UserError("policy.draft_tokens", self.draft_tokens, allowed, "set policy.draft_tokens=4")


@dataclass(frozen=True, slots=True)
class Way:
    """A way to serve: a placement with its prediction, and its drafts (None if tokens run to the cap without)."""

    option: Option
    drafts: Drafts | None

    @property
    def placement(self) -> Placement:
        return self.option.placement

    @property
    def kind(self) -> tuple[Placement, int, int]:
        """A key that is equal for two ways with the same placement, drafting exit and number of drafts."""
        return self.placement, *((0, 0) if self.drafts is None else (self.drafts.exit_layers, self.drafts.draft_tokens))

    @property
    def name(self) -> str:
        at = f"{self.placement.model}@{self.placement.layers}"
        return at if self.drafts is None else f"{at}, {self.drafts.draft_tokens} drafts at {self.drafts.exit_layers}"

    def to_json(self) -> dict[str, Any]:
        found = self.option.to_json()
        return found if self.drafts is None else {**found, "acceptance": self.drafts.acceptance,
                                                  "largest_batch": self.drafts.largest_batch}  # fmt: skip


class HeliosNextPolicy:
    """Decisions of helios_next. Its state: the way in force, the allowed caps, counts of drafts, the latest probe."""

    def __init__(self, parameters: HeliosNextParameters) -> None:
        self.parameters = parameters
        self._now: Way
        self._deployment: Deployment
        self._before: tuple[Way, Deployment]
        self._probed_ns = 0
        self._probed_at = 0  # completed requests when the latest probe ended
        self._heard_at = 0  # completed requests at the last review
        self._totals = (0, 0)  # tested and accepted drafts at the last review
        self._verified: dict[tuple[str, int], tuple[float, float]] = {}  # tested and accepted drafts by model and exit

    def start(self, situation: Situation) -> Deployment:
        """Chooses the first way to serve. Raises UserError if no candidate fits or meets the quality floor."""
        p, self._situation = self.parameters, situation
        self._assessor = Assessor(situation, half_life_requests=p.half_life_requests, batch_limit=p.batch_limit)
        self._caps = {name: self._control(name) for name in situation.candidates}
        load = expected_load(situation)
        self._assessor.require(self._assessor.ranked(load, p.horizon_requests, 0, whole_must_fit=False))
        ways = self._quick_enough(self._good_enough(self._ways(load, None, p.horizon_requests)))
        costs = self._costs(ways, load, 0, p.horizon_requests)
        chosen = ways[costs.index(min(costs))]
        self._now = chosen
        self._deployment = self._serve(chosen, "has the least predicted cost", self._evidence(ways, costs))
        self._before = chosen, self._deployment
        return self._deployment

    def _control(self, model: str) -> CapControl:
        """The control of a model's caps: exits within the cap rule's bound begin allowed; a promise may bar exits for
        good."""
        offline, limit = self._situation.candidates[model].offline, self._situation.objective.max_disagreement
        within = np.array(self._assessor.cap(model).upper_bound) <= limit
        promised = offline.certified_caps
        never = np.zeros(len(offline.exits), np.bool_) if promised is None else ~np.array(promised)
        return CapControl(offline.exits, within, never, limit, self.parameters.failure)

    def decide(self, cause: Cause, telemetry: Telemetry) -> Deployment | None:
        """Takes in the results of probes and drafts, then stays, probes or changes the way to serve."""
        p = self.parameters
        if isinstance(cause, LoadFailed):
            self._now, before = self._before
            self._deployment = replace(
                before, probe=None, triggers=(Completed(p.review_requests),), next_best=None, evidence={},
                reason=f"{cause.model} could not be loaded: {self._now.name} serves on",
            )  # fmt: skip
            return self._deployment
        barred = self._hear(telemetry)
        load = seen_load(self._situation, telemetry, self._now.placement.model)
        batch = telemetry.running_requests if telemetry.batch_mean is None else telemetry.batch_mean
        requests = max(p.horizon_requests, 10 * round(batch))
        in_system = telemetry.queued_requests + telemetry.running_requests
        ways = self._quick_enough(self._good_enough(self._ways(load, telemetry, requests)))
        costs = self._costs(ways, load, in_system, requests)
        least = ways[costs.index(min(costs))]
        kinds = [way.kind for way in ways]
        stays = self._now.kind in kinds
        here = costs[kinds.index(self._now.kind)] if stays else None
        if here is not None and here - min(costs) <= p.least_gain * abs(here):
            self._now = ways[kinds.index(self._now.kind)]
            return self._go_on(cause, telemetry, load, batch)
        evidence = self._evidence(ways, costs)
        if here is None:
            why = barred or f"{self._now.name} does not keep to the floors any more"
        else:
            why = f"saves {100 * (here - min(costs)) / abs(here):.0f} % of the predicted cost of {requests} requests"
        others = [(cost, n) for n, (way, cost) in enumerate(zip(ways, costs, strict=True)) if way is not least]
        second = ways[min(others)[1]] if others else None
        self._before, self._now = (self._now, self._deployment), least
        next_best = None if second is None else self._serve(second, "next best", {}, batch=batch)
        self._deployment = self._serve(least, why, evidence, next_best, batch=batch)
        return self._deployment

    def _hear(self, telemetry: Telemetry) -> str:
        """Takes in probes and drafts since the last decision. Returns why the cap in force is now barred, or ""."""
        cap = self._now.placement
        control = self._caps[cap.model]
        before = self._allowed(cap)
        for observation in telemetry.observations:
            self._assessor.history.add(observation, telemetry.completed_requests)
            self._caps[observation.model].add(observation.agrees)
        if telemetry.observations:
            self._probed_ns, self._probed_at = telemetry.now_ns, telemetry.completed_requests
        tested, accepted = telemetry.tested_drafts - self._totals[0], telemetry.accepted_drafts - self._totals[1]
        self._totals = telemetry.tested_drafts, telemetry.accepted_drafts
        left = 0.5 ** ((telemetry.completed_requests - self._heard_at) / self.parameters.half_life_requests)
        self._heard_at = telemetry.completed_requests
        self._verified = {key: (left * t, left * a) for key, (t, a) in self._verified.items()}
        if self._now.drafts is not None:
            key = cap.model, self._now.drafts.exit_layers
            known = self._verified.get(key, (0.0, 0.0))
            self._verified[key] = known[0] + tested, known[1] + accepted
        if before and not self._allowed(cap):
            limit = self._situation.objective.max_disagreement
            return f"{cap.model} changes more than {limit:g} at layer {cap.layers}, but for {control.failure:g}"
        return ""

    def _allowed(self, placement: Placement) -> bool:
        control = self._caps[placement.model]
        return bool(control.allowed[control.exits.index(placement.layers)])

    # --- what can be done

    def _ways(self, load: Load, telemetry: Telemetry | None, requests: int) -> list[Way]:
        """The ways that fit: each candidate at its cap, and whole with and without drafts."""
        return [
            way
            for model in self._situation.candidates
            for layers in dict.fromkeys((self._caps[model].cap, self._layers(model)))
            for way in self._ways_of(Placement(model, layers), load, telemetry, requests)
        ]

    def _ways_of(
        self, placement: Placement, load: Load, telemetry: Telemetry | None, requests: int
    ) -> Iterator[Way]:
        step = self._step(placement, load, telemetry, requests)
        plain = self._assessor.option(placement, load, requests, transition=step)
        if plain is None:
            return
        yield Way(plain, None)
        drafts = self._drafts(placement, load, plain) if placement.layers == self._layers(placement.model) else None
        if drafts is not None:
            option = self._assessor.option(placement, load, requests, transition=step, drafts=drafts)
            if option is not None:
                yield Way(option, drafts)

    def _drafts(self, placement: Placement, load: Load, plain: Option) -> Drafts | None:
        """The drafts with the best rate at the batch that full depth would have; None if no drafts pay."""
        p, model = self.parameters, placement.model
        candidate = self._situation.candidates[model]
        exits = candidate.offline.exits[:-1]
        if not p.draft_tokens or not exits or self._situation.shares:
            return None
        context = round(load.prompt_tokens(candidate) + load.output_tokens(candidate) / 2)
        batch = max(1, round(plain.prediction.batch))
        known = [(layers, self._acceptance(model, layers)) for layers in exits]
        best = best_drafting(candidate.profile, known, p.draft_tokens, batch, context)
        if not best.drafts:
            return None
        share = dict(known)[best.exit_layers]
        drafts = Drafts(best.exit_layers, best.drafts, share, placement.layers, batch)
        found = as_long_as_they_pay(candidate.profile, drafts, plain.prediction.batch_capacity, context)
        return found if found.largest_batch else None

    def _acceptance(self, model: str, layers: int) -> float:
        """The acceptance rate of drafts at an exit, by recorded and probed agreement and recently verified drafts."""
        e = self._situation.candidates[model].offline.exits.index(layers)
        known = 1.0 - float(self._assessor.history.shares(model).disagreement[e])
        tested, accepted = self._verified.get((model, layers), (0.0, 0.0))
        return (KNOWN_DRAFTS * known + accepted) / (KNOWN_DRAFTS + tested)

    def _step(self, to: Placement, load: Load, telemetry: Telemetry | None, requests: int) -> Any:
        if telemetry is None:
            return NO_TRANSITION
        at = self._now.placement
        iteration_s = self._now.option.prediction.decode_iteration_s if telemetry.running_requests else 0.0
        now = Underway(at, (), telemetry.running_requests, iteration_s, telemetry.prefix_cached_tokens)
        return transition(self._situation, now, to, load, self.parameters.in_flight, requests)

    def _layers(self, model: str) -> int:
        return self._situation.candidates[model].profile.model.n_layers

    def _good_enough(self, ways: Sequence[Way]) -> list[Way]:
        """The ways within the floor in bits per character, or all ways if none is."""
        floor = self._assessor.bits_floor()
        if floor is None:
            return list(ways)
        good = [way for way in ways if way.option.bits_per_char is None or way.option.bits_per_char <= floor]
        return good or list(ways)

    def _quick_enough(self, ways: Sequence[Way]) -> list[Way]:
        quick = self._assessor.quick_enough([way.option for way in ways])
        return [way for way in ways if any(way.option is option for option in quick)]

    def _costs(self, ways: Sequence[Way], load: Load, in_system: int, requests: int) -> list[float]:
        """The cost of each way over one horizon: `requests` requests, and the time the first way needs for them."""
        horizon_s = requests / ways[0].option.prediction.throughput_requests_per_s
        return [self._assessor.cost(way.option, load, in_system, requests, horizon_s) for way in ways]

    # --- probes

    def _go_on(self, cause: Cause, telemetry: Telemetry, load: Load, batch: float) -> Deployment | None:
        """Keeps the way in force, and begins or ends a probe if one is due; None if nothing changes."""
        if isinstance(cause, Probed):
            self._probed_ns = telemetry.now_ns
        probe = self._probe(telemetry, load)
        if probe is None and self._deployment.probe is None:
            return None
        reason, triggers = f"{self._now.name} goes on", self._triggers(batch)
        if probe is not None:
            reason, triggers = f"{', '.join(probe.models)} score the latest {probe.prompts} answers", (Probed(),)
        evidence = {"capital": {name: control.capital.tolist() for name, control in self._caps.items()},
                    "allowed": {name: control.allowed.tolist() for name, control in self._caps.items()}}  # fmt: skip
        self._deployment = replace(
            self._deployment, probe=probe, triggers=triggers, reason=reason, evidence=evidence, next_best=None
        )
        return self._deployment

    def _probe(self, telemetry: Telemetry, load: Load) -> Probe | None:
        """The probe that the time since the last one pays for, or None.

        A probe waits until it can score texts for as long as streaming the missing layers costs.
        """
        new = min(telemetry.completed_requests - self._probed_at, MOST_PROBED)
        models = self._worth_asking(load, telemetry) if new > 0 else []
        if not models:
            return None
        to_spend_s = self.parameters.probe_share * (telemetry.now_ns - self._probed_ns) / NS_PER_S
        stream_s = text_s = 0.0
        for model in models:
            profile = self._situation.candidates[model].profile
            resident = self._now.placement.layers if model == self._now.placement.model else 0
            missing = profile.weight_bytes(self._layers(model)) - (profile.weight_bytes(resident) if resident else 0)
            load_s = profile.load_time_s(missing) if missing else 0.0
            stream_s += load_s * (1.0 - 1.0 / profile.load_slowdown)
            text_s += probe_time_s(self._situation.candidates[model], load)
        affordable = int((to_spend_s - stream_s) / text_s)
        least = min(max(1.0, stream_s / text_s), MOST_PROBED)
        return Probe(tuple(models), min(affordable, new)) if affordable >= least else None

    def _worth_asking(self, load: Load, telemetry: Telemetry) -> list[str]:
        """Models with a probe that could change the decision."""
        objective, here = self._situation.objective, self._now.placement
        if objective.max_bits_ratio is not None and len(self._situation.candidates) > 1:
            return list(self._situation.candidates)  # any candidate may be the reference for the others' bits
        found = []
        requests = self.parameters.horizon_requests
        for model in self._situation.candidates:
            if model == here.model and here.layers < self._layers(model):
                found.append(model)
                continue
            control, choice = self._caps[model], self._assessor.cap(model)
            share, bound = np.array(choice.share), np.array(choice.upper_bound)
            hopeful = (control.allowed | (2 * share - bound <= objective.max_disagreement)) & ~control.never
            hopeful[-1] = True
            placement = Placement(model, control.exits[int(hopeful.argmax())])
            if placement == here:
                continue
            step = self._step(placement, load, telemetry, requests)
            option = self._assessor.option(placement, load, requests, transition=step)
            if option is not None:
                stays, goes = self._costs([self._now, Way(option, None)], load, 0, requests)
                if goes < stays:
                    found.append(model)
        return found

    # --- what is decided

    def _triggers(self, batch: float) -> tuple[Trigger, ...]:
        return (Completed(max(self.parameters.review_requests, round(batch))),)

    def _evidence(self, ways: Sequence[Way], costs: Sequence[float]) -> dict[str, Any]:
        goal = self._situation.objective.goal
        return {
            "goal": goal.value,
            "cost_unit": COST_UNITS[goal],
            "cost_of_horizon": {way.name: cost for way, cost in zip(ways, costs, strict=True)},
            "options": {way.name: way.to_json() for way in ways},
            "bits_floor": self._assessor.bits_floor(),
            "capital": {name: control.capital.tolist() for name, control in self._caps.items()},
            "allowed": {name: control.allowed.tolist() for name, control in self._caps.items()},
        }

    def _serve(
        self, way: Way, why: str, evidence: Mapping[str, Any], next_best: Deployment | None = None, batch: float = 1.0
    ) -> Deployment:
        p = self.parameters
        rule: ExitRule = FixedCap(p.threshold, p.confidence)
        if way.drafts is not None:
            most = way.drafts.largest_batch
            rule = SelfSpeculation(way.drafts.exit_layers, way.drafts.draft_tokens, most)
        return Deployment(
            active=way.placement,
            exit_rule=rule,
            kv_rule=KvRule.NONE,
            batch_limit=p.batch_limit,
            in_flight=p.in_flight,
            triggers=self._triggers(batch),
            reason=f"{way.name}: {why}",
            evidence=evidence,
            next_best=next_best,
        )
