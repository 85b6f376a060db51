"""HTML from text: what is not HTML already is escaped, wherever it stands. Tables, sections and pages in one style."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from helios_sim.report.format import visible


class Html(str):
    """Text that is HTML; everything else that goes into an element is escaped."""


Inside = object  # None (nothing), Html, text, a number, or several of these


def tag(name: str, *inside: Inside, **attributes: object) -> Html:
    """An element. Attributes that are None or False are left out; `cls` is its class, `scope_` its scope, and so on."""
    given = "".join(
        f" {'class' if key == 'cls' else key.rstrip('_')}" + ("" if value is True else f'="{_text(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{name}{given}>{joined(inside)}</{name}>")


def joined(inside: Inside) -> Html:
    if inside is None:
        return Html("")
    if isinstance(inside, Html):
        return inside
    if isinstance(inside, Iterable) and not isinstance(inside, str):
        return Html("".join(map(joined, inside)))
    return Html(_text(inside))


def _text(value: object) -> str:
    return escape(visible(str(value)))


def badge(name: str) -> Html:
    return tag("span", name, cls=f"badge {name}")


def sub(*inside: Inside, interval: bool = False) -> Html | None:
    """A small line below; none without text."""
    shown = joined(inside)
    return tag("span", shown, cls="sub interval" if interval else "sub") if shown else None


def num(*inside: Inside, head: bool = False) -> Html:
    return tag("th" if head else "td", *inside, cls="num")


def row_head(*inside: Inside, **attributes: object) -> Html:
    return tag("th", *inside, scope="row", **attributes)


def table(heads: Sequence[Inside], rows: Iterable[Inside]) -> Html:
    """`heads`: a text for each column of words, HTML for others. `rows`: cells that are no HTML become <td>."""
    head = tag("thead", tag("tr", (h if isinstance(h, Html) else tag("th", h) for h in heads))) if heads else None
    body = (row if isinstance(row, Html) else line(row) for row in rows)
    return tag("div", tag("table", head, tag("tbody", body)), cls="scroll")


def line(cells: Inside, **attributes: object) -> Html:
    assert isinstance(cells, Iterable)
    return tag("tr", (cell if isinstance(cell, Html) else tag("td", cell) for cell in cells), **attributes)


def details(summary: Inside, *inside: Inside, opened: bool = False) -> Html:
    return tag("details", tag("summary", summary), *inside, open=opened)


def count(number: object) -> Html:
    return tag("span", number, cls="count")


def terms(pairs: Iterable[tuple[Inside, Inside]]) -> Html:
    return tag("dl", ((tag("dt", name), tag("dd", value)) for name, value in pairs))


def section(name: str, heading: Inside, *inside: Inside) -> Html:
    return tag("section", tag("h2", heading) if heading else None, "\n", *inside, id=name)


def figure(name: str, title: str, svg: str, caption: str) -> Html:
    return tag("figure", tag("h3", title), Html(svg), tag("figcaption", caption), id=name)


def verdict(sentences: Iterable[str]) -> Html:
    return tag("div", (tag("p", sentence) for sentence in sentences), cls="verdict")


def card(what: str, value: str, note: str) -> Html:
    parts = (("what", what), ("value", value), ("note", note))
    return tag("div", (tag("div", text, cls=name) for name, text in parts), cls="card")


def warnings(texts: Sequence[str]) -> Html | None:
    if not texts:
        return None
    return section("warnings", "Read with care", tag("div", tag("ul", (tag("li", t) for t in texts)), cls="warnings"))


def page(
    title: str, head: Sequence[Inside], contents: Iterable[tuple[str, str]], sections: Iterable[Inside],
    foot: Inside, style: str = "",
) -> str:  # fmt: skip
    """A self-contained page: no script, no network. `contents` are (anchor, text)."""
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    nav = tag("nav", (tag("a", text, href=f"#{name}") for name, text in contents))
    body = joined(("\n\n", each) for each in sections if each)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{tag('title', title)}\n<style>{css}{style}</style>\n</head>\n<body>\n"
        f"<header><div>{joined(head)}\n{nav}</div></header>\n<main>{body}\n\n</main>\n"
        f"<footer><div>{joined(foot)}</div></footer>\n</body>\n</html>\n"
    )
