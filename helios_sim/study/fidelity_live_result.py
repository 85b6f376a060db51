"""Puts simulated and live runs together into one result with rows, gates and a verdict. Runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from helios_sim.provenance import Provenance, ProvenanceClass
from helios_sim.report.fidelity import ComparedRow, Fidelity, Spread
from helios_sim.report.metrics import Band, Metrics, MetricValue
from helios_sim.report.result import ArmResult, ExperimentResult, Gate, Replicate, SweepPoint, Workload
from helios_sim.study.build import task_names
from helios_sim.study.fidelity_live_cells import Cell
from helios_sim.study.job import JobResult
from helios_sim.study.live_notes import LiveNotes
from helios_sim.study.schema import Config
from helios_sim.study.verdict import workload_facts

LIVE, SIMULATED = "live", "simulated"
STATISTICS = ("mean", "p50", "p90", "p95", "p99")
# (metric, figure, unit, from the metric's unit to this one) of the server as a whole
SYSTEM = (
    ("throughput_requests_per_s", "throughput", "requests/s", 1.0),
    ("throughput_tokens_per_s", "throughput", "tokens/s", 1.0),
    ("batch_mean", "mean batch", "requests", 1.0),
    ("kv_utilisation_mean", "KV in use", "%", 100.0),
    ("layers_per_token", "layers run", "a token", 1.0),
    ("early_exit_fraction", "early exits", "% of tokens", 100.0),
    ("breach_fraction", "breaches", "% of tokens", 100.0),
    ("energy_wh_per_request", "energy", "Wh a request", 1.0),
    ("switches", "switches", "", 1.0),
    ("loads", "loads", "", 1.0),
    ("switch_time_s", "time of switches", "s", 1.0),
    ("preemptions", "preemptions", "", 1.0),
)
# (metric, name, largest difference either way where two live runs differ by less)
TARGETS = (
    ("tpot_s_mean", "TPOT mean", 0.05),
    ("throughput_requests_per_s", "throughput", 0.05),
    ("ttft_s_p95", "TTFT p95", 0.10),
)
HEADLINE = ("tpot_s_mean", "ttft_s_p95", "e2e_s_mean", "throughput_requests_per_s", "batch_mean", "layers_per_token",
            "switches")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Compared:
    """One cell's runs."""

    cell: Cell
    simulated: JobResult
    live: JobResult
    again: JobResult
    paced: JobResult | None = None  # simulated at the pace that the device had beside the first live run

    def metrics(self) -> tuple[Metrics | None, ...]:
        """As rows want them: measured, simulated, measured again, simulated at the device's pace."""
        runs = (self.live, self.simulated, self.again, self.paced)
        return tuple(None if run is None else run.replicate.metrics for run in runs)


def comparison(found: Sequence[Compared], config: Config, provenance: Mapping[str, Any]) -> ExperimentResult:
    """`found` in the order to show; at least one cell."""
    parts = tuple((c.cell.name, rows_of(*c.metrics())) for c in found)
    fidelity = Fidelity(
        parts=parts, counts=(), load_errors=(), profile_error=0.0, terms=tuple(_terms(found)),
        spreads=tuple(spread for c in found for spread in _spreads(c)),
    )  # fmt: skip
    gates = tuple(_gates(found))
    shown = [c for c in found if c.cell.load == _shown_load(found)]
    first = shown[0].live.replicate.records
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
        workload=Workload(
            statement=config.workload.statement,
            requests=len(first),
            offered_requests_per_s=rates.pop() if len(rates) == 1 else None,  # each arm has a rate of its own
            facts=workload_facts(config, first),
            tasks=task_names(config.workload.mix),
        ),
        inputs=_inputs(found),
        provenance=provenance,
        gates=gates,
        assumptions=tuple(dict.fromkeys(a for c in found for a in c.simulated.assumptions)),
        warnings=tuple(dict.fromkeys(notice for c in found for run in (c.live, c.again) for notice in run.notices)),
        points=tuple(_points(found)),
        headline_metrics=HEADLINE,
        fidelity=fidelity,
    )


def rows_of(*runs: Metrics | None) -> tuple[ComparedRow, ...]:
    """Of `Compared.metrics`: latencies in ms, then the server as a whole. What a run does not know is None."""
    rows = []
    for name, group in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("itl_s", "ITL"), ("e2e_s", "E2E")):
        for statistic in STATISTICS:
            values = [_number(m, f"{name}_{statistic}", 1e3) for m in runs]
            rows.append(ComparedRow(group, "median" if statistic == "p50" else statistic, "ms", *values))
    for name, figure, unit, factor in SYSTEM:
        values = [_number(m, name, factor) for m in runs]
        rows.append(ComparedRow("system", figure, unit, *values))
    return tuple(rows)


def _number(metrics: Metrics | None, name: str, factor: float) -> float | None:
    """A band by its middle."""
    value = None if metrics is None else metrics.get(name)
    if value is None:
        return None
    return factor * ((value.low + value.high) / 2 if isinstance(value, Band) else value)


def _row(c: Compared, metric: str) -> ComparedRow:
    return ComparedRow("", "", "", *(_number(m, metric, 1.0) for m in c.metrics()))


def _difference(c: Compared, metric: str) -> tuple[float | None, float | None]:
    """Of the simulation, and of the second live run; each over the first."""
    row = _row(c, metric)
    return row.difference, row.noise


