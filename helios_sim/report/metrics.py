"""All metrics: names, units and meanings as the report prints them, and their values for one run of one arm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from helios_sim.report.records import Records
from helios_sim.report.series import Series
from helios_sim.request import NS_PER_S, Slo, Status
from helios_sim.serving.autoscale import Scaled
from helios_sim.serving.stats import GapHistogram, RunStats
from helios_sim.workload.faults import FaultKind, Struck

if TYPE_CHECKING:
    from helios_sim.by_answer import Answered


class Better(StrEnum):
    """Which direction of a metric is an improvement."""

    HIGHER = "higher"
    LOWER = "lower"
    NEITHER = "neither"


@dataclass(frozen=True, slots=True)
class Definition:
    """The name, unit and meaning of a metric."""

    name: str
    label: str
    unit: str  # "s", "1/s", "bytes", "share", "J", "Wh", "bits", "USD", "g", "" for a plain number
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
    ("usd_per_hour", "USD/hour", "USD", "lower", "price of all cards that are on, by cost.usd_per_card_hour"),
    (
        "usd_per_million_tokens",
        "USD/M tokens",
        "USD",
        "lower",
        "price of all cards over the span / millions of output tokens of completed requests",
    ),
    (
        "gco2e_per_million_tokens",
        "gCO2e/M tokens",
        "g",
        "lower",
        "energy over the span x cost.gco2e_per_kwh / millions of output tokens; a band if simulated",
    ),
    (
        "replicas_on_mean", "Replicas on", "", "lower",
        "replicas that start, serve or drain, averaged over the span; all of them without autoscale",
    ),
    ("replica_starts", "Starts", "", "neither", "replicas that the autoscaler started; none where all are always on"),
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
    ("prefix_cache_queries", "Prefix queries", "", "neither", "prompt tokens looked for in the prefix cache (vLLM's)"),
    ("prefix_cache_hits", "Prefix hits", "", "higher", "prompt tokens found there, without what preempted ones refind"),
    ("prefix_cache_hit_rate", "Prefix hit rate", "share", "higher", "prefix hits / prefix queries"),
    ("prefill_tokens_saved", "Prefill saved", "", "higher", "tokens that were found and not computed, all together"),
    ("accepted_per_pass", "Accepted/pass", "", "higher", "drafts that full depth accepts in one pass of a request"),
    ("draft_acceptance", "Acceptance", "share", "higher", "accepted drafts / drafted tokens"),
    ("drafting_fraction", "Drafting", "share", "neither", "time of drafting / time in which an iteration runs"),
    (
        "verifying_fraction",
        "Verifying",
        "share",
        "neither",
        "where drafts are made on a card of their own: time in which the other card works / the same",
    ),
    ("split_fraction", "Split", "share", "neither", "decode iterations that end at an exit where a batch is split"),
    ("held_per_token", "Waits/token", "", "neither", "times that tokens wait at an exit for others / output tokens"),
    ("held_wait_s", "Wait at exit", "s", "lower", "mean wait of a token at an exit, from the split until it runs on"),
    ("escalations", "Escalations", "", "neither", "times that a cascade sent a request on to its next kind"),
    ("escalated_fraction", "Escalated", "share", "neither", "requests that a cascade sent on / requests that left"),
    ("replaced_tokens", "Replaced tokens", "", "lower", "output tokens of answers that a cascade replaced by others"),
    ("released_fraction", "Released", "share", "higher", "tokens delivered at a ramp while the model goes on / tokens"),
    ("released_earlier_s", "Earlier by", "s", "higher", "mean time from a token's delivery to its iteration's end"),
    ("late_layers_per_iteration", "Late layers", "", "lower", "layers that come from host memory, of a mean iteration"),
    ("late_time_fraction", "Late time", "share", "lower", "time by which late layers lengthen iterations / busy"),
    ("preemptions", "Preemptions", "", "lower", "requests put back because the KV pool was full"),
    ("requests_completed", "Completed", "", "higher", "requests"),
    ("requests_dropped", "Dropped", "", "lower", "requests refused, each with its reason in requests.parquet"),
    ("requests_unfinished", "Unfinished", "", "lower", "requests still in the system when the run was stopped"),
    ("availability", "Availability", "share", "higher", "share of the span in which replicas were up; with faults"),
    ("requests_retried", "Sent again", "", "lower", "requests that a fault hit and that were sent again, each time"),
    ("requests_lost", "Lost", "", "lower", "requests that a fault hit and that were dropped, after their retries"),
    ("wasted_tokens", "Wasted tokens", "", "lower", "output tokens of requests by the time that a fault hit them"),
    ("span_s", "Span", "s", "neither", "first arrival to last completion"),
)

DEFINITIONS: dict[str, Definition] = {
    d.name: d
    for d in (
        *(d for name, label, meaning in _LATENCIES for d in _latency(name, label, meaning)),
        *(Definition(name, label, unit, Better(better), text) for name, label, unit, better, text in _OTHERS),
    )
}

OF_PREFIXES = ("prefix_cache_hit_rate", "prefix_cache_queries", "prefix_cache_hits", "prefill_tokens_saved")
OF_DRAFTS = (  # with self-speculation or a drafter
    "accepted_per_pass", "draft_acceptance", "drafting_fraction", "verifying_fraction",
)  # fmt: skip
OF_SPLITS = ("split_fraction", "held_per_token", "held_wait_s")  # if batches are split at exits
OF_CASCADES = ("escalations", "escalated_fraction", "replaced_tokens")
OF_LATE_LAYERS = ("late_layers_per_iteration", "late_time_fraction")  # if layers stay in host memory
OF_RELEASES = ("released_fraction", "released_earlier_s")  # if answers are released while the model goes on
OF_COST = ("usd_per_hour", "usd_per_million_tokens", "gco2e_per_million_tokens")  # only with a price
# Exact in one run (counts, bytes and a price). All other metrics are estimates.
COUNTS = (
    "batch_capacity", "switches", "loads", "hbm_peak_bytes", "preemptions", "requests_completed", "requests_dropped",
    "requests_unfinished", "requests_retried", "requests_lost", "wasted_tokens", "usd_per_hour", "escalations",
    "replaced_tokens",
)  # fmt: skip

ENERGY_NOTE = (
    "Energy of a simulation was not measured, so it is a band and never a point. Low: idle power over the span, plus "
    "the rest of the board limit (TDP) for the time that the same iterations would take at the card's ceilings. High: "
    "TDP whenever an iteration runs, idle power otherwise. Of a B200, whose tables hold the power of kernels, it is "
    "what these draw whenever an iteration runs: 5 % of the decodes' drew less than the low end, 5 % of the prompts' "
    "more than the high end. Energy of a live run is what the device's own counter rose by over the span, whatever "
    "else the device did meanwhile included; without a counter there is none."
)
LATENCY_NOTE = (
    "Latencies are of completed requests. Percentiles interpolate linearly; what is undefined is left blank (null)."
)
INTERVAL_NOTE = (
    "Intervals are 95 %. With several seeds they hold what varies between seeds: a figure, or a ratio in both arms at "
    "once, is computed without each seed in turn, and Student's t over the seeds gives the bounds. With one seed an "
    "interval is one within this run: the same without each of ten stretches of its requests in turn, which leaves out "
    "what other seeds would do. Ratios of per-request metrics are over the requests that both arms completed. Counts "
    "and bytes of one run are exact; other figures of the whole system, such as throughput, and percentiles with fewer "
    "than three requests beyond them have no interval from one seed, which [–] marks."
)


@dataclass(frozen=True, slots=True)
class Band:
    """A quantity that is known to lie between two values."""

    low: float
    high: float


MetricValue = float | int | Band | None
Metrics = Mapping[str, MetricValue]


@dataclass(frozen=True, slots=True)
class Costs:
    """Prices of a run: USD per hour for all cards, and grams of CO2e per kWh; None if not counted."""

    usd_per_hour: float | None = None
    gco2e_per_kwh: float | None = None


@dataclass(frozen=True, slots=True)
class Power:
    """Power of one card: idle, its board's limit, and the range of its kernels if that was measured."""

    idle_w: float
    tdp_w: float
    busy_w: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Cards:
    """Totals of all replicas on cards of one kind."""

    power: Power | None  # of one card; None if not known
    replicas: float  # the mean number with autoscaling
    busy_ns: int
    floor_ns: int
    beside: bool = False  # these cards draft for replicas that are counted with their other cards


