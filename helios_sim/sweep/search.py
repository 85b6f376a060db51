"""Asks Optuna for designs, a generation at a time.

A generation is asked for as a whole and told in the order in which it was asked. Which designs come therefore depends
on the seed and the size of a generation alone, not on how many workers there are or which ends first, and a search
that starts again asks for the same designs, whose outcomes it finds in the journal: nothing else has to be kept.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from helios_sim.sweep.schema import DesignsConfig
from helios_sim.vary.axis import Axis, Choice, Range, choose
from helios_sim.vary.workers import need

Costs = Sequence[float]
Answer = Callable[[Sequence[Choice]], Sequence[Costs]]  # costs to be made small, in order; infinite: failed


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
