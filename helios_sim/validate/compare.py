"""One comparison of measured runs with simulated ones: rows, gates, arms and a verdict as one result.

Measured runs are a serving log (`of_log`), or live serving by this program in several passes (`of_live`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from helios_sim.provenance import Provenance, ProvenanceClass
from helios_sim.report.metrics import Band, MetricValue, compute_metrics
from helios_sim.report.records import Records
from helios_sim.report.result import (
    ArmResult,
    ComparedRow,
    Count,
    ExperimentResult,
    Fidelity,
    Gate,
    LoadError,
    Replicate,
    ServedWorkload,
    SweepPoint,
    compared_rows,
)
from helios_sim.request import NS_PER_S, all_to_ns
from helios_sim.serving.stats import RunStats
from helios_sim.study.jobs import JobResult, require_possible
from helios_sim.study.schema import Config
from helios_sim.study.verdict import workload_facts
from helios_sim.study.watched import LiveNotes
from helios_sim.study.workload import task_names
from helios_sim.validate.live import Compared, Profiled
from helios_sim.validate.logs import ServingLog
from helios_sim.validate.replay import Quantities, Simulated, stamped
from helios_sim.validate.setup import Setup

AS_SHIPPED = Profiled({})
MEASURED, SIMULATED, LIVE = "measured", "simulated", "live"


@dataclass(frozen=True, slots=True)
class Target:
    """The allowed difference of one row, and the likely cause if it is larger.

    `unshared` is the allowed difference if prompts share no prefixes.
    """

    group: str
    statistic: str
    unit: str
    bound: float
    missing: str = ""
    unshared: str | None = None

    @property
    def name(self) -> str:
        return self.statistic if self.group == "system" else f"{self.group} {self.statistic}"

    def row(self, rows: Sequence[ComparedRow]) -> ComparedRow:
        return next(r for r in rows if (r.group, r.statistic, r.unit) == (self.group, self.statistic, self.unit))


_PREFIXES = "prompts that share a prefix, and recomputation after preemptions"
_RECOMPUTED = "recomputation after preemptions"
_RAMP = "kernels' speed in the ramp"
_BOTH = "those of TTFT and TPOT together"
OF_LOG = (
    Target("TTFT", "mean", "ms", 0.03,
           f"prompts that share a prefix, which the log does not show, and {_RAMP}", _RAMP),
    Target("TTFT", "median", "ms", 0.05,
           "the ramp: errors of its early iterations add up in every request that waits behind them"),
    Target("TTFT", "p90", "ms", 0.03, _PREFIXES, _RECOMPUTED),
    Target("TTFT", "p99", "ms", 0.03, _PREFIXES, _RECOMPUTED),
    Target("TPOT", "mean", "ms", 0.01,
           "unequal KV lengths in captured decode graphs, or the link of a tensor-parallel group"),
    Target("E2E", "mean", "ms", 0.015, _BOTH),
    Target("E2E", "p99", "ms", 0.015, _BOTH),
)  # fmt: skip
OF_LIVE = (  # if two live runs differ by less
    Target("TPOT", "mean", "ms", 0.05),
    Target("system", "throughput", "requests/s", 0.05),
    Target("TTFT", "p95", "ms", 0.10),
)


def of_log(
    log: ServingLog,
    setup: Setup,
    quantities: Quantities | None,
    n: int,
    run: Simulated,
    load_errors: Sequence[LoadError],
    config: Config,
    provenance: Mapping[str, Any],
) -> ExperimentResult:
    """Compare a logged run with its simulation. `quantities` are estimated from the first `n` requests, or None."""
    simulated = Records.of(run.records)
    measured = Records.of(stamped(record, log.measured, i) for i, record in enumerate(run.records))
    measured = replace(measured, preemptions=np.zeros(len(log), np.int32))
    gaps = [run.stats.itl.mean_ns, *(run.stats.itl.percentile_ns(q) for q in (50, 90, 95, 99))]
    itl_ms = tuple(None if gap is None else gap / 1e6 for gap in gaps)
    fidelity = Fidelity(
        parts=_parts(measured, simulated, itl_ms, n), counts=_counts(log, run), load_errors=tuple(load_errors),
        profile_error=config.fidelity.profile_error, terms=_terms_of_log(setup, quantities, n),
    )  # fmt: skip
    gates = tuple(
        _gate(target.name, target.row(fidelity.rows), target.bound, f"within {target.bound:.1%}")
        for target in OF_LOG
    )
    metrics = compute_metrics(simulated, run.stats)
    if setup.own_types:
        fix = "correct the kernel tables, or fidelity.hardware"
        require_possible(metrics, setup.profile.hardware.name, fix)
    else:  # times in one type cannot be compared with the floor of another type
        metrics["roofline_fraction"] = None
    ours = Replicate(0, simulated, run.stats, metrics)
    logged = Replicate(0, measured, RunStats(), _measured_metrics(measured))
    span_s = float(log.arrival_ns[-1]) / NS_PER_S
    return _result(
        config,
        provenance,
        fidelity,
        gates,
        [
            ArmResult(MEASURED, "the log", (logged,)),
            ArmResult(SIMULATED, "from kernel times and engine settings", (ours,), run.timeline,
                      setup.profile.hardware.hbm_bytes),
        ],
        conditions=f"{setup.profile.name}; " + "; ".join(f"{name}: {value}" for name, value in setup.facts),
        verdict=_verdict_of_log(fidelity, gates, n if quantities else 0, setup.prefix_caching),
        workload=ServedWorkload(
            statement=f"The requests of {log.folder.name}: arrivals and lengths as logged.",
            requests=len(log),
            offered_requests_per_s=(len(log) - 1) / span_s if span_s > 0 else None,
            facts=tuple(
                (what, f"{tokens.mean():.0f} on average, {tokens.max()} at most")
                for what, tokens in (("prompt tokens", log.prompt_tokens), ("output tokens", log.output_tokens))
            ),
            tasks=("log",),
        ),
        inputs={
            f"profile {setup.profile.name}": setup.profile.provenance,
            "log": Provenance(ProvenanceClass.MEASURED, f"real run in {log.folder}", "not by this program"),
        },
        assumptions=(*setup.assumptions, *(quantities.assumptions(n) if quantities else ())),
        warnings=(*_warnings(quantities, n), *_of_preemptions(log, run), *setup.notices),
        headline_metrics=("ttft_s_mean", "ttft_s_p50", "ttft_s_p99", "tpot_s_mean", "e2e_s_mean", "e2e_s_p99",
                          "throughput_tokens_per_s"),
    )  # fmt: skip


def of_live(
    found: Sequence[Compared], config: Config, provenance: Mapping[str, Any], profiled: Profiled = AS_SHIPPED
) -> ExperimentResult:
    """Compare cells of live serving with their simulations. `found` is in display order, with at least one cell.

    A gate is at least as wide as the uncertainty of the profiles' times.
    """
    rows = {c.cell.name: c.rows for c in found}
    fidelity = Fidelity(
        parts=tuple(rows.items()), counts=(), load_errors=(), profile_error=0.0, terms=tuple(_terms_of_live(found)),
        spreads=tuple(spread for c in found for spread in c.spreads),
    )  # fmt: skip
    loads = sorted({c.cell.load for c in found})
    load = max((load for load in loads if load < 1), default=loads[0])  # show the highest load below saturation
    shown = [c for c in found if c.cell.load == load]
    first = shown[0].passes[0].live.replicate.records
    rates = {c.cell.rate_per_s for c in shown}
    gates = tuple(_gates_of_live(found, rows, profiled.within))
    passes = [one for c in found for one in c.passes]
    inputs: dict[str, Provenance] = {}
    for one in passes:
        inputs |= {**one.simulated.inputs, **one.live.inputs}
    return _result(
        config,
        provenance,
        fidelity,
        gates,
        [arm for c in shown for arm in _arms_of_live(c)],
        conditions=f"{', '.join(config.models)} on {config.live.device} beside {config.hardware}; arms at "
        f"{load:.0%} of their capacity; the table holds all loads.",
        verdict=tuple(_verdict_of_live(found, rows, gates, profiled.within)),
        workload=ServedWorkload(
            statement=config.workload.statement,
            requests=len(first),
            offered_requests_per_s=rates.pop() if len(rates) == 1 else None,  # each arm has a rate of its own
            facts=workload_facts(config, first),
            tasks=task_names(config.workload.mix),
        ),
        inputs={
            **inputs, "live runs": Provenance(ProvenanceClass.MEASURED, "served by this program", "mode=live"),
        },
        assumptions=tuple(dict.fromkeys(a for one in passes for a in one.simulated.assumptions)),
        warnings=(*profiled.notices, *dict.fromkeys(notice for one in passes for notice in one.live.notices)),
        points=tuple(_points(found)),
        headline_metrics=("tpot_s_mean", "ttft_s_p95", "e2e_s_mean", "throughput_requests_per_s", "batch_mean",
                          "layers_per_token", "switches"),
    )  # fmt: skip


def _result(
    config: Config,
    provenance: Mapping[str, Any],
    fidelity: Fidelity,
    gates: tuple[Gate, ...],
    arms: Sequence[ArmResult],
    **rest: Any,
) -> ExperimentResult:
    """The parts of the result that both comparisons share. The first arm is the measured one."""
    return ExperimentResult(
        experiment=config.name,
        title=config.title or config.name,
        question=config.question,
        baseline=arms[0].name,
        arms={arm.name: arm for arm in arms},
        provenance=provenance,
        gates=gates,
        fidelity=fidelity,
        **rest,
    )


def _gate(name: str, row: ComparedRow, allowed: float, bound: str) -> Gate:
    """Make a gate. `bound` is the allowed value in words."""
    value, beyond = _beyond(row, allowed)
    return Gate(name, value, bound, beyond <= 0)


def _beyond(row: ComparedRow, allowed: float) -> tuple[float | None, float]:
    """The judged difference, and by how much it exceeds the allowed one.

    If the device's pace was timed, the simulation at that pace is judged: other users of a machine are not part of its
    profile, and serving itself does not change the pace.
    """
    value = row.difference if row.paced is None else row.paced_difference
    return value, float("inf") if value is None else abs(value) - allowed


def _measured_metrics(records: Records) -> dict[str, MetricValue]:
    """Metrics that follow from request times; all others are not known for a log."""
    known = ("ttft_s", "tpot_s", "e2e_s", "queue_s", "throughput", "requests", "span_s")
    metrics = compute_metrics(records, RunStats())
    return {name: value if name.startswith(known) else None for name, value in metrics.items()}


def _parts(
    measured: Records, simulated: Records, itl_ms: tuple[float | None, ...], n: int
) -> tuple[tuple[str, tuple[ComparedRow, ...]], ...]:
    found = [(f"all {len(measured)} requests", compared_rows(measured, simulated, itl_ms))]
    for name, rows in ((f"requests 1 to {n}", slice(0, n)), (f"requests {n + 1} to {len(measured)}", slice(n, None))):
        part = compared_rows(measured.part(rows), simulated.part(rows), ())
        found.append((name, tuple(row for row in part if row.group != "system")))
    return tuple(found)


def _counts(log: ServingLog, run: Simulated) -> tuple[Count, ...]:
    """The log's samples, and the simulation's running and waiting requests at the same times.

    The number running changes only when the simulation samples it; requests may arrive in between.
    """
    if log.series is None or not run.timeline.rows:
        return ()
    time_ns = np.array([row[0] for row in run.timeline.rows]) - int(log.measured.queued_ns.min())
    sampled_ns = all_to_ns(log.series.time_s, "timeseries.csv: t")
    at = np.searchsorted(time_ns, sampled_ns, side="right") - 1
    noted = np.array([row[3] for row in run.timeline.rows], np.float64)
    running = np.where(at >= 0, noted[np.maximum(at, 0)], 0.0)
    queued = np.searchsorted(np.sort(run.times.queued_ns), sampled_ns, side="right")
    waiting = np.maximum(queued - np.searchsorted(np.sort(run.times.last_ns), sampled_ns, side="right") - running, 0.0)
    return (
        Count("running", log.series.time_s, log.series.running, running),
        Count("waiting", log.series.time_s, log.series.waiting, waiting),
    )


def _terms_of_log(setup: Setup, quantities: Quantities | None, n: int) -> tuple[tuple[str, str], ...]:
    tables = setup.profile.layer_tables[0]
    found = [
        (
            "decodes beside a prompt chunk",
            "as measured together" if tables.mixed_attention else "the sum of both alone",
        ),
        ("unequal KV lengths", "measured table" if tables.unequal_kv else "by their mean"),
    ]
    if quantities is not None:
        source = f"estimated from requests 1 to {n}"
        found += [
            ("warm-up of the first iteration", f"{quantities.warm_up_s * 1e3:.1f} ms, {source}"),
            ("gap of an iteration with prefill", f"{quantities.prefill_gap_s * 1e3:.2f} ms, {source}"),
            ("gap between iterations", f"{quantities.gap_s * 1e3:.3f} ms, {source}"),
            ("part of the measured excess of unequal KV lengths", f"{quantities.unequal_kv_part:.2f}, {source}"),
        ]
    return tuple(found)


def _verdict_of_log(fidelity: Fidelity, gates: Sequence[Gate], estimated_from: int, shared: bool) -> tuple[str, ...]:
    missed = [(gate, target) for gate, target in zip(gates, OF_LOG, strict=True) if not gate.passed]
    worst = max((g for g in gates if g.value is not None), key=lambda g: abs(g.value or 0.0), default=None)
    if not missed:
        far = "" if worst is None else f" The largest difference is {worst.value or 0.0:+.1%} ({worst.name})."
        found = [f"The simulation keeps all {len(gates)} gates.{far}"]
    else:
        found = [f"The simulation misses {len(missed)} of {len(gates)} gates."]
        for gate, target in missed:
            value = "not defined" if gate.value is None else f"{gate.value:+.1%}"
            missing = target.missing if shared or target.unshared is None else target.unshared
            found.append(f"Missed: {gate.name} {value} ({gate.bound}); thought to be missing: {missing}.")
    if estimated_from:
        part, rows = fidelity.parts[2]
        told = [f"{r.group} {r.difference:+.1%}" for r in rows if r.statistic == "mean" and r.difference is not None]
        found.append(f"Nothing was estimated from {part}: their means differ by {', '.join(told)}.")
    for count in fidelity.counts:
        miss = float(np.abs(count.simulated - count.measured).mean())
        found.append(
            f"{count.name.capitalize()} requests differ by {miss:.1f} on average (mean {count.measured.mean():.1f})."
        )
    return tuple(found)


def _warnings(quantities: Quantities | None, n: int) -> tuple[str, ...]:
    found = [
        "TTFT is first token minus queued, as vLLM stamps both; what a request waits for the engine's loop before that "
        "is left out of both runs. The log has no gaps between tokens, so ITL has no measured side."
    ]
    if quantities is not None:
        found.append(
            f"Quantities that no kernel table has were estimated from requests 1 to {n}; figures of the others are "
            "the test."
        )
    return tuple(found)


def _of_preemptions(log: ServingLog, run: Simulated) -> list[str]:
    if log.series is None or log.series.preemptions is None:
        return []
    simulated = sum(record.preemptions for record in run.records)
    return [f"The log counts {log.series.preemptions} preemptions, the simulation {simulated}."]


def _gates_of_live(
    found: Sequence[Compared], rows: Mapping[str, Sequence[ComparedRow]], within: float
) -> list[Gate]:
    """A gate for each arm and target: the cell below saturation that exceeds the allowed difference most."""
    below = [c.cell for c in found if c.cell.load < 1]
    gates = []
    for arm in dict.fromkeys(cell.arm for cell in below):
        for target in OF_LIVE:
            judged: dict[float, tuple[ComparedRow, float]] = {}
            for cell in below:
                if cell.arm == arm:
                    noise = _noise(target.row(rows[c.name]) for c in below if c.load == cell.load)
                    judged[cell.load] = target.row(rows[cell.name]), max(target.bound, noise, within)
            load = max(judged, key=lambda at: _beyond(*judged[at])[1])
            known = f", or the profile's {within:.0%}" if within else ""
            allowed = f"within {judged[load][1]:.1%} (noise floor or {target.bound:.0%}{known})"
            gates.append(_gate(f"{arm}, {target.name} at {load:.0%}", *judged[load], allowed))
    return gates


def _noise(rows: Iterable[ComparedRow]) -> float:
    """The difference between two live runs of the same cell: the root mean square over the rows of all arms.

    A few runs of one arm would be too few. 0 if nothing is known.
    """
    known = [row.noise for row in rows if row.noise is not None]
    return float(np.sqrt(np.mean(np.square(known)))) if known else 0.0


def _arms_of_live(c: Compared) -> list[ArmResult]:
    live = _arm(f"{LIVE}_{c.cell.arm}", f"{c.cell.about}; on the device", [one.live for one in c.passes])
    simulated = _arm(f"{SIMULATED}_{c.cell.arm}", f"{c.cell.about}; simulated", [one.simulated for one in c.passes])
    return [live, replace(simulated, baseline=live.name)]


def _arm(name: str, about: str, runs: Sequence[JobResult]) -> ArmResult:
    first = runs[0]
    replicates = tuple(
        Replicate(turn, run.replicate.records, run.replicate.stats, run.replicate.metrics)
        for turn, run in enumerate(runs)
    )
    return ArmResult(name, about, replicates, first.timeline, first.capacity_bytes, first.decisions, first.exit_depths)


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


def _terms_of_live(found: Sequence[Compared]) -> list[tuple[str, str]]:
    """The sources of a difference: the price of iterations, the host between them, or other iterations."""
    terms = []
    for c in found:
        notes = [one.live.live for one in c.passes if one.live.live is not None]
        if notes:
            both = LiveNotes.together(notes)
            terms.append((c.cell.name, both.sentence()))
    return terms


def _verdict_of_live(
    found: Sequence[Compared], rows: Mapping[str, Sequence[ComparedRow]], gates: Sequence[Gate], within: float
) -> list[str]:
    below = [c for c in found if c.cell.load < 1] or list(found)
    missed = sum(not gate.passed for gate in gates)
    paced = any(one.paced is not None for c in below for one in c.passes)
    judged = "the simulation at the device's pace" if paced else "the simulation"
    kept = f"keeps {len(gates) - missed} of {len(gates)} targets" if missed else "keeps every target"
    sentences = [
        f"Under saturation {judged} {kept}{f', as wide as its profile is known: {within:.0%}' if within else ''}.",
        *filter(None, (_off([target.row(rows[c.cell.name]) for c in below], target.name) for target in OF_LIVE)),
    ]
    over = [c for c in found if c.cell.load >= 1]
    if over:
        sentences.append("In overload: " + _off([OF_LIVE[1].row(rows[c.cell.name]) for c in over], "throughput"))
    name = "energy_wh_per_request"
    runs = [[run.replicate.metrics.get(name) for run in (one.live, one.simulated)] for c in found for one in c.passes]
    return [*sentences, *energy_told(runs)]


def _off(rows: Sequence[ComparedRow], name: str) -> str:
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


def energy_told(pairs: Iterable[Sequence[MetricValue]]) -> list[str]:
    """Compare (live, simulated) energies. The simulated one is a band; the live one should lie within it."""
    both = [(live, band) for live, band in pairs if isinstance(live, float) and isinstance(band, Band)]
    if not both:
        return []
    inside = sum(band.low <= live <= band.high for live, band in both)
    return [f"Measured energy of a request lies in the simulated band in {inside} of {len(both)} runs."]
