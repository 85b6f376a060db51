"""What an arm's entry means: a policy, its settings, and what only tables show. Knows no server and no result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from helios_sim.policy.registry import POLICIES, make_policy
from helios_sim.policy.telemetry import Policy
from helios_sim.study.build import confidence, threshold
from helios_sim.study.schema import Config

SHOWN_OF_AN_ARM = ("overrides", "description", "baseline")  # overrides are in the configuration by then
ARM_KEYS = ("policy", *SHOWN_OF_AN_ARM)  # of an arm's entry; the rest are the policy's settings


def policy_of(entry: Mapping[str, Any], config: Config) -> Policy:
    """The arm's policy; threshold and confidence come from the exits' settings unless the arm has its own."""
    name = str(entry["policy"])
    settings = {key: value for key, value in entry.items() if key not in ARM_KEYS}
    if name in POLICIES:
        known = {f.name for f in fields(POLICIES[name].parameters)}
        for key, value in (("threshold", threshold(config)), ("confidence", confidence(config).value)):
            if key in known:
                settings.setdefault(key, value)
    return make_policy(name, settings)
