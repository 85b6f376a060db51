"""The common look of figures: what is done to draw them quickly changes no pixel."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.text import Annotation

from helios_sim.report.figures import style
from helios_sim.report.figures.arms import exit_figure
from helios_sim.report.figures.style import (
    Drawing,
    arm_styles,
    handles_of,
    legend_above,
    look,
    name_levels,
    new_figure,
    to_png,
    to_svg,
    use_log_seconds,
)
from helios_sim.report.result import ExitDepths
from report_example import example_result


def example() -> Drawing:
    """Linear and log axes, shared ones, values with a factor of ten above the axis, which moves the title."""
    x = np.geomspace(0.003, 400, 30)
    with look():
        figure, axes = new_figure(2, 2, 5, sharex="col")
        for place, ax in enumerate(axes):
            ax.plot(x, (place + 1) * 1e6 * x, label="mine")
            ax.set_title("a title")
            ax.set_xlabel("time")
        use_log_seconds(axes[0])
        use_log_seconds(axes[3], y=True)
        legend_above(figure, handles_of(*axes))
    return Drawing("some", "Some", "caption", figure)


def test_kept_ticks_are_those_that_matplotlib_would_find_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = to_png(example())
    monkeypatch.setattr(style, "_Kept", lambda axis: None)
    assert kept == to_png(example())


def test_a_png_is_the_same_before_and_after_the_page_is_drawn() -> None:
    drawing = example()
    before = to_png(drawing)
    svg = to_svg(drawing)
    assert to_png(drawing) == before
    assert to_svg(drawing) == svg


def test_properties_are_written_into_docstrings_only_where_a_person_may_ask_for_help() -> None:
    show = "import helios_sim.report.figures.style; from matplotlib.lines import Line2D; Line2D([], []).set(color='r')"
    listed = "print('linestyle' in (Line2D.set.__doc__ or ''))"
    for before, expected in (("", "False"), ("import sys; sys.ps1 = '>>> '; ", "True")):
        command = [sys.executable, "-c", f"{before}{show}; {listed}"]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == expected


@pytest.mark.parametrize(("depths", "shown"), [({32: 9}, False), ({16: 4, 32: 5}, True)])
def test_exit_depths_are_drawn_where_there_is_more_than_one(depths: dict[int, int], shown: bool) -> None:
    full = example_result((1,), points=False)
    arm = replace(full.arms["helios"], exit_depths=(ExitDepths("some", 32, depths),))
    result = replace(full, arms={"helios": arm}, baseline="helios")
    assert (exit_figure(result, arm_styles(["helios"], "helios")) is not None) is shown


@pytest.mark.parametrize(
    ("line", "end", "above"), [([1, 1, 1, 1], 1, True), ([1, 1, 2.12, 2.12], 0, True), ([2.12] * 4, 1, False)]
)
def test_a_level_is_named_where_no_line_runs_through_its_name(line: list[float], end: int, above: bool) -> None:
    with look():
        _, (ax,) = new_figure(1, 1, 4)
        ax.plot(range(4), line)
        ax.axhline(2)
        ax.set_ylim(0.5, 3.5)
        name_levels(ax, [(2.0, "published")])
    (note,) = ax.texts
    assert isinstance(note, Annotation)
    assert (note.xy, note.get_position()[1] > 0) == ((end, 2.0), above)
