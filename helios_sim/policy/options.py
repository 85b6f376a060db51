"""Ways to go on: what each costs until the next round, which are good enough, and which one answers a breach."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from helios_sim.errors import UserError
from helios_sim.policy.cap import CapChoice
from helios_sim.policy.deployment import Placement
from helios_sim.policy.helios_parameters import BreachAction
from helios_sim.policy.prediction import Load, Prediction
from helios_sim.policy.telemetry import Goal, Objective
from helios_sim.policy.transition import Transition


@dataclass(frozen=True, slots=True)
class Option:
    """One placement to go to: what is predicted there and what it takes to get there."""

    placement: Placement
    prediction: Prediction
    transition: Transition
    cap: CapChoice | None = None
    breach_share: float | None = None  # tokens expected to leave there without confidence
    bits_per_char: float | None = None  # expected there, from the history table

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": self.placement.layers,
            "breach_share": self.breach_share,
            "bits_per_char": self.bits_per_char,
            "upper_bound": None if self.cap is None else list(self.cap.upper_bound),
            "transition": self.transition.to_json(),
            "prediction": self.prediction.to_json(),
        }


COST_UNITS = {
    Goal.THROUGHPUT: "s of server time",
    Goal.RESPONSE_TIME: "request-seconds",
    Goal.ENERGY: "J",
    Goal.BATCH_SIZE: "slot-seconds (negative: given)",
    Goal.QUALITY: "bits",
}


def cost_until_next_round(
    goal: Goal, option: Option, load: Load, in_system: int, requests: int, horizon_s: float
) -> float:
    """Lower is better; the cost of `requests` at the predicted rate plus that of the transition.

    Throughput: seconds to serve them at capacity, plus the seconds lost (under open arrivals below saturation all
    candidates deliver what arrives, and the faster one has more to spare). Response time: their summed response, plus
    the delay of all who are in the system or arrive while time is lost. Energy: their joules, plus the lost time at
    the same power. Batch size: minus the slots held over `horizon_s`, which is the same for all options. Quality: the
    bits that their text costs; lost time costs none, and is what the bound on response time is for.
    """
    prediction, lost_s = option.prediction, option.transition.lost_s
    if goal is Goal.THROUGHPUT:
        return lost_s + requests / prediction.capacity_requests_per_s
    if goal is Goal.RESPONSE_TIME:
        arriving = 0.0 if load.arrival_rate_per_s is None else load.arrival_rate_per_s * lost_s
        return requests * prediction.response_time_s + lost_s * (in_system + arriving / 2)
    if goal is Goal.ENERGY:
        busy_w = prediction.energy_rank_j / prediction.busy_s_per_request
        return requests * prediction.energy_rank_j + lost_s * busy_w
    if goal is Goal.QUALITY:
        if option.bits_per_char is None:
            raise UserError(
                "objective.goal",
                goal.value,
                f"nothing is recorded of what text costs under {option.placement.model}",
                "take exit traces of human text that have bits",
            )
        return requests * load.output_chars * option.bits_per_char
    return -prediction.batch_capacity * max(0.0, horizon_s - lost_s)


def bits_floor(objective: Objective, full_depth_bits: Mapping[str, float | None]) -> float | None:
    """Bits per character that are still good enough, by those of the candidates at full depth; None: any are.

    Floors that cannot be worked out, since nothing is known of the reference, do not bind.
    """
    floors = [] if objective.max_bits_per_char is None else [objective.max_bits_per_char]
    if objective.max_bits_ratio is not None:
        known = {model: bits for model, bits in full_depth_bits.items() if bits is not None}
        of = objective.bits_reference
        reference = min(known.values(), default=None) if of is None else known.get(of)
        if reference is not None:
            floors.append(objective.max_bits_ratio * reference)
    return min(floors, default=None)


def quick_enough(objective: Objective, options: Sequence[Option]) -> list[Option]:
    """Those predicted to answer within the objective's bound; where none does, the quickest."""
    most_s = objective.max_response_time_s
    if most_s is None or not options:
        return list(options)
    within = [option for option in options if option.prediction.response_time_s <= most_s]
    return within or [min(options, key=lambda option: option.prediction.response_time_s)]


def answer(
    action: BreachAction, load: Option | None, switches: Sequence[Option], cost: Callable[[Option], float]
) -> Option | None:
    """The option to take, None if there is none. On equal terms loading wins: it keeps the model's own tokens.

    `load` raises the active model to full depth, `switches` are other candidates' partial loads; all meet the quality
    floor. `cost` is an option's cost until the next round, transition included.
    """
    loads = [] if load is None else [load]
    match action:
        case BreachAction.LOAD_ONLY:
            return load
        case BreachAction.SWITCH_ONLY:
            return min(switches, key=cost, default=None)
        case BreachAction.TRANSFER_ONLY:
            return min([*loads, *switches], key=lambda option: option.transition.load_s, default=None)
        case BreachAction.CHEAPER:
            return min([*loads, *switches], key=cost, default=None)
