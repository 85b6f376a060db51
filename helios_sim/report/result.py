"""The result of a finished study, or of its comparison with a measured run, from which tables and pages are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from math import sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.policy.deployment import Placement
from helios_sim.profile.spec import TimeBand
from helios_sim.provenance import Assumption, Provenance, ProvenanceClass, Sourced
from helios_sim.report.breakdown import FaultFigures, ReplicaFigures, TaskFigures, WaitFigures, by_task
from helios_sim.report.compare import Ratio, compare, intervals_of
from helios_sim.report.intervals import Interval, Method
from helios_sim.report.metrics import (
    OF_CASCADES,
    OF_COST,
    OF_DRAFTS,
    OF_LATE_LAYERS,
    OF_PREFIXES,
    OF_RELEASES,
    OF_SPLITS,
    Metrics,
    MetricValue,
    mean_metrics,
)
from helios_sim.report.records import Records
from helios_sim.request import NS_PER_S, Slo
from helios_sim.serving.autoscale import Scaled
from helios_sim.serving.stats import RunStats, Timeline
from helios_sim.workload.faults import Struck

if TYPE_CHECKING:
    import pyarrow

    from helios_sim.serving.decider import Decision

USUAL_METRICS = (
    "throughput_requests_per_s",
    "ttft_s_p50",
    "tpot_s_mean",
    "e2e_s_p99",
    "layers_per_token",
    "agreement",
    "switches",
)


@dataclass(frozen=True, slots=True)
class Replicate:
    """One run of one arm under one seed."""

    seed: int
    records: Records
    stats: RunStats
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class Over:
    """Outcomes of requests in a window of time."""

    completed: int
    e2e_s_mean: float | None  # of the completed requests
    unfinished: int  # requests that had arrived and were not done at its end


@dataclass(frozen=True, slots=True)
class Instead:
    """A decision compared with the next best option, over the time until the next decision."""

    option: Placement  # the next best option
    window_s: float
    chosen: Over
    other: Over


@dataclass(frozen=True, slots=True)
class ExitDepths:
    """Output tokens of a model by the layer after which they left."""

    model: str
    n_layers: int
    tokens_by_depth: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class ArmResult:
    """The runs of one arm. Timeline, decisions, exit depths and replicas are those of the first replicate."""

    name: str
    description: str  # one line: what the policy does
    replicates: tuple[Replicate, ...]  # at least one; replicates of all arms match by position
    timeline: Timeline | None = None  # of the first replica
    capacity_bytes: int | None = None  # memory of the card, for the timeline
    decisions: Sequence[Decision] = ()
    exit_depths: tuple[ExitDepths, ...] = ()
    baseline: str | None = None  # the arm under the same conditions to compare with; None: the result's baseline
    timeline_transitions_ns: Sequence[int] | None = None  # of the timeline's replica; None: the replicate's
    replicas: tuple[ReplicaFigures, ...] = ()
    is_bound: bool = False  # an oracle that knows the future, and so cannot be deployed
    waits: tuple[WaitFigures, ...] = ()  # by priority or prompt length; empty with fcfs
    faults: FaultFigures | None = None  # None without planned faults
    timeline_faults: Sequence[Struck] = ()  # faults that struck the timeline's replica
    scaled: Scaled | None = None  # autoscaling of the first replicate; None if all replicas were always on
    instead: Mapping[int, Instead] = field(default_factory=dict)  # by index in `decisions`
    intervals: Mapping[str, Interval] = field(init=False, compare=False)  # of the defined `metrics`

    def __post_init__(self) -> None:
        object.__setattr__(self, "intervals", intervals_of([(it.records, it.metrics) for it in self.replicates]))

    @property
    def metrics(self) -> Metrics:
        """Means over the replicates."""
        return mean_metrics([replicate.metrics for replicate in self.replicates])


@dataclass(frozen=True, slots=True)
class Published:
    """A published figure, and the same figure in this study."""

    what: str  # "throughput over early-exit OPT-1.3B"
    published: float
    condition: str  # under which it was published
    source: str
    ours: float | None  # this study's figure; None if not computed, and `remark` says why
    low: float | None  # its interval
    high: float | None
    inputs: tuple[tuple[str, ProvenanceClass], ...]  # (input, its class)
    remark: str  # whether the study agrees, and if not, why
    unit: str = "x"


@dataclass(frozen=True, slots=True)
class Gate:
    """A bound that an experiment must meet. The command fails if it does not."""

    name: str
    value: float | None
    bound: str  # as text, such as "<= 0.05"
    passed: bool
    low: float | None = None  # interval of the value
    high: float | None = None


@dataclass(frozen=True, slots=True)
class ServedWorkload:
    """The workload of a study in words and figures."""

    statement: str
    requests: int
    offered_requests_per_s: float | None  # None in a closed loop, if all came at once, or if arms differ
    facts: tuple[tuple[str, str], ...] = ()  # (name, value): lengths, mix, drift, source
    tasks: tuple[str, ...] = ()  # names by the task number in records


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """The metrics of every arm at one setting."""

    settings: Mapping[str, float | int | str]
    metrics: Mapping[str, Metrics]  # by arm
    vs_baseline: Mapping[str, Mapping[str, Ratio]] = field(default_factory=dict)
    intervals: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)  # by arm, for the shown metrics


@dataclass(frozen=True, slots=True)
class Line:
    """A value to mark across a figure, e.g. a published one."""

    label: str
    value: float


@dataclass(frozen=True, slots=True)
class SweepFigure:
    """A metric of the points against one setting, with a line for each arm (and each value of `split_by`)."""

    title: str
    x: str  # a key of the points' settings
    x_label: str
    metric: str
    y_label: str
    relative: bool = False  # ratio to the baseline, with its interval
    arms: tuple[str, ...] | None = None  # None: all
    split_by: str | None = None
    log_x: bool = False
    log_y: bool = False
    marks: tuple[Line, ...] = ()
    where: Mapping[str, float | int | str] = field(default_factory=dict)  # only points with these settings


@dataclass(frozen=True, slots=True)
class LoadFigure:
    """Throughput and latency of the points against offered load."""

    title: str
    x: str
    x_label: str
    slo: Slo = field(default_factory=Slo)
    where: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ArmsFigure:
    """One metric of the arms against another, with a point for each arm, at the study's or a sweep point's settings."""

    title: str
    x: str
    y: str
    arms: tuple[str, ...] | None = None  # None: all
    along: tuple[str, ...] = ()  # axes of sweeps: a line joins an arm's points, in the order of their values
    where: Mapping[str, float | int | str] = field(default_factory=dict)  # settings of a point; empty: the study's own


@dataclass(frozen=True, slots=True)
class PhaseFigure:
    """The improvement of arms over the baseline in one metric, at each value of two settings."""

    title: str
    x: str  # a key of the points' settings
    x_label: str
    metric: str
    split_by: str  # the other key: rows, or groups of columns if all arms are shown
    least_agreement: float = 0.0  # arms with less agreement do not count as best
    arms: tuple[str, ...] | None = None  # None: all
    where: Mapping[str, float | int | str] = field(default_factory=dict)
    best_only: bool = True  # False: a row for each arm
    y_label: str = ""  # label of the rows


@dataclass(frozen=True, slots=True)
class QualityFigure:
    """Bits per character over the run, with a line for each arm."""

    title: str
    arms: tuple[str, ...] | None = None  # None: all
    parts: int = 20  # parts of the requests in order, with one point each


Figure = SweepFigure | LoadFigure | ArmsFigure | QualityFigure | PhaseFigure


FloatArray = NDArray[np.float64]
STATISTICS = ("mean", "median", "p90", "p95", "p99")


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """One figure of both runs; None if it is undefined or not in the log."""

    group: str  # TTFT, TPOT, ITL, E2E, system
    statistic: str
    unit: str
    measured: float | None  # mean of several measurements, as is the simulated figure
    simulated: float | None
    paced: float | None = None  # simulated at the device's pace during the run, if that is known
    runs: tuple[float, ...] = ()  # each measurement, if there are several
    band: tuple[float, float] | None = None  # 95 % interval of the difference; None if not known

    @property
    def name(self) -> str:
        return self.statistic if self.group == "system" else f"{self.group} {self.statistic}"

    @property
    def difference(self) -> float | None:
        """Simulated / measured - 1."""
        return _less_one(self.simulated, self.measured)

    @property
    def paced_difference(self) -> float | None:
        """`difference` for the simulation at the device's pace."""
        return _less_one(self.paced, self.measured)

    @property
    def noise(self) -> float | None:
        """The typical difference between two measurements of the same figure, as a share of their mean.

        The root mean square over all pairs, which is the root of 2 times the standard deviation.
        """
        if len(self.runs) < 2 or not self.measured:
            return None
        return sqrt(2.0) * float(np.std(self.runs, ddof=1)) / abs(self.measured)


