"""Puts simulated and live runs together into one result with rows, gates and a verdict. Runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from helios_sim.provenance import Provenance, ProvenanceClass
from helios_sim.report.fidelity import ComparedRow, Fidelity, FloatArray, RequestTimes
from helios_sim.report.metrics import Band, Metrics, MetricValue
from helios_sim.report.result import ArmResult, ExperimentResult, Gate, Replicate, ServedWorkload, SweepPoint
from helios_sim.study.build import task_names
from helios_sim.study.fidelity_live_cells import Cell
from helios_sim.study.fidelity_live_rows import number_of, row_of, rows_of
from helios_sim.study.job import JobResult
from helios_sim.study.live_notes import LiveNotes
from helios_sim.study.schema import Config
from helios_sim.study.verdict import workload_facts

LIVE, SIMULATED = "live", "simulated"
# (metric, name, largest difference either way where two live runs differ by less)
TARGETS = (
    ("tpot_s_mean", "TPOT mean", 0.05),
    ("throughput_requests_per_s", "throughput", 0.05),
    ("ttft_s_p95", "TTFT p95", 0.10),
)
HEADLINE = ("tpot_s_mean", "ttft_s_p95", "e2e_s_mean", "throughput_requests_per_s", "batch_mean", "layers_per_token",
            "switches")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pass:
    """One cell's runs of one pass."""

    simulated: JobResult
    live: JobResult
    paced: JobResult | None = None  # simulated at the pace that the device had in the live run


@dataclass(frozen=True, slots=True)
class Compared:
    """One cell with all that was run of it."""

    cell: Cell
    passes: tuple[Pass, ...] = ()

    def with_pass(self, one: Pass) -> Compared:
        return replace(self, passes=(*self.passes, one))

    @property
    def rows(self) -> tuple[ComparedRow, ...]:
        return rows_of(*self._metrics())

    def row(self, metric: str) -> ComparedRow:
        """Of one metric, in its own unit."""
        return row_of(("", "", ""), *([number_of(m, metric) for m in runs] for runs in self._metrics()))

    def _metrics(self) -> tuple[Sequence[Metrics | None], ...]:
        """Of each pass: measured, simulated, simulated at the device's pace."""
        runs = zip(*((one.live, one.simulated, one.paced) for one in self.passes), strict=True)
        return tuple([None if run is None else run.replicate.metrics for run in of] for of in runs)


def comparison(found: Sequence[Compared], config: Config, provenance: Mapping[str, Any]) -> ExperimentResult:
    """`found` in the order to show; at least one cell."""
    parts = tuple((c.cell.name, c.rows) for c in found)
    fidelity = Fidelity(
        parts=parts, counts=(), load_errors=(), profile_error=0.0, terms=tuple(_terms(found)),
        spreads=tuple(spread for c in found for spread in _spreads(c)),
    )  # fmt: skip
    gates = tuple(_gates(found))
    shown = [c for c in found if c.cell.load == _shown_load(found)]
    first = shown[0].passes[0].live.replicate.records
    rates = {c.cell.rate_per_s for c in shown}
    arms = {arm.name: arm for c in shown for arm in _arms(c)}
    return ExperimentResult(
        experiment=config.name,
        title=config.title or config.name,
        question=config.question,
        conditions=f"{', '.join(config.models)} on {config.live.device} beside {config.hardware}; arms at "
        f"{_shown_load(found):.0%} of their capacity; the table holds all loads.",
        verdict=tuple(_verdict(found, gates)),
        baseline=next(iter(arms)),
        arms=arms,
        workload=ServedWorkload(
            statement=config.workload.statement,
            requests=len(first),
            offered_requests_per_s=rates.pop() if len(rates) == 1 else None,  # each arm has a rate of its own
            facts=workload_facts(config, first),
            tasks=task_names(config.workload.mix),
        ),
        inputs=_inputs(found),
        provenance=provenance,
        gates=gates,
        assumptions=tuple(dict.fromkeys(a for one in _passes(found) for a in one.simulated.assumptions)),
        warnings=tuple(dict.fromkeys(notice for one in _passes(found) for notice in one.live.notices)),
        points=tuple(_points(found)),
        headline_metrics=HEADLINE,
        fidelity=fidelity,
    )


def _passes(found: Sequence[Compared]) -> list[Pass]:
    return [one for c in found for one in c.passes]


def _gates(found: Sequence[Compared]) -> list[Gate]:
    """One for each arm and target: the cell under saturation that is furthest off beyond what is allowed there.

    What is judged is the simulation at the device's pace where that was timed: who else is on a machine is no part of
    its profile, and no part of what is served makes the pace.
    """
    below = [c for c in found if c.cell.load < 1]
    gates = []
    for arm in dict.fromkeys(c.cell.arm for c in found):
        for metric, name, bound in TARGETS:
            worst: tuple[float, float | None, float, float] | None = None  # (beyond, value, allowed, load)
            for c in below:
                if c.cell.arm != arm:
                    continue
                row, allowed = c.row(metric), max(bound, _noise(below, metric, c.cell.load))
                value = row.difference if row.paced is None else row.paced_difference
                beyond = float("inf") if value is None else abs(value) - allowed
                if worst is None or beyond > worst[0]:
                    worst = (beyond, value, allowed, c.cell.load)
            if worst is not None:
                beyond, value, allowed, load = worst
                gates.append(
                    Gate(f"{arm}, {name} at {load:.0%}", value, f"within {allowed:.1%} (noise floor or {bound:.0%})",
                         beyond <= 0)
                )  # fmt: skip
    return gates


