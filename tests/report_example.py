"""A made-up result that exercises every part of the report. Its numbers are invented and say so; nothing ran."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from helios_sim.exits.rule import FixedCap
from helios_sim.policy.deployment import BreachLimit, Completed, Deployment, Placement, Started
from helios_sim.provenance import Assumption, Provenance, ProvenanceClass
from helios_sim.report.compare import compare
from helios_sim.report.metrics import Power, compute_metrics
from helios_sim.report.records import Records
from helios_sim.report.result import (
    ArmResult,
    ArmsFigure,
    ExitDepths,
    ExperimentResult,
    Gate,
    Line,
    LoadFigure,
    Published,
    QualityFigure,
    Replicate,
    ServedWorkload,
    SweepFigure,
    SweepPoint,
)
from helios_sim.request import NS_PER_S, RequestRecord, Slo, Status
from helios_sim.serving.decider import Decision
from helios_sim.serving.stats import RunStats, Timeline

ARMS = {
    # name: (description, seconds a token, layers a token, share that agrees, model)
    "early_exit_opt-1.3b": ("one model, all layers resident, a check at every exit", 1.01e-3, 14.3, 0.97, "opt-1.3b"),
    "full_depth_opt-1.3b": ("one model, every token through all layers", 2.0e-3, 24.0, 1.0, "opt-1.3b"),
    "static_cap_opt-1.3b": ("the cap chosen once, never changed", 0.63e-3, 6.0, 0.9, "opt-1.3b"),
    "helios": ("cap, switch and load as published", 0.68e-3, 6.8, 0.93, "opt-1.3b"),
    "helios_probe": ("as helios, candidates evaluated by probes", 0.65e-3, 6.6, 0.93, "opt-1.3b"),
    "oracle": ("clairvoyant, switches for free", 0.6e-3, 5.9, 1.0, "opt-1.3b"),
}
BASELINE = "early_exit_opt-1.3b"
SLO = Slo(ttft_s=0.5, tpot_s=0.0015)


def example_records(arm: str, seed: int, n: int = 200, slowdown: float = 1.0) -> Records:
    """Requests served one after the other, as if by one user in a closed loop."""
    _, token_s, layers, agree, model = ARMS[arm]
    rng = np.random.default_rng(seed)
    lengths = np.maximum(1, rng.lognormal(4.5, 0.8, n).astype(int))
    rows, now_ns = [], 0
    for i, tokens in enumerate(lengths.tolist()):
        ttft_ns = int((0.004 + 0.01 * rng.random()) * slowdown * NS_PER_S)
        last_ns = now_ns + ttft_ns + int((tokens - 1) * token_s * (0.95 + 0.1 * rng.random()) * slowdown * NS_PER_S)
        dropped = i == 17
        rows.append(
            RequestRecord(
                request_id=i,
                replica=0,
                task=i % 3,
                model=model,
                status=Status.DROPPED if dropped else Status.COMPLETED,
                drop_reason="prompt beyond the model's context" if dropped else None,
                arrival_ns=now_ns,
                scheduled_ns=None if dropped else now_ns,
                first_token_ns=None if dropped else now_ns + ttft_ns,
                last_token_ns=None if dropped else last_ns,
                prompt_tokens=300,
                output_tokens=0 if dropped else tokens,
                prompt_chars=1300,
                output_chars=0 if dropped else 4 * tokens,
                layers_run=0 if dropped else round(layers * tokens),
                early_tokens=0 if dropped else round(0.7 * tokens),
                breach_tokens=0 if dropped else round(0.2 * tokens),
                agreed_tokens=0 if dropped else min(tokens, round(agree * tokens)),
                evaluated_tokens=0,
                preemptions=0,
                microbits=0 if dropped else round(4 * tokens * (1 + 0.1 * (i % 3) + 0.02 * (1 - agree)) * 1e6),
            )
        )
        now_ns = now_ns if dropped else last_ns
    return Records.of(rows)


def example_stats(arm: str, records: Records) -> RunStats:
    _, token_s, _, _, _ = ARMS[arm]
    tokens = int(records.output_tokens.sum())
    busy_ns = int(tokens * token_s * NS_PER_S)
    stats = RunStats(
        busy_ns=busy_ns,
        floor_ns=busy_ns // 2,
        iterations=tokens,
        decode_iterations=tokens,
        decode_ns=busy_ns,
        decode_batch_ns=busy_ns,
        kv_block_ns=busy_ns * 30,
        kv_pool_block_ns=busy_ns * 1000,
        batch_capacity_blocks=9000,
        hbm_peak_bytes=31_000_000_000,
    )
    if "opt" not in arm:
        stats.switches, stats.loads, stats.switch_time_ns = 2, 3, NS_PER_S // 2
        stats.transitions_ns = [3 * NS_PER_S, 9 * NS_PER_S]
        stats.outside_grid_iterations = tokens // 50
    stats.itl.add(np.random.default_rng(1).normal(token_s, token_s / 20, 500) * NS_PER_S)
    return stats


def example_arm(arm: str, seeds: tuple[int, ...] = (1, 2, 3), slowdown: float = 1.0) -> ArmResult:
    replicates = []
    for seed in seeds:
        records = example_records(arm, seed, slowdown=slowdown)
        stats = example_stats(arm, records)
        metrics = compute_metrics(records, stats, slo=SLO, power=Power(50.0, 400.0))
        replicates.append(Replicate(seed, records, stats, metrics))
    moves = "opt" not in arm
    timeline = Timeline()
    rng = np.random.default_rng(5)
    for step in range(400):
        model, layers = ("opt-6.7b", 9) if moves and 60 < step < 180 else ("opt-1.3b", 6 if step < 300 else 24)
        weights = 5_000_000_000 if model == "opt-6.7b" else 1_500_000_000 if layers == 6 else 3_400_000_000
        running = int(40 + 20 * np.sin(step / 30) + 3 * rng.random())
        queued = max(0, int(15 * np.sin(step / 50)))
        timeline.sample(step * NS_PER_S // 20, model, layers, running, queued, running * 300_000_000, weights)
    decisions = [decision(0, Started(), "opt-1.3b", 6, "shallowest exit under the quality floor")]
    if moves:
        evidence = {"disagreement_upper": 0.094, "predicted_gain_s": {"opt-1.3b": 1.2, "opt-6.7b": 0.4}}
        limit = BreachLimit(window_tokens=100, limit=50)
        decisions.append(decision(3, limit, "opt-6.7b", 9, "switch is cheaper than load", evidence))
        decisions.append(decision(9, Completed(150), "opt-1.3b", 6, "round: back to the faster model", evidence))
    depths = {6: 740, 12: 50, 24: 210} if "early" in arm else {6: 930, 24: 70} if moves else {6: 1000}
    exits = [ExitDepths("opt-1.3b", 24, {24: 1000} if "full" in arm else depths)]
    if moves:
        exits.append(ExitDepths("opt-6.7b", 32, {9: 300, 32: 20}))
    return ArmResult(
        name=arm,
        description=ARMS[arm][0],
        replicates=tuple(replicates),
        timeline=timeline,
        capacity_bytes=40_000_000_000,
        decisions=decisions,
        exit_depths=tuple(exits),
    )


def decision(
    time_s: int, cause: object, model: str, layers: int, reason: str, evidence: dict[str, object] | None = None
) -> Decision:
    deployment = Deployment(Placement(model, layers), FixedCap(0.7), reason=reason, evidence=evidence or {})
    return Decision(time_s * NS_PER_S, 0, cause, deployment)  # type: ignore[arg-type]


def example_points(arms: dict[str, ArmResult]) -> tuple[SweepPoint, ...]:
    """Load and launch cost, from formulas that only look like a server."""
    points = []
    for rate in (1.0, 2.0, 4.0, 6.0, 8.0, 10.0):
        metrics = {}
        for arm, result in arms.items():
            capacity = 0.004 / ARMS[arm][1]
            load = min(rate / capacity, 0.98)
            row = dict(result.metrics)
            row["throughput_requests_per_s"] = min(rate, capacity)
            for name, base in (("ttft_s", 0.02), ("tpot_s", ARMS[arm][1]), ("e2e_s", 0.2)):
                row[f"{name}_p50"], row[f"{name}_p99"] = base / (1 - load), 4 * base / (1 - load)
            row["slo_attainment"] = float(np.clip(1.05 - 0.3 * max(0.0, load - 0.6) / 0.2, 0, 1))
            metrics[arm] = row
        points.append(SweepPoint({"rate_per_s": rate}, metrics))
    for launch_ms in (0.0, 0.1, 0.25, 0.5):
        by_arm = {arm: example_arm(arm, (1,), 1 + launch_ms * (1 + i)) for i, arm in enumerate(arms)}
        runs = {arm: [(r.records, r.metrics) for r in result.replicates] for arm, result in by_arm.items()}
        ratios = {arm: compare(runs[arm], runs[BASELINE]) for arm in arms if arm != BASELINE}
        points.append(SweepPoint({"launch_ms": launch_ms}, {a: r.metrics for a, r in by_arm.items()}, ratios))
    return tuple(points)


def example_result(
    seeds: tuple[int, ...] = (1, 2, 3), *, names: Iterable[str] = ARMS, points: bool = True
) -> ExperimentResult:
    arms = {arm: example_arm(arm, seeds) for arm in names}
    assumption = Assumption("host overhead of an iteration", 0.0004, "example: no source", "runtime.host_overhead_s")
    profile = Provenance(
        ProvenanceClass.DERIVED,
        "EXAMPLE: kernel tables of another card",
        "python -m helios_sim.profile.build --example",
        scaled=("memory-bound terms by 2.04 / 1.555 (EXAMPLE)",),
        assumptions=(assumption,),
    )
    exits = Provenance(ProvenanceClass.PUBLISHED, "EXAMPLE: shares of a paper", "python -m helios_sim.exits --example")
    classes = (("profile", ProvenanceClass.DERIVED), ("exit trace", ProvenanceClass.PUBLISHED))
    return ExperimentResult(
        experiment="example",
        title="EXAMPLE, not a result: HELIOS on the OPT pair",
        question="Does loading a model only up to a cap beat per-token early exit at batch 1, and by how much?",
        conditions="Invented numbers for testing the report: A100-40GB, captured graphs, one user in a closed loop.",
        verdict=(
            "On these invented numbers HELIOS serves 1.5 times the requests of early exit.",
            "Most of the gain is the cap itself: static_cap has it too. The oracle adds a tenth.",
        ),
        baseline=BASELINE,
        arms=arms,
        workload=ServedWorkload(
            "A mix of three tasks, one request after the other from one user. EXAMPLE.",
            requests=200,
            offered_requests_per_s=None,
            facts=(("answer length", "lognormal, median 90 tokens"), ("tasks", "a third each")),
            tasks=("stories", "sums", "code"),
        ),
        inputs={"profile opt-1.3b@a100-40gb": profile, "exit trace opt-1.3b": exits},
        provenance={"command": "pytest", "seeds": list(seeds), "python": "3.11"},
        slo=SLO,
        published=(
            Published("throughput over early-exit OPT-1.3B", 1.48, "batch 1, prompt mix", "arXiv 2504.10724", 1.52,
                      1.47, 1.57, classes, "EXAMPLE: follows, if a round evaluates 20 tokens an answer"),
            Published("response time", 1.39, "latency as the SLO", "arXiv 2504.10724", 1.44, 1.4, 1.48, classes,
                      "EXAMPLE: follows"),
            Published("energy efficiency", 1.10, "energy as the SLO", "arXiv 2504.10724", None, None, None, classes,
                      "EXAMPLE: power of this card has no source"),
        ),
        gates=(Gate("throughput error against the step engine", 0.0, "= 0", True), Gate("leaks", 2, "= 0", False)),
        assumptions=(Assumption("sampling", None, "example: not known", "runtime.sample_s"),),
        warnings=("Everything here is invented.",),
        points=example_points(arms) if points else (),
        figures=(
            LoadFigure("Throughput and latency against load", "rate_per_s", "offered requests/s", SLO),
            SweepFigure("What is left of the gain in a fast engine", "launch_ms", "launch cost per layer (ms)",
                        "throughput_requests_per_s", "throughput over early exit", relative=True,
                        marks=(Line("published 1.48×", 1.48),)),
            SweepFigure("TTFT by launch cost", "launch_ms", "launch cost per layer (ms)", "ttft_s_mean",
                        "mean TTFT (s)", arms=("helios", BASELINE)),
            ArmsFigure("What speed costs", "throughput_chars_per_s", "bits_per_char"),
            QualityFigure("Quality over the run", ("helios", BASELINE)),
        ),
    )  # fmt: skip