_QUANTILES = {"p50": 50, "p90": 90, "p95": 95, "p99": 99}
_SUMS = (
    "output_tokens", "output_chars", "prompt_tokens", "layers_run", "early_tokens", "breach_tokens", "agreed_tokens",
)  # fmt: skip


def compute_metrics(
    records: Records,
    stats: RunStats,
    *,
    slo: Slo | None = None,
    power: Power | None = None,
    cards: Sequence[Cards] | None = None,
    transitions: Mapping[int, Sequence[int]] | None = None,
    faults: Sequence[Struck] | None = None,
    costs: Costs | None = None,
    scaled: Scaled | None = None,
    answered: Answered | None = None,
) -> dict[str, MetricValue]:
    """All metrics of one run. Undefined ones are None, such as those of faults without `faults`, or of cascades if
    `answered` has none.

    `stats` is merged over the replicas. `power` is that of the card of a single replica; several replicas have `cards`,
    of one kind if they are `scaled`. `transitions` are in ns for each replica; None: those of `stats` for all replicas.
    """
    cards = [Cards(power, 1, stats.busy_ns, stats.floor_ns)] if cards is None else cards
    replicas: float = sum(of_kind.replicas for of_kind in cards if not of_kind.beside)
    costs, ends = costs or Costs(), records.ends_ns()
    if scaled is not None and ends is not None and ends[0] < ends[1]:
        on = scaled.mean(*ends)
        cards = [replace(of_kind, replicas=on * (of_kind.replicas / replicas)) for of_kind in cards]
        if costs.usd_per_hour is not None:
            costs = replace(costs, usd_per_hour=costs.usd_per_hour * on / replicas)
        replicas = on
    slo = slo or Slo()
    span_ns = None if ends is None else ends[1] - ends[0] or None
    span_s = None if span_ns is None else span_ns / NS_PER_S
    statuses = records.counts("status")
    n_done, n_dropped = statuses.get(Status.COMPLETED, 0), statuses.get(Status.DROPPED, 0)
    tokens, chars, prompt_tokens, layers, early, breaches, agreed = records.sums(_SUMS)
    good = sum(int(meets(part, slo).sum()) for part in records.parts()) if slo.any else None

    metrics: dict[str, MetricValue] = {}
    metrics |= summarise("queue_s", records.series(Records.queue_ns))
    metrics |= summarise("ttft_s", records.series(Records.ttft_ns))
    metrics |= summarise("tpot_s", records.series(Records.defined_tpot_ns))
    metrics |= _summarise_gaps(stats.itl)
    metrics |= summarise("e2e_s", records.series(Records.e2e_ns))
    metrics |= _near_transitions(records, stats.transitions_ns, transitions)
    metrics["throughput_requests_per_s"] = _over(n_done, span_s)
    metrics["throughput_tokens_per_s"] = _over(tokens, span_s)
    metrics["throughput_chars_per_s"] = _over(chars, span_s)
    metrics["goodput_requests_per_s"] = None if good is None else _over(good, span_s)
    metrics["slo_attainment"] = None if good is None else _over(good, n_done + n_dropped)
    metrics["batch_mean"] = _over(stats.decode_batch_ns, stats.decode_ns)
    metrics["batch_capacity"] = _capacity(n_done, prompt_tokens + tokens, stats)
    metrics["layers_per_token"] = _over(layers, tokens)
    metrics["early_exit_fraction"] = _over(early, tokens)
    metrics["breach_fraction"] = _over(breaches, tokens)
    metrics["agreement"] = _over(agreed, tokens)
    metrics["bits_per_char"] = records.bits_per_char()
    energy_j = None if span_s is None else energy_band_j(cards, span_s)
    metrics |= energy_metrics(energy_j, n_done, chars)
    metrics |= _cost_metrics(costs, span_s, energy_j, tokens)
    metrics["replicas_on_mean"] = replicas
    metrics["replica_starts"] = None if scaled is None else scaled.starts
    metrics["switches"] = stats.switches
    metrics["loads"] = stats.loads
    metrics["switch_time_s"] = stats.switch_time_ns / NS_PER_S
    metrics["load_time_s"] = stats.load_ns / NS_PER_S
    metrics["evaluation_time_s"] = stats.evaluation_ns / NS_PER_S
    metrics["hbm_peak_bytes"] = stats.hbm_peak_bytes
    metrics["kv_utilisation_mean"] = _over(stats.kv_block_ns, stats.kv_pool_block_ns)
    metrics["busy_fraction"] = _over(stats.busy_ns / NS_PER_S, None if span_s is None else span_s * replicas)
    metrics["roofline_fraction"] = _over(stats.floor_ns, stats.busy_ns)
    metrics["outside_grid_fraction"] = _over(stats.outside_grid_iterations, stats.iterations)
    metrics |= _of_prefixes(stats)
    metrics |= _of_drafts(stats)
    metrics |= _of_splits(stats)
    metrics |= _of_cascades(answered, len(records))
    metrics |= _of_releases(stats)
    metrics |= _of_late_layers(stats)
    metrics["preemptions"] = stats.preemptions
    metrics["requests_completed"] = n_done
    metrics["requests_dropped"] = n_dropped
    metrics["requests_unfinished"] = len(records) - n_done - n_dropped
    metrics |= _of_faults(records, faults, replicas)
    metrics["span_s"] = span_s
    return metrics


