"""Runs a sweep of designs from its plan to its result, files and lines on stdout; the journal has finished designs."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

from helios_sim.errors import OwnCodeError, UserError
from helios_sim.files import json_value
from helios_sim.report.compare import interval_of, intervals_of
from helios_sim.report.designs import Design, DesignsResult, cost, merits_of, on_front, value_text as value_shown
from helios_sim.report.format import metric_with_interval
from helios_sim.report.intervals import Interval, Method
from helios_sim.report.metrics import DEFINITIONS, Band, Better, Metrics, MetricValue, mean_metrics
from helios_sim.report.records import RecordLog, Records
from helios_sim.report.result import ServedWorkload
from helios_sim.report.tables import print_designs
from helios_sim.report.terminal import say
from helios_sim.report.write import write_designs
from helios_sim.study.command import end, provenance, with_read
from helios_sim.study.designs import SweepPlan, plan_sweep, search
from helios_sim.study.fleet import shared_fleet
from helios_sim.study.jobs import Job, assumptions_of, inputs_of, make_ready, measure, notices_of, serve
from helios_sim.study.runner import task_of
from helios_sim.study.schema import Config
from helios_sim.study.verdict import conditions, offered_requests_per_s
from helios_sim.study.workload import statement
from helios_sim.vary.axis import Choice
from helios_sim.vary.runner import Journal, OnDone, Task, at_work_in, progress, run_tasks
from helios_sim.vary.workers import Place, Workers

USUAL_METRICS = ("tpot_s_mean", "batch_mean", "layers_per_token")  # shown beside the objectives
EVERY_S = 10.0  # between two progress lines
Figures = tuple[Metrics, Mapping[str, Interval]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one design: metrics, or an error."""

    metrics: Metrics | None
    error: str | None
    wall_s: float
    lasting: bool = True  # false for an error that may not come again, so that it is not kept
    intervals: Mapping[str, Interval] = field(default_factory=dict)  # of the objectives and the shown metrics


def sweep(config: Config) -> DesignsResult:
    """Run a sweep from Python, without files. UserError if settings cannot be run."""
    return run_plan(plan_sweep(config), None, {"seeds": list(config.seeds)}, lambda task, outcome, kept: None)


def run_plan(
    plan: SweepPlan, folder: Path | None, provenance: Mapping[str, Any], on_done: OnDone[Sequence[Job], Outcome]
) -> DesignsResult:
    """Run what the folder's journal does not hold. UserError if a library is missing, or every design failed."""
    settings = plan.config.sweep
    with closing(Workers(Place(settings.backend, settings.workers, settings.address))) as workers:
        journal = Journal(folder, OutcomeLines())
        evaluations = Evaluations(plan, journal, workers, on_done)
        job, runs = next(iter(plan.references.values()))[0], plan.n_designs * len(plan.config.seeds)
        make_ready(job, runs * shared_fleet(job.config, job.seed).parts.workload.requests)
        if plan.designs is None:
            search(plan.parameters, settings, lambda choices: [_costs(plan, d) for d in evaluations(choices)])
        else:
            evaluations(plan.designs)
        references = evaluations.references()
    designs = tuple(evaluations.designs.values())
    if all(design.error is not None for design in designs):
        first = str(designs[0].error).removesuffix(".")
        raise UserError("sweep", f"{len(designs)} designs", f"all failed, the first: {first}", "mend that")
    return _result(plan, designs, references, with_read(provenance, journal))


def evaluate(jobs: Sequence[Job]) -> Outcome:
    """Return means of metrics over jobs, which are one design under several seeds. Errors are returned, not raised."""
    names = {*jobs[0].config.sweep.objectives, *_shown(jobs[0].config)}

    def figures() -> Figures:
        if len(jobs) == 1:
            records, metrics = figures_of(jobs[0])
            return metrics, intervals_of([(records, metrics)], names)
        runs = [figures_of(job)[1] for job in jobs]
        means = mean_metrics(runs)
        return means, {n: interval_of(n, [run[n] for run in runs]) for n in sorted(names) if means[n] is not None}

    return outcome_of(figures)


