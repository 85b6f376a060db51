"""Names, units and meanings of all metrics, as the report prints them. Knows no values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Better(StrEnum):
    HIGHER = "higher"
    LOWER = "lower"
    NEITHER = "neither"


@dataclass(frozen=True, slots=True)
class Definition:
    name: str
    label: str
    unit: str  # "s", "1/s", "bytes", "share", "J", "Wh", "bits", "" for a plain number
    better: Better
    meaning: str


STATISTICS = ("mean", "p50", "p90", "p95", "p99")
NEAR_TRANSITION_S = 5

_LATENCIES = (
    ("queue_s", "Queue wait", "first scheduled - arrival"),
    ("ttft_s", "TTFT", "time to first token: first token - arrival"),
    ("tpot_s", "TPOT", "time per output token: (E2E - TTFT) / (n - 1); requests of one token are left out"),
    ("itl_s", "ITL", "gaps between tokens, of all requests pooled; percentiles to 0.1 %"),
    ("e2e_s", "E2E", "end to end: last token - arrival"),
)


def _latency(name: str, label: str, meaning: str) -> list[Definition]:
    found = [Definition(f"{name}_{s}", f"{label} {s}", "s", Better.LOWER, f"{s} of {meaning}") for s in STATISTICS]
    if name in ("ttft_s", "tpot_s", "e2e_s"):
        near = f"p99 of requests in the system within {NEAR_TRANSITION_S} s of a change of placement"
        found.append(Definition(f"{name}_p99_near_transition", f"{label} p99 near switches", "s", Better.LOWER, near))
    return found


_OTHERS = (
    ("throughput_requests_per_s", "Requests/s", "1/s", "higher", "completed requests / span"),
    ("throughput_tokens_per_s", "Tokens/s", "1/s", "higher", "output tokens of completed requests / span"),
    ("throughput_chars_per_s", "Characters/s", "1/s", "higher", "output characters of completed requests / span"),
    ("goodput_requests_per_s", "Goodput", "1/s", "higher", "completed requests that meet every SLO / span"),
    ("slo_attainment", "SLO attainment", "share", "higher", "met every SLO, of completed and dropped requests"),
    ("batch_mean", "Mean batch", "", "neither", "requests that decode, averaged over the time in which any does"),
    ("batch_capacity", "Batch capacity", "", "higher", "requests of mean length that fit into the KV pool at the end"),
    ("layers_per_token", "Layers/token", "", "neither", "layers run per output token, recomputation not counted"),
    ("early_exit_fraction", "Early exits", "share", "neither", "output tokens that left before the model's last layer"),
    ("breach_fraction", "Breaches", "share", "lower", "output tokens that left at the cap without confidence"),
    ("agreement", "Agreement", "share", "higher", "output tokens equal to the same model's at full depth"),
    (
        "bits_per_char",
        "Bits/char",
        "bits",
        "lower",
        "-log2 of the probability of the reference text under what was served, each token at the exit where it left, "
        "over its characters; human text only; the one that ranks models",
    ),
    ("energy_j_per_char", "J/char", "J", "lower", "energy over the span / output characters; a band if simulated"),
    (
        "energy_wh_per_request",
        "Wh/request",
        "Wh",
        "lower",
        "energy over the span / completed requests; a band if simulated",
    ),
    ("switches", "Switches", "", "neither", "changes of the active model"),
    ("loads", "Loads", "", "neither", "transfers of weights to the device"),
    ("switch_time_s", "Switch time", "s", "lower", "from a decision to change the placement until it is in force"),
    ("load_time_s", "Load time", "s", "lower", "transfers in progress"),
    ("evaluation_time_s", "Evaluation time", "s", "lower", "time under deployments that observe or probe candidates"),
    ("hbm_peak_bytes", "Peak memory", "bytes", "lower", "weights, activation reserve and KV in use, at the peak"),
    ("kv_utilisation_mean", "KV use", "share", "neither", "used share of the KV pool, averaged over busy time"),
    ("busy_fraction", "Busy", "share", "neither", "share of the span in which an iteration runs, per replica"),
    ("roofline_fraction", "Of roofline", "share", "higher", "time at the card's ceilings / time taken"),
    ("outside_grid_fraction", "Extrapolated", "share", "lower", "iterations priced outside the profile's tables"),
    ("preemptions", "Preemptions", "", "lower", "requests put back because the KV pool was full"),
    ("requests_completed", "Completed", "", "higher", "requests"),
    ("requests_dropped", "Dropped", "", "lower", "requests refused, each with its reason in requests.parquet"),
    ("requests_unfinished", "Unfinished", "", "lower", "requests still in the system when the run was stopped"),
    ("span_s", "Span", "s", "neither", "first arrival to last completion"),
)

DEFINITIONS: dict[str, Definition] = {
    d.name: d
    for d in (
        *(d for name, label, meaning in _LATENCIES for d in _latency(name, label, meaning)),
        *(Definition(name, label, unit, Better(better), text) for name, label, unit, better, text in _OTHERS),
    )
}

ENERGY_NOTE = (
    "Energy of a simulation has no measured source, so it is a band and never a point. Low: idle power over the span, "
    "plus the rest of the board limit (TDP) for the time that the same iterations would take at the card's ceilings. "
    "High: TDP whenever an iteration runs, idle power otherwise. Energy of a live run is what the device's own counter "
    "rose by over the span, whatever else the device did meanwhile included; without a counter there is none."
)
LATENCY_NOTE = (
    "Latencies are of completed requests. Percentiles interpolate linearly; what is undefined is left blank (null)."
)
INTERVAL_NOTE = (
    "Intervals are 95 %. Ratios of per-request metrics: paired bootstrap over the requests that both arms completed "
    "(the arms share arrivals, texts and exits). It resamples requests of these runs and so leaves out how queueing "
    "ties requests together; with several seeds the t-interval over seeds, used for throughput and other figures of "
    "the whole system, includes that. One seed gives no interval for those."
)
