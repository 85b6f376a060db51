"""The jobs of a study: its arms at its own settings and at every point of its sweeps, checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import simpy

from helios_sim.engine.simulated import ModelData, SimulatedEngine
from helios_sim.errors import UserError, require_one_of
from helios_sim.exits.rule import DraftModel, FixedCap, PerToken, ReleaseEarly, require_leaving, require_live
from helios_sim.exits.trace import ANY_DRAFTER
from helios_sim.policy.deployment import Deployment, require_one_card
from helios_sim.report.metrics import DEFINITIONS
from helios_sim.serving.server import Server
from helios_sim.study.build import Parts, arm_of, confidence, in_arm, threshold
from helios_sim.study.cost import costs_of
from helios_sim.study.fleet import Fleet, in_json, of_kind, shared_fleet, what_counts
from helios_sim.study.jobs import Job
from helios_sim.study.modes import LIVE, SIMULATE
from helios_sim.study.schema import PRESENTATION, Config, FaultsConfig, SweepConfig
from helios_sim.vary.axis import Axis, axes_of, grid
from helios_sim.vary.settings import with_settings

FIGURES = ("sweep", "load", "arms", "quality", "phase", "matrix")
OVER_TWO_AXES = ("phase", "matrix")
CUSTOM = "custom"


@dataclass(frozen=True, slots=True)
class Point:
    """One combination of settings; `jobs` by arm, one for each seed."""

    settings: Mapping[str, Any]  # as figures name them; empty for the study itself
    baseline: str
    jobs: Mapping[str, tuple[Job, ...]]


@dataclass(frozen=True, slots=True)
class StudyPlan:
    """All runs of a study, and the points that they belong to."""

    config: Config
    headline: Point
    points: tuple[Point, ...]

    @property
    def jobs(self) -> list[Job]:
        of_points = (jobs for point in (self.headline, *self.points) for jobs in point.jobs.values())
        return [job for jobs in (*of_points, *self.without_faults.values()) for job in jobs]

    @property
    def without_faults(self) -> dict[str, tuple[Job, ...]]:
        """Jobs without faults, for each simulated arm that is to meet faults."""
        return {
            name: tuple(_without_faults(job) for job in jobs)
            for name, jobs in self.headline.jobs.items()
            if jobs[0].config.workload.faults.strikes and jobs[0].config.mode == SIMULATE
        }


def _without_faults(job: Job) -> Job:
    workload = replace(job.config.workload, faults=FaultsConfig())
    return replace(job, config=replace(job.config, workload=workload))


def plan_study(config: Config) -> StudyPlan:
    """Plan the runs of a study. UserError for a wrong arm, baseline or axis."""
    arms = entries_of(config)
    own = {name: entry for name, entry in arms.items() if not entry.get("sweeps_only")}
    baseline = _known_arm("baseline", config.baseline or next(iter(own)), own)
    if config.subject is not None:
        _known_arm("subject", config.subject, own)
    for name, entry in arms.items():
        if entry.get("baseline") is not None:
            _known_arm(f"arms.{name}.baseline", str(entry["baseline"]), own)
        _check_overrides(name, entry.get("overrides") or {})
    headline = _point(config, {}, {}, list(own), baseline)
    points = [point for sweep in config.sweeps for point in _sweep(config, sweep, arms, baseline)]
    return StudyPlan(config, headline, tuple(points))


def _check_overrides(arm: str, overrides: Any) -> None:
    """Raise UserError for settings that no arm may override: seeds, which change requests, and those of all arms."""
    if not isinstance(overrides, Mapping):
        allowed = "settings by path, such as {server.max_running_requests: 64}"
        raise UserError(f"arms.{arm}.overrides", overrides, allowed, "write a mapping")
    for path in overrides:
        if str(path).split(".")[0] in PRESENTATION:
            allowed = "of the whole study: all arms have one, and the same requests"
            fix = f"set {path} for the study, or leave it out"
            raise UserError(f"arms.{arm}.overrides.{path}", overrides[path], allowed, fix)


def check_axes(axes: Sequence[Axis]) -> None:
    """Raise UserError if an axis changes the seeds: its points would differ by chance."""
    for axis in axes:
        for path in axis.settings:
            if path.split(".")[0] in ("seeds", "auto_seeds"):
                allowed = "any setting but the seeds, which are the same for all that is compared"
                raise UserError(f"{axis.key}.settings", path, allowed, "name several: seeds=[0,1,2]")


def point_at(plan: StudyPlan, settings: Mapping[str, Any]) -> Point:
    """Return the first point with these settings; without settings, the study itself. UserError if there is none."""
    if not settings:
        return plan.headline
    for point in plan.points:
        if all(point.settings.get(key) == value for key, value in settings.items()):
            return point
    raise UserError("published.at", dict(settings), "a point of one of the sweeps", "correct it or extend a sweep")


def entries_of(config: Config) -> dict[str, Mapping[str, Any]]:
    """Return the arms' entries by name, with the arm that `policy` adds. UserError if an entry is no arm."""
    arms: dict[str, Mapping[str, Any]] = {}
    for name, entry in config.arms.items():
        if entry is None:  # left out by the command line
            continue
        if not isinstance(entry, Mapping):
            raise UserError(f"arms.{name}", entry, "a mapping with a policy and its settings", "write {policy: ...}")
        arms[str(name)] = entry
        if "policy" not in entry:
            raise UserError(f"arms.{name}", dict(entry), "each arm names its policy", "write {policy: helios}")
        _check_sweeps_only(config, str(name), entry)
    if config.policy is not None:
        name, entry = _added_arm(config.policy)
        while name in arms:  # an experiment's arm stays what it is
            name = f"{name}_added"
        arms[name] = entry
    if all(entry.get("sweeps_only") for entry in arms.values()):
        raise UserError("arms", {}, "at least one arm", "set policy=helios, or name arms in the experiment")
    return arms