def _gates(found: Sequence[Compared]) -> list[Gate]:
    """One for each arm and target: the cell under saturation that is furthest off beyond what is allowed there."""
    gates = []
    for arm in dict.fromkeys(c.cell.arm for c in found):
        below = [c for c in found if c.cell.arm == arm and c.cell.load < 1]
        for metric, name, bound in TARGETS:
            worst: tuple[float, float | None, float, float] | None = None  # (beyond, value, allowed, load)
            for c in below:
                value, noise = _difference(c, metric)
                allowed = max(bound, abs(noise or 0.0))
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


def _shown_load(found: Sequence[Compared]) -> float:
    """The highest load under saturation, else the lowest."""
    loads = sorted({c.cell.load for c in found})
    return max((load for load in loads if load < 1), default=loads[0])


def _arms(c: Compared) -> list[ArmResult]:
    entry = c.cell.simulated.entry
    about = str(entry.get("description") or entry["policy"])
    live = _arm(f"{LIVE}_{c.cell.arm}", f"{about}; on the device", (c.live, c.again))
    simulated = _arm(f"{SIMULATED}_{c.cell.arm}", f"{about}; simulated", (c.simulated, c.simulated))
    return [live, replace(simulated, baseline=live.name)]


def _arm(name: str, about: str, runs: Sequence[JobResult]) -> ArmResult:
    first = runs[0]
    replicates = tuple(
        Replicate(turn, run.replicate.records, run.replicate.stats, run.replicate.metrics)
        for turn, run in enumerate(runs)
    )
    return ArmResult(name, about, replicates, first.timeline, first.capacity_bytes, first.decisions, first.exit_depths)


def _spreads(c: Compared) -> list[Spread]:
    found = []
    for name in ("TTFT", "TPOT"):
        columns = []
        for run in (c.live, c.simulated, c.again):
            records = run.replicate.records
            if name == "TTFT":
                values = records.ttft_ns().astype(np.float64)
            else:
                tpot_ns, defined = records.tpot_ns()
                values = tpot_ns[defined]
            columns.append(np.sort(values) / 1e9)
        found.append(Spread(c.cell.name, name, *columns))
    return found


def _points(found: Sequence[Compared]) -> list[SweepPoint]:
    """All metrics of all cells, the second live runs with them."""
    points = []
    for load in dict.fromkeys(c.cell.load for c in found):
        at = [c for c in found if c.cell.load == load]
        metrics = {
            f"{kind}_{c.cell.arm}": run.replicate.metrics
            for c in at
            for kind, run in ((LIVE, c.live), ("again", c.again), (SIMULATED, c.simulated))
        }
        points.append(SweepPoint({"load": load}, metrics))
    return points


def _inputs(found: Sequence[Compared]) -> dict[str, Provenance]:
    inputs: dict[str, Provenance] = {}
    for c in found:
        inputs |= {**c.simulated.inputs, **c.live.inputs}
    inputs["live runs"] = Provenance(ProvenanceClass.MEASURED, "served by this program", "mode=live")
    return inputs


def _terms(found: Sequence[Compared]) -> list[tuple[str, str]]:
    """Where a difference comes from: the price of what ran, the host between iterations, or other iterations."""
    terms = []
    for c in found:
        notes = [run.live for run in (c.live, c.again) if run.live is not None]
        if notes:
            both = LiveNotes.together(notes)
            terms.append((c.cell.name, both.sentence()))
    return terms


def _verdict(found: Sequence[Compared], gates: Sequence[Gate]) -> list[str]:
    below = [c for c in found if c.cell.load < 1] or list(found)
    told = []
    for metric, name, _ in TARGETS:
        pairs = [_difference(c, metric) for c in below]
        off = [abs(value) for value, _ in pairs if value is not None]
        noise = [abs(value) for _, value in pairs if value is not None]
        if off and noise:
            paced = [abs(d) for c in below if (d := _row(c, metric).paced_difference) is not None]
            at_pace = f" ({np.median(paced):.1%} and {max(paced):.1%} at the device's pace)" if paced else ""
            told.append(
                f"{name}: off by {np.median(off):.1%} in the middle and {max(off):.1%} at worst{at_pace}; two live "
                f"runs of the same differ by {np.median(noise):.1%} and {max(noise):.1%}"
            )
    missed = sum(not gate.passed for gate in gates)
    first = "Under saturation the simulation keeps every target" if not missed else (
        f"Under saturation the simulation misses {missed} of {len(gates)} targets"
    )  # fmt: skip
    sentences = [f"{first}.", *(f"{sentence}." for sentence in told)]
    over = [c for c in found if c.cell.load >= 1]
    if over:
        values = [abs(value) for c in over if (value := _difference(c, "throughput_requests_per_s")[0]) is not None]
        if values:
            sentences.append(f"In overload its throughput is off by {max(values):.1%} at worst.")
    name = "energy_wh_per_request"
    energies = [(c.live.replicate.metrics.get(name), c.simulated.replicate.metrics.get(name)) for c in found]
    return [*sentences, *energy_told(energies)]


def energy_told(pairs: Sequence[tuple[MetricValue, MetricValue]]) -> list[str]:
    """Of (live, simulated) energies: the simulated one is a band, so what counts is whether the other lies in it."""
    both = [(live, band) for live, band in pairs if isinstance(live, float) and isinstance(band, Band)]
    if not both:
        return []
    inside = sum(band.low <= live <= band.high for live, band in both)
    return [f"Measured energy of a request lies in the simulated band in {inside} of {len(both)} cells."]
