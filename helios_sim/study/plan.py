"""The jobs of a study: its arms at its own settings, and at every point of its sweeps. Knows no result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from helios_sim.errors import UserError
from helios_sim.study.job import Job
from helios_sim.study.schema import AxisConfig, Config, SweepConfig

Variant = Callable[[Mapping[str, Any]], Config]  # the configuration with some settings (dotted paths) changed


@dataclass(frozen=True, slots=True)
class Point:
    """One setting; `jobs` by arm, one for each seed."""

    settings: Mapping[str, float | int | str]  # as figures name them; empty for the study itself
    baseline: str
    jobs: Mapping[str, tuple[Job, ...]]


@dataclass(frozen=True, slots=True)
class StudyPlan:
    config: Config
    headline: Point
    points: tuple[Point, ...]

    @property
    def jobs(self) -> list[Job]:
        of_points = (jobs for point in (self.headline, *self.points) for jobs in point.jobs.values())
        return [job for jobs in of_points for job in jobs]


def plan_study(variant: Variant) -> StudyPlan:
    """UserError where an arm, a baseline or an axis is not what it should be."""
    config = variant({})
    arms = arms_of(config)
    baseline = _known_arm("baseline", config.baseline or next(iter(arms)), arms)
    if config.subject is not None:
        _known_arm("subject", config.subject, arms)
    headline = _point({}, {}, list(arms), baseline, variant)
    points = [point for sweep in config.sweeps for point in _sweep(sweep, config, arms, baseline, variant)]
    return StudyPlan(config, headline, tuple(points))


def arms_of(config: Config) -> dict[str, Mapping[str, Any]]:
    """The study's arms, with the one that `policy` adds."""
    arms: dict[str, Mapping[str, Any]] = {}
    for name, entry in config.arms.items():
        if not isinstance(entry, Mapping):
            raise UserError(f"arms.{name}", entry, "a mapping with a policy and its settings", "write {policy: ...}")
        arms[str(name)] = entry
    if config.policy is not None:
        entry = dict(config.policy)
        name = str(entry.pop("name", ""))
        arms[name] = {"policy": name, **entry}
    if not arms:
        raise UserError("arms", {}, "at least one arm", "set policy=helios, or name arms in the experiment")
    return arms


def _known_arm(key: str, name: str, arms: Mapping[str, Any]) -> str:
    if name not in arms:
        raise UserError(key, name, f"one of the arms {', '.join(arms)}", f"set {key} to one of these")
    return name


def _sweep(sweep: SweepConfig, config: Config, arms: Mapping[str, Any], baseline: str, variant: Variant) -> list[Point]:
    names = list(arms) if sweep.arms is None else [_known_arm("sweeps.arms", name, arms) for name in sweep.arms]
    own = baseline if sweep.baseline is None else _known_arm("sweeps.baseline", sweep.baseline, arms)
    if own not in names:
        names.insert(0, own)
    points = []
    for combination in product(*(_values(axis) for axis in sweep.axes)):
        changes = {
            path: value for axis, (value, _) in zip(sweep.axes, combination, strict=True) for path in axis.settings
        }
        settings = {axis.name: label for axis, (_, label) in zip(sweep.axes, combination, strict=True)}
        points.append(_point(changes, settings, names, own, variant))
    return points


def _values(axis: AxisConfig) -> list[tuple[Any, Any]]:
    if not axis.values or not axis.settings or not axis.name:
        raise UserError("sweeps.axes", axis.name, "a name, at least one setting and one value", "complete the axis")
    labels = axis.values if axis.labels is None else axis.labels
    if len(labels) != len(axis.values):
        raise UserError("sweeps.axes.labels", labels, f"{len(axis.values)} labels, one a value", "match them")
    return list(zip(axis.values, labels, strict=True))


def _point(
    changes: Mapping[str, Any], settings: Mapping[str, Any], names: list[str], baseline: str, variant: Variant
) -> Point:
    arms = arms_of(variant(changes))
    jobs = {}
    for name in names:
        overrides = dict(arms[name].get("overrides") or {})
        config = variant({**overrides, **changes})
        entry = {key: value for key, value in arms_of(config)[name].items() if key != "overrides"}
        jobs[name] = tuple(Job(name, entry, config, seed) for seed in config.seeds)
    return Point(settings, baseline, jobs)
