"""Plans what a capacity plan runs: loads, cards, arms that can be planned, and what keeping the SLOs means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from helios_sim.errors import HardwareError, UserError, require
from helios_sim.exits.published import EXIT_SHARES
from helios_sim.policy.registry import parameters_of
from helios_sim.profile.catalog import card_key
from helios_sim.profile.devices import group_of
from helios_sim.profile.formats import named_format
from helios_sim.report.capacity import ATTAINMENT, TIMES, Requirement
from helios_sim.study.band import time_factor
from helios_sim.study.cost import PRICE, card_sets, costs_of
from helios_sim.study.fleet import Fleet, shared_fleet
from helios_sim.study.jobs import Job
from helios_sim.study.modes import BY_REQUESTS, LIVE
from helios_sim.study.plan import check_study, entries_of, jobs_of, plan_study
from helios_sim.study.schema import Config
from helios_sim.study.verdict import conditions
from helios_sim.study.workload import OF_THE_MODEL, expected_load
from helios_sim.vary.settings import with_settings

DRAWN = ("poisson", "gamma", "constant")
NOT_OF_A_PLAN = ("sweeps", "figures", "published", "gates", "baseline", "subject", "headline_metrics")
NEEDS_NO_EXITS = ("full_depth", "custom")
ONE_MODEL = ("full_depth", "early_exit")  # policies of one model: each candidate gets an arm of its own


@dataclass(frozen=True, slots=True)
class Option:
    """An arm on a card."""

    card: str  # card of a replica, with their number if it has several: 2xh100-80gb
    cards_per_replica: int
    arm: str
    config: Config  # with this arm and this card alone
    is_bound: bool = False  # its policy knows what will come, so it cannot be deployed
    least: int | None = None  # replicas that are always on, if the others come and go; None if all are always on
    of: str | None = None  # with `least`: the same arm with all replicas always on, if that is planned too
    why_not: str | None = None  # why it cannot run at all


@dataclass(frozen=True, slots=True)
class CapacityPlan:
    config: Config
    requirements: tuple[Requirement, ...]
    options: tuple[Option, ...]  # card by card
    requests_per_s: float  # rate of the workload as it is set, at load 1
    conditions: str
    notices: tuple[str, ...]
    without_exits: str | None  # why arms were left out, and how to plan them; None if none was

    @property
    def possible(self) -> tuple[int, ...]:
        """Indices of the options that can run."""
        return tuple(place for place, option in enumerate(self.options) if option.why_not is None)

    def rate_at(self, load: float) -> float:
        return self.requests_per_s * load

    def requests(self, job: Job) -> int:
        return shared_fleet(job.config, job.seed).parts.workload.requests

    def jobs(self, option: Option, load: float, replicas: int, factor: float = 1.0) -> Sequence[Job]:
        """Return a job for each seed: the option with so many replicas under a load. UserError if they cannot run.

        `factor`: iterations take so many times as long as the profiles say.
        """
        changes = {**at_load(self.config, load), "server.replicas": replicas}
        if option.least is not None:
            changes |= {"autoscale.least": min(option.least, replicas), "autoscale.first": replicas}
        if factor != 1.0:
            changes["profile_time_factor"] = time_factor(self.config, factor)
        return jobs_of(option.config, option.arm, changes)


def plan_capacity(config: Config) -> CapacityPlan:
    """Check the settings and plan. UserError for wrong ones; nothing has run or been written by then."""
    _check_kind(config)
    requirements = requirements_of(config)
    arms, without_exits = _arms(config)
    if len(config.models) > 1 and config.workload.chars_per_token == OF_THE_MODEL:
        config = _same_texts(config, arms[0][1])
    options: list[Option] = []
    errors: list[UserError] = []
    fleets: dict[str, Fleet] = {}
    for card in config.capacity.cards:
        for (arm, changes, entry), least, of in _always_on_or_not(config, arms):
            own = with_settings(config, {**changes, "hardware": card, **at_load(config, config.capacity.loads[0])})
            own = replace(own, arms={arm: entry}, policy=None)
            with _of_cards():
                study = plan_study(own)
                job = study.headline.jobs[arm][0]
                fleet = shared_fleet(job.config, job.seed)
            costs_of(replace(own, cost=replace(own.cost, usd_per_card_hour=None)), fleet)  # carbon needs known power
            fleets.setdefault(card, fleet)
            name = fleet.kinds[0].card.name
            cards, is_bound = group_of(name)[0] * card_sets(job.arm.policy), job.arm.policy.kind.is_bound
            option = Option(name, cards, arm, own, is_bound, least, of)
            try:
                check_study(plan_study(replace(own, cost=replace(own.cost, usd_per_card_hour=None))))
                if least is not None:
                    most = {"server.replicas": least, "autoscale.least": least}
                    shared_fleet(jobs_of(own, arm, most)[0].config, job.seed)
            except UserError as error:
                if of is not None and options[-1].why_not is None:  # the arm runs if all replicas are always on
                    raise
                errors.append(error)
                option = replace(option, why_not=str(error))
            options.append(option)
    if all(option.why_not is not None for option in options):
        raise errors[0].about(f"{options[0].card}: {errors[0].key}")
    names = [fleet.kinds[0].card.name for fleet in fleets.values()]
    groups = [group_of(name) for name in names]
    different = len({(cards, card_key(card) or card) for cards, card in groups}) == len(names)
    require(different, "capacity.cards", config.capacity.cards, f"different cards, not {names}")
    prices = _prices(config, names)
    options = [
        replace(it, config=with_settings(it.config, {PRICE: prices[it.card]})) if it.card in prices else it
        for it in options
    ]
    return CapacityPlan(
        config, requirements, tuple(options), _rate(config, next(iter(fleets.values()))),
        _conditions(config, names), tuple(_notices(config)), without_exits,
    )  # fmt: skip


def _same_texts(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return settings with the characters per token of the first arm's model, so that all arms see the same texts."""
    first = {**changes, "hardware": config.capacity.cards[0], **at_load(config, config.capacity.loads[0])}
    with _of_cards():
        fleet = shared_fleet(with_settings(config, first), config.seeds[0])
    return with_settings(config, {"workload.chars_per_token": fleet.parts.workload.chars_per_token})


