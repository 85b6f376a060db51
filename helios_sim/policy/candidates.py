"""Names of candidates and their exits. Knows no load and no time."""

from __future__ import annotations

from helios_sim.errors import UserError
from helios_sim.policy.telemetry import Candidate, Situation


def find_model(situation: Situation, model: str | None) -> str:
    """The named candidate, or the only one when no name is given. Raises UserError otherwise."""
    names = tuple(situation.candidates)
    if model is None and len(names) == 1:
        return names[0]
    if model is None or model not in situation.candidates:
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
