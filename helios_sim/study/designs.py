"""What a sweep of designs is going to run: the arm that is designed, its parameters, the arms beside it, the search.

A generation of a search is asked for as a whole and told in the order in which it was asked. Which designs come
therefore depends on the seed and the size of a generation alone, not on how many workers there are or which ends first,
and a search that starts again asks for the same designs and finds their outcomes in the journal."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from helios_sim.errors import UserError, require_one_of
from helios_sim.report.designs import FIXED_COLUMNS
from helios_sim.report.metrics import DEFINITIONS, Better
from helios_sim.study.fleet import shared_fleet
from helios_sim.study.jobs import Job
from helios_sim.study.modes import DesignsConfig
from helios_sim.study.plan import check_axes, check_study, entries_of, jobs_of, plan_study
from helios_sim.study.schema import Config
from helios_sim.vary.axis import Axis, Choice, Range, axes_of, choose, grid
from helios_sim.vary.workers import need

SAME_FOR_ALL = ("seeds", "auto_seeds", "sweep", "name", "jobs")  # settings that no design may have for itself
NOT_OF_A_SWEEP = ("sweeps", "figures", "published", "gates")
Costs = Sequence[float]
Answer = Callable[[Sequence[Choice]], Sequence[Costs]]  # costs to be made small, in order; infinite: failed


@dataclass(frozen=True, slots=True)
class SweepPlan:
    config: Config
    arm: str
    parameters: tuple[Axis, ...]
    references: Mapping[str, Sequence[Job]]  # every arm at the study's own settings, a job for each seed
    designs: tuple[Choice, ...] | None  # of a grid; None: a search asks for them

    @property
    def n_designs(self) -> int:
        """How many there are at most: a search may ask for one twice."""
        return self.config.sweep.designs if self.designs is None else len(self.designs)

    def jobs(self, design: Choice) -> Sequence[Job]:
        """The design under every seed. UserError where its settings cannot be."""
        return jobs_of(self.config, self.arm, design.changes)


def plan_sweep(config: Config) -> SweepPlan:
    """UserError where the study or its sweep is not what it should be; nothing has run or been written by then."""
    study = plan_study(config)
    for key in NOT_OF_A_SWEEP:
        if getattr(config, key):
            allowed = "a sweep of designs has none: it draws the front"
            raise UserError(key, f"{len(getattr(config, key))} given", allowed, f"leave {key} or sweep.parameters out")
    _check_objectives(config)
    parameters = axes_of("sweep.parameters", config.sweep.parameters)
    check_axes(parameters)
    for parameter in parameters:
        _check_names(parameter)
    arms = study.headline.jobs
    arm = config.sweep.arm or _arm_of_policy(config, parameters) or config.subject or list(arms)[-1]
    require_one_of("sweep.arm", arm, arms)
    if arms[arm][0].arm.overrides:
        allowed = "the arm that is designed has no overrides of its own"
        raise UserError(f"arms.{arm}.overrides", "given", allowed, "set them for the study, or name another sweep.arm")
    check_study(study)
    plan = SweepPlan(config, arm, parameters, arms, tuple(grid(parameters)) if config.sweep.method == "grid" else None)
    for parameter in parameters:
        _check_parameter(plan, parameter)
    return plan


def _arm_of_policy(config: Config, parameters: Sequence[Axis]) -> str | None:
    """The arm that `policy` adds, where a parameter is one of its settings: no other arm has them."""
    of_policy = any(path.startswith("policy.") for parameter in parameters for path in parameter.settings)
    return next((name for name in entries_of(config) if name not in config.arms), None) if of_policy else None


def _check_names(parameter: Axis) -> None:
    if parameter.name in DEFINITIONS or parameter.name in FIXED_COLUMNS:
        allowed = "is a column of the results already"
        raise UserError("sweep.parameters", parameter.name, allowed, "choose another name")
    for path in parameter.settings:
        if path.split(".")[0] in SAME_FOR_ALL:
            allowed = "is the same for all designs, so that they see the same requests"
            raise UserError(f"{parameter.key}.settings", path, allowed, "leave it out")


def _check_parameter(plan: SweepPlan, parameter: Axis) -> None:
    """UserError where none of its values can be, the rest being as it is, or where all that can be are the same."""
    values = parameter.values
    first: UserError | None = None
    keys: list[str] = []
    for value in (values.at(values.low), values.at(values.high)) if isinstance(values, Range) else values:
        try:
            keys.append(_key(plan, parameter.changes(value)))
        except UserError as error:
            first = first or error.about(f"{parameter.key}: {error.key}")
        if len(set(keys)) > 1:
            return
    if not keys:
        assert first is not None
        raise first
    of_others = all(path.startswith("arms.") and not path.startswith(f"arms.{plan.arm}.")
                    for path in parameter.settings)  # fmt: skip
    if len(keys) > 1 or of_others:  # one value alone has no other to differ from
        allowed = f"settings of the arm that is designed: they change nothing of {plan.arm}"
        raise UserError(f"{parameter.key}.settings", list(parameter.settings), allowed, "name another in sweep.arm")


def _key(plan: SweepPlan, changes: Mapping[str, Any]) -> str:
    """What tells one design from another. UserError where its settings cannot be."""
    job = plan.jobs(Choice({}, changes))[0]
    job.arm.policy.make()
    shared_fleet(job.config, job.seed)
    return job.settings_key


def _check_objectives(config: Config) -> None:
    for key, names in (("sweep.objectives", config.sweep.objectives), ("headline_metrics", config.headline_metrics)):
        for name in names or ():
            require_one_of(key, name, DEFINITIONS)
    for name in config.sweep.objectives:
        if DEFINITIONS[name].better is Better.NEITHER:
            allowed = "a metric of which more or less is better"
            raise UserError("sweep.objectives", name, allowed, "show it with headline_metrics instead")


def search(parameters: Sequence[Axis], config: DesignsConfig, answer: Answer) -> None:
    """Asks for `config.designs` points in all, some of them possibly twice. UserError without Optuna."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a library that it loads advises on progress bars in notebooks
        optuna = need("optuna", "sweep.method", config.method)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if config.sampler == "nsga2":
        sampler = optuna.samplers.NSGAIISampler(population_size=max(2, config.generation), seed=config.seed)
    else:
        sampler = optuna.samplers.TPESampler(seed=config.seed)
    study = optuna.create_study(directions=["minimize"] * len(config.objectives), sampler=sampler)
    space = {parameter.name: _distribution(optuna.distributions, parameter) for parameter in parameters}
    asked = 0
    while asked < config.designs:
        trials = [study.ask(space) for _ in range(min(config.generation, config.designs - asked))]
        choices = [choose(parameters, [trial.params[p.name] for p in parameters]) for trial in trials]
        for trial, costs in zip(trials, answer(choices), strict=True):
            if all(map(math.isfinite, costs)):
                study.tell(trial, list(costs))
            else:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
        asked += len(trials)


def _distribution(distributions: Any, parameter: Axis) -> Any:
    """Numbers in ascending order keep their order; anything else is a choice among names."""
    values = parameter.values
    if isinstance(values, Range):
        if values.whole:
            step = 1 if values.step is None else int(values.step)
            return distributions.IntDistribution(int(values.low), int(values.high), log=values.log, step=step)
        return distributions.FloatDistribution(values.low, values.high, log=values.log, step=values.step)
    if all(type(value) in (int, float) for value in values) and list(values) == sorted(values):
        return distributions.IntDistribution(0, len(values) - 1)
    return distributions.CategoricalDistribution(range(len(values)))