def outcome_of(figures: Callable[[], Figures]) -> Outcome:
    """Return the outcome of `figures`: its result, or its error, which is not raised."""
    started_s = perf_counter()
    try:
        metrics, intervals = figures()
    except UserError as mistake:  # an error of the user's own code may not come again, as if a file was missing
        return Outcome(None, str(mistake), perf_counter() - started_s, lasting=not isinstance(mistake, OwnCodeError))
    except Exception as defect:  # of this program: one run must not end the others
        place = traceback.extract_tb(defect.__traceback__)[-1]
        error = f"{type(defect).__name__}: {defect} ({place.filename}, line {place.lineno})"
        return Outcome(None, error, perf_counter() - started_s, lasting=False)
    return Outcome(metrics, None, perf_counter() - started_s, intervals=intervals)


class Evaluations:
    """Designs in the order in which they were first asked for; each is run once."""

    def __init__(
        self, plan: SweepPlan, journal: Journal[Outcome], workers: Workers, on_done: OnDone[Sequence[Job], Outcome]
    ) -> None:
        self.designs: dict[str, Design] = {}  # by key
        self._plan, self._journal, self._workers, self._on_done = plan, journal, workers, on_done
        self._outcomes: dict[str, Outcome] = {}  # by key, of designs and of the arms beside them

    def __call__(self, choices: Sequence[Choice]) -> list[Design]:
        """Run designs that are new, and return all in the order of the choices."""
        tasks: dict[str, Task[Sequence[Job]]] = {}
        outcomes: dict[str, Outcome] = {}
        keys = []
        for choice in choices:
            shown = dict(choice.shown)
            try:
                jobs = self._plan.jobs(choice)
                task = task_of(jobs, {"design": shown}, jobs)
                tasks[task.key] = task
            except UserError as error:
                task = Task(json.dumps(shown), {"design": shown}, ())
                if task.key not in self.designs:
                    outcomes[task.key] = Outcome(None, str(error), 0.0)
                    self._on_done(task, outcomes[task.key], False)
            keys.append(task.key)
            self.designs.setdefault(task.key, Design(f"#{len(self.designs) + 1}", shown, None))
        outcomes |= self._run([task for key, task in tasks.items() if _unknown(self.designs[key])])
        for key, outcome in outcomes.items():
            before = self.designs[key]
            found = (outcome.metrics, outcome.error, outcome.intervals)
            self.designs[key] = Design(before.name, before.parameters, *found)
        return [self.designs[key] for key in keys]

    def references(self) -> tuple[Design, ...]:
        """Run every arm at the study's own settings, and return them as designs without parameters."""
        tasks = {name: task_of(jobs, {"arm": name}, jobs) for name, jobs in self._plan.references.items()}
        outcomes = self._run(list(tasks.values()))
        found = {name: outcomes[task.key] for name, task in tasks.items()}
        return tuple(Design(name, {}, it.metrics, it.error, it.intervals) for name, it in found.items())

    def _run(self, tasks: Sequence[Task[Sequence[Job]]]) -> dict[str, Outcome]:
        for task in tasks:
            if task.key in self._outcomes:
                self._on_done(task, self._outcomes[task.key], True)
        new = [task for task in tasks if task.key not in self._outcomes]
        self._outcomes |= run_tasks(evaluate, new, self._journal, self._workers, self._on_done)
        return {task.key: self._outcomes[task.key] for task in tasks}


class OutcomeLines:
    """Keeps outcomes in their lines of the journal. Python writes floats so that they read back exactly."""

    def save(self, folder: Path, key: str, result: Outcome) -> Mapping[str, Any] | None:
        if not result.lasting:
            return None
        found = {"metrics": json_value(result.metrics), "intervals": json_value(result.intervals)}
        return {"wall_s": round(result.wall_s, 3), "error": result.error, **found}

    def load(self, folder: Path, key: str, line: Mapping[str, Any]) -> Outcome | None:
        error, metrics = line["error"], line["metrics"]
        if isinstance(error, str) == isinstance(metrics, dict) or not isinstance(error, str | None):
            raise ValueError("an outcome has metrics or an error")
        known = metrics and {name: _metric(value) for name, value in metrics.items()}
        intervals = {name: _interval(**found) for name, found in line["intervals"].items()}
        return Outcome(known, error, float(line["wall_s"]), intervals=intervals)


