"""The answer of a capacity plan: which fleet to take, what other cards and policies need, and its reservations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import ceil

from helios_sim.report import format as fmt
from helios_sim.report.capacity import (
    ATTAINMENT,
    TIMES,
    Advice,
    CapacityResult,
    FleetPlan,
    Requirement,
    Tried,
    attainment_text,
    load_in_words,
    range_in_words,
    rule,
)
from helios_sim.report.cautions import of_inputs
from helios_sim.request import Slo
from helios_sim.study.capacity_plan import CapacityPlan, replays

FULL_DEPTH = "full_depth"
NEAR = 1.1  # a fleet that cannot serve this many times the planned load has little room
QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
WORTH = 0.99  # share of its cards that are on, above which autoscaling a fleet saves too little to count
SOME = 0.001  # share of prompt tokens that are cached, from which the verdict mentions them
LONG_ENOUGH = 10  # arrivals must last this many times the mean time of a request


def advised_plan(plan: CapacityPlan, plans: Sequence[FleetPlan]) -> FleetPlan | None:
    """Return the cheapest fleet with good enough answers: by dollars if known, else by cards that are on.

    Among equals it is the fleet that changes fewer tokens, then one with replicas that are always on, then the first
    in the order of cards and arms. None if no fleet keeps the SLOs with good enough answers.
    """
    good = [it for it in plans if it.replicas is not None and _is_good(plan, it) and not _is_bound(plan, it)]
    return min(good, key=_price, default=None)


def _price(it: FleetPlan) -> tuple[float, ...]:
    cards, agreement = float(it.cards_on or 0), None if it.at is None else it.at.metrics.get("agreement")
    changed = 1 - agreement if isinstance(agreement, float) else 0.0
    price = cards if it.usd_per_hour is None else it.usd_per_hour
    if it.cards and cards > WORTH * it.cards:
        price, cards = price * it.cards / cards, float(it.cards)
    return (price, cards, changed, float(it.scaled))


def _is_good(plan: CapacityPlan, it: FleetPlan) -> bool:
    agreement = None if it.at is None else it.at.metrics.get("agreement")
    return not isinstance(agreement, float) or agreement >= 1 - plan.config.objective.max_disagreement


def _is_bound(plan: CapacityPlan, it: FleetPlan) -> bool:
    return any(option.is_bound for option in plan.options if option.arm == it.arm)


def why_not(requirements: Sequence[Requirement], slo: Slo, at: Tried) -> str:
    """Return a sentence on the requirements that are missed with as many replicas as may be tried."""
    missed = [it.metric for it in requirements if not it.kept(at.metrics)]
    if ATTAINMENT in missed:  # name the SLOs that are missed too
        times = [Requirement(f"{name}_p99", bound) for name in TIMES if (bound := getattr(slo, name)) is not None]
        missed += [it.metric for it in times if not it.kept(at.metrics)]
    said = [f"{fmt.label(name)} is {fmt.metric(name, at.metrics.get(name))}" for name in missed]
    return f"with {at.replicas} replicas {' and '.join(said) or 'too many requests are dropped'}"


def verdict(plan: CapacityPlan, plans: Sequence[FleetPlan], advice: Sequence[Advice]) -> tuple[str, ...]:
    """Return sentences: for each load the advised fleet, other cards and other policies; then what was left out."""
    found: list[str] = []
    for load in plan.config.capacity.loads:
        of_load = [it for it in plans if it.load == load]
        advised = next((it for it in advice if it.plan.load == load), None)
        if advised is None:
            found.append(_none_fits(plan, of_load))
        else:
            found += [_take(advised), *_where_off(advised)]
            found += [*_whole(plan, of_load, advised.plan), *_other_cards(plan, of_load, advised.plan)]
        found += _policies(plan, of_load, advised)
        found += _scaled(plan, of_load, advised)
        found += _cached(advised)
        found += _struck(plan, advised)
    if plan.without_exits is not None:
        found.append(plan.without_exits)
    cannot = dict.fromkeys(f"{it.arm} on {it.card} cannot run: {it.why_not}" for it in plans if it.at is None)
    return (*found, *cannot)


def _take(advice: Advice) -> str:
    it, at = advice.plan, advice.plan.at
    assert at is not None
    said = [f"For {load_in_words(it.load, it.requests_per_s)} take {it.fleet} with {it.arm}"]
    if by_seed := _by_seed(it):
        said[0] += f" ({by_seed})"
    if it.usd_per_hour is not None:
        tokens = at.metrics.get("usd_per_million_tokens")
        per_token = f", USD {fmt.number(tokens)} per million output tokens" if isinstance(tokens, int | float) else ""
        said.append(f"USD {it.usd_per_hour:,.2f} an hour{per_token}")
    said.append(f"{attainment_text(at)} % of requests are inside all SLOs")
    return f"{'; '.join(said)}. {_valid(advice)}"


def _where_off(advice: Advice) -> Iterator[str]:
    """Say how many replicas are needed if the profile's times are off."""
    if advice.band is None or not advice.at_ends:
        return
    factors = " and ".join(f"{factor:.2f}" for factor, _ in advice.at_ends)
    where = f"with iterations {factors} times as long as the profile says ({advice.band.source})"
    numbers = " and ".join("more than were tried" if number is None else str(number) for _, number in advice.at_ends)
    yield f"The same number is enough {where}." if advice.survives else f"That changes {where}: {numbers} replicas."


