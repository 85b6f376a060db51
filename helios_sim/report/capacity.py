"""Results of a capacity plan: the fleets tried, the smallest that keep the SLOs, the advice, and their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from helios_sim.files import json_value
from helios_sim.profile.spec import TimeBand
from helios_sim.provenance import Assumption, Provenance, Sourced
from helios_sim.report import format as fmt
from helios_sim.report.cautions import MOST_LOST
from helios_sim.report.designs import metric_columns
from helios_sim.report.intervals import Interval
from helios_sim.report.metrics import DEFINITIONS, STATISTICS, Band, Better, Metrics
from helios_sim.report.result import ServedWorkload, scope_in_words
from helios_sim.report.terminal import TextTable, say
from helios_sim.request import Slo

if TYPE_CHECKING:
    import pyarrow

ATTAINMENT = "slo_attainment"
TIMES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2e_s": "E2E"}
# Metrics of each plan in summary.json, with an interval if there is one
TOLD = (
    ATTAINMENT, *(f"{name}_{statistic}" for name in TIMES for statistic in STATISTICS), "agreement", "bits_per_char",
    "busy_fraction", "kv_utilisation_mean", "throughput_tokens_per_s", "usd_per_hour", "usd_per_million_tokens",
    "gco2e_per_million_tokens", "prefix_cache_hit_rate",
)  # fmt: skip
ON = "replicas_on_mean"  # for autoscaled fleets


@dataclass(frozen=True, slots=True)
class Requirement:
    """A bound on a metric: the least value if more is better, else the most."""

    metric: str
    bound: float

    def kept(self, metrics: Metrics) -> bool:
        value = metrics.get(self.metric)
        if value is None:  # answers of one token have no TPOT
            return self.metric.startswith("tpot_s") and bool(metrics.get("requests_completed"))
        assert isinstance(value, int | float)
        return value >= self.bound if DEFINITIONS[self.metric].better is Better.HIGHER else value <= self.bound

    def in_words(self) -> str:
        label, least = DEFINITIONS[self.metric].label, DEFINITIONS[self.metric].better is Better.HIGHER
        return f"{label} at {'least' if least else 'most'} {fmt.metric(self.metric, self.bound)}"


def all_kept(requirements: Sequence[Requirement], metrics: Metrics) -> bool:
    """Whether all bounds are kept and at most MOST_LOST of the requests were dropped, since these have no times."""
    counts = [metrics.get(f"requests_{status}") for status in ("completed", "dropped", "unfinished")]
    done, *lost = (float(count) if isinstance(count, int | float) else 0.0 for count in counts)
    if not done or sum(lost) > MOST_LOST * (done + sum(lost)):
        return False
    return all(requirement.kept(metrics) for requirement in requirements)


def rule(requirements: Sequence[Requirement], slo: Slo) -> str:
    """The condition for a fleet to be enough, in words."""
    if [it.metric for it in requirements] != [ATTAINMENT]:
        return " and ".join(it.in_words() for it in requirements)
    bounds = [f"{label} at most {fmt.seconds(bound)}" for name, label in TIMES.items() if (bound := getattr(slo, name))]
    return f"{requirements[0].bound * 100:g} % of requests with {' and '.join(bounds)}"


@dataclass(frozen=True, slots=True)
class Tried:
    """A fleet that served a load: mean figures over the seeds, and whether it kept the SLOs."""

    load: float  # in multiples of the workload's own arrival rate
    requests_per_s: float
    card: str  # card of a replica, with the number of its cards if it has several
    arm: str
    replicas: int
    metrics: Metrics
    intervals: Mapping[str, Interval]
    kept: bool
    kept_by_seed: tuple[bool, ...]
    error: str | None = None  # why a run failed; then there are no figures
    time_factor: float = 1.0  # factor on the profile's times of iterations


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """The fewest replicas of one card with which one arm keeps the SLOs under one load."""

    load: float
    requests_per_s: float
    card: str
    cards_per_replica: int
    arm: str
    replicas: int | None  # None: not found
    by_seed: tuple[int | None, ...] = ()  # the replicas for each seed alone
    at: Tried | None = None  # the fleet with so many replicas, or if none is enough with the most that were tried
    why_not: str | None = None  # why it cannot run, or which bound the largest fleet misses
    scaled: bool = False  # autoscaled, with at most so many replicas
    of: str | None = None  # the same arm with all replicas always on, if it is planned too

    @property
    def cards(self) -> int | None:
        return None if self.replicas is None else self.replicas * self.cards_per_replica

    @property
    def cards_on(self) -> float | None:
        """Mean number of cards that are on; all cards without autoscaling."""
        on = self.at.metrics.get(ON) if self.scaled and self.at is not None else None
        if self.cards is None or not isinstance(on, int | float):
            return self.cards
        return float(on) * self.cards_per_replica

    @property
    def fleet(self) -> str:
        """The fleet as text: 3 x h100-80gb; 2 x 4xh100-80gb (8 cards); up to 5 x l40s (2.4 on average)."""
        several = f"{self.cards} cards" if self.cards_per_replica > 1 else ""
        on = f"{fmt.number(self.cards_on)} on average" if self.scaled and self.cards_on is not None else ""
        beside = ", ".join(filter(None, (several, on)))
        return f"{'up to ' if self.scaled else ''}{self.replicas} x {self.card}" + (f" ({beside})" if beside else "")

    @property
    def usd_per_hour(self) -> float | None:
        value = None if self.at is None or self.replicas is None else self.at.metrics.get("usd_per_hour")
        return float(value) if isinstance(value, int | float) else None


@dataclass(frozen=True, slots=True)
class Advice:
    """The fleet to take for one load, and the largest load that it still serves within the SLOs."""

    plan: FleetPlan
    valid_up_to_rps: float
    valid_by_seed: tuple[float | None, ...]  # for each seed alone; None if below the planned load
    at_least: bool  # the fleet served even the largest load that was tried
    against_load: tuple[Tried, ...]
    band: TimeBand | None = None  # how far the times of the profile may be off; None if not known, or not asked for
    at_ends: tuple[tuple[float, int | None], ...] = ()  # (time factor, replicas needed) at both ends of the band

    @property
    def survives(self) -> bool | None:
        """Whether the same number is needed at both ends of the band; None if that was not run."""
        return all(number == self.plan.replicas for _, number in self.at_ends) if self.at_ends else None


@dataclass(frozen=True, slots=True)
class CapacityResult(Sourced):
    """The result of a capacity plan, from which its table, figures and page are made."""

    experiment: str
    title: str
    question: str
    conditions: str
    verdict: tuple[str, ...]
    rule: str  # condition for a fleet to be enough
    slo: Slo
    requirements: tuple[Requirement, ...]
    plans: tuple[FleetPlan, ...]  # by load, card and arm
    tried: tuple[Tried, ...]
    advice: tuple[Advice, ...]  # for each load that any fleet serves
    workload: ServedWorkload
    inputs: Mapping[str, Provenance]
    provenance: Mapping[str, Any]
    assumptions: tuple[Assumption, ...] = ()
    warnings: tuple[str, ...] = ()
    seeds: int = 1

    @property
    def loads(self) -> tuple[float, ...]:
        return tuple(dict.fromkeys(plan.load for plan in self.plans))

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(plan.arm for plan in self.plans))

    @property
    def cards(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(plan.card for plan in self.plans))

    @property
    def scaled(self) -> bool:
        return any(plan.scaled for plan in self.plans)

    @property
    def priced(self) -> bool:
        return any(plan.usd_per_hour is not None for plan in self.plans)

    def advised(self, load: float) -> Advice | None:
        return next((it for it in self.advice if it.plan.load == load), None)


def joules_per_million_tokens(metrics: Metrics) -> Band | float | None:
    """Joules of all cards per million output tokens; None if the power of a card is not known."""
    per_char, chars, tokens = (
        metrics.get(name) for name in ("energy_j_per_char", "throughput_chars_per_s", "throughput_tokens_per_s")
    )
    if per_char is None or not isinstance(chars, int | float) or not isinstance(tokens, int | float) or not tokens:
        return None
    factor = chars / tokens * 1e6
    return Band(per_char.low * factor, per_char.high * factor) if isinstance(per_char, Band) else per_char * factor


def load_in_words(load: float, requests_per_s: float) -> str:
    """The load as text, such as "5.53 requests/s (1x)": the offered rate, and its multiple of the workload's."""
    return f"{fmt.number(requests_per_s)} requests/s ({load:g}x)"