def _of_prefixes(stats: RunStats) -> dict[str, MetricValue]:
    """Metrics of prefix caching; None without it."""
    if not stats.prefix_caching:
        return dict.fromkeys(OF_PREFIXES)
    queries, hits = stats.prefix_cache_queries, stats.prefix_cache_hits
    return dict(zip(OF_PREFIXES, (_over(hits, queries), queries, hits, hits + stats.prefix_cache_refound), strict=True))


def _of_drafts(stats: RunStats) -> dict[str, MetricValue]:
    """Metrics of drafts; None if nothing was drafted."""
    of = (
        _over(stats.accepted_drafts, stats.verifications),
        _over(stats.accepted_drafts, stats.drafted_tokens),
        _over(stats.draft_ns, stats.busy_ns) if stats.drafted_tokens else None,
        _over(stats.verify_ns, stats.busy_ns) if stats.verify_ns and stats.drafted_tokens else None,
    )
    return dict(zip(OF_DRAFTS, of, strict=True))


def _of_splits(stats: RunStats) -> dict[str, MetricValue]:
    """Metrics of split batches; None if no batch was split."""
    tokens = sum(sum(depths.values()) for depths in stats.tokens_by_depth.values())
    of = (
        _over(stats.splits, stats.decode_iterations) if stats.splits else None,
        _over(stats.held_tokens, tokens) if stats.splits else None,
        _over(stats.held_token_ns / 1e9, stats.held_tokens) if stats.splits else None,
    )
    return dict(zip(OF_SPLITS, of, strict=True))


