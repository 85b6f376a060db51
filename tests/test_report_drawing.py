"""How figures are drawn in less time: titles and labels are where they were."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from helios_sim.report.figures.style import Drawing, lay_out, look, new_figure, use_log_seconds


def drawn(lays_out: bool) -> tuple[Drawing, list[Any]]:
    """A figure with all that is placed beside labels of ticks, and where its titles and labels are."""
    with look():
        figure, axes = new_figure(2, 2, 6.0)
        for place, ax in enumerate(axes):
            ax.plot([1, 2, 3], np.array([0.1, 5e7, 3e7]) if place == 3 else [10.0, 123456.0, 99.0])
            ax.set(title=f"Title {place}", xlabel="of the x axis,\nin two lines", ylabel="of the y axis" * (place != 1))
        use_log_seconds(axes[2])
        axes[0].set_yticks([10, 99], ["a long name of a tick", "b"])
    drawing = Drawing("all", "All", "", figure)
    whole = drawing.whole
    with look():
        if lays_out:
            lay_out(drawing)
        else:
            whole.set_dpi(150)
            engine = whole.get_layout_engine()
            assert engine is not None
            engine.execute(whole)
            whole.set_layout_engine("none")
        canvas = FigureCanvasAgg(whole)
        canvas.draw()
        places = []
        for ax in whole.findobj(Axes):
            texts = [ax.title, *ax.texts, ax.xaxis.label, ax.yaxis.label, ax.yaxis.offsetText]  # type: ignore[attr-defined]
            texts += [text for text in ax.get_children() if getattr(text, "get_text", str)().startswith("Title")]
            places += [text.get_window_extent().extents for text in texts if text.get_text()]
    return drawing, places


def test_titles_and_labels_are_where_matplotlib_itself_puts_them() -> None:
    (_, places), (_, expected) = drawn(True), drawn(False)
    assert len(places) == len(expected) == 4 + 4 + 3 + 1
    np.testing.assert_allclose(places, expected, atol=0.5)  # of a dot