def _whole(plan: CapacityPlan, plans: Sequence[FleetPlan], chosen: FleetPlan) -> Iterator[str]:
    """Name the cheapest fleet that changes no token, if the advised fleet changes some."""
    whole = [it for it in plans if it.at is not None and it.at.metrics.get("agreement") == 1.0]
    best = advised_plan(plan, whole)
    if best is not None and chosen not in whole:
        yield f"With every token as full depth gives it: {_in_short(best)}."


def _in_short(it: FleetPlan) -> str:
    price = "" if it.usd_per_hour is None else f"USD {it.usd_per_hour:,.2f} an hour"
    beside = "; ".join(filter(None, (_by_seed(it), price)))
    return f"{it.fleet} with {it.arm}" + (f" ({beside})" if beside else "")


def _by_seed(it: FleetPlan) -> str:
    if len(it.by_seed) < 2:
        return ""
    if all(number == it.replicas for number in it.by_seed):
        return f"under each of {len(it.by_seed)} seeds"
    return f"{range_in_words(it.by_seed, 'more')} over single seeds"


def _valid(advice: Advice) -> str:
    rate, by_seed = fmt.number(advice.valid_up_to_rps), advice.valid_by_seed
    if advice.at_least:
        return f"It serves at least {rate} requests/s within them; more was not tried."
    over = ""
    if len(by_seed) > 1:
        same = all(it == advice.valid_up_to_rps for it in by_seed)
        found = range_in_words(by_seed, "below the planned load")
        over = f" (under each of {len(by_seed)} seeds)" if same else f" ({found} over single seeds)"
    more = advice.valid_up_to_rps / advice.plan.requests_per_s - 1
    return f"It serves up to {rate} requests/s within them{over}, {more * 100:.0f} % more than planned."


def _other_cards(plan: CapacityPlan, plans: Sequence[FleetPlan], chosen: FleetPlan) -> Iterator[str]:
    others = []
    for card in dict.fromkeys(it.card for it in plans if it.card != chosen.card):
        best = advised_plan(plan, [it for it in plans if it.card == card])
        others.append((card, best))
    if not others:
        return
    told = [f"no number of {card} that was tried" if best is None else _in_short(best) for card, best in others]
    yield f"Other cards: {', '.join(told)}."
    if chosen.usd_per_hour is None and chosen.cards_on:
        limits = [
            f"{_times(best.cards_on / chosen.cards_on)} {_one(card)}"
            for card, best in others
            if best is not None and best.cards_on is not None
        ]
        if limits:
            yield (
                "No prices were given (cost.usd_per_card_hour), so fewest cards were taken: the cheapest fleet as long "
                f"as one {_one(chosen.card)} costs less than {' and than '.join(limits)}."
            )


def _times(factor: float) -> str:
    return "one" if factor == 1 else f"{factor:.3g}"


def _one(card: str) -> str:
    """Return the name of one card of a group: h100-80gb of 4xh100-80gb."""
    number, _, name = card.partition("x")
    return name if number.isdigit() else card


