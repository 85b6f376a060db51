"""The self-contained HTML page of a capacity plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from helios_sim.report import format as fmt
from helios_sim.report.capacity import (
    ATTAINMENT,
    CapacityResult,
    FleetPlan,
    energy_text,
    joules_per_million_tokens,
    load_in_words,
    on_text,
    range_in_words,
)
from helios_sim.report.metrics import DEFINITIONS, ENERGY_NOTE, INTERVAL_NOTE, LATENCY_NOTE, OF_COST
from helios_sim.report.page import MOST_CARDS, KeyNumber, render_parts
from helios_sim.report.result import scope_in_words

if TYPE_CHECKING:
    from helios_sim.report.figures.style import Drawing


def render_capacity(result: CapacityResult, drawings: Sequence[Drawing]) -> str:
    """The page of a capacity plan as text, self-contained as well."""
    cannot = [plan for plan in result.plans if plan.at is None]
    parts = {
        "answer": ("Answer", True),
        "warnings": ("Read with care", result.warnings),
        "plans": ("Fleets", True),
        "figures": ("Figures", drawings),
        "workload": ("Workload", True),
        "assumptions": ("Not measured", result.all_assumptions),
        "provenance": ("Provenance", True),
    }
    names = (*(name for it in result.requirements if (name := it.metric) != ATTAINMENT), *_BESIDE)
    return render_parts(
        "capacity.html.j2", result, parts, drawings,
        scope=scope_in_words(result.seeds),
        cards=_plan_cards(result),
        columns=[fmt.label(name) for name in names],
        loads=[
            {
                "title": load_in_words(load, next(it.requests_per_s for it in result.plans if it.load == load)),
                "rows": [_plan_row(result, it, names) for it in result.plans if it.load == load and it.at is not None],
            }
            for load in result.loads
        ],
        cannot=list({(it.card, it.arm): it for it in cannot}.values()),
        definitions=[DEFINITIONS[name] for name in (*names, ATTAINMENT, "agreement", *OF_COST[:2])],
        notes=[LATENCY_NOTE, INTERVAL_NOTE, ENERGY_NOTE],
    )  # fmt: skip


_BESIDE = ("kv_utilisation_mean",)  # columns of a plan beside the bounded metrics


def _plan_cards(result: CapacityResult) -> list[KeyNumber]:
    """The advised fleet for each load, and the largest load that it serves."""
    found = []
    for advice in result.advice[:MOST_CARDS]:
        plan = advice.plan
        usd = "" if plan.usd_per_hour is None else f"USD {plan.usd_per_hour:,.2f} an hour; "
        upto = f"{'at least' if advice.at_least else 'up to'} {fmt.number(advice.valid_up_to_rps)} requests/s"
        what = f"{load_in_words(plan.load, plan.requests_per_s)}: {plan.arm}"
        found.append(KeyNumber(what, plan.fleet, f"{usd}{_over_seeds(plan)}; {upto}"))
    return found


def _over_seeds(plan: FleetPlan) -> str:
    if len(plan.by_seed) < 2:
        return "one seed"
    if all(number == plan.replicas for number in plan.by_seed):
        return f"each of {len(plan.by_seed)} seeds"
    return f"{range_in_words(plan.by_seed, 'more')} over {len(plan.by_seed)} seeds"


def _plan_row(result: CapacityResult, plan: FleetPlan, names: Sequence[str]) -> dict[str, Any]:
    at = plan.at
    assert at is not None
    found, advised = plan.replicas is not None, result.advised(plan.load)
    shown = {name: at.metrics.get(name) for name in ("agreement", ATTAINMENT, *names, *OF_COST[:2])}
    usd = [shown.pop(name) if found else None for name in OF_COST[:2]]
    energy = joules_per_million_tokens(at.metrics) if found else None
    return {
        "card": plan.card,
        "arm": plan.arm,
        "chosen": advised is not None and advised.plan is plan,
        "replicas": str(plan.replicas) if found else f"> {at.replicas}",
        "by_seed": _over_seeds(plan) if len(plan.by_seed) > 1 else "",
        "cards": fmt.NOTHING if plan.cards is None else str(plan.cards),
        "on": f"on: {on_text(plan)}" if plan.scaled and found else "",
        "usd": [f"{value:,.2f}" if isinstance(value, int | float) else fmt.NOTHING for value in usd],
        "energy": energy_text(energy),
        "cells": [
            {"value": fmt.metric(name, value), "interval": fmt.interval(name, value, at.intervals.get(name))}
            for name, value in shown.items()
            if name not in OF_COST
        ],
        "why_not": plan.why_not or "",
    }
