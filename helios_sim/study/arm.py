"""What an arm's entry means: a policy with its parameters, and what only tables show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from helios_sim.errors import UserError
from helios_sim.policy.registry import PolicyConfig, parameters_of, policy_config
from helios_sim.study.build import confidence, threshold
from helios_sim.study.schema import Config

OF_THE_ARM = ("policy", "description", "baseline", "overrides")  # of an entry; the rest are the policy's parameters


@dataclass(frozen=True, slots=True)
class Arm:
    name: str
    policy: PolicyConfig
    description: str | None = None
    baseline: str | None = None  # an arm of its own to be compared with
    overrides: Mapping[str, Any] = field(default_factory=dict)  # of the study's settings, by dotted path


def arm_of(name: str, entry: Mapping[str, Any], config: Config) -> Arm:
    """UserError, which names the arm, where the policy does not know a parameter or its value cannot be."""
    with in_arm(name, config):
        return Arm(
            name,
            policy_of(entry, config),
            description=entry.get("description"),
            baseline=entry.get("baseline"),
            overrides=dict(entry.get("overrides") or {}),
        )


def policy_of(entry: Mapping[str, Any], config: Config) -> PolicyConfig:
    """The entry's policy. Threshold and confidence come from the exits' settings unless it has its own."""
    name = str(entry["policy"])
    settings = {key: value for key, value in entry.items() if key not in OF_THE_ARM}
    for key, value in (("threshold", threshold(config)), ("confidence", confidence(config).value)):
        if key in parameters_of(name) and settings.get(key) is None:
            settings[key] = value
    return policy_config(name, settings)


@contextmanager
def in_arm(name: str, config: Config) -> Iterator[None]:
    """Says in a UserError which of the experiment's arms it is about."""
    try:
        yield
    except UserError as error:
        if name not in config.arms:  # the one that `policy` added
            raise
        raise error.about(f"arms.{name}: {error.key}") from error
