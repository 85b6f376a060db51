"""A capacity plan from its settings to its result: for every load, card and arm the fewest replicas that keep the SLOs.

All searches go on together, so that the runs that they ask for can share the cores, and every run is kept in the
folder's journal. Then the advised fleet of each load meets higher and higher loads, until it keeps the SLOs no longer.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from helios_sim.profile.resolve import TIMES_FROM
from helios_sim.provenance import Assumption, Provenance
from helios_sim.report.capacity import (
    ATTAINMENT,
    TOLD,
    Advice,
    CapacityResult,
    FleetPlan,
    Tried,
    all_kept,
    print_capacity,
    rule,
)
from helios_sim.report.compare import attainment_of, interval_of, intervals_of
from helios_sim.report.metrics import Slo, mean_metrics
from helios_sim.report.result import ServedWorkload
from helios_sim.report.terminal import say
from helios_sim.report.write import write_capacity
from helios_sim.study.advice import advised_plan, reservations_of, verdict, why_not
from helios_sim.study.capacity_plan import CapacityPlan, plan_capacity
from helios_sim.study.command import end, processes, provenance
from helios_sim.study.fleet import shared_fleet
from helios_sim.study.jobs import Job, assumptions_of, inputs_of, make_ready, notices_of
from helios_sim.study.runner import task_of
from helios_sim.study.schema import Config
from helios_sim.study.sweep import Outcome, OutcomeLines, StateLines, figures_of, outcome_of
from helios_sim.study.workload import statement
from helios_sim.vary.least import Answers, Found, least, together
from helios_sim.vary.runner import Journal, OnDone, at_work_in, progress, run_tasks
from helios_sim.vary.workers import Place, Workers

STEP = 1.02  # from one load to the next, where the largest is looked for
MOST_TIMES = 16.0  # the planned load, up to which it is looked for


class _Case(NamedTuple):
    """A fleet of one option under one load."""

    option: int  # its place in the plan
    load: float
    replicas: int


def capacity(config: Config) -> CapacityResult:
    """Plan from Python, without files. UserError where settings cannot be run."""
    return run_plan(plan_capacity(config), None, {"seeds": list(config.seeds)}, lambda task, outcome, kept: None)


def run_capacity(config: Config, folder: Path) -> int:
    """Runs, writes and prints. Returns 0. UserError before anything is written, or where nothing can run."""
    plan = plan_capacity(config)
    lines = StateLines("runs", "a run failed")
    with at_work_in(folder):
        with redirect_stdout(sys.stderr), progress(config.name, None, lines) as on_done:
            result = run_plan(plan, folder, provenance(config), on_done)
        lines.state()
        if sys.stderr.isatty():
            say("Writing the table, the figures and the page ...", sys.stderr)
        summary = write_capacity(result, folder, config.figures_as)
    return end(lambda: _show(result), folder, summary)


def _show(result: CapacityResult) -> None:
    print_capacity(result)
    for name, source in result.inputs.items():
        if TIMES_FROM in source.details:
            say(f"{name}: times from {source.details[TIMES_FROM]}")
    for sentence in (*result.verdict, *result.warnings):
        say(sentence)


def run_plan(
    plan: CapacityPlan, folder: Path | None, made: Mapping[str, Any], on_done: OnDone[Job, Outcome]
) -> CapacityResult:
    """Runs what the folder's journal does not hold. UserError where the machine gives too little for it."""
    job = plan.jobs(plan.options[plan.possible[0]], plan.config.capacity.loads[0], 1)[0]
    make_ready(job, plan.requests(job) * len(plan.possible) * 10 * len(plan.config.seeds))
    with closing(Workers(Place("processes", processes(plan.config), setting="jobs"))) as workers:
        fleets = _Fleets(plan, Journal(folder, OutcomeLines()), workers, on_done)
        found = together(
            {
                (place, load): least(
                    plan.config.capacity.most_replicas,
                    beyond=plan.config.capacity.beyond,
                    every=plan.config.capacity.search == "every",
                )
                for place in plan.possible
                for load in plan.config.capacity.loads
            },
            lambda asked: fleets.answers({key: [_Case(*key, n) for n in numbers] for key, numbers in asked.items()}),
        )
        plans = tuple(
            _fleet_plan(plan, place, load, found.get((place, load)), fleets)
            for load in plan.config.capacity.loads
            for place in range(len(plan.options))
        )
        advice = _advice(plan, plans, fleets)
    return _result(plan, plans, advice, tuple(fleets.tried.values()), made)


def evaluate(job: Job) -> Outcome:
    """Metrics of one run, and their intervals within it. Never raises an error of the run's own."""

    def figures() -> tuple[Any, Any]:
        records, metrics = figures_of(job)
        slo = Slo(**vars(job.config.slo))
        return metrics, {**intervals_of([(records, metrics)], TOLD), ATTAINMENT: attainment_of(records, slo)}

    return outcome_of(figures)


