"""Runs a capacity plan: finds the fewest replicas that keep the SLOs for every load, card and arm.

All searches go on together, so that their runs can share the cores, and every run is kept in the folder's journal. Then
the advised fleet of each load meets higher and higher loads, until it no longer keeps the SLOs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from helios_sim.profile.resolve import TIMES_FROM
from helios_sim.profile.spec import TimeBand
from helios_sim.provenance import Assumption, Provenance
from helios_sim.report.capacity import (
    ATTAINMENT,
    ON,
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
from helios_sim.report.metrics import mean_metrics
from helios_sim.report.result import ServedWorkload
from helios_sim.report.terminal import say
from helios_sim.report.write import write_capacity
from helios_sim.request import Slo
from helios_sim.study.advice import advised_plan, reservations_of, verdict, why_not
from helios_sim.study.band import band_of, possible
from helios_sim.study.capacity_plan import CapacityPlan, plan_capacity
from helios_sim.study.command import end, processes, provenance, with_read
from helios_sim.study.fleet import shared_fleet
from helios_sim.study.jobs import Job, assumptions_of, inputs_of, make_ready, notices_of
from helios_sim.study.runner import task_of
from helios_sim.study.schema import NONE, Config
from helios_sim.study.sweep import Outcome, OutcomeLines, StateLines, figures_of, outcome_of
from helios_sim.study.workload import statement
from helios_sim.vary.least import Answers, Found, Search, least, together
from helios_sim.vary.runner import Journal, OnDone, at_work_in, progress, run_tasks
from helios_sim.vary.workers import Place, Workers

STEP = 1.02  # factor from one load to the next in the search for the largest load
MOST_TIMES = 16.0  # times the planned load at which that search ends

_Key = TypeVar("_Key")


class _Case(NamedTuple):
    """A fleet of one option under one load."""

    option: int  # its place in the plan
    load: float
    replicas: int
    time_factor: float = 1.0


def capacity(config: Config) -> CapacityResult:
    """Plan from Python, without files. Raises UserError if settings cannot be run."""
    return run_plan(plan_capacity(config), None, {"seeds": list(config.seeds)}, lambda task, outcome, kept: None)


def run_capacity(config: Config, folder: Path) -> int:
    """Run, write and print a plan. Returns 0. UserError before anything is written, or if nothing can run."""
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
    """Run what the folder's journal does not hold. Raises UserError if the machine gives too little for it."""
    job = plan.jobs(plan.options[plan.possible[0]], plan.config.capacity.loads[0], 1)[0]
    make_ready(job, plan.requests(job) * len(plan.possible) * 10 * len(plan.config.seeds))
    with closing(Workers(Place("processes", processes(plan.config), setting="jobs"))) as workers:
        journal = Journal(folder, OutcomeLines())
        fleets = _Fleets(plan, journal, workers, on_done)
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
            lambda asked: fleets.answers({key: {n: _Case(*key, n) for n in ns} for key, ns in asked.items()}),
        )
        plans = tuple(
            _fleet_plan(plan, place, load, found.get((place, load)), fleets)
            for load in plan.config.capacity.loads
            for place in range(len(plan.options))
        )
        advice = _advice(plan, plans, fleets)
    return _result(plan, plans, advice, tuple(fleets.tried.values()), with_read(made, journal))


def evaluate(job: Job) -> Outcome:
    """Return the metrics of one run, and their intervals within it. Errors of the run are returned, not raised."""

    def figures() -> tuple[Any, Any]:
        records, metrics = figures_of(job)
        slo = Slo(**vars(job.config.slo))
        names = TOLD if job.config.autoscale.least is None else (*TOLD, ON)
        return metrics, {**intervals_of([(records, metrics)], names), ATTAINMENT: attainment_of(records, slo)}

    return outcome_of(figures)


