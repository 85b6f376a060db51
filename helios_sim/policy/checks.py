"""Checks of what a policy is given: ranges of its parameters, names of candidates and their exits."""

from __future__ import annotations

from helios_sim.errors import UserError
from helios_sim.policy.telemetry import Candidate, Situation


def check_positive(key: str, value: float | None) -> None:
    """Raises UserError unless value > 0 (None stands for "not given" and passes)."""
    if value is not None and not value > 0:
        raise UserError(f"policy.{key}", value, "a number above 0", f"set policy.{key} above 0 or leave it out")


def check_not_negative(key: str, value: float | None) -> None:
    """Raises UserError unless value >= 0 (None passes)."""
    if value is not None and not value >= 0:
        raise UserError(f"policy.{key}", value, "a number of 0 or more", f"set policy.{key} to 0 or more")


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
