"""The headline of a campaign: how many requests, whose exits, and HELIOS's figures over its rivals'."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from calibrate.campaigns.headline import (
    ARRIVALS,
    CARRIED,
    EARLY_EXIT,
    FULL_DEPTH,
    FULL_QUEUE,
    HELIOS,
    LENDER,
    METRICS,
    ONE_USER,
    REQUESTS,
    Arm,
    carried_over,
    gains,
    requests_within,
)
from calibrate.campaigns.land import page
from calibrate.stages import NotEnoughTime
from helios_sim.errors import UserError
from helios_sim.exits.published import EXIT_SHARES
from helios_sim.exits.store import read_trace, write_trace
from helios_sim.profile.catalog import MODELS
from helios_sim.study.modes import LIVE, SIMULATE

BAND = {"low": 1.0, "high": 4.0}


def figures(mode: str, load: str, **of_helios: object) -> dict[Arm, dict[str, object]]:
    """Every metric of each rival is 2, of HELIOS 3, but for those given."""
    rivals = {Arm(mode, load, policy): dict.fromkeys(METRICS, 2.0) for policy in (FULL_DEPTH, EARLY_EXIT)}
    return {**rivals, Arm(mode, load, HELIOS): {**dict.fromkeys(METRICS, 3.0), **of_helios}}


def test_arms_are_called_by_mode_policy_and_load() -> None:
    assert Arm(LIVE, ONE_USER, HELIOS).name == "live_helios"
    assert Arm(SIMULATE, FULL_QUEUE, EARLY_EXIT).name == "simulated_early_exit_batched"
    assert set(ARRIVALS) == {ONE_USER, FULL_QUEUE}


def test_a_gain_is_over_the_rival_in_the_same_mode_under_the_same_load() -> None:
    found = gains(figures(LIVE, ONE_USER) | figures(SIMULATE, FULL_QUEUE, batch_mean=8.0))
    assert [(g["mode"], g["load"], g["over"]) for g in found] == [
        (LIVE, ONE_USER, EARLY_EXIT), (LIVE, ONE_USER, FULL_DEPTH),
        (SIMULATE, FULL_QUEUE, EARLY_EXIT), (SIMULATE, FULL_QUEUE, FULL_DEPTH),
    ]  # fmt: skip
    assert {g["throughput_requests_per_s"] for g in found} == {1.5}
    assert [g["batch_mean"] for g in found] == [1.5, 1.5, 4.0, 4.0]


def test_a_gain_of_bands_is_a_band_and_of_what_nobody_knows_nothing() -> None:
    known = figures(SIMULATE, ONE_USER, energy_wh_per_request={"low": 2.0, "high": 2.0}, e2e_s_mean=None)
    known[Arm(SIMULATE, ONE_USER, FULL_DEPTH)]["energy_wh_per_request"] = BAND
    over_early, over_full = gains(known)
    assert over_full["energy_wh_per_request"] == {"low": 0.5, "high": 2.0}
    assert over_early["energy_wh_per_request"] is None  # one is measured, the other a band
    assert over_full["e2e_s_mean"] is None


def test_requests_are_as_many_as_fit_into_the_time() -> None:
    assert requests_within(30.0, 0.5, 12) == 60
    assert requests_within(1e6, 0.5, 12) == REQUESTS
    with pytest.raises(NotEnoughTime, match=r"12 requests take 60 s, and 30 s are there"):
        requests_within(30.0, 5.0, 12)


def test_exits_carried_over_are_the_lender_s_at_the_model_s_own_layer(tmp_path) -> None:
    """The share of tokens is OPT-6.7B's; the layer, and what deeper layers leave unchanged, the model's own."""
    model = "codellama-34b"
    layer, unchanged = CARRIED[model]
    trace = carried_over(model, MODELS[model].n_layers, 3.8)
    assert trace.exits == (layer, 48)
    assert trace.confident is not None
    confident = trace.confident[:, 0]
    assert confident.mean() == pytest.approx(EXIT_SHARES[LENDER][9], abs=0.02)
    assert trace.agree[confident, 0].all()
    assert trace.agree[~confident, 0].mean() == pytest.approx(unchanged, abs=0.01)
    assert trace.agree[:, 1].all()
    assert trace.chars.mean() == pytest.approx(3.8, rel=1e-3)
    (assumed,) = trace.provenance.assumptions
    assert "no share is published" in assumed.why
    write_trace(trace, tmp_path)
    assert (read_trace(tmp_path).agree == trace.agree).all()
    with pytest.raises(UserError, match=r"models='llama-2-7b'.*codellama-34b"):
        carried_over("llama-2-7b", 32, 3.8)


def test_the_page_shows_every_arm_with_where_its_figures_come_from() -> None:
    all_figures = figures(LIVE, ONE_USER) | figures(SIMULATE, ONE_USER, energy_wh_per_request=BAND)
    origin = {"times": "served here", "exits": "published", "energy": None, "class": "published"}
    result = {
        "models": ["a", "b"],
        "exits": "fitted",
        "requests": {ONE_USER: 20, FULL_QUEUE: 300},
        "verdict": ["helios helps."],
        "counter": "NVML, total energy of the card",
        "arms": {arm.name: {**values, "provenance": origin} for arm, values in all_figures.items()},
        "gains": gains(all_figures),
    }
    stage = {"archive": "e", "status": "done", "wall_s": 1.0, "why": None, "result": result}
    text = page("any", {"device": "x", "worthless": False, "stages": {"live-headline-b": stage}})
    assert "Requests of each arm: 20 (one user), 300 (full queue). Energy counter: NVML" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| simulated_helios |")]
    assert row.startswith("| simulated_helios | served here | published |  | published | 3 | 3 | 3 | 3 | 1 to 4 |")
    assert "| live, one user | early_exit | 1.5 | 1.5 | 1.5 | 1.5 |" in text
