"""Axes of variation: an axis is some settings that move together and the values they take; a grid combines axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from helios_sim.errors import UserError

MOST_CHOICES = 100_000  # each is planned, checked and kept
Shown = float | int | str | bool | None  # a value as tables and figures name it


@dataclass
class AxisConfig:
    """One thing that varies: `values` to choose from, or a range from `low` to `high`."""

    name: str = ""  # the key in points and figures; in a mapping of axes the mapping's key is the name
    settings: list[str] = field(default_factory=list)  # dotted paths of the study's settings; all take the value
    values: list[Any] | None = None  # with several settings a value may be a list, one entry for each of them
    labels: list[Any] | None = None  # names of the values in tables and figures; null: the values themselves
    low: float | None = None
    high: float | None = None
    step: float | None = None  # null: any value of the range; a grid needs one
    log: bool = False  # searched on a log scale
    whole: bool = False  # only whole numbers


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from low to high, both allowed."""

    low: float
    high: float
    step: float | None  # None: any
    log: bool
    whole: bool

    def at(self, value: float) -> float | int:
        """Return a value as the settings get it: a point of the grid is rid of rounding errors in its last digits."""
        if self.whole:
            return round(value)
        return float(value) if self.step is None else round(float(value), 12)

    @property
    def count(self) -> float:
        """Number of points of the grid, 1 without a step; not rounded above MOST_CHOICES, and possibly infinite."""
        if self.step is None:
            return 1
        steps = (self.high - self.low) / self.step + 1e-9
        return int(steps) + 1 if steps < MOST_CHOICES else steps

    def points(self) -> tuple[float | int, ...]:
        """Return the grid: low, low + step, ... up to high. Each is its own product, so that no error adds up."""
        assert self.step is not None
        return tuple(self.at(self.low + i * self.step) for i in range(int(self.count)))


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis that was checked to be complete."""

    key: str  # where the axis itself is set, for messages
    name: str
    settings: tuple[str, ...]
    values: tuple[Any, ...] | Range
    labels: tuple[Shown, ...] | None = None  # of the values

    def changes(self, value: Any) -> dict[str, Any]:
        """Return the study's settings that a value sets, by path."""
        if len(self.settings) > 1 and isinstance(value, list):
            return dict(zip(self.settings, value, strict=True))
        return dict.fromkeys(self.settings, value)


@dataclass(frozen=True, slots=True)
class Choice:
    """One value of every axis: how it is shown, and which settings it sets."""

    shown: Mapping[str, Shown]
    changes: Mapping[str, Any]


def axes_of(key: str, configs: Sequence[AxisConfig] | Mapping[str, AxisConfig]) -> tuple[Axis, ...]:
    """Check axes that the study sets under `key`. UserError if one is incomplete, or two set the same setting."""
    named = configs.items() if isinstance(configs, Mapping) else [(config.name, config) for config in configs]
    found = tuple(_axis(f"{key}.{name}", name, config) for name, config in named)
    owner: dict[str, str] = {}
    names = [axis.name for axis in found]
    for axis in found:
        if names.count(axis.name) > 1:
            allowed = "a name of one axis: points and figures tell axes by it"
            raise UserError(f"{key}.name", axis.name, allowed, "give each its own")
        for path in axis.settings:
            if owner.setdefault(path, axis.name) != axis.name or axis.settings.count(path) > 1:
                raise UserError(f"{axis.key}.settings", path, f"{owner[path]} sets this already", "let one axis set it")
    return found


def choose(axes: Sequence[Axis], choice: Sequence[Any]) -> Choice:
    """Return the choice at which each axis has a number of its range, or one of its values (by index)."""
    shown: dict[str, Shown] = {}
    changes: dict[str, Any] = {}
    for axis, chosen in zip(axes, choice, strict=True):
        value = axis.values.at(chosen) if isinstance(axis.values, Range) else axis.values[chosen]
        label = value if axis.labels is None else axis.labels[chosen]
        shown[axis.name] = label if isinstance(label, float | int | str) or label is None else str(label)
        changes |= axis.changes(value)
    return Choice(shown, changes)


def grid(axes: Sequence[Axis]) -> list[Choice]:
    """Return every combination, the last axis changing fastest. UserError for a range without a step, or too many."""
    choices: list[Sequence[Any]] = []
    total = 1.0
    for axis in axes:
        total *= len(axis.values) if not isinstance(axis.values, Range) else axis.values.count
        if total > MOST_CHOICES:
            allowed = f"at most {MOST_CHOICES:,} combinations in a grid"
            fix = "take larger steps, fewer values or sweep.method=search"
            raise UserError(axis.key, f"{total:,.0f}", allowed, fix)
    for axis in axes:
        if isinstance(axis.values, Range):
            if axis.values.step is None:
                allowed = "a grid needs a step or a list of values"
                raise UserError(f"{axis.key}.step", None, allowed, f"set {axis.key}.step")
            choices.append(axis.values.points())
        else:
            choices.append(range(len(axis.values)))
    return [choose(axes, choice) for choice in product(*choices)]


def _axis(key: str, name: str, c: AxisConfig) -> Axis:
    if not name:
        raise UserError(f"{key}name", c.name, "each axis has a name", "name it")
    if not c.settings:
        raise UserError(f"{key}.settings", c.settings, "at least one setting of the study", f"set {key}.settings")
    settings = tuple(c.settings)
    if c.values is None:
        return Axis(key, name, settings, _range(key, c))
    if c.low is not None or c.high is not None or c.step is not None:
        raise UserError(f"{key}.values", c.values, "values or a range, not both", "leave one out")
    if not c.values:
        raise UserError(f"{key}.values", c.values, "at least one value", f"set {key}.values")
    for value in c.values:
        if len(settings) > 1 and isinstance(value, list) and len(value) != len(settings):
            raise UserError(f"{key}.values", value, f"one entry for each of {len(settings)} settings", "match them")
    if c.labels is not None and len(c.labels) != len(c.values):
        raise UserError(f"{key}.labels", c.labels, f"{len(c.values)} labels, one a value", "match them")
    if c.labels is not None and len({str(label) for label in c.labels}) < len(c.labels):
        allowed = "different labels: tables and figures tell values by them"
        raise UserError(f"{key}.labels", c.labels, allowed, "change one")
    return Axis(key, name, settings, tuple(c.values), None if c.labels is None else tuple(c.labels))


def _range(key: str, c: AxisConfig) -> Range:
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
