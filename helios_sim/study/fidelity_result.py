"""Puts a measured and a simulated run together into one result with rows, gates and a verdict. Runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from helios_sim.provenance import Assumption, Provenance, ProvenanceClass
from helios_sim.report.fidelity import ComparedRow, Count, Fidelity, LoadError, compared_rows
from helios_sim.report.metrics import MetricValue, compute_metrics
from helios_sim.report.records import Records
from helios_sim.report.result import ArmResult, ExperimentResult, Gate, Replicate, ServedWorkload
from helios_sim.serving.stats import RunStats
from helios_sim.study.fidelity_estimate import Quantities
from helios_sim.study.fidelity_log import ServingLog
from helios_sim.study.fidelity_run import Simulated, stamped
from helios_sim.study.fidelity_setup import Setup
from helios_sim.study.schema import Config

MEASURED, SIMULATED = "measured", "simulated"
# (group, statistic, largest difference either way, term that is thought to be missing where it is larger)
GATES = (
    ("TTFT", "mean", 0.03, "prompts that share a prefix, which the log does not show, and kernels' speed in the ramp"),
    ("TTFT", "median", 0.05, "the ramp: errors of its early iterations add up in whoever waits behind them"),
    ("TTFT", "p90", 0.03, "prompts that share a prefix, and recomputation after preemptions"),
    ("TTFT", "p99", 0.03, "prompts that share a prefix, and recomputation after preemptions"),
    ("TPOT", "mean", 0.01, "unequal KV lengths in captured decode graphs, or the link of a tensor-parallel group"),
    ("E2E", "mean", 0.015, "those of TTFT and TPOT together"),
    ("E2E", "p99", 0.015, "those of TTFT and TPOT together"),
)
HEADLINE = ("ttft_s_mean", "ttft_s_p50", "ttft_s_p99", "tpot_s_mean", "e2e_s_mean", "e2e_s_p99",
            "throughput_tokens_per_s")  # fmt: skip


def comparison(
    log: ServingLog,
    setup: Setup,
    quantities: Quantities | None,
    estimated_from: int,
    run: Simulated,
    load_errors: Sequence[LoadError],
    config: Config,
    provenance: Mapping[str, Any],
) -> ExperimentResult:
    """`quantities`: what was estimated from the first `estimated_from` requests; None: nothing was."""
    simulated = Records.of(run.records)
    measured = Records.of(stamped(record, log.measured, i) for i, record in enumerate(run.records))
    measured = replace(measured, preemptions=np.zeros(len(log), np.int32))
    gaps = [run.stats.itl.mean_ns, *(run.stats.itl.percentile_ns(q) for q in (50, 90, 95, 99))]
    itl_ms = tuple(None if gap is None else gap / 1e6 for gap in gaps)
    parts = _parts(measured, simulated, itl_ms, estimated_from)
    fidelity = Fidelity(
        parts=parts,
        counts=_counts(log, run),
        load_errors=tuple(load_errors),
        profile_error=config.fidelity.profile_error,
        terms=_terms(setup, quantities, estimated_from),
    )
    gates = tuple(_gate(fidelity.rows, *gate[:3]) for gate in GATES)
    arms = {
        MEASURED: _arm(MEASURED, "the log", measured, _measured_metrics(measured), RunStats()),
        SIMULATED: replace(
            _arm(SIMULATED, "from kernel times and engine settings", simulated,
                 compute_metrics(simulated, run.stats), run.stats),
            timeline=run.timeline, capacity_bytes=setup.profile.hardware.hbm_bytes,
        ),
    }  # fmt: skip
    span_s = float(log.arrival_ns[-1]) / 1e9
    return ExperimentResult(
        experiment=config.name,
        title=config.title or config.name,
        question=config.question,
        conditions=f"{setup.profile.name}; " + "; ".join(f"{name}: {value}" for name, value in setup.facts),
        verdict=_verdict(fidelity, gates, estimated_from if quantities else 0),
        baseline=MEASURED,
        arms=arms,
        workload=ServedWorkload(
            statement=f"The requests of {log.folder.name}: arrivals and lengths as logged.",
            requests=len(log),
            offered_requests_per_s=(len(log) - 1) / span_s if span_s > 0 else None,
            facts=(
                ("prompt tokens", f"{log.prompt_tokens.mean():.0f} on average, {log.prompt_tokens.max()} at most"),
                ("output tokens", f"{log.output_tokens.mean():.0f} on average, {log.output_tokens.max()} at most"),
            ),
            tasks=("log",),
        ),
        inputs={
            f"profile {setup.profile.name}": setup.profile.provenance,
            "log": Provenance(ProvenanceClass.MEASURED, f"real run in {log.folder}", "not by this program"),
        },
        provenance=provenance,
        gates=gates,
        assumptions=(*setup.assumptions, *_assumptions(quantities, estimated_from)),
        warnings=_warnings(log, quantities, estimated_from),
        headline_metrics=HEADLINE,
        fidelity=fidelity,
    )


def _arm(name: str, text: str, records: Records, metrics: Mapping[str, MetricValue], stats: RunStats) -> ArmResult:
    return ArmResult(name, text, (Replicate(0, records, stats, metrics),))


def _measured_metrics(records: Records) -> dict[str, MetricValue]:
    """What request times alone tell; the rest is not known of a log."""
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
    """The log's samples, and what the simulation had at those times: whoever was queued and not done, runs or waits.

    The number running changes only where the simulation notes it; requests may arrive in between.
    """
    if log.series is None or not run.timeline.rows:
        return ()
    time_ns = np.array([row[0] for row in run.timeline.rows]) - int(log.measured.queued_ns.min())
    at = np.searchsorted(time_ns, log.series.time_s * 1e9, side="right") - 1
    sampled_ns = log.series.time_s * 1e9
    noted = np.array([row[3] for row in run.timeline.rows], np.float64)
    running = np.where(at >= 0, noted[np.maximum(at, 0)], 0.0)
    queued = np.searchsorted(np.sort(run.times.queued_ns), sampled_ns, side="right")
    waiting = np.maximum(queued - np.searchsorted(np.sort(run.times.last_ns), sampled_ns, side="right") - running, 0.0)
    return (
        Count("running", log.series.time_s, log.series.running, running),
        Count("waiting", log.series.time_s, log.series.waiting, waiting),
    )


def _gate(rows: Sequence[ComparedRow], group: str, statistic: str, bound: float) -> Gate:
    row = next(r for r in rows if (r.group, r.statistic) == (group, statistic))
    value = row.difference
    return Gate(f"{group} {statistic}", value, f"within {bound:.1%}", value is not None and abs(value) <= bound)


def _terms(setup: Setup, quantities: Quantities | None, n: int) -> tuple[tuple[str, str], ...]:
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


def _assumptions(quantities: Quantities | None, n: int) -> tuple[Assumption, ...]:
    return () if quantities is None else quantities.assumptions(n)


def _verdict(fidelity: Fidelity, gates: Sequence[Gate], estimated_from: int) -> tuple[str, ...]:
    missed = [gate for gate in gates if not gate.passed]
    worst = max((g for g in gates if g.value is not None), key=lambda g: abs(g.value or 0.0), default=None)
    if not missed:
        far = (
            f" The largest difference is {worst.value:+.1%} ({worst.name})."
            if worst and worst.value is not None
            else ""
        )
        found = [f"The simulation keeps all {len(gates)} gates.{far}"]
    else:
        found = [f"The simulation misses {len(missed)} of {len(gates)} gates."]
        for gate in missed:
            term = next(text for group, statistic, _, text in GATES if f"{group} {statistic}" == gate.name)
            value = "not defined" if gate.value is None else f"{gate.value:+.1%}"
            found.append(f"Missed: {gate.name} {value} ({gate.bound}); thought to be missing: {term}.")
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


def _warnings(log: ServingLog, quantities: Quantities | None, n: int) -> tuple[str, ...]:
    found = [
        "TTFT is first token minus queued, as vLLM stamps both; what a request waits for the engine's loop before that "
        "is left out of both runs. The log has no gaps between tokens, so ITL has no measured side."
    ]
    if quantities is not None:
        found.append(
            f"Quantities that no kernel table has were estimated from requests 1 to {n}; figures of the others are "
            "the test."
        )
    found.append("Prompts are taken to share nothing: the log has their lengths, not their texts.")
    return tuple(found)
