"""Checks of a policy's inputs: ranges of its parameters, names of candidates and their exits."""

from __future__ import annotations

from dataclasses import replace

from helios_sim.errors import UserError
from helios_sim.policy.deployment import LATE_ROOM, Placement
from helios_sim.policy.telemetry import Candidate, Situation


def check_positive(key: str, value: float | None) -> None:
    """Raises UserError unless value > 0 (None means "not given" and passes)."""
    if value is not None and not value > 0:
        raise UserError(f"policy.{key}", value, "a number above 0", f"set policy.{key} above 0 or leave it out")


def check_not_negative(key: str, value: float | None) -> None:
    """Raises UserError unless value >= 0 (None passes)."""
    if value is not None and not value >= 0:
        raise UserError(f"policy.{key}", value, "a number of 0 or more", f"set policy.{key} to 0 or more")


def find_model(situation: Situation, model: str | None) -> str:
    """The named candidate, or the only one if no name is given. Raises UserError otherwise."""
    names = tuple(situation.candidates)
    if model is None and len(names) == 1:
        return names[0]
    if model is None or model not in situation.candidates:
        raise UserError("policy.model", model, f"one of {', '.join(names)}", "name a model of this experiment")
    return model


def check_cap(candidate: Candidate, layers: int) -> int:
    """Returns `layers` if the model has an exit there. Raises UserError otherwise."""
    exits = candidate.offline.exits
    if layers not in exits:
        raise UserError(
            "policy.cap_layers",
            layers,
            f"{candidate.profile.name} has exits at {', '.join(map(str, exits))}",
            "choose one of these",
        )
    return layers


def whole_model(situation: Situation, model: str, resident_layers: int | None) -> tuple[Situation, Placement]:
    """The placement of all layers of a model, with `resident_layers` on the card (None means all), and a situation that
    prices it.

    Raises UserError unless 1 <= resident_layers < n_layers - LATE_ROOM: `LATE_ROOM` late layers have room on the card
    anyway, so more than these must come late.
    """
    candidate = situation.candidates[model]
    n_layers = candidate.profile.model.n_layers
    if resident_layers is None:
        return situation, Placement(model, n_layers)
    most = n_layers - LATE_ROOM - 1
    if not 1 <= resident_layers <= most:
        allowed = f"from 1 to {most} of {n_layers} layers: {LATE_ROOM} more have room while they come"
        if most < 1:
            allowed = f"null: {model} has {n_layers} layers, too few for some to come late"
        raise UserError("policy.resident_layers", resident_layers, allowed, "change it, or leave it out")
    late = replace(candidate, profile=candidate.profile.with_resident(resident_layers))
    return replace(situation, candidates={**situation.candidates, model: late}), Placement(
        model, n_layers, resident_layers
    )