def _policies(plan: CapacityPlan, plans: Sequence[FleetPlan], advice: Advice | None) -> Iterator[str]:
    """Say what each arm needs on the advised card; nothing if no fleet is advised."""
    for card in [advice.plan.card] if advice is not None else []:
        of_card = [it for it in plans if it.card == card and it.at is not None]
        if len(of_card) < 2:
            continue
        least = f"{(1 - plan.config.objective.max_disagreement) * 100:.4g} %"
        yield (
            f"Policies on {card}, replicas and tokens equal to full depth's: {'; '.join(map(_needs, of_card))}. Fleets "
            f"with less than {least} are not advised (objective.max_disagreement)."
        )


def _needs(it: FleetPlan) -> str:
    assert it.at is not None
    number = f"more than {it.at.replicas}" if it.replicas is None else str(it.replicas)
    same = it.at.metrics.get("agreement")
    return f"{it.arm} {number}" + (f", {fmt.in_unit(same, 'share')}" if isinstance(same, float) else "")


def _scaled(plan: CapacityPlan, plans: Sequence[FleetPlan], advice: Advice | None) -> Iterator[str]:
    """Say what autoscaling saves compared with as many replicas as the same policy needs if all are always on.

    With several values of `autoscale.requests_per_replica` the cheapest is told, and what the others take.
    """
    scaled = [it for it in plans if it.of is not None and it.at is not None]
    if advice is not None:
        scaled = [it for it in scaled if it.card == advice.plan.card]
    for card, of in dict.fromkeys((it.card, it.of) for it in scaled):
        several = [it for it in scaled if (it.card, it.of) == (card, of)]
        best = min((it for it in several if it.replicas is not None), key=_price, default=None)
        fixed = next((other for other in plans if (other.card, other.arm) == (card, of)), None)
        which = f"{of} on {card}" if advice is None else of
        if best is None:
            told = several[0].why_not if len(several) == 1 else "; ".join(f"{it.arm}: {it.why_not}" for it in several)
            yield (
                f"Autoscaled, {which} does not keep the service levels: {told}. More replicas that are always on "
                "(autoscale.least) or fewer requests for each (autoscale.requests_per_replica) start them earlier."
            )
            continue
        as_what = f" as {best.arm}" if len(several) > 1 else ""
        others = [f"{it.arm} {it.fleet if it.replicas else 'does not keep them'}" for it in several if it is not best]
        beside = ""
        if fixed is not None and fixed.cards and best.cards_on is not None:
            less = 1 - best.cards_on / fixed.cards
            change = f"{abs(less) * 100:.0f} % {'less' if less > 0 else 'more'} card time than"
            beside = f": {change if round(less, 2) else 'as much card time as'} {fixed.fleet} that are always on"
        rest = f" ({'; '.join(others)})" if others else ""
        yield f"Autoscaled, {which} takes {best.fleet}{as_what}{beside}{rest}."


def _cached(advice: Advice | None) -> Iterator[str]:
    at = None if advice is None else advice.plan.at
    share = None if at is None else at.metrics.get("prefix_cache_hit_rate")
    if at is not None and isinstance(share, int | float) and share >= SOME:
        known = fmt.metric_with_interval("prefix_cache_hit_rate", share, at.intervals.get("prefix_cache_hit_rate"))
        yield (
            f"Of its prompts' tokens {known} were cached, which the plan counts on: server.enable_prefix_caching=false "
            "plans without."
        )


def _struck(plan: CapacityPlan, advice: Advice | None) -> Iterator[str]:
    """Say what the faults that strike every fleet of the plan did to the advised one."""
    kinds = ", ".join(kind.replace("_", " ") for kind in plan.config.workload.faults.strikes)
    if kinds and advice is not None and advice.plan.at is not None:
        metrics = advice.plan.at.metrics
        again, lost = (fmt.metric(name, metrics.get(name)) for name in ("requests_retried", "requests_lost"))
        yield (
            f"Every fleet meets the faults that are set ({kinds}): in the advised one {again} requests were sent again "
            f"and {lost} were lost. Without workload.faults it is planned without."
        )


def _none_fits(plan: CapacityPlan, plans: Sequence[FleetPlan]) -> str:
    """Say what each card and arm missed; a fleet that is large enough but changes too many tokens is named too."""
    tried = [it for it in plans if it.at is not None]
    told = [
        f"{it.arm} on {it.card}: {it.why_not}"
        if it.replicas is None
        else f"{it.arm} on {it.card}: enough with {it.fleet}, but too many tokens change"
        for it in tried
    ]
    where = load_in_words(plans[0].load, plans[0].requests_per_s)
    return f"No fleet of up to {plan.config.capacity.most_replicas} replicas serves {where}. {'; '.join(told)}."


