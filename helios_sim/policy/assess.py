"""Assessment of candidates: what each would achieve, from profile, offline exits and the history table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from helios_sim.errors import UserError
from helios_sim.policy.cap import CapChoice, choose_cap
from helios_sim.policy.checks import check_cap
from helios_sim.policy.deployment import KvRule, Placement
from helios_sim.policy.history import HistoryTable
from helios_sim.policy.options import Option, bits_floor, cost_until_next_round, quick_enough
from helios_sim.policy.prediction import (
    Depths,
    Load,
    Paced,
    Prediction,
    batch_capacity,
    fixed_depth,
    per_token_depths,
    predict,
)
from helios_sim.policy.telemetry import Situation
from helios_sim.policy.transition import NO_TRANSITION, Transition


class Assessor:
    """Caps and predicted options of the candidates, given the observations so far."""

    def __init__(
        self,
        situation: Situation,
        *,
        half_life_requests: float,
        cap_layers: int | None = None,
        batch_limit: int | None = None,
    ) -> None:
        """Raises UserError if `cap_layers` is given and not an exit of every candidate."""
        self.situation = situation
        self.history = HistoryTable(situation.candidates, half_life_requests)
        self.batch_limit = batch_limit
        self._cap_layers = cap_layers
        self.above_floor: list[Option] = []  # left out of the latest ranking by the floor in bits per character alone
        self._refused: list[str] = []  # reasons for all that the latest ranking left out
        self._caps: dict[str, tuple[tuple[int, float | None], CapChoice]] = {}  # by model, with the inputs of `cap`
        self._load: Load | None = None  # the load of the predictions below
        self._predicted: dict[Any, Prediction | None] = {}
        if cap_layers is not None:
            for candidate in situation.candidates.values():
                check_cap(candidate, cap_layers)

    def bits_floor(self) -> float | None:
        """The most bits per character that are good enough, as known now; None if there is no such floor."""
        objective = self.situation.objective
        if objective.max_bits_per_char is None and objective.max_bits_ratio is None:
            return None
        return bits_floor(objective, {name: self._bits(name) for name in self.situation.candidates})

    def meets_quality_floor(self, model: str) -> bool:
        """Whether full depth is within the floor in bits per character; true if that is not known."""
        most = self.bits_floor()
        return most is None or (bits := self._bits(model)) is None or bits <= most

    def _bits(self, model: str, layers: int | None = None) -> float | None:
        """Bits per character by the history table at an exit, full depth by default; None if not known."""
        bits = self.history.shares(model).bits_per_char
        exits = self.situation.candidates[model].offline.exits
        return None if bits is None else float(bits[-1 if layers is None else exits.index(layers)])

    def cap(self, model: str) -> CapChoice:
        """The shallowest exit within the quality floor, as known now, or the given cap if there is one."""
        # A cap depends on nothing else: the model's own observed prompts, and the floor, which may follow other models.
        behind = (self.history.observed_prompts(model), self.bits_floor())
        known = self._caps.get(model)
        if known is None or known[0] != behind:
            known = self._caps[model] = (behind, self._cap(model, behind[1]))
        return known[1]

    def _cap(self, model: str, most: float | None) -> CapChoice:
        offline, objective = self.situation.candidates[model].offline, self.situation.objective
        bits = self.history.shares(model).bits_per_char
        allowed = offline.certified_caps
        if bits is not None and most is not None:
            good = (bits <= most).tolist()
            allowed = tuple(good if allowed is None else (a and b for a, b in zip(allowed, good, strict=True)))
        choice = choose_cap(offline.exits, self.history.weighed(model), objective.max_disagreement, allowed)
        if self._cap_layers is None:
            return choice
        return CapChoice(self._cap_layers, choice.share, choice.upper_bound)

    def option(
        self,
        placement: Placement,
        load: Load,
        horizon_requests: int,
        *,
        cap: CapChoice | None = None,
        transition: Transition = NO_TRANSITION,
        standby: Iterable[Placement] = (),
        leave_early: KvRule | None = None,
        drafts: Paced | None = None,
    ) -> Option | None:
        """The predicted option of this placement; None if it leaves no room for one request.

        With `leave_early` tokens leave early one by one, under that KV rule. With `drafts` the whole model verifies the
        drafts of its first layers.
        """
        prediction = self._predict(placement, load, horizon_requests, tuple(standby), leave_early, drafts)
        if prediction is None:
            return None
        # Tokens that leave early one by one count with their bits at full depth, since they were confident.
        bits = self._bits(placement.model, placement.layers)
        return Option(placement, prediction, transition, cap, self.breach_share(placement), bits)

    def _predict(
        self,
        placement: Placement,
        load: Load,
        horizon_requests: int,
        standby: tuple[Placement, ...],
        early: KvRule | None,
        drafts: Paced | None,
    ) -> Prediction | None:
        """Predicts each placement once per load, since a choice compares the current placement with every option."""
        if load != self._load:
            self._load = load
            self._predicted.clear()
        key = placement, standby, early, horizon_requests, drafts
        if key not in self._predicted:
            depths: Depths | Paced = fixed_depth(placement.layers) if drafts is None else drafts
            if early is not None:
                offline = self.situation.candidates[placement.model].offline
                depths = per_token_depths(offline, propagated=early is KvRule.PROPAGATE)
            self._predicted[key] = predict(
                self.situation,
                placement,
                depths,
                load,
                standby=standby,
                batch_limit=self.batch_limit,
                horizon_requests=horizon_requests,
            )
        return self._predicted[key]

    def fits(self, active: Placement, standby: Sequence[Placement], load: Load) -> bool:
        """Whether these placements leave room for one request of mean length."""
        candidate = self.situation.candidates[active.model]
        tokens = load.prompt_tokens(candidate) + load.output_tokens(candidate)
        return batch_capacity(self.situation, active, tokens, standby) > 0

    def breach_share(self, placement: Placement) -> float:
        """Share of tokens expected to leave at this cap without confidence; 0 at full depth."""
        exits = self.situation.candidates[placement.model].offline.exits
        if placement.layers == exits[-1]:
            return 0.0
        return 1.0 - float(self.history.shares(placement.model).confident[exits.index(placement.layers)])

    def ranked(
        self, load: Load, horizon_requests: int, completed_requests: int, *, whole_must_fit: bool
    ) -> list[Option]:
        """Ranks candidates at their caps that meet memory and floors, best predicted objective first.

        Candidates that fit but exceed the floor in bits per character go into `above_floor`, in the same order.
        """
        options: list[Option] = []
        above: list[Option] = []
        self._refused.clear()
        for model, candidate in self.situation.candidates.items():
            cap = self.cap(model)
            option = self.option(Placement(model, cap.layers), load, horizon_requests, cap=cap)
            whole = Placement(model, candidate.profile.model.n_layers)
            if option is None or (whole_must_fit and not self.fits(whole, (), load)):
                self._refused.append(f"{model} leaves no room for one request")
                continue
            self.history.note(model, option.prediction, completed_requests)
            if self.meets_quality_floor(model):
                options.append(option)
            else:
                above.append(option)
                self._refused.append(f"{model} is above the floor in bits per character")

        def cost(option: Option) -> float:
            return self.cost(option, load, 0, 1, 1.0)

        self.above_floor = sorted(above, key=cost)
        return sorted(self.quick_enough(options), key=cost)

    def quick_enough(self, options: Sequence[Option]) -> list[Option]:
        """Options within the bound on response time, or the quickest one if there is none."""
        return quick_enough(self.situation.objective, options)

    def require(self, ranked: Sequence[Option]) -> None:
        """Raises UserError if the latest ranking is empty."""
        if not ranked:
            raise UserError(
                "models",
                ", ".join(self.situation.candidates),
                "at least one must fit in memory and meet the quality floor, but " + "; ".join(self._refused),
                "use a smaller model, a larger card, or a looser floor",
            )

    def cost(self, option: Option, load: Load, in_system: int, requests: int, horizon_s: float) -> float:
        """The option's cost by `cost_until_next_round`, for the objective's goal."""
        goal = self.situation.objective.goal
        return cost_until_next_round(goal, option, load, in_system, requests, horizon_s)