def _metric(value: Any) -> MetricValue:
    found = Band(**value) if isinstance(value, dict) else value
    if isinstance(found, bool) or not isinstance(found, int | float | Band | None):
        raise ValueError("a metric is a number, a band or unknown")
    return found


def _interval(low: Any, high: Any, method: Any, n: Any) -> Interval:
    if not all(bound is None or isinstance(bound, float) for bound in (low, high)) or not isinstance(n, int):
        raise ValueError("an interval has numbers or nothing")
    return Interval(low, high, Method(method), n)


def _shown(config: Config) -> Sequence[str]:
    """Return the metrics that are shown beside the objectives."""
    return config.headline_metrics or USUAL_METRICS


def figures_of(job: Job) -> tuple[Records, dict[str, MetricValue]]:
    """Run a job without pictures and return its records and metrics."""
    fleet = shared_fleet(job.config, job.seed)
    log = RecordLog(fleet.parts.workload.requests)
    run = serve(job, fleet, log.add, pictures=False, block_sink=log.add_block)
    records = log.records()
    return records, measure(job, fleet, records, run)


def _unknown(design: Design) -> bool:
    return design.metrics is None and design.error is None


def _costs(plan: SweepPlan, design: Design) -> list[float]:
    metrics = design.metrics
    return [cost(name, None if metrics is None else metrics[name]) for name in plan.config.sweep.objectives]


def _result(
    plan: SweepPlan, designs: tuple[Design, ...], references: tuple[Design, ...], provenance: Mapping[str, Any]
) -> DesignsResult:
    config, objectives = plan.config, tuple(plan.config.sweep.objectives)
    job = plan.references[plan.arm][0]
    fleet = shared_fleet(job.config, job.seed)
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
        shown_metrics=tuple(name for name in _shown(config) if name not in objectives),
        designs=designs,
        references=references,
        workload=ServedWorkload(
            statement(config.workload), fleet.parts.workload.requests, offered_requests_per_s(config)
        ),
        inputs=inputs_of(fleet),
        provenance=provenance,
        assumptions=assumptions_of(config, fleet, job.arm.policy),
        warnings=(*notices_of(fleet, config), *failed, *_cautions(config)),
        seeds=len(config.seeds),
    )


def _cautions(config: Config) -> list[str]:
    found = []
    if len(config.seeds) == 1:
        found.append(
            "One seed: designs that lie close to each other may change places under other requests. Run the chosen "
            "ones again with several seeds before deciding between neighbours."
        )
    return found


def sentences(
    arm: str, objectives: Sequence[str], designs: Sequence[Design], references: Sequence[Design]
) -> tuple[str, ...]:
    """Return sentences on the size of the front, its ends, and how the arms that were not designed compare."""
    costs = merits_of(designs, objectives)
    front = [design for design, there in zip(designs, on_front(costs), strict=True) if there]
    found = [_size(arm, objectives, designs, front)]
    if front:
        found += [_end(name, objectives, front) for name in objectives]
    beaten_by_none: list[str] = []
    for reference in references:
        if reference.metrics is not None:
            own = merits_of([reference], objectives)[0]
            beats = (costs <= own).all(axis=1) & (costs < own).any(axis=1)
            better = [design for design, beaten in zip(designs, beats, strict=True) if beaten]
            clear = sum(any(_apart(name, design, reference) for name in objectives) for design in better)
            name = f"{arm} as it was set" if reference.name == arm else reference.name
            if better:
                found.append(_beaten(name, len(better), clear, len(designs)))
            else:
                beaten_by_none.append(name)
    if beaten_by_none:
        *names, last = beaten_by_none
        found.append(f"No design beats {', '.join(names)}{' or ' if names else ''}{last} in every objective.")
    return tuple(found)


def in_words(design: Design) -> str:
    """Return a design in words: #12 (threshold 0.8, round_requests 150)."""
    values = ", ".join(f"{name} {value_shown(value)}" for name, value in design.parameters.items())
    return f"{design.name} ({values})" if values else design.name


