"""What is drawn has the distribution that was asked for: closed forms, on fixed seeds.

Bounds are 4 standard errors (a chance of 6e-5 each under the right distribution); Kolmogorov-Smirnov tests at 0.001.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from helios_sim.errors import UserError
from helios_sim.request import NS_PER_S
from helios_sim.workload import (
    AllAtOnce,
    Arrivals,
    ClosedLoop,
    Constant,
    DrawnLengths,
    Exponential,
    Fixed,
    Gamma,
    Length,
    LinearDrift,
    Lognormal,
    Per,
    PeriodicDrift,
    Poisson,
    StepDrift,
    TaskMix,
    Workload,
    describe,
    generate,
)

N = 100_000
FIXED = DrawnLengths(Fixed(512), Fixed(128))
AB = ("a", "b")


def column(workload: Workload, name: str, seed: int = 11) -> NDArray[np.int64]:
    return np.concatenate([getattr(block, name) for block in generate(workload, seed)])


def gaps_s(arrivals: Arrivals) -> NDArray[np.float64]:
    arrival_ns = column(Workload(arrivals, FIXED, TaskMix.single("a"), N), "arrival_ns")
    return np.diff(arrival_ns, prepend=0) / NS_PER_S


def tokens(length: Length) -> NDArray[np.int64]:
    return column(Workload(AllAtOnce(), DrawnLengths(length, Fixed(1)), TaskMix.single("a"), N, None), "prompt_chars")


def within(count: int, n: int, share: float) -> bool:
    return abs(count - n * share) <= 4 * math.sqrt(n * share * (1 - share))


def test_poisson_gaps_are_exponential_with_the_rate_and_independent() -> None:
    gaps = gaps_s(Poisson(6.0))
    assert abs(gaps.mean() * 6.0 - 1) <= 4 / math.sqrt(N)
    assert stats.kstest(gaps, "expon", args=(0, 1 / 6.0)).pvalue > 0.001
    assert abs(stats.pearsonr(gaps[:-1], gaps[1:]).statistic) <= 4 / math.sqrt(N)


@pytest.mark.parametrize("cv", [0.3, 2.0, 4.0])
def test_gamma_gaps_have_the_rate_and_the_cv(cv: float) -> None:
    gaps = gaps_s(Gamma(6.0, cv))
    assert abs(gaps.mean() * 6.0 - 1) <= 4 * cv / math.sqrt(N)
    # Standard error of a variance: sqrt((kurtosis - 1) / n) times it, with gamma's kurtosis of 3 + 6 cv^2.
    assert abs((gaps.std() * 6.0 / cv) ** 2 - 1) <= 4 * math.sqrt((2 + 6 * cv**2) / N)
    # Percentiles in place of a KS test: at a CV of 4 a quarter of the gaps is below half a ns and rounds to 0.
    for share in (0.5, 0.75, 0.9, 0.99):
        quantile = stats.gamma.ppf(share, cv**-2, scale=cv**2 / 6.0)
        assert within(int((gaps <= quantile).sum()), N, share)


def test_lognormal_percentiles_are_those_asked_for() -> None:
    lengths = tokens(Lognormal.from_percentiles(10_000, 40_000))
    assert within(int((lengths <= 10_000).sum()), N, 0.5)
    assert within(int((lengths <= 40_000).sum()), N, 0.95)
    assert stats.kstest(np.log(lengths), "norm", args=(math.log(1e4), math.log(4) / 1.6448536269514722)).pvalue > 0.001


def test_lognormal_mean_is_the_one_asked_for_before_clipping() -> None:
    lengths = tokens(Lognormal.from_mean(1000, 0.8))
    assert abs(lengths.mean() / 1000 - 1) <= 4 * math.sqrt(math.expm1(0.8**2) / N)


def test_clipping_holds_the_bounds_and_puts_the_tails_on_them() -> None:
    lengths = tokens(Lognormal(1000, 1.0, minimum=500, maximum=2000))
    assert (lengths.min(), lengths.max()) == (500, 2000)
    tail = stats.norm.sf(math.log(2))
    assert within(
        int((lengths == 2000).sum()), N, tail + (stats.norm.cdf(math.log(2)) - stats.norm.cdf(math.log(1.9995)))
    )


def test_a_very_wide_distribution_stays_within_what_fits() -> None:
    assert tokens(Lognormal(1e9, 50.0)).max() == 2**31 - 1


def test_exponential_lengths_are_exponential() -> None:
    lengths = tokens(Exponential(5000.0))
    assert abs(lengths.mean() / 5000 - 1) <= 4 / math.sqrt(N)
    assert stats.kstest(lengths, "expon", args=(0, 5000)).pvalue > 0.001


def test_prompts_answers_gaps_and_tasks_are_independent() -> None:
    lengths = DrawnLengths(Exponential(5000), Exponential(5000))
    workload = Workload(Poisson(1.0), lengths, TaskMix(AB, (1, 1)), N)
    columns = [column(workload, name) for name in ("arrival_ns", "prompt_chars", "output_chars", "task", "text_start")]
    columns[0] = np.diff(columns[0], prepend=0)
    off_diagonal = np.asarray(np.corrcoef(columns))[~np.eye(5, dtype=bool)]
    assert (abs(off_diagonal) <= 4 / math.sqrt(N)).all()


def test_text_positions_are_uniform() -> None:
    starts = column(Workload(AllAtOnce(), FIXED, TaskMix.single("a"), N), "text_start")
    assert stats.kstest(starts / 2.0**62, "uniform").pvalue > 0.001


def test_constant_shares_hold() -> None:
    tasks = column(Workload(AllAtOnce(), FIXED, TaskMix(("a", "b", "none"), (3, 1, 0)), N), "task")
    assert within(int((tasks == 0).sum()), N, 0.75)
    assert not (tasks == 2).any()


def test_a_step_changes_the_shares_at_its_request() -> None:
    mix = TaskMix(AB, (0.8, 0.2), (0.1, 0.9), StepDrift(0.4))
    tasks = column(Workload(ClosedLoop(4), FIXED, mix, N), "task")
    before, after = tasks[: 2 * N // 5], tasks[2 * N // 5 :]
    assert within(int((before == 1).sum()), len(before), 0.2)
    assert within(int((after == 1).sum()), len(after), 0.9)


def test_a_step_between_pure_mixes_is_sharp_at_its_second() -> None:
    mix = TaskMix(AB, (1, 0), (0, 1), StepDrift(100.0), Per.SECONDS)
    workload = Workload(Constant(10.0), FIXED, mix, 2000)
    assert np.array_equal(column(workload, "task"), (np.arange(2000) >= 1000).astype(int))


def test_a_step_between_pure_mixes_is_sharp_at_its_request() -> None:
    workload = Workload(AllAtOnce(), FIXED, TaskMix(AB, (1, 0), (0, 1), StepDrift(0.1)), 1000)
    assert np.array_equal(column(workload, "task"), (np.arange(1000) >= 100).astype(int))


def test_a_task_without_a_share_is_never_drawn_not_even_at_the_ends() -> None:
    mix = TaskMix(("none", "a", "b", "none too"), (0, 0.3, 0.7, 0))
    draws = np.array([0.0, np.nextafter(0.3, 0), np.nextafter(0.3, 1), np.nextafter(1, 0)])
    assert mix.pick(draws, np.zeros(4)).tolist() == [1, 1, 2, 2]


def test_a_linear_drift_passes_through_the_middle() -> None:
    tasks = column(Workload(AllAtOnce(), FIXED, TaskMix(AB, (1, 0), (0, 1), LinearDrift(0.2, 0.8)), N), "task")
    assert not tasks[: N // 5].any()
    assert tasks[4 * N // 5 :].all()
    tenths = [tasks[k * N // 10 : (k + 1) * N // 10].sum() for k in range(2, 8)]
    expected = [(k + 0.5 - 2) / 6 for k in range(2, 8)]
    assert all(within(int(count), N // 10, share) for count, share in zip(tenths, expected, strict=True))


def test_a_periodic_mix_returns() -> None:
    mix = TaskMix(AB, (1, 0), (0, 1), PeriodicDrift(0.5))
    position = np.array([0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0])
    assert np.allclose(mix.shares_at(position)[:, 1], [0, 0.5, 1, 0.5, 0, 1, 0])
    tasks = column(Workload(AllAtOnce(), FIXED, mix, N), "task")
    peak = tasks[N // 5 : 3 * N // 10]  # positions 0.2 to 0.3, where the cycle's mean is 1/2 + sin(pi/5) / (2 pi/5)
    assert within(int(peak.sum()), len(peak), 0.5 + 0.5 * math.sin(0.2 * math.pi) / (0.2 * math.pi))


def test_describe_states_what_was_generated() -> None:
    lengths = DrawnLengths(Lognormal.from_percentiles(1000, 3000), Fixed(128))
    workload = Workload(Constant(8.0), lengths, TaskMix(AB, (1, 3)), 10_001)
    figures = describe(generate(workload, 0), AB, 4.0)
    prompts = column(workload, "prompt_chars", 0) / 4
    assert figures.requests == 10_001
    assert figures.prompt_tokens.mean == pytest.approx(prompts.mean(), rel=1e-12)
    assert [figures.prompt_tokens.p50, figures.prompt_tokens.p95, figures.prompt_tokens.p99] == list(
        np.percentile(prompts, (50, 95, 99))
    )
    assert (figures.output_tokens.mean, figures.output_tokens.p99, figures.output_tokens.largest) == (128, 128, 128)
    assert figures.arrival_span_s == 1250
    assert figures.arrival_rate_per_s == 8
    assert figures.arrival_cv == 0
    assert sum(figures.task_shares.values()) == pytest.approx(1)
    assert figures.task_shares["b"] == column(workload, "task", 0).mean()
    assert figures.to_json()["prompt_tokens"]["p50"] == figures.prompt_tokens.p50


def test_describe_leaves_undefined_figures_out_and_refuses_nothing_at_all() -> None:
    figures = describe(generate(Workload(ClosedLoop(2), FIXED, TaskMix.single("a"), 5), 0), ("a",), 4.0)
    assert (figures.arrival_span_s, figures.arrival_rate_per_s, figures.arrival_cv) == (0, None, None)
    with pytest.raises(UserError, match="no requests"):
        describe([], ("a",), 4.0)
