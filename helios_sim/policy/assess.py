"""What each candidate would give, from profile, offline exits and the history table. Knows no state machine.

Every draw comes from a generator of its own (seed, model, moment), so results do not depend on the order of calls.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from helios_sim.errors import UserError
from helios_sim.policy.candidates import check_cap
from helios_sim.policy.cap import CapChoice, choose_cap
from helios_sim.policy.deployment import Placement
from helios_sim.policy.depth import fixed_depth
from helios_sim.policy.history import HistoryTable
from helios_sim.policy.load import Load
from helios_sim.policy.options import NO_TRANSITION, Option, Transition, cost_until_next_round
from helios_sim.policy.prediction import predict
from helios_sim.policy.telemetry import Situation


class Assessor:
    """Caps and predicted options of the candidates, given what was seen so far."""

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
        self._index = {name: i for i, name in enumerate(situation.candidates)}
        if cap_layers is not None:
            for candidate in situation.candidates.values():
                check_cap(candidate, cap_layers)

    def meets_quality_floor(self, model: str) -> bool:
        """Whether full depth is within the floor in bits per character; true where that is not known."""
        most, bits = self.situation.objective.max_bits_per_char, self.history.shares(model).bits_per_char
        return most is None or bits is None or bool(bits[-1] <= most)

    def cap(self, model: str, completed_requests: int) -> CapChoice:
        """The shallowest exit within the quality floor by what is known now; the given cap if there is one."""
        offline, objective = self.situation.candidates[model].offline, self.situation.objective
        bits, most = self.history.shares(model).bits_per_char, objective.max_bits_per_char
        allowed = None if bits is None or most is None else tuple((bits <= most).tolist())
        seed = np.random.SeedSequence(self.situation.seed, spawn_key=(self._index[model], completed_requests))
        evidence = self.history.evidence(model, completed_requests)
        choice = choose_cap(offline.exits, evidence, objective.max_disagreement, np.random.default_rng(seed), allowed)
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
    ) -> Option | None:
        """None when the placement leaves no room for one request."""
        prediction = predict(
            self.situation,
            placement,
            fixed_depth(placement.layers),
            load,
            standby=standby,
            batch_limit=self.batch_limit,
            horizon_requests=horizon_requests,
        )
        if prediction is None:
            return None
        exits = self.situation.candidates[placement.model].offline.exits
        confident = self.history.shares(placement.model).confident[exits.index(placement.layers)]
        whole = placement.layers == exits[-1]
        return Option(placement, prediction, transition, cap, 0.0 if whole else float(1.0 - confident))

    def ranked(
        self,
        load: Load,
        horizon_requests: int,
        completed_requests: int,
        *,
        whole_must_fit: bool,
        only: str | None = None,
    ) -> list[Option]:
        """Candidates (or `only` this one) at their caps that meet memory and quality floor.

        Best predicted objective first.

        Raises UserError if none is left.
        """
        options: list[Option] = []
        refused: list[str] = []
        for model, candidate in self.situation.candidates.items():
            if only is not None and model != only:
                continue
            if not self.meets_quality_floor(model):
                refused.append(f"{model}: above the floor in bits per character")
                continue
            cap = self.cap(model, completed_requests)
            option = self.option(Placement(model, cap.layers), load, horizon_requests, cap=cap)
            whole = Placement(model, candidate.profile.model.n_layers)
            if option is None or (whole_must_fit and self.option(whole, load, horizon_requests) is None):
                refused.append(f"{model}: no room for its weights and one request")
                continue
            options.append(option)
            self.history.note(model, option.prediction, completed_requests)
        if not options:
            raise UserError(
                "policy.candidates",
                list(self.situation.candidates),
                "at least one must fit in memory and meet the quality floor; " + "; ".join(refused),
                "use a smaller model, a larger card, or a looser floor",
            )
        return sorted(options, key=lambda option: self.cost(option, load, 0, 1, 1.0))

    def cost(self, option: Option, load: Load, in_system: int, requests: int, horizon_s: float) -> float:
        goal = self.situation.objective.goal
        return cost_until_next_round(goal, option, load, in_system, requests, horizon_s)