def at_load(config: Config, load: float) -> dict[str, Any]:
    """Return the settings that multiply the study's arrival rate by `load`."""
    arrivals = config.workload.arrivals
    if arrivals.kind == "trace":
        return {"workload.arrivals.rate_scale": arrivals.rate_scale * load}
    if arrivals.rate_per_s is None:  # the workload refuses this later
        return {}
    changes: dict[str, Any] = {"workload.arrivals.rate_per_s": arrivals.rate_per_s * load}
    if config.capacity.seconds is not None:
        changes["workload.n_requests"] = max(1, round(arrivals.rate_per_s * load * config.capacity.seconds))
    return changes


def requirements_of(config: Config) -> tuple[Requirement, ...]:
    """Return what must be kept. UserError if there is no SLO, or none that limits how long requests may wait."""
    slo = {name: bound for name, bound in vars(config.slo).items() if bound is not None}
    if not slo:
        fix = "set slo.ttft_s (first token), slo.tpot_s (each further one) or slo.e2e_s (last one), in seconds"
        raise UserError("slo", None, "a capacity plan needs service levels to keep", fix)
    if set(slo) == {"tpot_s"}:
        allowed = "not alone: requests that wait for ever would keep it"
        raise UserError("slo.tpot_s", slo["tpot_s"], allowed, "set slo.ttft_s or slo.e2e_s too")
    by = config.capacity.by
    if by == BY_REQUESTS:
        return (Requirement(ATTAINMENT, config.capacity.attainment),)
    if not isinstance(by, Mapping):
        return tuple(Requirement(f"{name}_{by}", bound) for name, bound in slo.items())
    if set(by) != set(slo):
        allowed = f"a statistic for each SLO that is set and no other: {', '.join(slo)}"
        raise UserError("capacity.by", dict(by), allowed, "name these, such as {ttft_s: p95, tpot_s: mean}")
    return tuple(Requirement(f"{name}_{by[name]}", slo[name]) for name in TIMES if name in slo)


