"""A page of sections with tables and figures, in the style of the simulator's reports, and its HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helios_sim import __version__
from helios_sim.report import html

if TYPE_CHECKING:
    from helios_sim.report.figures.style import Drawing

_STYLE = """
.scroll + .scroll, .scroll + h3, .footnote + h3, .scroll + figure, .footnote + figure { margin-top: 16px; }
h2 .badge { vertical-align: middle; margin-left: 8px; letter-spacing: 0; }
.cards { grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); }
pre.commands { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 18px;
  margin: 0 0 10px; }
"""


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
    """The page as self-contained HTML: no script, no network, figures inline."""
    kicker = [html.tag("span", "helios-sim · calibration")]
    if page.provenance_class:
        kicker += [html.badge(page.provenance_class), html.tag("span", "is the class of the weakest number")]
    head = (
        html.tag("div", kicker, cls="kicker"),
        html.tag("h1", page.title),
        html.tag("p", page.subtitle, cls="question"),
    )
    cards = html.tag("div", (html.card(c.what, c.value, c.note) for c in page.cards), cls="cards")
    foot = (f"Made by helios-sim {__version__}. The same numbers are in ", html.tag("code", "summary.json"),
            ", every sample under ", html.tag("code", "stages/"), ".")  # fmt: skip
    sections = (html.section("answer", None, html.verdict(page.verdict), cards), html.warnings(page.warnings),
                *map(_section, page.sections))  # fmt: skip
    return html.page(page.title, head, [(it.id, it.title) for it in page.sections], sections, foot, _STYLE)


def _section(it: Section) -> html.Html:
    from helios_sim.report.figures.style import to_svg

    heading = (it.title, html.badge(it.provenance_class) if it.provenance_class else None)
    return html.section(
        it.id, heading, (html.tag("p", text) for text in it.text),
        html.tag("pre", "\n".join(it.commands), cls="commands") if it.commands else None,
        map(_table, it.tables),
        (html.figure(d.name, d.title, to_svg(d), d.caption) for d in it.figures),
        (html.details(title, html.tag("div", html.tag("pre", text), cls="inside")) for title, text in it.details),
    )  # fmt: skip


def _table(table: Table) -> html.Html:
    def is_number(place: int) -> bool:
        return place > 0 and place not in table.words

    heads = [html.num(text, head=True) if is_number(place) else text for place, text in enumerate(table.columns)]
    rows = (
        [html.row_head(row[0]), *(html.num(it) if is_number(place) else it for place, it in enumerate(row[1:], 1))]
        for row in table.rows
    )
    title = html.tag("h3", table.title) if table.title else None
    note = html.tag("p", table.note, cls="footnote") if table.note else None
    return html.joined((title, html.table(heads, rows), note))
