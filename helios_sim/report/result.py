"""The result of a finished study: everything that its summary, tables, figures and page are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from helios_sim.provenance import Assumption, Provenance, ProvenanceClass, weakest
from helios_sim.report.breakdown import ReplicaFigures, TaskFigures, WaitFigures, by_task
from helios_sim.report.compare import Ratio, compare
from helios_sim.report.fidelity import Fidelity
from helios_sim.report.metrics import Metrics, Slo, mean_metrics
from helios_sim.report.records import Records
from helios_sim.serving.stats import RunStats
from helios_sim.serving.timeline import Timeline

if TYPE_CHECKING:
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
class ExitDepths:
    """Output tokens of a model by the layer after which they left."""

    model: str
    n_layers: int
    tokens_by_depth: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One policy's runs. Timeline, decisions, exit depths and replicas are of the first replicate."""

    name: str
    description: str  # one line: what the policy does
    replicates: tuple[Replicate, ...]  # at least one; those of all arms match by position
    timeline: Timeline | None = None  # of the first replica
    capacity_bytes: int | None = None  # of the card, for the timeline's memory
    decisions: Sequence[Decision] = ()
    exit_depths: tuple[ExitDepths, ...] = ()
    baseline: str | None = None  # the arm under the same conditions that it is compared with; None: the result's
    timeline_transitions_ns: Sequence[int] | None = None  # of the timeline's replica; None: those of the replicate
    replicas: tuple[ReplicaFigures, ...] = ()
    is_bound: bool = False  # knows what will come, as no policy that one could deploy
    waits: tuple[WaitFigures, ...] = ()  # by what the order of the line prefers; empty in order of arrival

    @property
    def metrics(self) -> Metrics:
        """Means over the replicates."""
        return mean_metrics([replicate.metrics for replicate in self.replicates])


@dataclass(frozen=True, slots=True)
class Published:
    """A published figure and the same figure of this study."""

    what: str  # "throughput over early-exit OPT-1.3B"
    published: float
    condition: str  # of the publication
    source: str
    ours: float | None  # None: not computed here, and `remark` says why
    low: float | None  # our interval
    high: float | None
    inputs: tuple[tuple[str, ProvenanceClass], ...]  # (input, its class)
    remark: str  # whether it follows, and if not, why
    unit: str = "x"


@dataclass(frozen=True, slots=True)
class Gate:
    """A bound that an experiment must meet; otherwise the command fails."""

    name: str
    value: float | None
    bound: str  # as a person reads it, "<= 0.05"
    passed: bool


@dataclass(frozen=True, slots=True)
class ServedWorkload:
    """The workload of a study in words and figures."""

    statement: str
    requests: int
    offered_requests_per_s: float | None  # None in a closed loop, when all came at once, or where arms differ
    facts: tuple[tuple[str, str], ...] = ()  # (name, value): lengths, mix, drift, source
    tasks: tuple[str, ...] = ()  # by the number that records have


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """The metrics of every arm at one setting."""

    settings: Mapping[str, float | int | str]
    metrics: Mapping[str, Metrics]  # by arm
    vs_baseline: Mapping[str, Mapping[str, Ratio]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Line:
    """A value to mark across a figure, e.g. a published one."""

    label: str
    value: float


@dataclass(frozen=True, slots=True)
class SweepFigure:
    """A metric of the points against one setting, a line for each arm (and each value of `split_by`)."""

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
    """One metric of the arms against another, a point for each arm."""

    title: str
    x: str
    y: str
    arms: tuple[str, ...] | None = None  # None: all


@dataclass(frozen=True, slots=True)
class QualityFigure:
    """Bits per character over the run, a line for each arm."""

    title: str
    arms: tuple[str, ...] | None = None  # None: all
    parts: int = 20  # of the requests in their order, one point each


Figure = SweepFigure | LoadFigure | ArmsFigure | QualityFigure


@dataclass(frozen=True, slots=True)
class ExperimentResult:
    """One study with all its arms."""

    experiment: str
    title: str
    question: str
    conditions: str  # hardware, runtime and load in a sentence
    verdict: tuple[str, ...]  # one or a few sentences; the first is the answer
    baseline: str  # an arm
    arms: Mapping[str, ArmResult]  # in the order to show
    workload: ServedWorkload
    inputs: Mapping[str, Provenance]  # by name: profiles, exit traces, request traces
    provenance: Mapping[str, Any]  # of the run: command, versions, seeds, configuration
    slo: Slo = field(default_factory=Slo)
    published: tuple[Published, ...] = ()
    gates: tuple[Gate, ...] = ()
    assumptions: tuple[Assumption, ...] = ()  # besides those of the inputs
    warnings: tuple[str, ...] = ()  # besides those that the report finds itself
    points: tuple[SweepPoint, ...] = ()
    figures: tuple[Figure, ...] = ()
    headline_metrics: tuple[str, ...] | None = None  # columns of the arms table; None: the usual ones
    fidelity: Fidelity | None = None  # of a comparison with a measured run
    subject: str | None = None  # the arm that the verdict is about

    def baseline_of(self, arm: str) -> str:
        """The arm that this one is compared with. An arm under other conditions has its own baseline."""
        return self.arms[arm].baseline or self.baseline

    def by_task(self, arm: str) -> dict[str, TaskFigures]:
        """The arm's figures for each of the workload's tasks."""
        return by_task([replicate.records for replicate in self.arms[arm].replicates], self.workload.tasks)

    @property
    def provenance_class(self) -> ProvenanceClass | None:
        """The weakest of the inputs'; None without inputs."""
        classes = [source.provenance_class for source in self.inputs.values()]
        return weakest(classes) if classes else None

    @property
    def all_assumptions(self) -> tuple[Assumption, ...]:
        """Assumptions of the run and of every input, each once."""
        of_inputs = (a for source in self.inputs.values() for a in source.assumptions)
        return tuple(dict.fromkeys((*self.assumptions, *of_inputs)))


def headline_metrics(result: ExperimentResult) -> tuple[str, ...]:
    """The columns of the arms table: the experiment's own, else the usual ones; ratios are of the first."""
    return result.headline_metrics or USUAL_METRICS


Comparisons = Mapping[str, Mapping[str, Ratio]]  # by arm, then by metric


def comparisons(result: ExperimentResult) -> dict[str, dict[str, Ratio]]:
    """Ratios of every arm to its baseline, without the baselines themselves."""
    runs = {name: [(r.records, r.metrics) for r in arm.replicates] for name, arm in result.arms.items()}
    return {
        name: compare(runs[name], runs[result.baseline_of(name)])
        for name in result.arms
        if name != result.baseline_of(name)
    }