def _noise(found: Sequence[Compared], metric: str, load: float) -> float:
    """How far two live runs of the same lie apart at that load: the root of the mean square over all arms, since a few
    runs of one arm hardly tell. 0 where nothing is known.
    """
    known = [noise for c in found if c.cell.load == load and (noise := c.row(metric).noise) is not None]
    return float(np.sqrt(np.mean(np.square(known)))) if known else 0.0


def _shown_load(found: Sequence[Compared]) -> float:
    """The highest load under saturation, else the lowest."""
    loads = sorted({c.cell.load for c in found})
    return max((load for load in loads if load < 1), default=loads[0])


def _arms(c: Compared) -> list[ArmResult]:
    about = c.cell.about
    live = _arm(f"{LIVE}_{c.cell.arm}", f"{about}; on the device", [one.live for one in c.passes])
    simulated = _arm(f"{SIMULATED}_{c.cell.arm}", f"{about}; simulated", [one.simulated for one in c.passes])
    return [live, replace(simulated, baseline=live.name)]


def _arm(name: str, about: str, runs: Sequence[JobResult]) -> ArmResult:
    first = runs[0]
    replicates = tuple(
        Replicate(turn, run.replicate.records, run.replicate.stats, run.replicate.metrics)
        for turn, run in enumerate(runs)
    )
    return ArmResult(name, about, replicates, first.timeline, first.capacity_bytes, first.decisions, first.exit_depths)


def _spreads(c: Compared) -> list[RequestTimes]:
    live, simulated = ([getattr(one, of) for one in c.passes] for of in ("live", "simulated"))
    return [
        RequestTimes(c.cell.name, name, tuple(map(times, live)), tuple(map(times, simulated)))
        for name, times in (("TTFT", _ttfts_s), ("TPOT", _tpots_s))
    ]


def _ttfts_s(run: JobResult) -> FloatArray:
    return np.sort(run.replicate.records.ttft_ns().astype(np.float64)) / 1e9


def _tpots_s(run: JobResult) -> FloatArray:
    tpot_ns, defined = run.replicate.records.tpot_ns()
    return np.sort(tpot_ns[defined]) / 1e9


def _points(found: Sequence[Compared]) -> list[SweepPoint]:
    """All metrics of all cells in every pass."""
    points = []
    for load in dict.fromkeys(c.cell.load for c in found):
        at = [c for c in found if c.cell.load == load]
        for turn in range(len(at[0].passes)):
            metrics = {
                f"{kind}_{c.cell.arm}": run.replicate.metrics
                for c in at
                for kind, run in ((LIVE, c.passes[turn].live), (SIMULATED, c.passes[turn].simulated))
            }
            points.append(SweepPoint({"load": load, "pass": turn + 1}, metrics))
    return points


def _inputs(found: Sequence[Compared]) -> dict[str, Provenance]:
    inputs: dict[str, Provenance] = {}
    for one in _passes(found):
        inputs |= {**one.simulated.inputs, **one.live.inputs}
    inputs["live runs"] = Provenance(ProvenanceClass.MEASURED, "served by this program", "mode=live")
    return inputs


def _terms(found: Sequence[Compared]) -> list[tuple[str, str]]:
    """Where a difference comes from: the price of what ran, the host between iterations, or other iterations."""
    terms = []
    for c in found:
        notes = [one.live.live for one in c.passes if one.live.live is not None]
        if notes:
            both = LiveNotes.together(notes)
            terms.append((c.cell.name, both.sentence()))
    return terms


def _verdict(found: Sequence[Compared], gates: Sequence[Gate]) -> list[str]:
    below = [c for c in found if c.cell.load < 1] or list(found)
    missed = sum(not gate.passed for gate in gates)
    paced = any(one.paced is not None for one in _passes(below))
    judged = "the simulation at the device's pace" if paced else "the simulation"
    kept = f"keeps {len(gates) - missed} of {len(gates)} targets" if missed else "keeps every target"
    sentences = [
        f"Under saturation {judged} {kept}.",
        *filter(None, (_off(below, metric, name) for metric, name, _ in TARGETS)),
    ]
    over = [c for c in found if c.cell.load >= 1]
    if over:
        sentences.append("In overload: " + _off(over, "throughput_requests_per_s", "throughput"))
    name = "energy_wh_per_request"
    energies = [(p.live.replicate.metrics.get(name), p.simulated.replicate.metrics.get(name)) for p in _passes(found)]
    return [*sentences, *energy_told(energies)]


def _off(found: Sequence[Compared], metric: str, name: str) -> str:
    rows = [c.row(metric) for c in found]
    off, paced, noise = (
        [abs(share) for row in rows if (share := getattr(row, of)) is not None]
        for of in ("difference", "paced_difference", "noise")
    )
    if not off or not noise:
        return ""
    at_pace = f" ({np.median(paced):.1%} and {max(paced):.1%} at the device's pace)" if paced else ""
    return (
        f"{name}: off by {np.median(off):.1%} in the middle and {max(off):.1%} at worst{at_pace}; two live runs of the "
        f"same differ by {np.median(noise):.1%} and {max(noise):.1%}."
    )


def energy_told(pairs: Sequence[tuple[MetricValue, MetricValue]]) -> list[str]:
    """Of (live, simulated) energies: the simulated one is a band, so what counts is whether the other lies in it."""
    both = [(live, band) for live, band in pairs if isinstance(live, float) and isinstance(band, Band)]
    if not both:
        return []
    inside = sum(band.low <= live <= band.high for live, band in both)
    return [f"Measured energy of a request lies in the simulated band in {inside} of {len(both)} runs."]
