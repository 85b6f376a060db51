"""The designs that there can be: parameters, their values, and every combination. Knows no result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from helios_sim.errors import UserError
from helios_sim.sweep.schema import ParameterConfig

Shown = float | int | str | bool | None  # a parameter's value as tables and figures name it


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from low to high, both allowed."""

    low: float
    high: float
    step: float | None  # None: any
    log: bool
    whole: bool

    def at(self, value: float) -> float | int:
        """As the settings get it: a point of the grid without what sums leave in its last digits."""
        if self.whole:
            return round(value)
        return float(value) if self.step is None else round(float(value), 12)

    def points(self) -> tuple[float | int, ...]:
        """The grid: low, low + step, ... up to high. Each is its own product, so that no error adds up."""
        assert self.step is not None
        count = int((self.high - self.low) / self.step + 1e-9) + 1
        return tuple(self.at(self.low + i * self.step) for i in range(count))


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    settings: tuple[str, ...]
    values: tuple[Any, ...] | Range
    labels: tuple[Shown, ...] | None = None  # of the values

    def changes(self, value: Any) -> dict[str, Any]:
        """The study's settings by path."""
        if isinstance(value, list | tuple):
            return dict(zip(self.settings, value, strict=True))
        return dict.fromkeys(self.settings, value)


@dataclass(frozen=True, slots=True)
class Point:
    """One design: its values as shown, and what they set."""

    shown: Mapping[str, Shown]
    changes: Mapping[str, Any]


def parameters_of(configs: Mapping[str, ParameterConfig]) -> tuple[Parameter, ...]:
    """UserError where a parameter is incomplete, or two of them set the same."""
    found = tuple(_parameter(name, config) for name, config in configs.items())
    owner: dict[str, str] = {}
    for parameter in found:
        for path in parameter.settings:
            if owner.setdefault(path, parameter.name) != parameter.name or parameter.settings.count(path) > 1:
                key = f"sweep.parameters.{parameter.name}.settings"
                raise UserError(key, path, f"{owner[path]} sets this already", "let one parameter set it")
    return found


def point(parameters: Sequence[Parameter], choice: Sequence[Any]) -> Point:
    """`choice`: for each parameter a number of its range, or which of its values (an index)."""
    shown: dict[str, Shown] = {}
    changes: dict[str, Any] = {}
    for parameter, chosen in zip(parameters, choice, strict=True):
        values = parameter.values
        value = values.at(chosen) if isinstance(values, Range) else values[chosen]
        label = value if parameter.labels is None else parameter.labels[chosen]
        shown[parameter.name] = label if isinstance(label, float | int | str) or label is None else str(label)
        changes |= parameter.changes(value)
    return Point(shown, changes)


def grid(parameters: Sequence[Parameter]) -> list[Point]:
    """Every combination, the last parameter changing fastest. UserError for a range without a step."""
    choices: list[Sequence[Any]] = []
    for parameter in parameters:
        if isinstance(parameter.values, Range):
            if parameter.values.step is None:
                key = f"sweep.parameters.{parameter.name}.step"
                raise UserError(key, None, "a grid needs a step or a list of values", f"set {key}")
            choices.append(parameter.values.points())
        else:
            choices.append(range(len(parameter.values)))
    return [point(parameters, choice) for choice in product(*choices)]


def _parameter(name: str, c: ParameterConfig) -> Parameter:
    key = f"sweep.parameters.{name}"
    if not c.settings:
        raise UserError(f"{key}.settings", c.settings, "at least one setting of the study", f"set {key}.settings")
    settings = tuple(c.settings)
    if c.values is None:
        return Parameter(name, settings, _range(key, c))
    if c.low is not None or c.high is not None or c.step is not None:
        raise UserError(f"{key}.values", c.values, "values or a range, not both", "leave one out")
    if not c.values:
        raise UserError(f"{key}.values", c.values, "at least one value", f"set {key}.values")
    for value in c.values:
        if isinstance(value, list) and len(value) != len(settings):
            raise UserError(f"{key}.values", value, f"one entry for each of {len(settings)} settings", "match them")
    if c.labels is not None and len(c.labels) != len(c.values):
        raise UserError(f"{key}.labels", c.labels, f"{len(c.values)} labels, one a value", "match them")
    values = tuple(tuple(value) if isinstance(value, list) else value for value in c.values)
    return Parameter(name, settings, values, None if c.labels is None else tuple(c.labels))


def _range(key: str, c: ParameterConfig) -> Range:
    if c.low is None or c.high is None:
        raise UserError(key, None, "needs values, or a range from low to high", f"set {key}.values, or both ends")
    if not c.low <= c.high:
        raise UserError(f"{key}.high", c.high, f"must be at least low, {c.low:g}", f"raise {key}.high")
    if c.step is not None and c.step <= 0:
        raise UserError(f"{key}.step", c.step, "must be null or above 0", f"set {key}.step accordingly")
    if c.log and (c.low <= 0 or c.step is not None):
        raise UserError(f"{key}.log", c.log, "needs a range above 0 without a step", "leave log or the step out")
    if c.whole and any(end is not None and end != int(end) for end in (c.low, c.high, c.step)):
        raise UserError(f"{key}.whole", c.whole, "needs whole low, high and step", "round them, or leave whole out")
    if c.labels is not None:
        raise UserError(f"{key}.labels", c.labels, "a range has none", "leave them out or list the values")
    return Range(c.low, c.high, c.step, c.log, c.whole)