@dataclass(slots=True)
class _Fleets:
    """Fleets that were tried, each run once."""

    plan: CapacityPlan
    journal: Journal[Outcome]
    workers: Workers
    on_done: OnDone[Job, Outcome]
    tried: dict[_Case, Tried] = field(default_factory=dict)

    def answers(self, asked: Mapping[Any, Sequence[_Case]]) -> dict[Any, dict[int, Answers]]:
        """For each search whether the fleets that it asks for keep the SLOs: in the mean, then under each seed."""
        found = self.of([case for cases in asked.values() for case in cases])
        return {
            key: {case.replicas: (found[case].kept, *found[case].kept_by_seed) for case in cases}
            for key, cases in asked.items()
        }

    def of(self, cases: Sequence[_Case]) -> dict[_Case, Tried]:
        new = [case for case in dict.fromkeys(cases) if case not in self.tried]
        tasks = {}
        for case in new:
            option = self.plan.options[case.option]
            about = {"card": option.card, "arm": option.arm, "load": case.load, "replicas": case.replicas}
            jobs = self.plan.jobs(option, case.load, case.replicas)
            tasks[case] = [task_of((job,), {**about, "seed": job.seed}, job) for job in jobs]
        outcomes = run_tasks(
            evaluate, [task for of_case in tasks.values() for task in of_case], self.journal, self.workers, self.on_done
        )
        for case, of_case in tasks.items():
            self.tried[case] = self._tried(case, [outcomes[task.key] for task in of_case])
        return {case: self.tried[case] for case in cases}

    def _tried(self, case: _Case, outcomes: Sequence[Outcome]) -> Tried:
        option, error = self.plan.options[case.option], next((it.error for it in outcomes if it.error), None)
        place = (case.load, self.plan.rate_at(case.load), option.card, option.arm, case.replicas)
        runs = [it.metrics for it in outcomes if it.metrics is not None]
        if error is not None:
            return Tried(*place, {}, {}, kept=False, kept_by_seed=(False,) * len(outcomes), error=error)
        means = mean_metrics(runs)
        intervals = outcomes[0].intervals if len(runs) == 1 else {
            name: interval_of(name, [run[name] for run in runs])
            for name in TOLD
            if means[name] is not None
        }
        kept = all_kept(self.plan.requirements, means)
        by_seed = tuple(all_kept(self.plan.requirements, run) for run in runs)
        return Tried(*place, means, intervals, kept, by_seed)


def _fleet_plan(plan: CapacityPlan, place: int, load: float, found: Found | None, fleets: _Fleets) -> FleetPlan:
    option = plan.options[place]
    about = (load, plan.rate_at(load), option.card, option.cards_per_replica, option.arm)
    if found is None:
        return FleetPlan(*about, None, why_not=option.why_not)
    replicas, *by_seed = found.least
    at = fleets.tried[_Case(place, load, max(found.tried) if replicas is None else replicas)]
    slo = Slo(**vars(plan.config.slo))
    reason = None if replicas is not None else at.error or why_not(plan.requirements, slo, at)
    return FleetPlan(*about, replicas, tuple(by_seed), at, reason)


def _advice(plan: CapacityPlan, plans: Sequence[FleetPlan], fleets: _Fleets) -> tuple[Advice, ...]:
    """The advised fleet of each load, and how far it goes: loads are STEP apart, and the search is one for numbers."""
    steps = math.ceil(math.log(MOST_TIMES) / math.log(STEP))
    chosen: dict[int, FleetPlan] = {}
    for load in plan.config.capacity.loads:
        best = advised_plan(plan, [it for it in plans if it.load == load])
        if best is not None:
            chosen[plans.index(best)] = best

    def case(place: int, number: int) -> _Case:
        """Numbers go from the largest load down to the planned one, so that the later ones keep the SLOs."""
        it = chosen[place]
        assert it.replicas is not None
        return _Case(place % len(plan.options), it.load * STEP ** (steps + 1 - number), it.replicas)

    def answer(asked: Mapping[int, Sequence[int]]) -> dict[int, dict[int, Answers]]:
        cases = {place: {number: case(place, number) for number in numbers} for place, numbers in asked.items()}
        found = fleets.of([one for of_place in cases.values() for one in of_place.values()])
        return {
            place: {n: (found[one].kept, *found[one].kept_by_seed) for n, one in of_place.items()}
            for place, of_place in cases.items()
        }

    beyond = plan.config.capacity.beyond
    found = together({place: least(steps + 1, start=steps + 1, beyond=beyond) for place in chosen}, answer)
    advice = []
    for place, it in chosen.items():
        rates = [None if n is None else plan.rate_at(case(place, n).load) for n in found[place].least]
        assert rates[0] is not None
        met = sorted((fleets.tried[case(place, n)] for n in found[place].tried), key=lambda tried: tried.load)
        advice.append(Advice(it, rates[0], tuple(rates[1:]), found[place].least[0] == 1, tuple(met)))
    return tuple(advice)


def _result(
    plan: CapacityPlan,
    plans: tuple[FleetPlan, ...],
    advice: tuple[Advice, ...],
    tried: tuple[Tried, ...],
    made: Mapping[str, Any],
) -> CapacityResult:
    config, slo = plan.config, Slo(**vars(plan.config.slo))
    jobs = [plan.jobs(plan.options[place], config.capacity.loads[0], 1)[0] for place in plan.possible]
    inputs: dict[str, Provenance] = {}
    assumptions: dict[Assumption, None] = {}
    notices: dict[str, None] = dict.fromkeys(plan.notices)
    for job in jobs:
        fleet = shared_fleet(job.config, job.seed)
        inputs |= inputs_of(fleet)
        assumptions |= dict.fromkeys(assumptions_of(job.config, fleet))
        notices |= dict.fromkeys(notices_of(fleet, job.config))
    result = CapacityResult(
        experiment=config.name,
        title=config.title or config.name,
        question=config.question,
        conditions=plan.conditions,
        verdict=verdict(plan, plans, advice),
        rule=rule(plan.requirements, slo),
        slo=slo,
        requirements=plan.requirements,
        plans=plans,
        tried=tried,
        advice=advice,
        workload=ServedWorkload(statement(config.workload), plan.requests(jobs[0]), plan.rate_at(1.0)),
        inputs=inputs,
        provenance=made,
        assumptions=tuple(assumptions),
        warnings=tuple(notices),
        seeds=len(config.seeds),
    )
    return reservations_of(result)
