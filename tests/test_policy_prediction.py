"""Predictions against hand arithmetic: with `layered_profile` an iteration to depth l takes l x layer_s."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helios_sim.exits.rule import Confidence
from helios_sim.policy.deployment import Placement
from helios_sim.policy.prediction import (
    Load,
    Prediction,
    decode_time_s,
    expected_load,
    fixed_depth,
    per_token_depths,
    predict,
    seen_load,
)
from helios_sim.policy.telemetry import Candidate, ExpectedLoad, Situation, Telemetry
from policy_example import KV_BYTES, LAYER_BYTES, OTHER_BYTES, large, layered_profile, offline, situation, small
from priced import priced_profile

PROMPT, OUTPUT = 10.0, 21.0
ITERATION_S = 0.002  # small at 2 layers
SMALL_AT_2 = Placement("small", 2)


def of_small(load: Load, here: Situation | None = None, **kwargs: object) -> Prediction:
    prediction = predict(here or situation(), SMALL_AT_2, fixed_depth(2), load, **kwargs)
    assert prediction is not None
    return prediction


def test_one_user_is_served_one_token_after_the_other() -> None:
    p = of_small(Load(PROMPT, OUTPUT, users=1))
    assert p.batch == 1
    assert p.response_time_s == pytest.approx(OUTPUT * ITERATION_S)  # the prompt's iteration yields the first token
    assert p.throughput_requests_per_s == pytest.approx(1 / (OUTPUT * ITERATION_S))
    assert p.busy_s_per_request == pytest.approx(OUTPUT * ITERATION_S)


def test_users_beyond_the_capacity_wait_their_turn() -> None:
    """8 run at once: X = 1 / (p + 20 d / 8), and Little's law gives the response of 20 users."""
    p = of_small(Load(PROMPT, OUTPUT, users=20))
    rate = 1 / (ITERATION_S + 20 * ITERATION_S / 8)
    assert p.batch == 8
    assert p.throughput_requests_per_s == pytest.approx(rate)
    assert p.response_time_s == pytest.approx(20 / rate)


def test_a_full_queue_runs_at_capacity() -> None:
    p = of_small(Load(PROMPT, OUTPUT), situation(max_running_requests=4))
    assert p.batch == p.batch_capacity == 4
    assert p.response_time_s == pytest.approx(4 * ITERATION_S + 20 * ITERATION_S)


def test_open_arrivals_settle_where_littles_law_holds() -> None:
    """X(B) = 1 / (2 ms + 40 ms / B): 60/s needs B = 3 (65.2/s), since B = 2 gives 45.5/s."""
    p = of_small(Load(PROMPT, OUTPUT, arrival_rate_per_s=60.0))
    service_s = 3 * ITERATION_S + 20 * ITERATION_S
    assert p.batch == pytest.approx(60.0 * service_s)
    assert p.throughput_requests_per_s == 60.0
    assert p.capacity_requests_per_s == pytest.approx(1 / (ITERATION_S + 20 * ITERATION_S / 8))
    assert p.response_time_s > service_s


def test_arrivals_beyond_capacity_fill_the_batch_and_the_queue_grows() -> None:
    limit = 1 / (ITERATION_S + 20 * ITERATION_S / 8)
    over = of_small(Load(PROMPT, OUTPUT, arrival_rate_per_s=2 * limit), horizon_requests=1000)
    assert over.batch == 8
    assert over.throughput_requests_per_s == pytest.approx(limit)
    growth_s = 1000 / 2 * (1 / limit - 1 / (2 * limit))
    diffusion_s = 2 / 3 * math.sqrt(4 * 1000 / math.pi) / limit
    assert over.response_time_s == pytest.approx(8 / limit + diffusion_s + growth_s)


def test_with_one_slot_the_wait_is_that_of_mm1() -> None:
    """At load 0.5 and service s the mean wait of M/M/1 is s."""
    service_s = OUTPUT * ITERATION_S
    p = of_small(Load(PROMPT, OUTPUT, arrival_rate_per_s=0.5 / service_s), batch_limit=1, horizon_requests=10**6)
    assert p.response_time_s == pytest.approx(2 * service_s)
    assert p.batch == pytest.approx(0.5)