def _of_cascades(answered: Answered | None, requests: int) -> dict[str, MetricValue]:
    """Metrics of a cascade; None without one."""
    if answered is None or not answered.cascades:
        return dict.fromkeys(OF_CASCADES)
    of = answered.escalations, _over(answered.escalated, requests), answered.replaced_tokens
    return dict(zip(OF_CASCADES, of, strict=True))


def _of_releases(stats: RunStats) -> dict[str, MetricValue]:
    """Metrics of released answers over all output tokens; None if none was released."""
    tokens = sum(sum(depths.values()) for depths in stats.tokens_by_depth.values())
    of = (_over(stats.released_tokens, tokens), _over(stats.released_ns / 1e9, tokens))
    return dict(zip(OF_RELEASES, of if stats.released_tokens else (None, None), strict=True))


def _of_late_layers(stats: RunStats) -> dict[str, MetricValue]:
    """Metrics of late layers; None if no layer came from host memory."""
    of = (_over(stats.late_layers, stats.iterations), _over(stats.late_ns, stats.busy_ns))
    return dict(zip(OF_LATE_LAYERS, of if stats.late_layers else (None, None), strict=True))


def _of_faults(records: Records, faults: Sequence[Struck] | None, replicas: float) -> dict[str, MetricValue]:
    names = ("availability", "requests_retried", "requests_lost", "wasted_tokens")
    if faults is None:
        return dict.fromkeys(names)
    down_ns, ends = 0, records.ends_ns()
    if ends is not None:
        down = [fault for fault in faults if fault.hit and fault.kind is FaultKind.REPLICA_DIES]
        down_ns = sum(max(0, min(fault.until_ns, ends[1]) - max(fault.time_ns, ends[0])) for fault in down)
    span_ns = None if ends is None else ends[1] - ends[0]
    up = None if not span_ns else 1 - down_ns / (span_ns * replicas)
    sums = (sum(f.retried for f in faults), sum(f.lost for f in faults), sum(f.wasted_tokens for f in faults))
    return dict(zip(names, (up, *sums), strict=True))