def reservations_of(plan: CapacityPlan, result: CapacityResult) -> CapacityResult:
    """Return the result with warnings about what limits it."""
    found = [*result.warnings, *of_inputs(result)]
    if result.seeds == 1 and not replays(plan.config):
        found.append(
            "One seed: what other seeds would need is not known, and intervals hold within that run: name several in "
            "seeds=[...]."
        )
    plans = [it for it in result.plans if it.at is not None and it.replicas is not None]
    short = [it for it in plans if it.at is not None and _is_short(it.at)]
    if short:
        loads = ", ".join(dict.fromkeys(f"{it.load:g}x" for it in short))
        found.append(
            f"At {loads} arrivals last less than {LONG_ENOUGH} times as long as a request does: queues may not have "
            "grown to what they come to. Plan with more seconds (capacity.seconds), or a longer trace."
        )
    least = max((_least_requests(requirement) for requirement in result.requirements), default=1)
    if few := {f"{it.load:g}x": n for it in plans if it.at is not None and (n := _requests(it.at)) < least}:
        told = " and ".join(f"{n:.0f} at {load}" for load, n in few.items())
        found.append(
            f"Few requests ({told}): what is asked for, {rule(result.requirements, result.slo)}, says nothing of "
            f"fewer than {least}. Plan with more seconds (capacity.seconds), or a longer trace."
        )
    outside = [it for it in plans if it.at is not None and (it.at.metrics.get("outside_grid_fraction") or 0) != 0]
    if outside:
        fleets = ", ".join(dict.fromkeys(f"{it.arm} on {it.card}" for it in outside))
        found.append(f"{fleets}: some iterations were priced outside the profile's tables.")
    for advice in result.advice:
        if advice.valid_up_to_rps < NEAR * advice.plan.requests_per_s:
            found.append(
                f"At {advice.plan.load:g}x the advised fleet has little room: prices of a profile and forecasts of a "
                "load are seldom within some per cent. One replica more is safer."
            )
    found += _out_of_order(result)
    unknown = [card for card in result.cards if any(
        it.card == card and it.at is not None and it.at.metrics.get("energy_j_per_char") is None
        and it.at.metrics.get("requests_completed") for it in plans
    )]  # fmt: skip
    if unknown:
        cards = ", ".join(unknown)
        found.append(f"No energy of {cards}: the idle power is not known (a file of the card can state idle_w).")
    return replace(result, warnings=tuple(dict.fromkeys(found)))


def _requests(at: Tried) -> float:
    counts = (at.metrics.get(f"requests_{status}") for status in ("completed", "dropped", "unfinished"))
    return sum(float(count) for count in counts if isinstance(count, int | float))


def _least_requests(requirement: Requirement) -> int:
    """Return the fewest requests at which one alone does not decide: a hundred for 99 % of them, or for a p99."""
    statistic = requirement.metric.rpartition("_")[2]
    share = requirement.bound if requirement.metric == ATTAINMENT else QUANTILES.get(statistic, 0.0)
    return ceil(1 / max(1 - share, 1e-3) - 1e-6)


def _is_short(at: Tried) -> bool:
    span, e2e = at.metrics.get("span_s"), at.metrics.get("e2e_s_mean")
    return isinstance(span, float) and isinstance(e2e, float) and span - e2e < LONG_ENOUGH * e2e


def _out_of_order(result: CapacityResult) -> Iterator[str]:
    """Warn if fewer replicas than planned kept the SLOs, although a number in between did not."""
    for it in result.plans:
        if it.replicas is None:
            continue
        fewer = [
            tried.replicas for tried in result.tried
            if tried.kept and (tried.load, tried.card, tried.arm) == (it.load, it.card, it.arm)
            and tried.replicas < it.replicas and tried.time_factor == 1.0
        ]  # fmt: skip
        if fewer:
            yield (
                f"{it.arm} on {it.card} at {it.load:g}x: {min(fewer)} replicas kept the SLOs and "
                f"{it.replicas - 1} did not, so they are near their limit; the plan takes {it.replicas}."
            )