def _check_kind(config: Config) -> None:
    for key in NOT_OF_A_PLAN:
        if getattr(config, key):
            given = getattr(config, key)
            shown = given if isinstance(given, str) else f"{len(given)} given"
            raise UserError(key, shown, "a capacity plan has none of its own", "leave it or capacity.cards out")
    if config.sweep.parameters:
        raise UserError("sweep.parameters", "given", "a capacity plan varies replicas and loads alone", "leave one out")
    if config.mode == LIVE:
        raise UserError("mode", LIVE, "a capacity plan is a simulation", "leave mode or capacity.cards out")
    if config.cluster.kinds:
        allowed = "a capacity plan is of equal replicas"
        raise UserError("cluster.kinds", "given", allowed, "name all cards in capacity.cards, each is planned alone")
    least, most = config.autoscale.least, config.capacity.most_replicas
    if least is not None and least > most:
        allowed = f"at most capacity.most_replicas={most}"
        raise UserError("autoscale.least", least, allowed, "raise capacity.most_replicas")
    workload = config.workload
    if workload.arrivals.kind not in (*DRAWN, "trace"):
        allowed = f"arrivals that do not wait for answers: {', '.join(DRAWN)} or trace"
        raise UserError("workload.arrivals.kind", workload.arrivals.kind, allowed, "choose one of these")
    drawn = workload.arrivals.kind in DRAWN and config.capacity.seconds is not None
    if drawn and workload.lengths.kind == "trace" and not workload.lengths.resample:
        allowed = "lengths for any number of requests, since every load has so many seconds of arrivals"
        fix = "set workload.lengths.resample=true, or capacity.seconds=null for workload.n_requests at every load"
        raise UserError("capacity.seconds", config.capacity.seconds, allowed, fix)
    for kind, fault in workload.faults.strikes.items() if drawn else ():
        if fault.rate_per_hour is None and min(fault.at_s) > (config.capacity.seconds or 0.0):
            allowed = f"some within the {config.capacity.seconds:g} s of arrivals that are planned with"
            fix = "name earlier ones, or raise capacity.seconds"
            raise UserError(f"workload.faults.{kind}.at_s", fault.at_s, allowed, fix)


_Arm = tuple[str, dict[str, Any], Mapping[str, Any]]  # name, changes of the study's settings, entry


def _always_on_or_not(config: Config, arms: Sequence[_Arm]) -> Iterator[tuple[_Arm, int | None, str | None]]:
    """Yield each arm; with `autoscale`, once with all replicas always on and once with replicas that come and go.

    Yields the arm, the least number of replicas that are always on (None for all), and for an autoscaled arm its arm
    with all always on. Each of several `autoscale.requests_per_replica` is an arm. An arm with `autoscale.least` of its
    own is planned only so.
    """
    least = config.autoscale.least
    always_on = {} if least is None else {"autoscale.least": None}
    for name, changes, entry in arms:
        overrides = dict(entry.get("overrides") or {})
        own = overrides.pop("autoscale.least", None)
        if own is not None:
            yield (name, {**changes, **always_on}, {**entry, "overrides": overrides}), int(own), None
            continue
        yield (name, {**changes, **always_on}, entry), None, None
        if least is None:
            continue
        per = config.autoscale.requests_per_replica
        for number in per if isinstance(per, list) else [per]:
            own_name = f"{name}_autoscaled" + (f"_{number:g}" if isinstance(per, list) else "")
            yield (own_name, {**changes, **always_on, "autoscale.requests_per_replica": number}, entry), least, name


def _arms(config: Config) -> tuple[list[_Arm], str | None]:
    """Return the arms that can be planned, and why others cannot: arms that need exits get only models that have some.

    A policy of one model that names none becomes an arm for each model. UserError if no arm is left.
    """
    with_exits = [model for model in config.models if _has_exits(config, model)]
    found: list[_Arm] = []
    left_out: list[str] = []
    for name, entry in entries_of(config).items():
        policy = str(entry["policy"])
        needs = policy not in NEEDS_NO_EXITS
        models = [str(entry["model"])] if entry.get("model") else list(config.models)
        models = [model for model in models if not needs or model in with_exits]
        if not models:
            left_out.append(name)
        elif policy in ONE_MODEL or (policy in NEEDS_NO_EXITS and "model" in parameters_of(policy)):
            for model in models:
                own = f"{name}_{model.rsplit('/', 1)[-1]}" if len(models) > 1 else name
                found.append((own, _of_models(config, [model], with_exits), {**entry, "model": model}))
        else:
            found.append((name, _of_models(config, models, with_exits), entry))
    missing = [model for model in config.models if model not in with_exits]
    if not found:
        allowed = f"an arm that needs no exits, since none are known of {', '.join(missing)}"
        raise UserError("arms", ", ".join(left_out), allowed, "add policy=full_depth, or name exits.source")
    return found, _without_exits(config, left_out, missing) if missing else None


def _has_exits(config: Config, model: str) -> bool:
    source = config.exits.source
    return source != "none" and (source != "published" or named_format(model)[0] in EXIT_SHARES)


