"""Costs of the cards of a run, by the prices in the settings. No price is assumed: without one nothing is counted."""

from __future__ import annotations

from collections.abc import Mapping

from helios_sim.errors import UserError
from helios_sim.policy.draft_model import DraftModelParameters
from helios_sim.policy.registry import PolicyConfig
from helios_sim.profile.devices import group_of
from helios_sim.report.metrics import Costs
from helios_sim.study.fleet import Fleet, Kind
from helios_sim.study.modes import SIMULATE
from helios_sim.study.schema import Config

PRICE, CARBON = "cost.usd_per_card_hour", "cost.gco2e_per_kwh"


def card_sets(policy: PolicyConfig | None) -> int:
    """Return how many sets of cards a replica has: one, and one more for each drafter on a card of its own."""
    return policy.parameters.cards if policy and isinstance(policy.parameters, DraftModelParameters) else 1


def costs_of(config: Config, fleet: Fleet, policy: PolicyConfig | None = None) -> Costs:
    """Return dollars per hour of all cards, and grams of CO2e per kWh. UserError if prices or known power do not fit.

    `policy` is that of kinds without a policy of their own.
    """
    price, carbon = config.cost.usd_per_card_hour, config.cost.gco2e_per_kwh
    if carbon is not None and config.mode == SIMULATE:
        unknown = [kind.card.name for kind in fleet.kinds if kind.card.idle_w is None or kind.card.tdp_w is None]
        if unknown:
            allowed = f"cards with known power: of {unknown[0]} the idle power is not known, and so its energy is not"
            fix = "describe the card in a file with tdp_w and idle_w, or leave it out"
            raise UserError(CARBON, carbon, allowed, fix)
    if price is None:
        return Costs(None, carbon)
    cards = [(len(kind.numbers) * card_sets(kind.policy or policy), *_cards(kind)) for kind in fleet.kinds]
    if not isinstance(price, Mapping):
        return Costs(float(price) * sum(replicas * number for replicas, number, _ in cards), carbon)
    prices = {str(name).lower(): float(each) for name, each in price.items()}
    names = {name for _, _, name in cards}
    if set(prices) != names:
        allowed = f"a price of each card of the run and of no other: {', '.join(sorted(names))}"
        raise UserError(PRICE, dict(price), allowed, "name these")
    return Costs(sum(replicas * number * prices[name] for replicas, number, name in cards), carbon)


def _cards(kind: Kind) -> tuple[int, str]:
    """Return how many cards a replica has, and the name of one."""
    number, name = group_of(kind.card.name)
    return number, name.lower()
