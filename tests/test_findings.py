"""What a sweep over load says, by numbers that can be worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from helios_sim.report.compare import Ratio
from helios_sim.report.intervals import Method
from helios_sim.report.result import LoadFigure, SweepPoint
from helios_sim.study.verdict import break_even, error_findings, highest_rate, load_findings


def point(rate: float, attained: float, ratio: float = 1.0, **settings: float) -> SweepPoint:
    return SweepPoint(
        settings={"rate": rate, **settings},
        metrics={"ours": {"slo_attainment": attained}, "theirs": {"slo_attainment": 1.0}},
        vs_baseline={"ours": {"e2e_s_mean": Ratio(ratio, None, None, Method.NONE, 1)}},
    )


@dataclass
class Result:
    points: list[SweepPoint]
    baseline: str = "theirs"
    arms: tuple[str, ...] = ("ours", "theirs")
    figures: tuple[LoadFigure, ...] = (LoadFigure("load", "rate", "requests/s"),)
    slo: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(any=True))


def test_the_highest_rate_lies_between_the_points_in_the_logarithm() -> None:
    """From 1.0 at 4/s to 0.98 at 16/s: 0.99 is half-way, at the geometric mean."""
    points = [point(1, 1.0), point(4, 1.0), point(16, 0.98), point(64, 0.5)]
    assert highest_rate(points, "rate", "ours") == pytest.approx(8.0)
    assert highest_rate(points, "rate", "theirs") == 64
    assert highest_rate([point(1, 0.9)], "rate", "ours") is None


def test_a_rate_that_is_met_again_later_does_not_count() -> None:
    assert highest_rate([point(1, 1.0), point(2, 0.5), point(4, 1.0)], "rate", "ours") < 2


def test_it_is_said_where_it_is_met_again() -> None:
    result = Result([point(1, 1.0), point(2, 0.98), point(4, 0.995), point(8, 0.5)])
    assert "ours 1.4/s (and again at 4)" in load_findings(result, "ours", "e2e_s_mean")[0]


def test_break_even_is_where_the_ratio_crosses_one() -> None:
    """Ratios 1/2 and 2 are as far from 1 either way: half-way between 2/s and 8/s."""
    assert break_even([point(2, 1, 0.5), point(8, 1, 2.0)], "rate", "ours", "e2e_s_mean") == pytest.approx([4.0])
    assert break_even([point(2, 1, 0.5), point(8, 1, 0.9)], "rate", "ours", "e2e_s_mean") == []


def test_the_sentences_say_so() -> None:
    (carried, even) = load_findings(Result([point(2, 1.0, 0.5), point(8, 1.0, 2.0)]), "ours", "e2e_s_mean")
    assert "ours at least 8/s" in carried
    assert "break even at 4.0 requests/s" in even
    (_, never) = load_findings(Result([point(2, 1.0, 0.5), point(8, 1.0, 0.8)]), "ours", "e2e_s_mean")
    assert never == "In E2E mean, ours is better than theirs at every rate tried."


def test_profile_error_that_turns_the_verdict_is_said() -> None:
    def result(ratio: float) -> Result:
        return Result([
            point(2, 1.0, 0.9, profile_time_factor=0.95),
            point(2, 1.0, ratio, profile_time_factor=1.05),
        ])  # fmt: skip

    assert "turns at rate 2" in error_findings(result(1.1), "ours", "e2e_s_mean")[0]
    assert "stays on the same side" in error_findings(result(0.99), "ours", "e2e_s_mean")[0]
    assert "at most 10%, without an interval" in error_findings(result(0.99), "ours", "e2e_s_mean")[0]
    assert error_findings(Result([point(2, 1.0)]), "ours", "e2e_s_mean") == []