def range_in_words(values: Sequence[float | int | None], beyond: str) -> str:
    """A range as text, such as "9 to 10", with `beyond` in place of None."""
    known = [value for value in values if value is not None]
    if not known:
        return beyond
    low, high = fmt.number(min(known)), fmt.number(max(known))
    if len(known) < len(values):
        return f"{low} to {beyond}" if beyond.startswith("more") else f"{beyond} to {high}"
    return low if low == high else f"{low} to {high}"


def print_capacity(result: CapacityResult, file: TextIO | None = None) -> None:
    """Print a table for each load, and an explanation of its columns."""
    for load in result.loads:
        plan_table(result, load).show(file)
    dollars = " USD: by cost.usd_per_card_hour." if result.priced else ""
    say(
        f"*: advised. repl.: the fewest replicas with {result.rule}. MJ/M{', USD/M' if result.priced else ''}: for a "
        "million output tokens. same: output tokens equal to full depth's. SLOs kept: requests inside all, [95 % "
        f"{scope_in_words(result.seeds)}].{dollars}{' on: cards that are on, on average.' if result.scaled else ''} "
        "MJ/M: a band, by the power of a card. Intervals of the other figures are in summary.json.",
        file,
    )


def plan_table(result: CapacityResult, load: float) -> TextTable:
    """The plans for one load: a row for each card, and below it one for each arm."""
    plans = [plan for plan in result.plans if plan.load == load]
    table = TextTable(f"{result.title}: {load_in_words(load, plans[0].requests_per_s)}")
    beside = (*(("on",) if result.scaled else ()), *(("USD/h", "USD/M") if result.priced else ()))
    for header in ("fleet", "repl.", "cards", *beside, "MJ/M", "same %"):
        table.column(header, number=header != "fleet")
    table.column("SLOs kept, %")
    advised = result.advised(load)
    for card in result.cards:
        table.row([card, *[""] * (len(table.headers) - 1)], dim=True)
        for plan in (plan for plan in plans if plan.card == card):
            mark = "*" if advised is not None and plan is advised.plan else " "
            table.row([f"{mark} {plan.arm}", *_cells(plan, result.priced, result.scaled)])
    return table