def _check_sweeps_only(config: Config, name: str, entry: Mapping[str, Any]) -> None:
    """Raise UserError if an arm is for sweeps only, but no sweep names it, or it has a baseline of its own."""
    key, value = f"arms.{name}.sweeps_only", entry.get("sweeps_only", False)
    if not isinstance(value, bool):
        raise UserError(key, value, "true or false", "correct it")
    if value and not any(name in (sweep.arms or ()) for sweep in config.sweeps):
        raise UserError(key, value, "an arm that a sweep names in its arms", "name it there, or leave this out")
    if value and entry.get("baseline") is not None:
        allowed = "none of its own: a sweep's arms are compared with the sweep's"
        raise UserError(f"arms.{name}.baseline", entry["baseline"], allowed, "set sweeps.baseline, or leave it out")


def jobs_of(config: Config, arm: str, changes: Mapping[str, Any] | None = None) -> tuple[Job, ...]:
    """Return an arm's jobs, one for each seed, with some settings changed. UserError if its settings cannot be.

    Exits that are known beforehand are summed up at the arm's own threshold and confidence, if it has them.
    """
    changes = changes or {}
    changed = with_settings(config, changes) if changes else config
    overrides = _entry(changed, arm).get("overrides")
    if overrides:
        with in_arm(arm, config):
            changed = with_settings(config, {**overrides, **changes})
    found = arm_of(arm, _entry(changed, arm), changed)
    rule: dict[str, Any] = {}
    for key, of_study in (("threshold", threshold(changed)), ("confidence", confidence(changed).value)):
        own = getattr(found.policy.parameters, key, of_study)
        if own != of_study:
            rule[f"exits.{key}"] = own
    if rule:
        changed = with_settings(changed, rule)
    return tuple(Job(found, changed, seed) for seed in changed.seeds)


def _entry(config: Config, arm: str) -> Mapping[str, Any]:
    entries = entries_of(config)
    if arm not in config.arms:  # the arm that `policy` adds, named by its model
        return list(entries.values())[-1]
    return entries[arm]


