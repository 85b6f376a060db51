"""Plans a sweep of designs: the arm that is designed, its parameters, the arms beside it, the search.

A search asks for a generation as a whole and is told its outcomes in the order in which it asked. Its designs therefore
depend on the seed and the size of a generation alone, not on the number of workers or which of them ends first. A
search that starts again asks for the same designs and finds their outcomes in the journal."""

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

SAME_FOR_ALL = ("seeds", "auto_seeds", "sweep", "name", "jobs")  # settings that a design may not change
NOT_OF_A_SWEEP = ("sweeps", "figures", "published", "gates")
Costs = Sequence[float]
Answer = Callable[[Sequence[Choice]], Sequence[Costs]]  # costs to minimise, in order; infinite: failed


@dataclass(frozen=True, slots=True)
class SweepPlan:
    config: Config
    arm: str
    parameters: tuple[Axis, ...]
    references: Mapping[str, Sequence[Job]]  # every arm at the study's own settings, a job for each seed
    designs: tuple[Choice, ...] | None  # designs of a grid; None if a search asks for them

    @property
    def n_designs(self) -> int:
        """Largest number of designs: a search may ask for one twice."""
        return self.config.sweep.designs if self.designs is None else len(self.designs)

    def jobs(self, design: Choice) -> Sequence[Job]:
        """Return the jobs of a design, one for each seed. UserError if its settings cannot be."""
        return jobs_of(self.config, self.arm, design.changes)


def plan_sweep(config: Config) -> SweepPlan:
    """Check the settings and plan. UserError for wrong ones; nothing has run or been written by then."""
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
    """Return the arm that `policy` adds, if a parameter is one of its settings, which no other arm has; else None."""
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
    """Raise UserError if no value of a parameter can run with the other settings, or if it changes nothing."""
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
    """Return a key that differs between different designs. UserError if the settings cannot be."""
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
    """Ask `answer` for `config.designs` points in all, some of them possibly twice. UserError without Optuna."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it warns about progress bars in notebooks
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
    """Return Optuna's distribution: numbers in ascending order keep their order, other values are mere names."""
    values = parameter.values
    if isinstance(values, Range):
        if values.whole:
            step = 1 if values.step is None else int(values.step)
            return distributions.IntDistribution(int(values.low), int(values.high), log=values.log, step=step)
        return distributions.FloatDistribution(values.low, values.high, log=values.log, step=values.step)
    if all(type(value) in (int, float) for value in values) and list(values) == sorted(values):
        return distributions.IntDistribution(0, len(values) - 1)
    return distributions.CategoricalDistribution(range(len(values)))
