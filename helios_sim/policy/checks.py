"""Range checks of policy parameters. Knows only how to say what is wrong."""

from __future__ import annotations

from helios_sim.errors import UserError


def check_positive(key: str, value: float | None) -> None:
    """Raises UserError unless value > 0 (None stands for "not given" and passes)."""
    if value is not None and not value > 0:
        raise UserError(f"policy.{key}", value, "a number above 0", f"set policy.{key} above 0 or leave it out")


def check_not_negative(key: str, value: float | None) -> None:
    """Raises UserError unless value >= 0 (None passes)."""
    if value is not None and not value >= 0:
        raise UserError(f"policy.{key}", value, "a number of 0 or more", f"set policy.{key} to 0 or more")