def _added_arm(policy: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return name and entry of the arm that `policy` adds. It is named by its policy, and its model if it has one."""
    settings = dict(policy)
    kind = settings.pop("name", None)
    if kind is None:
        raise UserError("policy", dict(policy), "it must have a name", "choose one, such as policy=helios")
    name, model = str(settings.pop("arm", kind)), settings.get("model")
    return f"{name}_{model}" if model else name, {"policy": str(kind), **settings}


def _known_arm(key: str, name: str, arms: Mapping[str, Any]) -> str:
    require_one_of(key, name, arms)
    return name


def _sweep(config: Config, sweep: SweepConfig, arms: Mapping[str, Any], baseline: str) -> list[Point]:
    own_arms = [name for name, entry in arms.items() if not entry.get("sweeps_only")]
    names = own_arms if sweep.arms is None else [_known_arm("sweeps.arms", name, arms) for name in sweep.arms]
    own = baseline if sweep.baseline is None else _known_arm("sweeps.baseline", sweep.baseline, arms)
    if own not in names:
        names.insert(0, own)
    if not sweep.axes:
        raise UserError("sweeps.axes", [], "at least one: without an axis nothing varies", "name one, or leave it out")
    axes = axes_of("sweeps.axes", sweep.axes)
    check_axes(axes)
    points = [_point(config, choice.changes, choice.shown, names, own) for choice in grid(axes)]
    _check_apart(points)
    return points


def _check_apart(points: Sequence[Point]) -> None:
    """Raise UserError if two points of a sweep are equal runs: the settings that differ have no effect on its arms."""
    seen: dict[tuple[str, ...], Point] = {}
    for point in points:
        first = seen.setdefault(tuple(job.settings_key for jobs in point.jobs.values() for job in jobs), point)
        if first is not point:
            allowed = f"other runs than {dict(first.settings)}: what differs counts for none of {', '.join(point.jobs)}"
            raise UserError("sweeps.axes", dict(point.settings), allowed, "leave it out, or name other arms")


def _point(
    config: Config, changes: Mapping[str, Any], settings: Mapping[str, Any], names: list[str], baseline: str
) -> Point:
    return Point(settings, baseline, {name: jobs_of(config, name, changes) for name in names})


def check_study(plan: StudyPlan) -> None:
    """Raise UserError for an unknown name, a setting that cannot be, or an arm that cannot start.

    Points of sweeps are built but not started: an arm that cannot start there is found when it runs, and finished
    results are kept.
    """
    _check_names(plan)
    for job in {(job.arm.name, id(job.config)): job for job in plan.jobs}.values():
        with in_arm(job.arm.name, job.config):
            if job.arm.policy.name == CUSTOM:  # found now rather than when it runs
                job.arm.policy.make()
            if job.config.mode == LIVE and job.arm.policy.kind.is_bound:
                allowed = "one that needs no knowledge of what will come when mode=live"
                raise UserError("policy", job.arm.policy.name, allowed, "leave it out")
    built: dict[str, Fleet] = {}
    for job in {id(job.config): job for job in plan.jobs}.values():
        name = in_json(what_counts(job.config))
        if name not in built:
            with in_arm(job.arm.name, job.config) if job.arm.overrides else nullcontext():
                built[name] = shared_fleet(job.config, job.seed)
            costs_of(job.config, built[name])
            if job.config.mode == LIVE:
                from helios_sim.study.live import check_live

                check_live(job.config, built[name])
    for jobs in plan.headline.jobs.values():
        job = jobs[0]
        for kind in built[in_json(what_counts(job.config))].kinds:
            policy = kind.policy or job.arm.policy
            # an oracle plans for all requests when it starts, and a user's own policy is not ours to start twice
            if not policy.kind.is_bound and policy.name != CUSTOM:
                parts, env = kind.parts, simpy.Environment()
                live = job.config.mode == LIVE
                engine = SimulatedEngine(env, _with_any_drafts(parts.models) if live else parts.models)
                with in_arm(job.arm.name, job.config), of_kind(kind.name):
                    server = Server(env, 0, engine, policy.make(), parts.situation, lambda record, left_ns: None)
                    first = server.decisions[0].deployment
                    _check_threshold(parts, first, job.config)
                    if live:
                        from helios_sim.study.live import check_judged

                        check_judged(job.config, kind.name, first.exit_rule)


def _with_any_drafts(models: Mapping[str, ModelData]) -> dict[str, ModelData]:
    """Return models with traces that take any drafter: live, serving finds out which drafts are accepted."""
    found = {}
    for name, data in models.items():
        trace = data.trace.trace
        drafters = {ANY_DRAFTER: np.zeros(len(trace.task), np.bool_), **trace.drafters}
        found[name] = replace(data, trace=replace(data.trace, trace=replace(trace, drafters=drafters)))
    return found


def _check_threshold(parts: Parts, first: Deployment, config: Config) -> None:
    """Raise UserError if the exit rule of an arm's first deployment lacks recorded exits or a known cost."""
    rule, live = first.exit_rule, config.mode == LIVE
    if isinstance(rule, PerToken) and config.exits.guarantee.max_disagreement is not None:
        allowed = "null with exits.guarantee: what is promised was shown for checks at every exit"
        if rule.near is not None:
            raise UserError("policy.near_tokens", rule.near.tokens, allowed, "leave one of them out")
        if rule.checkpoints:
            raise UserError("policy.checkpoints", list(rule.checkpoints), allowed, "leave one of them out")
    if live:
        require_one_card(rule)
        if isinstance(rule, DraftModel):
            from helios_sim.study.live import check_drafter

            check_drafter(config, parts, first.active.model, rule.drafter)
        if isinstance(rule, FixedCap | PerToken | ReleaseEarly):
            require_live(rule.confidence)
        if isinstance(rule, FixedCap | ReleaseEarly):
            require_leaving(rule.confidence)
    if isinstance(rule, FixedCap | PerToken):
        data = parts.models[first.active.model]
        data.trace.trace.confident_at(rule.threshold, rule.confidence)
        data.profile.check_table(rule.confidence)


def _check_names(plan: StudyPlan) -> None:
    config, arms = plan.config, list(plan.headline.jobs)
    for name in config.headline_metrics or ():
        require_one_of("headline_metrics", name, DEFINITIONS)
    for gate in config.gates:
        require_one_of("gates.arm", gate.arm, arms)
        require_one_of("gates.metric", gate.metric, DEFINITIONS)
        if gate.over is not None:
            require_one_of("gates.over", gate.over, arms)
        if gate.low is None and gate.high is None:
            raise UserError("gates", gate.name or gate.metric, "a gate needs a bound", "set low or high")
        if gate.low is not None and gate.high is not None and gate.low > gate.high:
            allowed = f"low at most high, which is {gate.high:g}: nothing passes this gate"
            raise UserError("gates.low", gate.low, allowed, "exchange low and high")
    for published in config.published:
        point = point_at(plan, published.at)
        require_one_of("published.arm", published.arm, point.jobs)
        require_one_of("published.over", published.over or point.baseline, point.jobs)
        require_one_of("published.metric", published.metric, DEFINITIONS)
        if not published.published:
            place = published.what or published.metric
            raise UserError("published.published", place, "a row needs the published figure", "set published: 1.48")
    in_sweeps = dict.fromkeys(name for point in plan.points for name in point.jobs)
    _check_figures(config, plan.points, list(dict.fromkeys((*arms, *in_sweeps))))


def _check_figures(config: Config, points: Iterable[Point], arms: list[str]) -> None:
    axes = dict.fromkeys(name for point in points for name in point.settings)
    for figure in config.figures:
        require_one_of("figures.kind", figure.kind, FIGURES)
        if figure.kind != "quality":
            if figure.kind != "arms" and not axes:
                fix = "leave the figure out (figures=[] leaves all out), or add a sweep"
                raise UserError("figures.x", figure.x, "an axis of a sweep, and there is no sweep", fix)
            require_one_of("figures.x", figure.x, DEFINITIONS if figure.kind == "arms" else axes)
        require_one_of("figures.metric", figure.metric, DEFINITIONS)
        if figure.kind in OVER_TWO_AXES and figure.split_by is None:
            raise UserError("figures.split_by", None, f"another axis, for kind={figure.kind}", "name it")
        for key in (*figure.where, *([figure.split_by] if figure.split_by else [])):
            require_one_of("figures.where and split_by", key, axes)
        for key, value in figure.where.items():
            there = list(dict.fromkeys(point.settings[key] for point in points if key in point.settings))
            if value not in there:
                raise UserError(f"figures.where.{key}", value, f"a point of the axis: {there}", "name one of them")
        for key in figure.along:
            require_one_of("figures.along", key, axes)
        for arm in figure.arms or ():
            require_one_of("figures.arms", arm, arms)


