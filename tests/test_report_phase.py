"""The phase diagram: which arm is best at each point, among those that change few enough tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helios_sim import UserError, simulate, study_config
from helios_sim.report.compare import Ratio
from helios_sim.report.figures.phase import baseline_of, matrix_figure, phase_figure, ranked_arms
from helios_sim.report.figures.style import arm_styles, look, to_png
from helios_sim.report.intervals import Method
from helios_sim.report.result import PhaseFigure, SweepPoint

SPEC = PhaseFigure("Who", "load", "load", "e2e_s_mean", split_by="model", least_agreement=0.95)


def point(model: str = "m", load: str = "one", **arms: tuple[float | None, float | None]) -> SweepPoint:
    """Of each arm its mean E2E and its agreement."""
    metrics = {name: {"e2e_s_mean": e2e_s, "agreement": share} for name, (e2e_s, share) in arms.items()}
    return SweepPoint({"model": model, "load": load}, metrics)


def test_the_best_comes_first_among_those_that_keep_to_the_agreement() -> None:
    at = point(base=(2.0, 1.0), quick=(0.5, 0.94), cap=(1.0, 0.95), slow=(4.0, 1.0), none=(None, 1.0), open=(1.0, None))
    assert ranked_arms(SPEC, at, "base") == [("cap", 2.0), ("base", 1.0), ("slow", 0.5)]
    assert ranked_arms(replace(SPEC, least_agreement=1.0), at, "base") == [("base", 1.0), ("slow", 0.5)]
    assert ranked_arms(replace(SPEC, arms=("slow",)), at, "base") == [("base", 1.0), ("slow", 0.5)]
    more = SweepPoint(at.settings, {"base": {"throughput_requests_per_s": 2.0, "agreement": 1.0},
                                    "fast": {"throughput_requests_per_s": 6.0, "agreement": 1.0}})  # fmt: skip
    assert ranked_arms(replace(SPEC, metric="throughput_requests_per_s"), more, "base")[0] == ("fast", 3.0)


def test_of_equals_the_baseline_comes_first_then_the_one_named_first() -> None:
    at = point(b=(1.0, 1.0), a=(0.999, 1.0), base=(1.001, 1.0))
    assert [name for name, _ in ranked_arms(SPEC, at, "base")] == ["base", "b", "a"]


def test_the_next_best_is_one_that_does_not_do_as_well() -> None:
    points = [point(base=(2.0, 1.0), cap=(1.0, 1.0), same=(1.001, 1.0), slow=(1.5, 1.0))]
    with look():
        drawing = phase_figure("phase_0", SPEC, points, arm_styles(["base", "cap", "same", "slow"], "base"), "base")
    texts = [text.get_text() for ax in drawing.figure.axes for text in ax.texts]
    assert texts == ["cap", "2.00×  (+1)", "slow 1.33×"]
    assert "how many others do as well" in drawing.caption


def test_a_matrix_shows_every_arm_and_which_is_left_out() -> None:
    points = [point("m", "one", base=(2.0, 1.0), cap=(1.0, 0.9), lazy=(1.6, 1.0)), point("n", "one", base=(2.0, 1.0),
              lazy=(4.0, 1.0))]  # fmt: skip
    with look():
        styles = arm_styles(["base", "cap", "lazy"], "base")
        drawing = matrix_figure("matrix_0", replace(SPEC, best_only=False), points, styles, "base")
    (ax,) = drawing.figure.axes
    assert [text.get_text() for text in ax.texts] == ["m", "2.00", "1.25", "n", "–", "0.50"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["cap", "lazy"]
    changes_too_much, best = ax.texts[1], ax.texts[2]
    assert (changes_too_much.get_fontstyle(), best.get_fontstyle()) == ("italic", "normal")
    assert (changes_too_much.get_fontweight(), best.get_fontweight()) == ("normal", "bold")
    assert "changes more than 5 % of the tokens" in drawing.caption
    assert len(to_png(drawing)) > 1000


def test_points_have_the_baseline_of_their_sweep() -> None:
    ratio = Ratio(1.0, None, None, Method.NONE, 1)
    other = SweepPoint({}, {"own": {}, "arm": {}}, {"arm": {"e2e_s_mean": ratio}})
    assert baseline_of([other], "base") == "own"
    assert baseline_of([SweepPoint({}, {"arm": {}}, {"arm": {}})], "base") == "base"


def test_without_a_baseline_there_is_nothing_to_rank() -> None:
    assert ranked_arms(SPEC, point(a=(1.0, 1.0)), "base") == []


def test_a_tile_names_the_best_and_the_next() -> None:
    points = [point("m", "one", base=(2.0, 1.0), cap=(1.0, 0.97)), point("n", "two", base=(2.0, 1.0), cap=(4.0, 1.0))]
    with look():
        drawing = phase_figure("phase_0", SPEC, points, arm_styles(["base", "cap"], "base"), "base")
    texts = [text.get_text() for ax in drawing.figure.axes for text in ax.texts]
    assert texts == ["cap", "2.00×", "base 1.00×", "base", "1.00×", "cap 0.50×"]
    assert "at most 5 % of the tokens" in drawing.caption
    assert len(to_png(drawing)) > 1000


def test_it_needs_a_second_axis() -> None:
    sweep = "+sweeps=[{axes: [{name: users, settings: [server.max_running_requests], values: [1, 2]}]}]"
    figure = "+figures=[{kind: phase, x: users, metric: e2e_s_mean}]"
    words = ("policy=full_depth", sweep.removeprefix("+"), figure.removeprefix("+"), "workload.n_requests=2")
    with pytest.raises(UserError, match=r"figures.split_by"):
        simulate(study_config("own", *words))
