"""Options to serve with: the cost of each until the next round, which are good enough, and which answers a breach."""

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
    """A placement to serve with, its prediction, and the transition to it."""

    placement: Placement
    prediction: Prediction
    transition: Transition
    cap: CapChoice | None = None
    breach_share: float | None = None  # share of tokens expected to leave at the cap without confidence
    bits_per_char: float | None = None  # expected with this placement, by the history table

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
    """The cost of `requests` requests at the predicted rate, plus that of the transition; lower is better.

    - Throughput: seconds to serve the requests at capacity, plus the lost seconds. (Under open arrivals below
      saturation all candidates deliver the arrival rate, and the faster one has more to spare.)
    - Response time: the sum of their response times, plus the delay of all requests that are in the system or arrive
      during the lost time.
    - Energy: their joules, plus the lost time at the same power.
    - Batch size: minus the slots held over `horizon_s`, which is the same for all options.
    - Quality: the bits that their text costs. Lost time costs no bits; the bound on response time limits it.
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
    """The most bits per character that are good enough, given the candidates' bits at full depth; None if no floor
    binds.

    A floor relative to a reference does not bind if the reference's bits are not known.
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
    """The options with a predicted response time within the objective's bound, or the quickest one if there is none."""
    most_s = objective.max_response_time_s
    if most_s is None or not options:
        return list(options)
    within = [option for option in options if option.prediction.response_time_s <= most_s]
    return within or [min(options, key=lambda option: option.prediction.response_time_s)]


def answer(
    action: BreachAction, load: Option | None, switches: Sequence[Option], cost: Callable[[Option], float]
) -> Option | None:
    """The option that answers a breach; None if there is none. At equal cost loading wins: it keeps the model's tokens.

    `load` raises the active model to full depth, and `switches` are other candidates' partial loads; all meet the
    quality floor. `cost` is an option's cost until the next round, transition included.
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
