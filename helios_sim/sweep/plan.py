"""What a sweep is going to run: the arm that is designed, its parameters, the arms beside it. Knows no result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from helios_sim.errors import UserError
from helios_sim.report.designs import FIXED_COLUMNS
from helios_sim.report.metrics import DEFINITIONS, Better
from helios_sim.study.arm import policy_of
from helios_sim.study.check import check_study
from helios_sim.study.job import Job
from helios_sim.study.plan import Variant, arms_of, plan_study
from helios_sim.study.schema import Config
from helios_sim.study.shared import shared_fleet
from helios_sim.sweep.settings import with_settings
from helios_sim.sweep.space import Parameter, Point, Range, grid, parameters_of

SAME_FOR_ALL = ("seeds", "sweep", "name", "jobs")  # settings that no design may have for itself
NOT_OF_A_SWEEP = ("sweeps", "figures", "published", "gates")


@dataclass(frozen=True, slots=True)
class SweepPlan:
    config: Config
    arm: str
    parameters: tuple[Parameter, ...]
    references: Mapping[str, tuple[Job, ...]]  # every arm at the study's own settings, a job for each seed
    points: tuple[Point, ...] | None  # of a grid; None: a search asks for them

    @property
    def n_designs(self) -> int:
        """How many there are at most: a search may ask for one twice."""
        return self.config.sweep.designs if self.points is None else len(self.points)

    def jobs(self, point: Point) -> tuple[Job, ...]:
        """The design under every seed. UserError where its settings cannot be."""
        config = with_settings(self.config, point.changes)
        arms = arms_of(config)
        name = self.arm if self.arm in config.arms else list(arms)[-1]  # the one that `policy` adds comes last
        entry = {key: value for key, value in arms[name].items() if key != "overrides"}
        return tuple(Job(self.arm, entry, config, seed) for seed in config.seeds)


def plan_sweep(variant: Variant) -> SweepPlan:
    """UserError where the study or its sweep is not what it should be; nothing has run or been written by then."""
    study = plan_study(variant)
    config = study.config
    for key in NOT_OF_A_SWEEP:
        if getattr(config, key):
            allowed = "a sweep of designs has none: it draws the front"
            raise UserError(key, f"{len(getattr(config, key))} given", allowed, f"leave {key} or sweep.parameters out")
    _check_objectives(config)
    parameters = parameters_of(config.sweep.parameters)
    for parameter in parameters:
        _check_names(parameter)
    arms = study.headline.jobs
    arm = config.sweep.arm or config.subject or list(arms)[-1]
    if arm not in arms:
        raise UserError("sweep.arm", arm, f"one of the arms {', '.join(arms)}", "set sweep.arm to one of these")
    if config.arms.get(arm, {}).get("overrides"):
        allowed = "the arm that is designed has no overrides of its own"
        raise UserError(f"arms.{arm}.overrides", "given", allowed, "set them for the study, or name another sweep.arm")
    check_study(study)
    points = tuple(grid(parameters)) if config.sweep.method == "grid" else None
    plan = SweepPlan(config, arm, parameters, arms, points)
    for parameter in parameters:
        _check_parameter(plan, parameter)
    return plan


def _check_names(parameter: Parameter) -> None:
    if parameter.name in DEFINITIONS or parameter.name in FIXED_COLUMNS:
        allowed = "is a column of the results already"
        raise UserError("sweep.parameters", parameter.name, allowed, "choose another name")
    for path in parameter.settings:
        if path.split(".")[0] in SAME_FOR_ALL:
            key = f"sweep.parameters.{parameter.name}.settings"
            raise UserError(
                key, path, "is the same for all designs, so that they see the same requests", "leave it out"
            )


def _check_parameter(plan: SweepPlan, parameter: Parameter) -> None:
    """UserError where none of its values can be, the rest being as it is: a wrong name, or a wrong kind of value."""
    values = parameter.values
    first: UserError | None = None
    for value in (values.at(values.low), values.at(values.high)) if isinstance(values, Range) else values:
        try:
            _try(plan, parameter.changes(value))
            return
        except UserError as error:
            first = first or error.about(f"sweep.parameters.{parameter.name}: {error.key}")
    assert first is not None
    raise first


def _try(plan: SweepPlan, changes: Mapping[str, Any]) -> None:
    job = plan.jobs(Point({}, changes))[0]
    policy_of(job.entry, job.config)
    shared_fleet(job.config, job.seed)


def _check_objectives(config: Config) -> None:
    for key, names in (("sweep.objectives", config.sweep.objectives), ("headline_metrics", config.headline_metrics)):
        for name in names or ():
            if name not in DEFINITIONS:
                close = get_close_matches(name, DEFINITIONS, n=1)
                fix = f"you may have meant {close[0]}" if close else "the page lists all of them with their meanings"
                raise UserError(key, name, "no such metric", fix)
    for name in config.sweep.objectives:
        if DEFINITIONS[name].better is Better.NEITHER:
            allowed = "a metric of which more or less is better"
            raise UserError("sweep.objectives", name, allowed, "show it with headline_metrics instead")
