"""Texts and tables for a terminal or a file: what acts on a terminal is shown by its code, whatever it came from."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TextIO
from unicodedata import combining, east_asian_width

from helios_sim.report.format import visible

_PLAIN = str.maketrans({"×": "x", "–": "-", "−": "-", "─": "-", "µ": "u", "†": "+", "‡": "++", "…": "...", "·": "-"})
_BOLD, _DIM, _END = "\x1b[1m", "\x1b[2m", "\x1b[0m"


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line, here and now, as far as the stream's encoding has its characters."""
    stream = sys.stdout if file is None else file
    print(_encodable(visible(text), stream), file=stream, flush=stream is sys.stderr)


def _encodable(text: str, stream: TextIO) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(encoding, "backslashreplace").decode(encoding)
    except LookupError:
        return text
    return text


@dataclass(slots=True)
class TextTable:
    """A table of texts. Headers may have several lines; a row is dim where it stands beside the others."""

    title: str
    headers: list[str] = field(default_factory=list)
    numbers: list[bool] = field(default_factory=list)  # columns whose texts end at the right
    rows: list[tuple[Sequence[str], bool] | None] = field(default_factory=list)  # None: an empty line

    def column(self, header: str, number: bool = True) -> None:
        self.headers.append(header)
        self.numbers.append(number)

    def row(self, cells: Sequence[str], dim: bool = False) -> None:
        self.rows.append((cells, dim))

    def show(self, file: TextIO | None = None) -> None:
        """Print the table; bold and dim only on a terminal."""
        stream = sys.stdout if file is None else file
        for line in self.lines(stream.isatty()):
            print(_encodable(line, stream), file=stream)

    def lines(self, styled: bool = False) -> list[str]:
        heads = [[visible(part) for part in header.split("\n")] for header in self.headers]
        rows = [None if row is None else ([_in_a_line(cell) for cell in row[0]], row[1]) for row in self.rows]
        shown = [row[0] for row in rows if row is not None]
        widths = [
            max([*map(_width, head), *(_width(cells[place]) for cells in shown)]) for place, head in enumerate(heads)
        ]
        most = max(map(len, heads))
        found = [f"{_BOLD}{visible(self.title)}{_END}" if styled else visible(self.title), ""]
        for place in range(most):
            parts = [head[place - most + len(head)] if place >= most - len(head) else "" for head in heads]
            found.append(self._line(parts, widths))
        found.append("─" * (sum(widths) + 2 * (len(widths) - 1)))
        for row in rows:
            line = "" if row is None else self._line(row[0], widths)
            found.append(f"{_DIM}{line}{_END}" if styled and row is not None and row[1] else line)
        return [*found, ""]

    def _line(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        padded = (
            " " * (width - _width(cell)) + cell if number else cell + " " * (width - _width(cell))
            for cell, width, number in zip(cells, widths, self.numbers, strict=True)
        )
        return "  ".join(padded).rstrip()


def _in_a_line(text: str) -> str:
    return " ".join(visible(text).split("\n"))


def _width(text: str) -> int:
    """Cells of a terminal."""
    if text.isascii():
        return len(text)
    return sum(0 if combining(sign) else 2 if east_asian_width(sign) in "WF" else 1 for sign in text)
