"""Names of candidates and the quality floor. Knows exits and sizes, no load and no time."""

from __future__ import annotations

from helios_sim.errors import UserError
from helios_sim.policy.telemetry import Candidate, Objective, Situation


def find_model(situation: Situation, model: str | None) -> str:
    """The named candidate, or the only one when no name is given. Raises UserError otherwise."""
    names = tuple(situation.candidates)
    if model is None and len(names) == 1:
        return names[0]
    if model not in situation.candidates:
        raise UserError("policy.model", model, f"one of {', '.join(names)}", "name a model of this experiment")
    return model


def check_cap(candidate: Candidate, layers: int) -> int:
    """`layers` if the model has an exit there. Raises UserError otherwise."""
    exits = candidate.offline.exits
    if layers not in exits:
        raise UserError(
            "policy.cap_layers",
            layers,
            f"{candidate.profile.name} has exits at {', '.join(map(str, exits))}",
            "choose one of these",
        )
    return layers


def meets_bits_floor(candidate: Candidate, layers: int, objective: Objective) -> bool:
    """Whether the model, left at `layers`, is within the floor in bits per character.

    True where bits per character are not known or no floor is set: the other floor (agreement) still holds.
    """
    bits = candidate.offline.bits_per_char
    if bits is None or objective.max_bits_per_char is None:
        return True
    return bool(bits[candidate.offline.exits.index(layers)] <= objective.max_bits_per_char)