def _of_models(config: Config, models: list[str], with_exits: Sequence[str]) -> dict[str, Any]:
    changes: dict[str, Any] = {"models": models}
    if not set(models) <= set(with_exits):
        changes["exits.source"] = "none"
    return changes


def _without_exits(config: Config, left_out: Sequence[str], missing: Sequence[str]) -> str:
    names, source = ", ".join(missing), config.exits.source
    what = f"{', '.join(left_out)} {'is' if len(left_out) == 1 else 'are'}" if left_out else "Nothing but full depth is"
    of = f" of {names}" if len(missing) < len(config.models) else ""
    return (
        f"Early exits, caps and HELIOS: {what} not planned{of}, because exits.source={source} knows no exits of "
        f"{names}, and without them neither gain nor quality is known. Whether it exits at all: python -m calibrate "
        f"model={missing[0]} +task=potential on a device that runs it. To plan with them: +task=traces in its place, "
        "then exits.source=OUT/trace; a table of your own, exits.source=mine.parquet; or exits.source=stated for a cap "
        "whose share of unchanged tokens you know."
    )


@contextmanager
def _of_cards() -> Iterator[None]:
    """Name capacity.cards in place of hardware in a UserError that is raised inside."""
    try:
        yield
    except HardwareError as error:
        raise error.about("capacity.cards") from error


def _prices(config: Config, names: Sequence[str]) -> dict[str, float]:
    """Return the price of one card, by card of a replica. UserError if cards and prices do not match."""
    price = config.cost.usd_per_card_hour
    if price is None:
        return {}
    cards = {name: group_of(name)[1].lower() for name in names}
    if not isinstance(price, Mapping):
        return dict.fromkeys(names, float(price))
    prices = {str(card).lower(): float(each) for card, each in price.items()}
    if set(prices) != set(cards.values()):
        allowed = f"a price of each card of the plan and of no other: {', '.join(sorted(set(cards.values())))}"
        raise UserError(PRICE, dict(price), allowed, "name these")
    return {name: prices[card] for name, card in cards.items()}


def _rate(config: Config, fleet: Fleet) -> float:
    """Return the requests per second of the workload as it is set. UserError if all of them come at once."""
    arrivals = config.workload.arrivals
    if arrivals.kind in DRAWN:
        assert arrivals.rate_per_s is not None
        return arrivals.rate_per_s
    rate = expected_load(fleet.parts.workload, config.seeds[0]).arrival_rate_per_s
    if rate is None:
        raise UserError("workload.arrivals.trace", arrivals.trace, "arrivals at different times", "take another trace")
    return rate / config.capacity.loads[0]  # the fleet was built with the first load


def _conditions(config: Config, names: Sequence[str]) -> str:
    server = replace(config.server, tensor_parallel=1, replicas=1)
    cards = f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]
    said = conditions(replace(config, hardware=cards, server=server)).rstrip(".")
    cached = "; equal beginnings of prompts are cached" if config.server.enable_prefix_caching else ""
    strikes = ", ".join(kind.replace("_", " ") for kind in config.workload.faults.strikes)
    struck = f"; faults: {strikes}" if strikes else ""
    it, scaled = config.autoscale, ""
    if it.least is not None:
        per = it.requests_per_replica
        numbers = " or ".join(f"{number:g}" for number in (per if isinstance(per, list) else [per]))
        scaled = f"; autoscaled: at least {it.least}, one for each {numbers} requests in the system"
        scaled += f", {it.start_s:g} s to start"
    return f"{said}; replicas behind {config.server.router.replace('_', ' ')}{cached}{scaled}{struck}."


def replays(config: Config) -> bool:
    """Whether the requests are the same under every seed, but for their texts."""
    workload = config.workload
    return workload.arrivals.kind == "trace" and workload.lengths.kind == "trace" and not workload.lengths.resample


def _notices(config: Config) -> Iterator[str]:
    if replays(config):
        yield (
            "Arrivals and lengths are those of the trace under every seed, so intervals leave out what other days "
            "bring: workload.lengths.resample=true and several seeds draw lengths anew."
        )
    if config.autoscale.least is not None and config.workload.arrivals.kind != "trace":
        yield (
            "Arrivals at one rate leave an autoscaler little to save: what it saves shows where load moves, with "
            "workload.arrivals.kind=trace."
        )
    if len(config.models) > 1:
        yield (
            "Several models: agreement is that of each with its own full depth. Which of them answers well enough is "
            "not part of the plan."
        )
