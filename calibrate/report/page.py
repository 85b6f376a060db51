"""A page of sections with tables and figures, in the style of the simulator's reports, and its HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helios_sim import __version__

if TYPE_CHECKING:
    from helios_sim.report.figures.style import Drawing


@dataclass(frozen=True, slots=True)
class Highlight:
    """One number that stands out."""

    what: str
    value: str
    note: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table. The first column names the row; the others are numbers, except those in `words`, counted from 0."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""
    words: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """A section of the page, with the provenance class of its numbers."""

    id: str
    title: str
    provenance_class: str | None = None
    text: Sequence[str] = ()
    commands: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Drawing] = ()
    details: Sequence[tuple[str, str]] = ()  # (summary, text), collapsed


@dataclass(frozen=True, slots=True)
class Page:
    """Everything that the page shows."""

    title: str
    subtitle: str
    provenance_class: str | None
    verdict: Sequence[str]
    cards: Sequence[Highlight]
    warnings: Sequence[str]
    sections: Sequence[Section]

    @property
    def drawings(self) -> list[Drawing]:
        return [figure for section in self.sections for figure in section.figures]


def render(page: Page) -> str:
    """The page as self-contained HTML, with figures and their interactive script inline; it needs no network."""
    from helios_sim.report.environment import page_environment
    from helios_sim.report.page import page_figure

    figures = {drawing.name: page_figure(drawing) for drawing in page.drawings}
    template = page_environment("calibrate").get_template("calibration.html.j2")
    return template.render(page=page, version=__version__, figures=figures)


def palette(count: int) -> list[tuple[float, ...]]:
    """Colours from one colour map, so that neighbours look alike, without its darkest and palest ends."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.15 + 0.75 * i / max(1, count - 1)) for i in range(count)]
