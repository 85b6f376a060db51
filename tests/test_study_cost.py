"""Prices of cards and of electricity: by hand, in a study, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helios_sim.api import study_config
from helios_sim.errors import UserError
from helios_sim.report.metrics import OF_COST, Band
from helios_sim.report.result import headline_metrics
from helios_sim.study.command import run, run_study
from helios_sim.study.cost import costs_of
from helios_sim.study.fleet import build_fleet

OWN = ["own", "models=[opt-1.3b]", "exits.source=none", "policy=full_depth", "workload.n_requests=40"]


@pytest.mark.slow
def test_dollars_and_grams_by_hand() -> None:
    """Two replicas of two cards: 4 x 2.5 USD an hour over the span, and the band of energy times 380 g a kWh."""
    cards = ["hardware=2xa100-40gb", "server.replicas=2"]
    result = run(study_config(*OWN, *cards, "cost.usd_per_card_hour=2.5", "cost.gco2e_per_kwh=380"))
    metrics = result.arms["full_depth"].metrics
    tokens = metrics["throughput_tokens_per_s"] * metrics["span_s"]
    assert metrics["usd_per_hour"] == 10.0
    assert metrics["usd_per_million_tokens"] == pytest.approx(10.0 * metrics["span_s"] / 3600 / tokens * 1e6)
    of_request, carbon = metrics["energy_wh_per_request"], metrics["gco2e_per_million_tokens"]
    assert isinstance(of_request, Band)
    assert isinstance(carbon, Band)
    for ours, wh in ((carbon.low, of_request.low), (carbon.high, of_request.high)):
        assert ours == pytest.approx(wh * metrics["requests_completed"] / 1000 * 380 / tokens * 1e6)
    assert headline_metrics(result)[-3:] == OF_COST


@pytest.mark.slow
def test_without_a_price_nothing_is_counted() -> None:
    result = run(study_config(*OWN, "hardware=l40s"))
    assert not any(result.arms["full_depth"].metrics[name] for name in OF_COST)
    assert not set(headline_metrics(result)) & set(OF_COST)


@pytest.mark.slow
def test_kinds_have_their_own_prices_and_the_summary_has_them(tmp_path: Path) -> None:
    kinds = "+cluster.kinds={a: {count: 3}, b: {hardware: 2xh100-80gb}}"
    words = [*OWN, "hardware=a100-40gb", kinds, "pictures=false"]
    config = study_config(*words, "cost.usd_per_card_hour={a100-40gb: 1.2, h100-80gb: 2.5}")
    assert costs_of(config, build_fleet(config, 0)).usd_per_hour == pytest.approx(3 * 1.2 + 2 * 2.5)
    assert run_study(config, tmp_path / "out") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["arms"]["full_depth"]["metrics"]["usd_per_hour"] == pytest.approx(8.6)
    assert "usd_per_million_tokens" in summary["headline_metrics"]
    fewer = study_config(*words, "cost.usd_per_card_hour={a100-40gb: 1.2}")
    with pytest.raises(UserError, match="a100-40gb, h100-80gb"):
        costs_of(fewer, build_fleet(fewer, 0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cost.usd_per_card_hour=0"], "a number above 0"), (["cost.usd_per_card_hour=cheap"], "a number above 0"),
        (["cost.usd_per_card_hour={}"], "a number above 0"), (["cost.usd_per_card_hour={l40s: -1}"], "above 0"),
        (["cost.usd_per_card_hour={a100: 1}"], "of the run and of no other: l40s"),
        (["cost.gco2e_per_kwh=-1"], "from 1"), (["cost.gco2e_per_kwh=0.38"], "not kilograms"),
        (["cost.gco2e_per_kwh=380"], "the idle power is not known"),
    ],
)  # fmt: skip
def test_each_mistake_gets_one_message(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        run(study_config(*OWN, "hardware=l40s", *words))
