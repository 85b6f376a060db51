"""The sequential test of what a cap changes: false alarms, when it stops, and its capital."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from helios_sim.policy.bets import STAKES, Bets, CapControl

LIMIT, FAILURE = 0.05, 0.05


def first_alarms(bets: Bets, draws: np.ndarray) -> np.ndarray:
    """(E,) the draw after which the capital of each reached 1 / FAILURE first; one more than all where it never did."""
    first = np.full(draws.shape[1], len(draws) + 1)
    for k, losses in enumerate(draws, 1):
        bets.add(losses)
        first[(bets.capital >= 1.0 / FAILURE) & (first > k)] = k
    return first


def tokens(share: float, draws: int, streams: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).uniform(size=(draws, streams)) < share).astype(float)


@pytest.mark.parametrize("that_above", [True, False])
def test_at_the_limit_false_alarms_are_rare_at_any_time(that_above: bool) -> None:
    """2,000 streams of 2,000 independent tokens, looked at after each one."""
    first = first_alarms(Bets(2000, LIMIT, that_above=that_above), tokens(LIMIT, 2000, 2000, 1))
    assert (first <= 2000).mean() <= FAILURE


def test_whole_prompts_at_the_limit() -> None:
    """Tokens of a prompt are alike: a few prompts change a lot, most of them nothing."""
    drawn = np.random.default_rng(2).uniform(size=(500, 2000))
    first = first_alarms(Bets(2000, LIMIT, that_above=True), np.where(drawn < 0.125, 0.4, 0.0))
    assert (first <= 500).mean() <= FAILURE


def expected_stop(share: float) -> float:
    """Upper bound on the mean number of tokens, by Wald: what is left of 1 / FAILURE for the best stake alone, which
    begins with half of its part at the first token, plus one overshoot, over the logarithm that it gains a token.
    """
    bounds = []
    for stake in STAKES:
        up, down = math.log(1.0 + stake * (1.0 / LIMIT - 1.0)), math.log(1.0 - stake)
        gains = share * up + (1.0 - share) * down
        if gains > 0:
            bounds.append((math.log(2 * len(STAKES) / FAILURE) + up) / gains)
    return min(bounds)


@pytest.mark.parametrize("share", [2 * LIMIT, 4 * LIMIT])
def test_above_the_limit_it_stops_within_the_expected_number_of_tokens(share: float) -> None:
    first = first_alarms(Bets(1000, LIMIT, that_above=True), tokens(share, 3000, 1000, 3))
    assert (first <= 3000).mean() > 0.999
    assert first.mean() <= expected_stop(share)
    # No test whatsoever stops sooner on average than log(1 / FAILURE) over the divergence, given that error.
    divergence = share * math.log(share / LIMIT) + (1 - share) * math.log((1 - share) / (1 - LIMIT))
    assert first.mean() >= math.log(1.0 / FAILURE) / divergence


def test_a_mean_that_turns_bad_late_is_found_soon() -> None:
    """After 1,000 good tokens; a capital that bets from the first on alone would have to win back all that it lost."""
    good, bad = tokens(LIMIT / 4, 1000, 400, 4), tokens(4 * LIMIT, 500, 400, 5)
    first = first_alarms(Bets(400, LIMIT, that_above=True), np.concatenate([good, bad]))
    assert np.median(first) - 1000 <= 200
    assert (first <= 1000).mean() <= FAILURE


@settings(max_examples=40)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.01, 0.9), st.booleans())
def test_the_capital_is_the_sum_over_stakes_and_beginnings(losses: list[float], limit: float, that_above: bool) -> None:
    bets = Bets(1, limit, that_above=that_above)
    for loss in losses:
        bets.add(np.array([loss]))
    total = 1.0 / (len(losses) + 1)  # has not begun
    for stake in STAKES:
        for first in range(len(losses)):
            gains = [(x - limit) / limit if that_above else (limit - x) / (1 - limit) for x in losses[first:]]
            part = 1.0 / ((first + 1) * (first + 2)) / len(STAKES)
            total += part * math.prod(1.0 + stake * gain for gain in gains)
    assert bets.capital[0] == pytest.approx(total, rel=1e-9)


@settings(max_examples=40)
@given(st.floats(0, 1), st.floats(0, 1), st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_no_capital_turns_negative_or_endless(limit: float, loss: float, losses: list[float]) -> None:
    for that_above in (True, False):
        bets = Bets(1, limit, that_above=that_above)
        for each in (*losses, *[loss] * 200):
            bets.add(np.array([each]))
            assert 0 <= bets.capital[0] <= 1e101


# --- exits


def prompts(share: float, n: int, exits: int = 3, size: int = 50) -> list[np.ndarray]:
    """All exits but the last change this share."""
    agrees = np.ones((size, exits), np.bool_)
    agrees[: round(share * size), :-1] = False
    return [agrees] * n


def control(never: int | None = None) -> CapControl:
    barred = np.array([n == never for n in range(3)])
    return CapControl((2, 4, 8), np.array([True, True, False]), barred, LIMIT, FAILURE)


def test_an_exit_that_changes_too_much_is_barred_and_one_that_does_not_is_freed() -> None:
    caps = control()
    assert caps.cap == 2
    for agrees in prompts(0.04, 200):
        caps.add(agrees)
    assert caps.cap == 2
    bad = 0
    while caps.cap == 2:
        caps.add(prompts(0.2, 1)[0])
        bad += 1
    assert bad < 15  # each wins 1 + 0.64 x 3 times the stake; the 200 prompts before cost a factor of 201 x 202
    assert caps.cap == 8
    assert not caps.allowed[:-1].any()
    assert caps.capital.tolist()[0] == 1.0  # it begins anew
    good = 0
    while caps.cap == 8:
        caps.add(prompts(0.0, 1)[0])
        good += 1
    # A barred exit pays 1 + 0.64 / 19 a prompt at most: log(20 x 12) / log(1.0337) of them.
    assert good <= math.log(2 * len(STAKES) / FAILURE) / math.log1p(0.64 * LIMIT / (1 - LIMIT))
    assert caps.cap == 2


def test_what_a_promise_excludes_never_becomes_a_cap() -> None:
    caps = control(never=0)
    assert caps.cap == 4
    for agrees in prompts(0.0, 400):
        caps.add(agrees)
    assert caps.allowed.tolist() == [False, True, True]


def test_a_prompt_without_tokens_says_nothing_and_the_last_exit_stays() -> None:
    caps = control()
    caps.add(np.zeros((0, 3), np.bool_))
    assert caps.capital.tolist() == [1.0, 1.0, 1.0]
    for _ in range(50):
        caps.add(np.zeros((10, 3), np.bool_))
    assert caps.cap == 8