@given(low=st.floats(0.01, 2.0), step=st.floats(0.0, 1.0), queued=st.integers(0, 300))
def test_response_never_falls_as_load_or_queue_rises(low: float, step: float, queued: int) -> None:
    limit = 1 / (ITERATION_S + 20 * ITERATION_S / 8)

    def response_s(rate: float, waiting: int) -> float:
        return of_small(Load(PROMPT, OUTPUT, arrival_rate_per_s=rate * limit, queued_requests=waiting)).response_time_s

    assert response_s(low + step, queued) >= response_s(low, queued) * (1 - 1e-12)
    assert response_s(low, queued + 1) >= response_s(low, queued)


def test_capacity_is_memory_over_a_whole_request() -> None:
    pool = 5 * 31 * 2 * KV_BYTES + 7
    here = situation(capacity_bytes=OTHER_BYTES + 2 * LAYER_BYTES + pool)
    load = Load(PROMPT, OUTPUT)
    assert of_small(load, here).batch_capacity == 5
    beside = OTHER_BYTES + 2 * LAYER_BYTES  # `large` kept at 2 layers
    fits = 5 - math.ceil((beside - 7) / (31 * 2 * KV_BYTES))
    assert of_small(load, here, standby=[Placement("large", 2)]).batch_capacity == fits
    assert of_small(load, here, batch_limit=2).batch_capacity == 2
    assert predict(here, Placement("large", 8), fixed_depth(8), Load(PROMPT, 1000.0)) is None


def test_energy_is_a_band_between_idle_and_tdp_and_unknown_without_idle() -> None:
    load = Load(PROMPT, OUTPUT, users=1)
    without = of_small(load)
    assert without.energy_j_low is None
    assert without.energy_rank_j == pytest.approx(100.0 * OUTPUT * ITERATION_S)
    known = Candidate(layered_profile("small", 0.001, 4, idle_w=40.0), small().offline)
    p = of_small(load, situation(known))
    busy_s = OUTPUT * ITERATION_S
    assert p.energy_j_high == pytest.approx(100.0 * busy_s)
    assert p.energy_j_low == pytest.approx(40.0 * busy_s, rel=1e-3)  # such a small model uses next to nothing
    assert p.energy_rank_j == pytest.approx(70.0 * busy_s, rel=1e-3)
    card = replace(known.profile.hardware, least_busy_w=55.0, most_busy_w=95.0)
    p = of_small(load, situation(replace(known, profile=replace(known.profile, hardware=card))))
    assert (p.energy_j_low, p.energy_j_high) == pytest.approx((55.0 * busy_s, 95.0 * busy_s))


def test_prompts_beyond_the_token_budget_run_in_chunks() -> None:
    profile = small().profile
    assert profile.prompt_time_s(2, 1000, 1000)[0] == pytest.approx(ITERATION_S)
    assert profile.prompt_time_s(2, 1001, 1000)[0] == pytest.approx(2 * ITERATION_S)


@pytest.mark.slow
def test_per_token_exits_at_batch_one_are_the_mixture_of_the_exits() -> None:
    """75 % leave after 2 layers, the rest run 4: a mean of 2.5 layers, plus nothing for free checks."""
    recorded = offline("small", (2, 4), (0.0, 0.0), (0.75, 1.0))
    depths = per_token_depths(recorded, propagated=False)
    assert depths.reach == pytest.approx((1.0, 0.25))
    time_s = decode_time_s(small().profile, depths, np.array([1, 16]), 50.0)
    launches_s = [0.75 * 2 + 0.25 * 4, 4.0]  # in a batch of 16 somebody always runs deep
    assert time_s == pytest.approx(0.001 * np.array(launches_s))


def test_a_token_that_left_by_a_classifier_pays_for_the_head_besides() -> None:
    """A check and a head pass cost 2 s each, a classifier 0.5 s; 75 % of the tokens leave at the first of two exits."""
    profile = priced_profile("small", n_layers=4, layer_s=1.0, head_s=2.0, classifier_s=0.5)
    shares = offline("small", (2, 4), (0.0, 0.0), (0.75, 1.0))
    for confidence, expected_s in (
        (Confidence.MAX_PROBABILITY, 2.0 + (2.0 + 2.0) * 0.25 + 2.0),  # layers, layers and head of the rest, check
        (Confidence.CLASSIFIER, 2.0 + 2.0 * 0.25 + 0.5 + 2.0),
    ):
        depths = per_token_depths(replace(shares, confidence=confidence), propagated=False)
        time_s = decode_time_s(profile, depths, np.array([1]), 50.0)
        assert time_s == pytest.approx([expected_s])