@dataclass(slots=True)
class _Fleets:
    """Fleets that were tried; each is run once."""

    plan: CapacityPlan
    journal: Journal[Outcome]
    workers: Workers
    on_done: OnDone[Job, Outcome]
    tried: dict[_Case, Tried] = field(default_factory=dict)

    def answers(self, asked: Mapping[_Key, Mapping[int, _Case]]) -> dict[_Key, dict[int, Answers]]:
        """Return for each number of each search whether its fleet keeps the SLOs: in the mean, then under each seed."""
        found = self.of([case for cases in asked.values() for case in cases.values()])
        return {
            key: {number: (found[case].kept, *found[case].kept_by_seed) for number, case in cases.items()}
            for key, cases in asked.items()
        }

    def of(self, cases: Sequence[_Case]) -> dict[_Case, Tried]:
        new = [case for case in dict.fromkeys(cases) if case not in self.tried]
        tasks = {}
        for case in new:
            option = self.plan.options[case.option]
            about = {"card": option.card, "arm": option.arm, **case._asdict()}
            jobs = self.plan.jobs(option, case.load, case.replicas, case.time_factor)
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
            seeds = (False,) * len(outcomes)
            return Tried(*place, {}, {}, False, seeds, error=error, time_factor=case.time_factor)
        means = mean_metrics(runs)
        intervals = outcomes[0].intervals if len(runs) == 1 else {
            name: interval_of(name, [run[name] for run in runs])
            for name in ((*TOLD, ON) if option.least is not None else TOLD)
            if means[name] is not None
        }
        kept = all_kept(self.plan.requirements, means)
        by_seed = tuple(all_kept(self.plan.requirements, run) for run in runs)
        return Tried(*place, means, intervals, kept, by_seed, time_factor=case.time_factor)


def _fleet_plan(plan: CapacityPlan, place: int, load: float, found: Found | None, fleets: _Fleets) -> FleetPlan:
    option = plan.options[place]
    about = (load, plan.rate_at(load), option.card, option.cards_per_replica, option.arm)
    scaled = option.least is not None
    if found is None:
        return FleetPlan(*about, None, why_not=option.why_not, scaled=scaled, of=option.of)
    replicas, *by_seed = found.least
    at = fleets.tried[_Case(place, load, max(found.tried) if replicas is None else replicas)]
    slo = Slo(**vars(plan.config.slo))
    reason = None if replicas is not None else at.error or why_not(plan.requirements, slo, at)
    return FleetPlan(*about, replicas, tuple(by_seed), at, reason, scaled, option.of)


def _advice(plan: CapacityPlan, plans: Sequence[FleetPlan], fleets: _Fleets) -> tuple[Advice, ...]:
    """Return the advised fleet of each load, its largest load, and its size if the profile is off.

    Loads are powers of STEP apart, so that the search for the largest is one for whole numbers.
    """
    steps = math.ceil(math.log(MOST_TIMES) / math.log(STEP))
    settings, chosen = plan.config.capacity, {}
    for load in settings.loads:
        best = advised_plan(plan, [it for it in plans if it.load == load])
        if best is not None:
            chosen[plans.index(best)] = best
    bands = {place: _band(plan, place % len(plan.options), it) for place, it in chosen.items()}

    def case(place: int, factor: float | None, number: int) -> _Case:
        """Return the case of a number. With `factor` None larger numbers are smaller loads, down to the planned one."""
        it, option = chosen[place], place % len(plan.options)
        assert it.replicas is not None
        if factor is None:
            return _Case(option, it.load * STEP ** (steps + 1 - number), it.replicas)
        return _Case(option, it.load, number, factor)

    searches: dict[tuple[int, float | None], Search] = {}
    for place, it in chosen.items():
        searches[place, None] = least(steps + 1, start=steps + 1, beyond=settings.beyond)
        band = bands[place]
        for factor in (band.low, band.high) if band is not None else ():
            searches[place, factor] = least(settings.most_replicas, start=it.replicas or 1, beyond=settings.beyond)
    found = together(
        searches, lambda asked: fleets.answers({key: {n: case(*key, n) for n in ns} for key, ns in asked.items()})
    )
    advice = []
    for place, it in chosen.items():
        loads, band = found[place, None], bands[place]
        rates = [None if n is None else plan.rate_at(case(place, None, n).load) for n in loads.least]
        assert rates[0] is not None
        met = sorted((fleets.tried[case(place, None, n)] for n in loads.tried), key=lambda tried: tried.load)
        ends = () if band is None else tuple((end, found[place, end].least[0]) for end in (band.low, band.high))
        advice.append(Advice(it, rates[0], tuple(rates[1:]), loads.least[0] == 1, tuple(met), band, ends))
    return tuple(advice)


def _band(plan: CapacityPlan, place: int, it: FleetPlan) -> TimeBand | None:
    """Return how far the times of the option's profile may be off, but no quicker than its card can be."""
    if plan.config.profile_band == NONE or it.at is None or it.replicas is None:
        return None
    band = band_of(plan.config, plan.jobs(plan.options[place], it.load, it.replicas))
    share = it.at.metrics.get("roofline_fraction")
    return band if band is None or not isinstance(share, int | float) else possible(band, share)


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
        assumptions |= dict.fromkeys(assumptions_of(job.config, fleet, job.arm.policy))
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
    return reservations_of(plan, result)