def summarise(name: str, times_ns: Series) -> dict[str, MetricValue]:
    """Mean and percentiles in seconds under `name`_mean, `name`_p50, ...; None without values."""
    if not len(times_ns):
        return {f"{name}_{s}": None for s in ("mean", *_QUANTILES)}
    percentiles = times_ns.percentiles(list(_QUANTILES.values()))
    found: dict[str, MetricValue] = {f"{name}_mean": times_ns.mean() / NS_PER_S}
    return found | {f"{name}_{s}": p / NS_PER_S for s, p in zip(_QUANTILES, percentiles, strict=True)}


def meets(records: Records, slo: Slo) -> NDArray[np.bool_]:
    """Whether each completed request meets every SLO. A request of one token meets any TPOT."""
    good = np.ones(int(records.completed.sum()), dtype=np.bool_)
    if slo.ttft_s is not None:
        good &= records.ttft_ns() <= slo.ttft_s * NS_PER_S
    if slo.e2e_s is not None:
        good &= records.e2e_ns() <= slo.e2e_s * NS_PER_S
    if slo.tpot_s is not None:
        tpot_ns, defined = records.tpot_ns()
        good &= ~defined | (tpot_ns <= slo.tpot_s * NS_PER_S)
    return good


def energy_band_j(cards: Sequence[Cards], span_s: float) -> Band | None:
    """Joules over the span; None if the power of a card is not known. See `ENERGY_NOTE`."""
    low = high = 0.0
    for it in cards:
        if it.power is None:
            return None
        idle_j = it.power.idle_w * span_s * it.replicas
        if it.power.busy_w is not None:
            least_w, most_w = it.power.busy_w
            low += idle_j + (least_w - it.power.idle_w) * (it.busy_ns / NS_PER_S)
            high += idle_j + (most_w - it.power.idle_w) * (it.busy_ns / NS_PER_S)
            continue
        above_idle_w = it.power.tdp_w - it.power.idle_w
        low += idle_j + above_idle_w * (min(it.floor_ns, it.busy_ns) / NS_PER_S)
        high += idle_j + above_idle_w * (it.busy_ns / NS_PER_S)
    return Band(low, high)


def energy_metrics(energy_j: Band | float | None, n_done: int, chars: int) -> dict[str, MetricValue]:
    """The joules of a run per character and per completed request; None if undefined."""
    return {"energy_j_per_char": _spread(energy_j, chars), "energy_wh_per_request": _spread(energy_j, n_done * 3600)}


def _cost_metrics(
    costs: Costs, span_s: float | None, energy_j: Band | float | None, tokens: int
) -> dict[str, MetricValue]:
    usd = None if costs.usd_per_hour is None or span_s is None else costs.usd_per_hour * span_s / 3600
    return {
        "usd_per_hour": costs.usd_per_hour,
        "usd_per_million_tokens": None if usd is None else _over(usd * 1e6, tokens),
        "gco2e_per_million_tokens": gco2e_per_million(energy_j, costs.gco2e_per_kwh, tokens),
    }