def test_what_costs_nothing_takes_the_clocks_step() -> None:
    """A rate from no time at all would be infinite, and its ratios undefined."""
    free = Candidate(layered_profile("small", 0.0, 4), small().offline)
    found = predict(situation(free), Placement("small", 4), fixed_depth(4), Load(PROMPT, OUTPUT, users=1))
    assert found is not None
    assert found.capacity_requests_per_s == pytest.approx(1e9 / OUTPUT)  # the prompt and one step for each later token


@given(layers=st.integers(1, 8), users=st.integers(1, 40))
def test_deeper_is_never_faster(layers: int, users: int) -> None:
    here, load = situation(), Load(PROMPT, OUTPUT, users=users)
    shallow = predict(here, Placement("large", layers), fixed_depth(layers), load)
    whole = predict(here, Placement("large", 8), fixed_depth(8), load)
    assert shallow is not None
    assert whole is not None
    assert shallow.throughput_requests_per_s >= whole.throughput_requests_per_s


def test_lengths_are_counted_in_each_models_tokens() -> None:
    coarse = replace(small().profile, model=replace(small().profile.model, chars_per_token=4.0))
    candidate = Candidate(coarse, replace(small().offline, chars_per_token=3.0))
    load = Load(prompt_chars=400.0, output_chars=300.0)
    assert load.prompt_tokens(candidate) == 100.0
    assert load.output_tokens(candidate) == 100.0
    here = situation(candidate, large())
    telemetry = Telemetry(0, 10, 3, 1, 1.0, 50.0, 60.0, 2.5, 0, ())
    seen = seen_load(here, telemetry, "small")
    assert (seen.prompt_chars, seen.output_chars) == (200.0, 180.0)
    assert seen.arrival_rate_per_s is None  # a closed loop: arrivals follow completions
    assert seen.users == 1


def test_without_expectation_the_queue_is_full_and_lengths_are_the_recorded_ones() -> None:
    load = expected_load(situation(expected=None))
    assert (load.prompt_chars, load.output_chars) == (100.0, 100.0)
    assert load.arrival_rate_per_s is None
    assert load.users is None


def test_open_arrivals_are_as_seen_and_before_that_as_expected() -> None:
    here = situation(expected=ExpectedLoad(10.0, 21.0, arrival_rate_per_s=7.0))
    telemetry = Telemetry(0, 10, 3, 1, 1.0, None, None, None, 0, ())
    assert seen_load(here, telemetry, "small").arrival_rate_per_s == 7.0
    assert seen_load(here, replace(telemetry, arrival_rate_per_s=9.0), "small").arrival_rate_per_s == 9.0
    assert seen_load(here, telemetry, "small").queued_requests == 3


def test_a_prompt_does_not_compute_what_is_cached() -> None:
    """100 tokens in chunks of 10 take ten iterations, and two where 80 of them are cached."""
    here = replace(situation(), max_batch_tokens=10)
    cold = of_small(Load(100.0, OUTPUT), here)
    warm = of_small(Load(100.0, OUTPUT, cached_share=0.8), here)
    assert cold.prefill_s == pytest.approx(10 * ITERATION_S)
    assert warm.prefill_s == pytest.approx(2 * ITERATION_S)
    assert warm.throughput_requests_per_s > cold.throughput_requests_per_s
    assert warm.batch_capacity == cold.batch_capacity
    whole = of_small(Load(100.0, OUTPUT, cached_share=1.0), here)
    assert whole.prefill_s == pytest.approx(ITERATION_S)  # the last token is computed in any case


def test_the_share_that_was_found_lately_is_expected_of_every_candidate() -> None:
    here = situation()
    telemetry = Telemetry(0, 10, 3, 1, 1.0, None, None, None, 0, (), prefix_hit_share=0.4)
    assert seen_load(here, telemetry, "small").cached_share == 0.4
    assert seen_load(here, replace(telemetry, prefix_hit_share=None), "small").cached_share == 0.0
    load = seen_load(here, telemetry, "small")
    assert [load.cached_tokens(c) for c in here.candidates.values()] == [4, 4]
