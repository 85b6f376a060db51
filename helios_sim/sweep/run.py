"""A sweep from its plan to its result: every design once, finished ones from the journal. Writes only the journal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from helios_sim.errors import UserError
from helios_sim.report.designs import Design, DesignsResult, cost
from helios_sim.report.result import ServedWorkload
from helios_sim.study.job import Job, assumptions_of, inputs_of, notices_of
from helios_sim.study.ready import make_ready
from helios_sim.study.schema import Config
from helios_sim.study.shared import shared_fleet
from helios_sim.study.verdict import conditions, offered_requests_per_s
from helios_sim.sweep.backends import Workers
from helios_sim.sweep.journal import Journal, Outcome
from helios_sim.sweep.plan import SweepPlan, plan_sweep
from helios_sim.sweep.search import search
from helios_sim.sweep.space import Point
from helios_sim.sweep.verdict import sentences

USUAL_METRICS = ("tpot_s_mean", "batch_mean", "layers_per_token")  # beside the objectives
OnDone = Callable[[Outcome, bool], None]  # true: kept from before, not run now


def sweep(config: Config) -> DesignsResult:
    """From Python, without files: for notebooks and scripts. UserError where settings cannot be run."""
    return run_plan(plan_sweep(lambda changes: config), None, {"seeds": list(config.seeds)}, lambda outcome, kept: None)


def run_plan(plan: SweepPlan, folder: Path | None, provenance: Mapping[str, Any], on_done: OnDone) -> DesignsResult:
    """Runs what the folder's journal does not hold. UserError when a library is missing, or every design failed."""
    workers = Workers(plan.config.sweep)
    try:
        evaluations = Evaluations(plan, Journal(folder), workers, on_done)
        job, runs = next(iter(plan.references.values()))[0], plan.n_designs * len(plan.config.seeds)
        make_ready(job, runs * shared_fleet(job.config, job.seed).parts.workload.requests)
        if plan.points is None:
            search(plan.parameters, plan.config.sweep, lambda points: [_costs(plan, d) for d in evaluations(points)])
        else:
            evaluations(plan.points)
        references = evaluations.references()
    finally:
        workers.close()
    designs = tuple(evaluations.designs.values())
    if all(design.error is not None for design in designs):
        raise UserError("sweep", f"{len(designs)} designs", f"all failed, the first: {designs[0].error}", "mend that")
    return _result(plan, designs, references, provenance)


class Evaluations:
    """Designs by what they are, in the order in which they were first asked for; each is run once."""

    def __init__(self, plan: SweepPlan, journal: Journal, workers: Workers, on_done: OnDone) -> None:
        self.designs: dict[str, Design] = {}  # by key
        self._plan, self._journal, self._workers, self._on_done = plan, journal, workers, on_done

    def __call__(self, points: Sequence[Point]) -> list[Design]:
        """In the order of the points."""
        named: dict[str, tuple[dict[str, Any], Sequence[Job]]] = {}
        impossible: dict[str, Outcome] = {}
        keys = []
        for point in points:
            shown = dict(point.shown)
            try:
                jobs = self._plan.jobs(point)
                key = _key(jobs)
                named[key] = shown, jobs
            except UserError as error:
                key = json.dumps(shown)
                if key not in self.designs:
                    impossible[key] = Outcome(None, str(error), 0.0)
                    self._on_done(impossible[key], False)
            keys.append(key)
            self.designs.setdefault(key, Design(f"#{len(self.designs) + 1}", shown, None))
        outcomes = impossible | self._outcomes({k: v for k, v in named.items() if _unknown(self.designs[k])})
        for key, outcome in outcomes.items():
            before = self.designs[key]
            self.designs[key] = Design(before.name, before.parameters, outcome.metrics, outcome.error)
        return [self.designs[key] for key in keys]

    def references(self) -> tuple[Design, ...]:
        """Every arm at the study's own settings."""
        keys = {name: _key(jobs) for name, jobs in self._plan.references.items()}
        outcomes = self._outcomes({keys[name]: ({"arm": name}, jobs) for name, jobs in self._plan.references.items()})
        found = {name: outcomes[key] for name, key in keys.items()}
        return tuple(Design(name, {}, outcome.metrics, outcome.error) for name, outcome in found.items())

    def _outcomes(self, named: Mapping[str, tuple[Mapping[str, Any], Sequence[Job]]]) -> dict[str, Outcome]:
        found: dict[str, Outcome] = {}
        for key in named:
            outcome = self._journal.get(key)
            if outcome is not None:
                found[key] = outcome
                self._on_done(outcome, True)
        missing = {key: jobs for key, (_, jobs) in named.items() if key not in found}
        with closing(self._workers(missing)) as outcomes:
            for key, outcome in outcomes:
                found[key] = outcome
                self._journal.add(key, named[key][0], outcome)
                self._on_done(outcome, False)
        return found


def _unknown(design: Design) -> bool:
    return design.metrics is None and design.error is None


def _key(jobs: Sequence[Job]) -> str:
    """The same for the same result."""
    return hashlib.sha256(" ".join(job.key for job in jobs).encode()).hexdigest()[:24]


def _costs(plan: SweepPlan, design: Design) -> list[float]:
    metrics = design.metrics
    return [cost(name, None if metrics is None else metrics[name]) for name in plan.config.sweep.objectives]


def _result(
    plan: SweepPlan, designs: tuple[Design, ...], references: tuple[Design, ...], provenance: Mapping[str, Any]
) -> DesignsResult:
    config, objectives = plan.config, tuple(plan.config.sweep.objectives)
    job = plan.references[plan.arm][0]
    fleet = shared_fleet(job.config, job.seed)
    shown = config.headline_metrics or USUAL_METRICS
    failed = [f"{d.name} failed: {d.error}" for d in references if d.error is not None]
    return DesignsResult(
        experiment=config.name,
        title=config.title or config.name,
        question=config.question,
        conditions=conditions(config),
        verdict=sentences(plan.arm, objectives, designs, references),
        arm=plan.arm,
        parameters=tuple(parameter.name for parameter in plan.parameters),
        objectives=objectives,
        shown_metrics=tuple(name for name in shown if name not in objectives),
        designs=designs,
        references=references,
        workload=ServedWorkload(
            config.workload.statement, fleet.parts.workload.requests, offered_requests_per_s(config)
        ),
        inputs=inputs_of(fleet),
        provenance=provenance,
        assumptions=assumptions_of(config, fleet),
        warnings=(*notices_of(fleet.parts.workload), *failed, *_cautions(config)),
    )


def _cautions(config: Config) -> list[str]:
    found = []
    if len(config.seeds) == 1:
        found.append(
            "One seed: designs that lie close to each other may change places under other requests. Run the chosen "
            "ones again with several seeds before deciding between neighbours."
        )
    return found