@dataclass(frozen=True, slots=True, eq=False)
class RequestTimes:
    """TTFT, TPOT or E2E of all requests of one part, as an ascending array (n,) for each run."""

    part: str
    name: str  # TTFT, TPOT, E2E
    measured_s: tuple[FloatArray, ...]
    simulated_s: tuple[FloatArray, ...]


@dataclass(frozen=True, slots=True)
class Count:
    """Running or waiting requests of both runs at the same k times, (k,) each."""

    name: str
    time_s: FloatArray
    measured: FloatArray
    simulated: FloatArray


@dataclass(frozen=True, slots=True)
class LoadError:
    """Relative changes of the derived figures under a slower profile, at one load."""

    load: float  # in multiples of the log's arrivals
    changes: tuple[tuple[str, float], ...]  # (figure, relative change)


@dataclass(frozen=True, slots=True)
class Fidelity:
    """A comparison of a simulation with measured runs."""

    # (name, rows): for a log all requests and parts of them; for a live server each arm at each load
    parts: tuple[tuple[str, tuple[ComparedRow, ...]], ...]
    counts: tuple[Count, ...]
    load_errors: tuple[LoadError, ...]
    profile_error: float  # the error that load_errors assume
    terms: tuple[tuple[str, str], ...]  # names and values of estimated quantities
    spreads: tuple[RequestTimes, ...] = ()

    @property
    def rows(self) -> tuple[ComparedRow, ...]:
        return self.parts[0][1]

    @property
    def paced(self) -> bool:
        """Whether the device's pace was measured in any part."""
        return any(row.paced is not None for _, rows in self.parts for row in rows)

    @property
    def repeated(self) -> bool:
        """Whether anything was measured more than once."""
        return any(len(row.runs) > 1 for _, rows in self.parts for row in rows)