def _size(arm: str, objectives: Sequence[str], designs: Sequence[Design], front: Sequence[Design]) -> str:
    names = [DEFINITIONS[name].label for name in objectives]
    between = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    failed = sum(design.error is not None for design in designs)
    said = f"Of {len(designs)} designs of {arm}, {len(front)} are beaten by none in {between}"
    return f"{said}; {failed} failed." if failed else f"{said}."


def _end(name: str, objectives: Sequence[str], front: Sequence[Design]) -> str:
    def price(design: Design) -> list[float]:
        assert design.metrics is not None
        first = [cost(name, design.metrics[name])]
        return first + [cost(other, design.metrics[other]) for other in objectives]

    best = min(front, key=price)
    assert best.metrics is not None
    rest = [f"{DEFINITIONS[n].label} {_figure(best, n)}" for n in objectives if n != name]
    most = "Highest" if DEFINITIONS[name].better is Better.HIGHER else "Lowest"
    said = f"{most} {DEFINITIONS[name].label}: {in_words(best)} with {_figure(best, name)}"
    return f"{said}; {', '.join(rest)}." if rest else f"{said}."


def _figure(design: Design, name: str) -> str:
    assert design.metrics is not None
    return metric_with_interval(name, design.metrics[name], design.intervals.get(name))


def _apart(name: str, design: Design, reference: Design) -> bool:
    """Whether the design's interval lies wholly on the better side of the reference's interval."""
    ours, theirs = design.intervals.get(name), reference.intervals.get(name)
    if ours is None or theirs is None:
        return False
    low, high = (theirs.high, ours.low) if DEFINITIONS[name].better is Better.HIGHER else (ours.high, theirs.low)
    return low is not None and high is not None and low < high


def _beaten(name: str, better: int, clear: int, total: int) -> str:
    clearly = f"{clear} of them clearly" if clear else "none of them clearly"
    return (
        f"{better} of {total} designs beat {name}: none of the objectives worse, at least one better; {clearly}, with "
        "intervals that lie apart."
    )


def run_sweep(config: Config, folder: Path) -> int:
    """Run, write and print a sweep. Returns 0. UserError before anything is written, or if every design failed."""
    plan = plan_sweep(config)
    total = plan.n_designs + len(plan.references)
    lines = StateLines(f"of at most {total} runs", "a design failed")
    with at_work_in(folder):
        with redirect_stdout(sys.stderr), progress(config.name, total, lines) as on_done:  # Ray prints what nodes do
            result = run_plan(plan, folder, provenance(config), on_done)
        lines.state()
        summary = write_designs(result, folder, config.figures_as)
    return end(lambda: _show(result), folder, summary)


class StateLines:
    """Prints a line for each failure, and a progress line now and then; it is not called if a bar shows progress."""

    def __init__(self, of_all: str, failure: str) -> None:
        self._of_all, self._failure, self._started_s = of_all, failure, monotonic()
        self._said_s = self._started_s
        self._done = self._kept = self._failed = 0

    def __call__(self, task: Task[Any], outcome: Outcome, kept: bool) -> None:
        self._done, self._kept = self._done + 1, self._kept + kept
        self._failed += outcome.error is not None
        if outcome.error is not None:
            say(f"{self._failure}: {outcome.error}", sys.stderr)
        if monotonic() - self._said_s > EVERY_S:
            self.state()

    def state(self) -> None:
        if self._done:
            counts = [f"{self._kept} kept from before" if self._kept else ""]
            counts += [f"{self._failed} failed" if self._failed else ""]
            text = ", ".join([f"{self._done} {self._of_all}", *filter(None, counts)])
            print(f"{text}, {monotonic() - self._started_s:.0f} s", file=sys.stderr, flush=True)
            self._said_s = monotonic()


def _show(result: DesignsResult) -> None:
    """Print the front, the answer and the failures."""
    print_designs(result)
    for sentence in (*result.verdict, *(f"{d.name} failed: {d.error}" for d in result.failed[:5])):
        say(sentence)
    if len(result.failed) > 5:
        print(f"{len(result.failed) - 5} more failed: see designs.parquet.")
