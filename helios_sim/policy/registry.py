"""Registry of policies: policies by name, and their parameters made from plain settings."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from functools import cache
from typing import Any

from helios_sim.errors import UserError, near_names
from helios_sim.policy.telemetry import Policy

if typing.TYPE_CHECKING:
    from helios_sim.policy.custom import CustomParameters
    from helios_sim.policy.draft_model import DraftModelParameters
    from helios_sim.policy.early_exit import EarlyExitParameters
    from helios_sim.policy.full_depth import FullDepthParameters
    from helios_sim.policy.helios_next import HeliosNextParameters
    from helios_sim.policy.helios_parameters import HeliosParameters
    from helios_sim.policy.oracle import OracleParameters
    from helios_sim.policy.release_early import ReleaseEarlyParameters
    from helios_sim.policy.self_speculation import SelfSpeculationParameters
    from helios_sim.policy.static_cap import StaticCapParameters

    PolicyParameters = (
        FullDepthParameters
        | EarlyExitParameters
        | StaticCapParameters
        | ReleaseEarlyParameters
        | SelfSpeculationParameters
        | DraftModelParameters
        | HeliosParameters
        | HeliosNextParameters
        | OracleParameters
        | CustomParameters
    )

Loaded = tuple[type[Any], Callable[[Any], Policy]]
"""The parameters of a policy, and the function that makes it from an instance of them."""


@dataclass(frozen=True, slots=True)
class PolicyKind:
    """A policy that can be named in settings. It is imported when it is used: to import all takes 0.02 s."""

    load: Callable[[], Loaded]
    about: str  # one line for tables
    fixed: Mapping[str, Any] = field(default_factory=dict)  # parameters that the name implies; they cannot be changed
    is_bound: bool = False  # a bound that knows the future, not a policy to deploy

    @property
    def parameters(self) -> type[Any]:
        """The dataclass of the policy's parameters."""
        return self.load()[0]

    def make(self, parameters: PolicyParameters) -> Policy:
        """A policy with its own state."""
        return self.load()[1](parameters)


def _full_depth() -> Loaded:
    from helios_sim.policy.full_depth import FullDepthParameters, FullDepthPolicy

    return FullDepthParameters, FullDepthPolicy


def _early_exit() -> Loaded:
    from helios_sim.policy.early_exit import EarlyExitParameters, EarlyExitPolicy

    return EarlyExitParameters, EarlyExitPolicy


def _static_cap() -> Loaded:
    from helios_sim.policy.static_cap import StaticCapParameters, StaticCapPolicy

    return StaticCapParameters, StaticCapPolicy


def _release_early() -> Loaded:
    from helios_sim.policy.release_early import ReleaseEarlyParameters, ReleaseEarlyPolicy

    return ReleaseEarlyParameters, ReleaseEarlyPolicy


def _self_speculation() -> Loaded:
    from helios_sim.policy.self_speculation import SelfSpeculationParameters, SelfSpeculationPolicy

    return SelfSpeculationParameters, SelfSpeculationPolicy


def _draft_model() -> Loaded:
    from helios_sim.policy.draft_model import DraftModelParameters, DraftModelPolicy

    return DraftModelParameters, DraftModelPolicy


def _helios() -> Loaded:
    from helios_sim.policy.helios import HeliosPolicy
    from helios_sim.policy.helios_parameters import HeliosParameters

    return HeliosParameters, HeliosPolicy


def _helios_next() -> Loaded:
    from helios_sim.policy.helios_next import HeliosNextParameters, HeliosNextPolicy

    return HeliosNextParameters, HeliosNextPolicy


def _oracle() -> Loaded:
    from helios_sim.policy.oracle import OracleParameters, OraclePolicy

    return OracleParameters, OraclePolicy


def _custom() -> Loaded:
    from helios_sim.policy.custom import CustomParameters, load_custom

    return CustomParameters, load_custom


POLICIES: Mapping[str, PolicyKind] = {
    "full_depth": PolicyKind(_full_depth, "every token runs all layers"),
    "early_exit": PolicyKind(_early_exit, "each token leaves at its first confident exit"),
    "static_cap": PolicyKind(_static_cap, "a cap chosen once from offline exits"),
    "release_early": PolicyKind(_release_early, "answers leave at ramps while the model goes on"),
    "self_speculation": PolicyKind(_self_speculation, "the first layers draft tokens, all layers verify them"),
    "draft_model": PolicyKind(_draft_model, "another model drafts tokens, one verifies them"),
    "helios": PolicyKind(_helios, "evaluation rounds, a cap, load or switch on breaches"),
    "helios_probe": PolicyKind(
        _helios, "as helios, but candidates score served text in one pass", fixed={"evaluation": "probe"}
    ),
    "helios_next": PolicyKind(
        _helios_next, "ours: a cap that a test of changed tokens defends, drafts above it, probes and changes that pay"
    ),
    "oracle": PolicyKind(_oracle, "a bound: knows every exit, pays for no change", is_bound=True),
    "custom": PolicyKind(_custom, "a policy of your own"),
}

VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {  # further names, each for a policy with some of its settings
    "early_exit_lazy": ("early_exit", {"batching": "lazy"}),
    "early_exit_rebatch": ("early_exit", {"batching": "rebatch"}),
    "load_only": ("helios", {"on_breach": "load_only"}),
    "switch_only": ("helios", {"on_breach": "switch_only"}),
    "transfer_only": ("helios", {"on_breach": "transfer_only"}),
}


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """A policy by name, with its parameters."""

    name: str
    parameters: PolicyParameters

    def make(self) -> Policy:
        """Makes a policy with its own state, for one replica in one run."""
        return self.kind.make(self.parameters)

    @property
    def kind(self) -> PolicyKind:
        return POLICIES[self.name]

    def told(self) -> dict[str, Any]:
        """Parameters that have no default or differ from it, without the parameters that the name implies."""
        fixed, found = self.kind.fixed, {}
        for f in fields(self.parameters):
            value = getattr(self.parameters, f.name)
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            if value != default and f.name not in fixed:
                found[f.name] = value
        return found


def policy_config(name: str, settings: Mapping[str, Any] | None = None) -> PolicyConfig:
    """Makes the parameters of a policy from plain values (text, numbers, None); enums are given by their values.

    UserError for an unknown name, an unknown or missing parameter, or a value of the wrong kind or range.
    """
    settings = settings or {}
    if name in VARIANTS:
        variant, (name, own) = name, VARIANTS[name]
        for key, value in own.items():
            if settings.get(key, value) != value:
                allowed = f"{variant} is {name} with {key}={value}"
                raise UserError(f"policy.{key}", settings[key], allowed, f"leave it out, or choose {name}")
        settings = {**settings, **own}
    kind, known = _kind_of(name), parameters_of(name)
    parameters: Any = kind.parameters
    hints = _hints(parameters)
    for key in settings:
        if key not in known:
            close = near_names(key, known, cutoff=0.7)
            fix = f"you may have meant policy.{close[0]}" if close else "correct the name or leave it out"
            raise UserError(f"policy.{key}", settings[key], f"{name} knows {', '.join(known)}", fix)
    for f in fields(kind.parameters):
        if f.name in known and f.name not in settings and f.default is MISSING and f.default_factory is MISSING:
            raise UserError(f"policy.{f.name}", None, f"{name} needs a value", f"set policy.{f.name}")
    given = {**settings, **kind.fixed}
    return PolicyConfig(name, parameters(**{key: _convert(f"policy.{key}", hints[key], v) for key, v in given.items()}))


def make_policy(name: str, settings: Mapping[str, Any] | None = None) -> Policy:
    """Makes a policy with its own state from plain values. UserError as in `policy_config`."""
    return policy_config(name, settings).make()


def parameters_of(name: str) -> tuple[str, ...]:
    """Names of the parameters that can be set. UserError for an unknown policy."""
    kind = _kind_of(name)
    return tuple(f.name for f in fields(kind.parameters) if f.name not in kind.fixed)


def _kind_of(name: str) -> PolicyKind:
    name = VARIANTS[name][0] if name in VARIANTS else name
    if name not in POLICIES:
        names = ", ".join([*POLICIES, *VARIANTS])
        raise UserError("policy", name, f"one of {names}", "choose one of these, or custom for your own")
    return POLICIES[name]


@cache
def _hints(parameters: Any) -> dict[str, Any]:
    return typing.get_type_hints(parameters)


def _convert(key: str, hint: Any, value: Any) -> Any:
    """Converts `value` to the field's declared type: a union of None, bool, int, float, str, an Enum or a mapping."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        kind = typing.get_origin(option) or option
        if kind is types.NoneType and value is None:
            return None
        if isinstance(kind, type) and issubclass(kind, Enum):
            members = {member.value: member for member in kind}
            if isinstance(value, kind) or value in members:
                return value if isinstance(value, kind) else members[value]
        elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        elif isinstance(kind, type) and isinstance(value, kind) and (kind is not int or not isinstance(value, bool)):
            return value
    raise UserError(key, value, " or ".join(_name(option) for option in options), f"give {key} one of these")


def _name(hint: Any) -> str:
    kind = typing.get_origin(hint) or hint
    if kind is types.NoneType:
        return "null"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(str(member.value) for member in kind)
    words = {list: "a list", int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return {**words, Mapping: "a mapping such as {a: b}"}.get(kind, str(kind.__name__))
