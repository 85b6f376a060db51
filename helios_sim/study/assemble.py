"""Assembles finished jobs into one result: arms, points, published figures beside ours, gates, the verdict."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.provenance import Assumption, Provenance
from helios_sim.report.breakdown import WaitFigures, by_priority, by_prompt_length, fault_figures, waits
from helios_sim.report.cautions import kept_up_to_rps
from helios_sim.report.compare import Ratio, compare, intervals_of
from helios_sim.report.intervals import Interval, Method
from helios_sim.report.metrics import Metrics, MetricValue, mean_metrics
from helios_sim.report.records import Records
from helios_sim.report.result import (
    ArmResult,
    ArmsFigure,
    AtEnd,
    ExperimentResult,
    Figure,
    Gate,
    Instead,
    Line,
    LoadFigure,
    PhaseFigure,
    Published,
    QualityFigure,
    Replicate,
    ServedWorkload,
    SweepFigure,
    SweepPoint,
    Trust,
    headline_metrics,
    shown_metrics,
)
from helios_sim.request import Slo
from helios_sim.serving.decider import MOST_DECISIONS
from helios_sim.study.build import Arm, confidence, threshold
from helios_sim.study.fleet import shared_fleet
from helios_sim.study.jobs import Job, JobResult
from helios_sim.study.plan import OVER_TWO_AXES, Point, StudyPlan, point_at
from helios_sim.study.promise import kept_promises
from helios_sim.study.schema import Config, FigureConfig, GateConfig, PublishedConfig
from helios_sim.study.seeds import Settled
from helios_sim.study.verdict import conditions, offered_requests_per_s, survives, verdict, workload_facts
from helios_sim.study.workload import statement, task_names
from helios_sim.workload import Workload

Results = Mapping[str, JobResult]  # by job key
NEAR = 0.05  # a published ratio within 5 % of ours or of our interval counts as consistent


def assemble(settled: Settled, provenance: Mapping[str, Any]) -> ExperimentResult:
    """Return the result of a study with a plan that has passed `check_study`."""
    plan, results = settled.plan, settled.results
    config = plan.config
    compared, without = _Compared(results), plan.without_faults
    arms = {
        name: _arm(
            name, jobs, results, config, compared.metrics(without[name]) if name in without else None,
            settled.instead.get(name, {}),
        )
        for name, jobs in plan.headline.jobs.items()
    }
    baseline = plan.headline.baseline
    first = results[next(iter(plan.headline.jobs.values()))[0].key]
    slo = Slo(config.slo.ttft_s, config.slo.tpot_s, config.slo.e2e_s)
    figures = tuple(_figure(f, slo) for f in config.figures)
    shown = shown_metrics(config.headline_metrics, figures)
    inputs: dict[str, Provenance] = {}
    assumptions: list[Assumption] = []
    notices: dict[str, None] = {}
    for jobs in plan.headline.jobs.values():
        inputs |= results[jobs[0].key].inputs
        assumptions += results[jobs[0].key].assumptions
        notices |= dict.fromkeys(results[jobs[0].key].notices)
    result = ExperimentResult(
        experiment=config.name,
        title=config.title or config.name,
        question=config.question,
        conditions=conditions(config),
        verdict=(),
        baseline=baseline,
        arms=arms,
        workload=ServedWorkload(
            statement=statement(config.workload),
            requests=len(first.replicate.records),
            offered_requests_per_s=offered_requests_per_s(config),
            facts=workload_facts(config, first.replicate.records),
            tasks=task_names(config.workload.mix),
        ),
        inputs=inputs,
        provenance=provenance,
        slo=slo,
        published=tuple(_published(p, plan, compared, inputs) for p in config.published),
        gates=tuple(_gate(g, plan, compared) for g in config.gates),
        assumptions=tuple(dict.fromkeys(assumptions)),
        warnings=(*notices, *_left_out(plan.headline.jobs, results)),
        points=tuple(_sweep_point(point, compared, shown) for point in plan.points),
        figures=figures,
        headline_metrics=tuple(config.headline_metrics) if config.headline_metrics else None,
    )
    return _with_verdict(result, compared, settled)


def _with_verdict(result: ExperimentResult, compared: _Compared, settled: Settled) -> ExperimentResult:
    plan = settled.plan
    name = plan.config.subject or list(result.arms)[-1]
    conditions_of = {arm: _conditions(jobs[0].arm.overrides) for arm, jobs in plan.headline.jobs.items()}
    comparable = [arm for arm in result.arms if conditions_of[arm] == conditions_of[name]]
    over = result.baseline_of(name)
    ratios = {} if name == over else compared.ratios(plan.headline.jobs[name], plan.headline.jobs[over])
    found = replace(result, subject=name, trust=_trust(result, name, ratios, compared, settled))
    return replace(found, verdict=verdict(found, name, ratios, comparable, settled.why))


def _trust(
    result: ExperimentResult, subject: str, ratios: Mapping[str, Ratio], compared: _Compared, settled: Settled
) -> Trust:
    """Return how far the subject's answer can be trusted: at other times of iterations, loads and promises."""
    metric, over, ends = headline_metrics(result)[0], result.baseline_of(subject), settled.ends
    at_ends = []
    for factor, (ours, theirs) in (ends.pairs or {}).items():
        ratio = None if subject == over else compared.ratios(ours, theirs).get(metric)
        at_ends.append(AtEnd(factor, ratio, compared.metrics(ours).get(metric)))
    stands = survives(result, subject, metric, ratios.get(metric), [end.ratio for end in at_ends])
    return Trust(
        band=ends.band,
        at_ends=tuple(at_ends),
        survives=stands if at_ends else None,
        why_not=ends.why_not,
        valid_up_to_rps=kept_up_to_rps(result, (subject, over)),
        promises=kept_promises(settled.plan.headline.jobs, result.arms),
    )