def _cells(plan: FleetPlan, priced: bool, scaled: bool) -> list[str]:
    nothing, at = fmt.NOTHING, plan.at
    if at is None:
        return [nothing] * ((7 if priced else 5) + scaled)
    found = plan.replicas is not None
    dollars = [at.metrics.get(name) if found else None for name in ("usd_per_hour", "usd_per_million_tokens")]
    shown = [f"{value:,.2f}" if isinstance(value, int | float) else nothing for value in dollars]
    energy, same = joules_per_million_tokens(at.metrics) if found else None, at.metrics.get("agreement")
    return [
        str(plan.replicas) if found else f">{at.replicas}",
        str(plan.cards) if found else nothing,
        *((on_text(plan),) if scaled else ()),
        *(shown if priced else ()),
        energy_text(energy),
        per_cent(same) if isinstance(same, float) else nothing,
        attainment_text(at),
    ]


def on_text(plan: FleetPlan) -> str:
    """Mean cards on as text, such as "2.41 [2.30, 2.52]"; all cards without autoscaling."""
    on, at = plan.cards_on, plan.at
    if on is None or not plan.scaled or at is None:
        return fmt.NOTHING if on is None else fmt.number(on)
    found, each = at.intervals.get(ON), plan.cards_per_replica
    if found is None or found.low is None or found.high is None:
        return f"{fmt.number(on)} {fmt.NO_INTERVAL}"
    return f"{fmt.number(on)} [{fmt.number(found.low * each)}, {fmt.number(found.high * each)}]"


def energy_text(energy: Band | float | None) -> str:
    """Energy in megajoules as text, such as "0.22-0.31"."""
    if energy is None:
        return fmt.NOTHING
    ends = (energy.low, energy.high) if isinstance(energy, Band) else (energy,)
    return "-".join(f"{end / 1e6:.2f}" if end >= 1e4 else fmt.number(end / 1e6, 2) for end in ends)


