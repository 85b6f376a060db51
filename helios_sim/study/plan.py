"""The jobs of a study: its arms at its own settings, and at every point of its sweeps. Knows no result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from helios_sim.errors import UserError
from helios_sim.study.job import Job
from helios_sim.study.schema import AxisConfig, Config, SweepConfig

FROM_EXITS = ("threshold", "confidence")  # a policy's; null: as in `exits`
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
    for name, entry in arms.items():
        if entry.get("baseline") is not None:
            _known_arm(f"arms.{name}.baseline", str(entry["baseline"]), arms)
    headline = _point({}, {}, list(arms), baseline, variant)
    points = [point for sweep in config.sweeps for point in _sweep(sweep, arms, baseline, variant)]
    return StudyPlan(config, headline, tuple(points))


def point_at(plan: StudyPlan, settings: Mapping[str, Any]) -> Point:
    """The first point with these settings; without any, the study itself. UserError where there is none."""
    if not settings:
        return plan.headline
    for point in plan.points:
        if all(point.settings.get(key) == value for key, value in settings.items()):
            return point
    raise UserError("published.at", dict(settings), "a point of one of the sweeps", "correct it or extend a sweep")


def arms_of(config: Config) -> dict[str, Mapping[str, Any]]:
    """The study's arms, with the one that `policy` adds. UserError where an entry is no arm."""
    arms: dict[str, Mapping[str, Any]] = {}
    for name, entry in config.arms.items():
        if not isinstance(entry, Mapping):
            raise UserError(f"arms.{name}", entry, "a mapping with a policy and its settings", "write {policy: ...}")
        arms[str(name)] = entry
        if "policy" not in entry:
            raise UserError(f"arms.{name}", dict(entry), "each arm names its policy", "write {policy: helios}")
    if config.policy is not None:
        name, entry = _added_arm(config.policy)
        while name in arms:  # an experiment's arm stays what it is
            name = f"{name}_added"
        arms[name] = entry
    if not arms:
        raise UserError("arms", {}, "at least one arm", "set policy=helios, or name arms in the experiment")
    return arms


def _added_arm(policy: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Its name and entry. It is called by its policy, and by its model if it has one."""
    settings = {key: value for key, value in policy.items() if not (key in FROM_EXITS and value is None)}
    kind = settings.pop("name", None)
    if kind is None:
        raise UserError("policy", dict(policy), "it must have a name", "choose one, such as policy=helios")
    name, model = str(settings.pop("arm", kind)), settings.get("model")
    return f"{name}_{model}" if model else name, {"policy": str(kind), **settings}


def _known_arm(key: str, name: str, arms: Mapping[str, Any]) -> str:
    if name not in arms:
        raise UserError(key, name, f"one of the arms {', '.join(arms)}", f"set {key} to one of these")
    return name


def _sweep(sweep: SweepConfig, arms: Mapping[str, Any], baseline: str, variant: Variant) -> list[Point]:
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
    own = variant(changes)
    arms, jobs = arms_of(own), {}
    for name in names:
        overrides = dict(arms[name].get("overrides") or {})
        config = variant({**overrides, **changes}) if overrides else own
        entry = {key: value for key, value in arms_of(config)[name].items() if key != "overrides"}
        rule = {f"exits.{key}": entry[key] for key in FROM_EXITS if entry.get(key) is not None}
        if rule:  # what was recorded beforehand is summed up at the arm's own rule
            config = variant({**overrides, **changes, **rule})
        jobs[name] = tuple(Job(name, entry, config, seed) for seed in config.seeds)
    return Point(settings, baseline, jobs)
