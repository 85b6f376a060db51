"""Metrics of several passes as the rows of a comparison. Knows metrics by name, no cell and no gate."""

from __future__ import annotations

from collections.abc import Sequence

from helios_sim.report.fidelity import ComparedRow
from helios_sim.report.metrics import Band, Metrics

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


def rows_of(*runs: Sequence[Metrics | None]) -> tuple[ComparedRow, ...]:
    """Of the metrics measured, simulated, and simulated at the device's pace in each pass: latencies in ms, then the
    server as a whole. What a pass does not know, no row does.
    """
    rows = []
    for name, group in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("itl_s", "ITL"), ("e2e_s", "E2E")):
        for statistic in STATISTICS:
            values = ([number_of(m, f"{name}_{statistic}", 1e3) for m in of] for of in runs)
            rows.append(row_of((group, "median" if statistic == "p50" else statistic, "ms"), *values))
    for name, figure, unit, factor in SYSTEM:
        rows.append(row_of(("system", figure, unit), *([number_of(m, name, factor) for m in of] for of in runs)))
    return tuple(rows)


def row_of(what: tuple[str, str, str], *runs: Sequence[float | None]) -> ComparedRow:
    known = tuple(value for value in runs[0] if value is not None)
    measured, simulated, paced = map(_mean, runs)
    return ComparedRow(*what, measured, simulated, paced, known if len(known) == len(runs[0]) else ())


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def number_of(metrics: Metrics | None, name: str, factor: float = 1.0) -> float | None:
    """A band by its middle."""
    value = None if metrics is None else metrics.get(name)
    if value is None:
        return None
    return factor * ((value.low + value.high) / 2 if isinstance(value, Band) else value)