def attainment_text(tried: Tried) -> str:
    """Attainment in per cent as text, such as "99.1 [98.7, 99.4]"."""
    value, interval = tried.metrics.get(ATTAINMENT), tried.intervals.get(ATTAINMENT)
    if not isinstance(value, int | float):
        return fmt.NOTHING
    if interval is None or interval.low is None or interval.high is None:
        return f"{per_cent(value)} {fmt.NO_INTERVAL}"
    return f"{per_cent(value)} [{per_cent(interval.low)}, {per_cent(interval.high)}]"


def per_cent(share: float) -> str:
    """A share in per cent with one decimal; "100" for all, "100.0" for nearly all."""
    return "100" if share == 1 else f"{share * 100:.1f}"


def tried_table(result: CapacityResult) -> pyarrow.Table:
    """The rows of fleets.parquet: every fleet that was tried at every load, with all metrics."""
    import pyarrow as pa

    advised = {id(tried): place for place, it in enumerate(result.advice) for tried in it.against_load}
    rows = list({id(t): t for t in (*result.tried, *(t for it in result.advice for t in it.against_load))}.values())
    columns: dict[str, Any] = {
        "load": pa.array([row.load for row in rows], pa.float64()),
        "requests_per_s": pa.array([row.requests_per_s for row in rows], pa.float64()),
        "card": pa.array([row.card for row in rows], pa.string()),
        "arm": pa.array([row.arm for row in rows], pa.string()),
        "replicas": pa.array([row.replicas for row in rows], pa.int64()),
        "time_factor": pa.array([row.time_factor for row in rows], pa.float64()),
        "kept": pa.array([row.kept for row in rows], pa.bool_()),
        "seeds_kept": pa.array([sum(row.kept_by_seed) for row in rows], pa.int64()),
        "limit_of": pa.array([advised.get(id(row)) for row in rows], pa.int64()),
    }
    return pa.table(columns | metric_columns([row.metrics for row in rows]))


def summarise_plans(result: CapacityResult) -> dict[str, Any]:
    """The part of `summary.json` under "capacity"."""
    return {
        "rule": result.rule,
        "slo": json_value(result.slo),
        "requirements": [{"metric": it.metric, "bound": it.bound} for it in result.requirements],
        "loads": [
            {
                "load": load,
                "requests_per_s": next(plan.requests_per_s for plan in result.plans if plan.load == load),
                "plans": [_plan(plan) for plan in result.plans if plan.load == load],
                "recommended": _advice(result.advised(load)),
            }
            for load in result.loads
        ],
    }


def _plan(plan: FleetPlan) -> dict[str, Any]:
    at = plan.at
    names = (*TOLD, ON) if plan.scaled else TOLD
    metrics = {} if at is None else {name: at.metrics[name] for name in names if at.metrics.get(name) is not None}
    return {
        "card": plan.card,
        "policy": plan.arm,
        "replicas": plan.replicas,
        "replicas_by_seed": list(plan.by_seed),
        "cards": plan.cards,
        "why_not": plan.why_not,
        "j_per_million_tokens": None if at is None else json_value(joules_per_million_tokens(at.metrics)),
        "of_replicas": None if at is None else at.replicas,
        "metrics": json_value(metrics),
        "intervals": {} if at is None else json_value({k: v for k, v in at.intervals.items() if k in metrics}),
    } | ({"autoscaled": True} if plan.scaled else {})


def _advice(advice: Advice | None) -> dict[str, Any] | None:
    if advice is None:
        return None
    plan = advice.plan
    return {
        "card": plan.card,
        "policy": plan.arm,
        "replicas": plan.replicas,
        "replicas_by_seed": list(plan.by_seed),
        "cards": plan.cards,
        "usd_per_hour": plan.usd_per_hour,
        "valid_up_to_rps": advice.valid_up_to_rps,
        "valid_up_to_rps_by_seed": list(advice.valid_by_seed),
        "more_was_not_tried": advice.at_least,
        "profile_band": json_value(advice.band),
        "at_ends": [{"time_factor": factor, "replicas": number} for factor, number in advice.at_ends],
        "survives": advice.survives,
    } | ({"autoscaled": True, "cards_on_mean": plan.cards_on} if plan.scaled else {})