def _conditions(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an arm changes of load or hardware. Its objective does not count, nor how it shares out its cards;
    whether it has as many cards is checked with the kinds."""
    own = ("objective.", "server.router", "cluster.tasks")
    changed = {key: value for key, value in overrides.items() if not key.startswith(own)}
    kinds = changed.get("cluster.kinds")
    if isinstance(kinds, Mapping) and not any("hardware" in kind for kind in kinds.values()):
        del changed["cluster.kinds"]
    return changed


class _Compared:
    """Ratios between arms; each pair is compared once."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self._found: dict[tuple[str, ...], dict[str, Ratio]] = {}

    def ratios(self, arm: Sequence[Job], over: Sequence[Job]) -> dict[str, Ratio]:
        key = tuple(job.key for job in (*arm, *over))
        if key not in self._found:
            self._found[key] = compare(self._runs(arm), self._runs(over))
        return self._found[key]

    def metrics(self, arm: Sequence[Job]) -> dict[str, MetricValue]:
        return mean_metrics([replicate.metrics for replicate in self._replicates(arm)])

    def intervals(self, arm: Sequence[Job], names: Collection[str]) -> dict[str, Interval]:
        return intervals_of(self._runs(arm), names)

    def _replicates(self, arm: Sequence[Job]) -> list[Replicate]:
        return [self._results[job.key].replicate for job in arm]

    def _runs(self, arm: Sequence[Job]) -> list[Any]:
        return [(replicate.records, replicate.metrics) for replicate in self._replicates(arm)]


def _arm(
    name: str,
    jobs: Sequence[Job],
    results: Results,
    study: Config,
    without_faults: Metrics | None,
    instead: Mapping[int, Instead],
) -> ArmResult:
    first = results[jobs[0].key]
    faults = [found for job in jobs if (found := results[job.key].faults) is not None]
    return ArmResult(
        name=name,
        description=_description(jobs[0].arm, study),
        replicates=tuple(results[job.key].replicate for job in jobs),
        timeline=first.timeline,
        timeline_transitions_ns=first.timeline_transitions_ns,
        replicas=first.replicas,
        capacity_bytes=first.capacity_bytes,
        decisions=first.decisions,
        exit_depths=first.exit_depths,
        baseline=jobs[0].arm.baseline,
        is_bound=jobs[0].arm.policy.kind.is_bound,
        waits=_waits(jobs, [results[job.key].replicate.records for job in jobs]),
        faults=fault_figures(faults, without_faults) if faults else None,
        scaled=first.scaled,
        timeline_faults=[fault for fault in first.faults or () if fault.hit and not fault.replica],
        instead=instead,
    )


def _waits(jobs: Sequence[Job], replicates: Sequence[Records]) -> tuple[WaitFigures, ...]:
    """Return queue times by priority or by quarters of prompt length; none if the line is in order of arrival."""
    order = jobs[0].config.server.order
    if order == "fcfs":
        return ()
    if order == "shortest_prompt":
        return waits(replicates, by_prompt_length(replicates))
    workloads = [shared_fleet(job.config, job.seed).parts.workload for job in jobs]
    return waits(replicates, by_priority(replicates, [partial(_priorities, workload) for workload in workloads]))


def _priorities(workload: Workload, records: Records) -> NDArray[np.int64]:
    recorded = workload.recorded_priority
    if recorded is not None:
        return recorded[records.request_id]
    return workload.mix.priority(records.task.astype(np.int64))


def _left_out(arms: Mapping[str, Sequence[Job]], results: Results) -> list[str]:
    """Return a sentence for each arm with decisions that its log left out, as in long runs."""
    left_out = {name: results[jobs[0].key].decisions_left_out for name, jobs in arms.items()}
    return [
        f"{name}: {count:,} of its decisions are not in the log, which holds the first {MOST_DECISIONS // 2:,} and the "
        f"last {MOST_DECISIONS // 2:,} of each replica."
        for name, count in left_out.items()
        if count
    ]


def _description(arm: Arm, study: Config) -> str:
    """Return the experiment's description of an arm, else the policy's with the settings that are not the defaults."""
    if arm.description:
        return arm.description
    about, told = arm.policy.kind.about, arm.policy.told()
    of_study = {"threshold": threshold(study), "confidence": confidence(study)}
    own = ", ".join(
        f"{key}={value}"
        for key, value in told.items()
        if key not in ("model", "batch_limit") and value != of_study.get(key)
    )
    return f"{about}; {own}" if own and arm.policy.name != "custom" else about


def _sweep_point(point: Point, compared: _Compared, shown: Collection[str]) -> SweepPoint:
    baseline = point.jobs[point.baseline]
    return SweepPoint(
        settings=point.settings,
        metrics={name: compared.metrics(jobs) for name, jobs in point.jobs.items()},
        vs_baseline={
            name: compared.ratios(jobs, baseline) for name, jobs in point.jobs.items() if name != point.baseline
        },
        intervals={name: compared.intervals(jobs, shown) for name, jobs in point.jobs.items()},
    )


def _figure(c: FigureConfig, slo: Slo) -> Figure:
    arms = None if c.arms is None else tuple(c.arms)
    if c.kind == "arms":
        return ArmsFigure(c.title, c.x, c.metric, arms, tuple(c.along), dict(c.where))
    if c.kind == "quality":
        return QualityFigure(c.title, arms)
    if c.kind == "load":
        return LoadFigure(c.title, c.x, c.x_label, slo, dict(c.where))
    if c.kind in OVER_TWO_AXES:
        assert c.split_by is not None
        return PhaseFigure(
            c.title, c.x, c.x_label, c.metric, c.split_by, c.least_agreement, arms, dict(c.where), c.kind == "phase",
            c.y_label,
        )  # fmt: skip
    return SweepFigure(
        title=c.title,
        x=c.x,
        x_label=c.x_label,
        metric=c.metric,
        y_label=c.y_label,
        relative=c.relative,
        arms=arms,
        split_by=c.split_by,
        log_x=c.log_x,
        log_y=c.log_y,
        marks=tuple(Line(label, value) for label, value in c.marks.items()),
        where=dict(c.where),
    )


def _published(c: PublishedConfig, plan: StudyPlan, compared: _Compared, inputs: Mapping[str, Provenance]) -> Published:
    point = point_at(plan, c.at)
    arm, over = point.jobs[c.arm], point.jobs[c.over or point.baseline]
    # With an inverse metric (lower is better) the published gain is over / arm.
    ratio = compared.ratios(over, arm).get(c.metric) if c.inverse else compared.ratios(arm, over).get(c.metric)
    ours = low = high = None
    if ratio is not None:
        ours, low, high = ratio.ratio, ratio.low, ratio.high
        if ratio.method is Method.EXACT:
            low = high = ours
    return Published(
        what=c.what,
        published=c.published,
        condition=c.condition,
        source=c.source,
        ours=ours,
        low=low,
        high=high,
        inputs=tuple((name, source.provenance_class) for name, source in inputs.items()),
        remark=" ".join(filter(None, (_follows(c.published, ours, low, high), c.remark))),
    )


def _follows(published: float, ours: float | None, low: float | None, high: float | None) -> str:
    if ours is None and (low is None or high is None):
        return "Not defined here."
    bottom = low if low is not None else ours
    top = high if high is not None else ours
    assert bottom is not None
    assert top is not None
    if bottom * (1 - NEAR) <= published <= top * (1 + NEAR):
        return "Consistent with the published figure."
    return "Lower than published." if top < published else "Higher than published."


def _gate(c: GateConfig, plan: StudyPlan, compared: _Compared) -> Gate:
    arms = plan.headline.jobs
    value: Any
    found: Interval | Ratio | None
    if c.over is None:
        value = compared.metrics(arms[c.arm]).get(c.metric)
        found = compared.intervals(arms[c.arm], [c.metric]).get(c.metric)
    else:
        found = compared.ratios(arms[c.arm], arms[c.over]).get(c.metric)
        value = None if found is None else found.ratio
    low, high = (None, None) if found is None else (found.low, found.high)
    bounds = [f">= {c.low:g}" if c.low is not None else "", f"<= {c.high:g}" if c.high is not None else ""]
    passed = isinstance(value, int | float) and (
        (c.low is None or value >= c.low) and (c.high is None or value <= c.high)
    )
    number = float(value) if isinstance(value, int | float) else None
    return Gate(c.name or f"{c.arm} {c.metric}", number, " and ".join(filter(None, bounds)), passed, low, high)
