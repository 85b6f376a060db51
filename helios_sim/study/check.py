"""Finds what is wrong with a study's settings before anything runs or is written."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

import simpy

from helios_sim.engine.simulated import SimulatedEngine
from helios_sim.errors import UserError
from helios_sim.exits.rule import FixedCap, PerToken
from helios_sim.policy.deployment import Deployment
from helios_sim.report.metrics import DEFINITIONS
from helios_sim.serving.server import Server
from helios_sim.study.arm import in_arm
from helios_sim.study.build import Parts
from helios_sim.study.fleet import Fleet, of_kind
from helios_sim.study.live_schema import LIVE
from helios_sim.study.plan import Point, StudyPlan, point_at
from helios_sim.study.schema import Config
from helios_sim.study.shared import in_json, shared_fleet, what_counts

FIGURES = ("sweep", "load", "arms", "quality")
CUSTOM = "custom"


def check_study(plan: StudyPlan) -> None:
    """UserError for a name that means nothing here, a setting that cannot be, or an arm that cannot start.

    Points of sweeps are built but not started: what does not fit there is found when it runs, with the rest kept.
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
            built[name] = shared_fleet(job.config, job.seed)
            if job.config.mode == LIVE:
                from helios_sim.study.live import check_live

                check_live(job.config)
    for jobs in plan.headline.jobs.values():
        job = jobs[0]
        for kind in built[in_json(what_counts(job.config))].kinds:
            policy = kind.policy or job.arm.policy
            # one plans for all requests when it starts, the other is not ours to start twice
            if not policy.kind.is_bound and policy.name != CUSTOM:
                parts, env = kind.parts, simpy.Environment()
                engine = SimulatedEngine(env, parts.models)
                with in_arm(job.arm.name, job.config), of_kind(kind.name):
                    server = Server(env, 0, engine, policy.make(), parts.situation, lambda record, left_ns: None)
                    _check_threshold(parts, server.decisions[0].deployment)


def _check_threshold(parts: Parts, first: Deployment) -> None:
    """UserError where recorded exits cannot answer the rule of an arm's first deployment, or nobody knows its cost."""
    rule = first.exit_rule
    if isinstance(rule, FixedCap | PerToken):
        data = parts.models[first.active.model]
        data.trace.trace.confident_at(rule.threshold, rule.confidence)
        data.profile.check_table(rule.confidence)


def _check_names(plan: StudyPlan) -> None:
    config, arms = plan.config, list(plan.headline.jobs)
    for name in config.headline_metrics or ():
        _known("headline_metrics", name, DEFINITIONS)
    for gate in config.gates:
        _known("gates.arm", gate.arm, arms)
        _known("gates.metric", gate.metric, DEFINITIONS)
        if gate.over is not None:
            _known("gates.over", gate.over, arms)
        if gate.low is None and gate.high is None:
            raise UserError("gates", gate.name or gate.metric, "a gate needs a bound", "set low or high")
    for published in config.published:
        point = point_at(plan, published.at)
        _known("published.arm", published.arm, point.jobs)
        _known("published.over", published.over or point.baseline, point.jobs)
        _known("published.metric", published.metric, DEFINITIONS)
    _check_figures(config, plan.points, arms)


def _check_figures(config: Config, points: Iterable[Point], arms: list[str]) -> None:
    axes = dict.fromkeys(name for point in points for name in point.settings)
    for figure in config.figures:
        _known("figures.kind", figure.kind, FIGURES)
        if figure.kind != "quality":
            _known("figures.x", figure.x, DEFINITIONS if figure.kind == "arms" else axes)
        _known("figures.metric", figure.metric, DEFINITIONS)
        for key in (*figure.where, *([figure.split_by] if figure.split_by else [])):
            _known("figures.where and split_by", key, axes)
        for arm in figure.arms or ():
            _known("figures.arms", arm, arms)


def _known(key: str, name: str, names: Iterable[str]) -> None:
    names = list(names)
    if name in names:
        return
    close = get_close_matches(name, names, n=1)
    fix = f"you may have meant {close[0]}" if close else f"set {key} to one of these"
    raise UserError(key, name, f"one of {', '.join(names) or 'none: there are no sweeps'}", fix)