def _less_one(value: float | None, over: float | None) -> float | None:
    return None if value is None or not over else value / over - 1.0


def compared_rows(measured: Records, simulated: Records, itl_ms: tuple[float | None, ...]) -> tuple[ComparedRow, ...]:
    """Rows for TTFT, TPOT, ITL (simulated only, since a log has no gaps between tokens), E2E, span and throughput."""
    rows = []
    for group, of in (("TTFT", _ttft), ("TPOT", _tpot), ("E2E", _e2e)):
        if group == "E2E":
            rows += [ComparedRow("ITL", s, "ms", None, v) for s, v in zip(STATISTICS, itl_ms, strict=False)]
        both = (statistics(of(measured)), statistics(of(simulated)))
        rows += [ComparedRow(group, s, "ms", a, b) for s, a, b in zip(STATISTICS, *both, strict=True)]
    spans = [records.span_ns() for records in (measured, simulated)]
    span_s = [None if span is None else span / NS_PER_S for span in spans]
    tokens, n = int(measured.output_tokens.sum()), len(measured)
    of_system = (("makespan", "s", None), ("throughput", "tokens/s", tokens), ("throughput", "requests/s", n))
    for figure, unit, total in of_system:
        log, model = (s if s is None or total is None else total / s for s in span_s)
        rows.append(ComparedRow("system", figure, unit, log, model))
    return tuple(rows)