def gco2e_per_million(energy_j: Band | float | None, gco2e_per_kwh: float | None, tokens: int) -> Band | float | None:
    """Grams of CO2e per million output tokens; None if undefined."""
    return None if not gco2e_per_kwh else _spread(energy_j, 3.6e6 * tokens / (gco2e_per_kwh * 1e6))


def mean_metrics(runs: Sequence[Metrics]) -> dict[str, MetricValue]:
    """Means over replicates. None if a replicate has no value."""
    if len(runs) == 1:
        return dict(runs[0])
    return {name: _mean([run[name] for run in runs]) for name in runs[0]}


def _mean(values: Iterable[MetricValue]) -> MetricValue:
    lows: list[float] = []
    highs: list[float] = []
    is_band = False
    for value in values:
        if value is None:
            return None
        is_band |= isinstance(value, Band)
        lows.append(value.low if isinstance(value, Band) else value)
        highs.append(value.high if isinstance(value, Band) else value)
    low, high = sum(lows) / len(lows), sum(highs) / len(highs)
    return Band(low, high) if is_band else low


def _summarise_gaps(gaps: GapHistogram) -> dict[str, MetricValue]:
    mean_ns = gaps.mean_ns
    found: dict[str, MetricValue] = {"itl_s_mean": None if mean_ns is None else mean_ns / NS_PER_S}
    for statistic, q in _QUANTILES.items():
        gap_ns = gaps.percentile_ns(q)
        found[f"itl_s_{statistic}"] = None if gap_ns is None else gap_ns / NS_PER_S
    return found


def _near_transitions(
    records: Records, of_all_ns: Sequence[int], by_replica: Mapping[int, Sequence[int]] | None
) -> dict[str, MetricValue]:
    """p99 of requests that were in the system within NEAR_TRANSITION_S of a transition of their replica."""
    moments = [of_all_ns] if by_replica is None else list(by_replica.values())
    if not any(map(len, moments)):
        return {f"{name}_p99_near_transition": None for name in ("ttft_s", "tpot_s", "e2e_s")}

    def near(part: Records) -> NDArray[np.bool_]:
        done = part.completed
        if by_replica is None:
            return _near(part, done, of_all_ns)
        found = np.zeros(int(done.sum()), np.bool_)
        for replica, moments_ns in by_replica.items():
            if moments_ns:
                found |= _near(part, done, moments_ns) & (part.replica[done] == replica)
        return found

    def tpot_ns(part: Records) -> NDArray[np.float64]:
        of_each_ns, defined = part.tpot_ns()
        return of_each_ns[near(part) & defined]

    chosen = {
        "ttft_s": records.series(lambda part: part.ttft_ns()[near(part)].astype(np.float64)),
        "tpot_s": records.series(tpot_ns),
        "e2e_s": records.series(lambda part: part.e2e_ns()[near(part)].astype(np.float64)),
    }
    return {
        f"{name}_p99_near_transition": ns.percentiles([99])[0] / NS_PER_S if len(ns) else None
        for name, ns in chosen.items()
    }


def _near(records: Records, done: NDArray[np.bool_], moments_ns: Sequence[int]) -> NDArray[np.bool_]:
    times = np.sort(np.asarray(moments_ns, dtype=np.int64))
    margin_ns = NEAR_TRANSITION_S * NS_PER_S
    first = np.searchsorted(times, records.arrival_ns[done] - margin_ns, side="left")
    behind_last = np.searchsorted(times, records.last_token_ns.values[done] + margin_ns, side="right")
    return np.asarray(behind_last > first)


def _capacity(n_done: int, tokens: int, stats: RunStats) -> int | None:
    """The number of requests of mean length that fit into the pool, each in whole blocks, rounded down."""
    if not n_done or stats.batch_capacity_blocks == 0:
        return None
    return int(stats.batch_capacity_blocks // np.ceil(tokens / n_done / stats.block_tokens))


def _over(amount: float, by: float | None) -> float | None:
    return amount / by if by else None


def _spread(amount: Band | float | None, by: float) -> Band | float | None:
    if amount is None or not by:
        return None
    return Band(amount.low / by, amount.high / by) if isinstance(amount, Band) else amount / by