def statistics(values_ms: FloatArray) -> tuple[float | None, ...]:
    """Mean, median, p90, p95 and p99, each None without values."""
    if not len(values_ms):
        return (None,) * len(STATISTICS)
    return float(values_ms.mean()), *(float(p) for p in np.percentile(values_ms, (50, 90, 95, 99)))


def _ttft(records: Records) -> FloatArray:
    return records.ttft_ns() / 1e6


def _e2e(records: Records) -> FloatArray:
    return records.e2e_ns() / 1e6


def _tpot(records: Records) -> FloatArray:
    tpot_ns, defined = records.tpot_ns()
    return tpot_ns[defined] / 1e6


@dataclass(frozen=True, slots=True)
class AtEnd:
    """The subject with every iteration `time_factor` times as long as in the profile."""

    time_factor: float
    ratio: Ratio | None  # over the baseline with the same factor; None if the subject is the baseline
    value: MetricValue


@dataclass(frozen=True, slots=True)
class KeptPromise:
    """The promised bound on tokens that an arm's exits change, and the share that they changed."""

    arm: str
    max_disagreement: float  # promised share of changed tokens
    probability: float  # probability that the promise holds
    prompts: int  # prompts of each model by which it was tested
    threshold: float | None  # the chosen threshold; None: no token may leave early
    held_out: float | None  # share of changed tokens in the served requests; None if there were none
    held_out_interval: tuple[float, float] | None

    @property
    def kept(self) -> bool | None:
        """False if even the lower end is above the promise; None if noise leaves it open, or nothing ran."""
        if self.held_out is None:
            return None
        if self.held_out <= self.max_disagreement:
            return True
        return False if self.held_out_interval and self.held_out_interval[0] > self.max_disagreement else None


@dataclass(frozen=True, slots=True)
class Trust:
    """How far the subject's answer in the headline metric can be trusted, besides its inputs."""

    band: TimeBand | None = None  # real times divided by the profiles'
    at_ends: tuple[AtEnd, ...] = ()
    survives: bool | None = None  # whether the answer is the same at both ends; None if unknown or not run
    why_not: str | None = None  # why the ends were not run, if they should have been
    valid_up_to_rps: float | None = None  # arrival rate up to which the subject and its baseline kept up
    promises: tuple[KeptPromise, ...] = ()  # promises of arms with exits.guarantee


@dataclass(frozen=True, slots=True)
class ExperimentResult(Sourced):
    """One study with all its arms."""

    experiment: str
    title: str
    question: str
    conditions: str  # hardware, runtime and load in a sentence
    verdict: tuple[str, ...]  # one or a few sentences; the first is the answer
    baseline: str  # an arm
    arms: Mapping[str, ArmResult]  # in display order
    workload: ServedWorkload
    inputs: Mapping[str, Provenance]  # by name: profiles, exit traces, request traces
    provenance: Mapping[str, Any]  # of the run: command, versions, seeds, configuration
    slo: Slo = field(default_factory=Slo)
    published: tuple[Published, ...] = ()
    gates: tuple[Gate, ...] = ()
    assumptions: tuple[Assumption, ...] = ()  # in addition to those of the inputs
    warnings: tuple[str, ...] = ()  # in addition to those that the report finds
    points: tuple[SweepPoint, ...] = ()
    figures: tuple[Figure, ...] = ()
    headline_metrics: tuple[str, ...] | None = None  # columns of the arms table; None: the usual ones
    fidelity: Fidelity | None = None  # of a comparison with a measured run
    subject: str | None = None  # the arm that the verdict is about
    trust: Trust = Trust()

    def baseline_of(self, arm: str) -> str:
        """The arm that this one is compared with. An arm under other conditions has its own baseline."""
        return self.arms[arm].baseline or self.baseline

    def by_task(self, arm: str) -> dict[str, TaskFigures]:
        """The arm's figures for each of the workload's tasks."""
        return by_task([replicate.records for replicate in self.arms[arm].replicates], self.workload.tasks)

    def request_tables(self) -> Iterator[pyarrow.Table]:
        """The rows of requests.parquet, one for each request, arm and seed, in parts."""
        replicates = [(arm.name, replicate) for arm in self.arms.values() for replicate in arm.replicates]
        cached = any(replicate.records.cached_tokens.present.any() for _, replicate in replicates)
        for name, replicate in replicates:
            yield from replicate.records.tables(name, replicate.seed, self.workload.tasks, cached)

    def requests(self) -> Any:
        """The rows of requests.parquet as a data frame of pandas, or of polars if only that is installed.

        Raises UserError if neither is.
        """
        import pyarrow as pa

        table = pa.concat_tables(self.request_tables()).unify_dictionaries()
        if find_spec("pandas") is not None:
            return table.to_pandas()
        with suppress(ImportError):
            return import_module("polars").from_arrow(table)
        allowed = "a data frame needs pandas or polars; requests.parquet has the same rows"
        raise UserError("requests()", "no data frames here", allowed, "pip install pandas")

    @property
    def seeds(self) -> int:
        """The number of seeds of each arm."""
        return len(self.arms[self.baseline].replicates)


def headline_metrics(result: ExperimentResult) -> tuple[str, ...]:
    """The columns of the table of arms: the experiment's own, else the default ones. Ratios are of the first.

    Costs, the hit rate of prefix caching, and metrics of drafts and cascades follow if the study has them.
    """
    names = result.headline_metrics or USUAL_METRICS
    runs = [replicate.metrics for arm in result.arms.values() for replicate in arm.replicates]
    of = (OF_PREFIXES[0], *OF_DRAFTS, *OF_SPLITS, *OF_RELEASES, *OF_LATE_LAYERS, *OF_CASCADES, *OF_COST)
    new = (name for name in of if name not in names)
    return (*names, *(name for name in new if any(run.get(name) is not None for run in runs)))


def scope(seeds: int) -> Method:
    """The scope of intervals with so many seeds."""
    return Method.OVER_SEEDS if seeds > 1 else Method.WITHIN_RUN


def scope_in_words(seeds: int) -> str:
    """The scope of intervals with so many seeds, in the words that are shown beside them."""
    return f"over {seeds} seeds" if seeds > 1 else "within this run"


LOAD_METRICS = ("throughput_requests_per_s", "ttft_s_p50", "ttft_s_p99", "tpot_s_p50", "tpot_s_p99", "slo_attainment",
                "e2e_s_p50", "e2e_s_p99")  # fmt: skip


def shown_metrics(headline: Sequence[str] | None, figures: Sequence[Figure]) -> set[str]:
    """Metrics with ratios and intervals at every point of a sweep: those in the table and the figures."""
    found = {*(headline or USUAL_METRICS), *(f.metric for f in figures if isinstance(f, SweepFigure | PhaseFigure))}
    return found | {*LOAD_METRICS} if any(isinstance(f, LoadFigure) for f in figures) else found


Comparisons = Mapping[str, Mapping[str, Ratio]]  # by arm, then by metric


def comparisons(result: ExperimentResult) -> dict[str, dict[str, Ratio]]:
    """The ratios of every arm to its baseline, without the baselines themselves."""
    runs = {name: [(r.records, r.metrics) for r in arm.replicates] for name, arm in result.arms.items()}
    return {
        name: compare(runs[name], runs[result.baseline_of(name)])
        for name in result.arms
        if name != result.baseline_of(name)
    }
