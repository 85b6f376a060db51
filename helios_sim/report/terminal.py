"""Texts and tables for a terminal or a file. Control characters are always shown by their code."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TextIO
from unicodedata import combining, east_asian_width

from helios_sim.report.format import visible

_PLAIN = str.maketrans({"×": "x", "–": "-", "−": "-", "─": "-", "µ": "u", "†": "+", "‡": "++", "…": "...", "·": "-"})
_BOLD, _DIM, _END = "\x1b[1m", "\x1b[2m", "\x1b[0m"


JSON_ASKED: ContextVar[bool] = ContextVar("json_asked", default=False)  # summary.json on a terminal too
_NARROW = 40  # cells: in narrower terminals nothing is laid out to fit
_READABLE = 30  # cells: least width of a column in which a text is wrapped


def without_json(command: Sequence[str]) -> list[str]:
    """The command line without `--json`; remembers whether it was given."""
    JSON_ASKED.set("--json" in command)
    return [word for word in command if word != "--json"]


def width_of(stream: TextIO) -> int | None:
    """Cells in a line of this terminal; None if it is not a terminal, so that lines are not wrapped."""
    if not stream.isatty():
        return None
    with suppress(OSError, ValueError):
        return max(_NARROW, os.get_terminal_size(stream.fileno()).columns or 80)
    return 80


def say(text: str, file: TextIO | None = None) -> None:
    """Print a text at once, with characters that the stream can encode; on a terminal wrapped at words."""
    stream = sys.stdout if file is None else file
    line, width = _encodable(visible(text), stream), width_of(stream)
    if width is not None and len(line) > width:
        line = textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
    print(line, file=stream, flush=stream is sys.stderr)


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
    """A table of texts. Headers may have several lines; secondary rows are dim."""

    title: str
    headers: list[str] = field(default_factory=list)
    numbers: list[bool] = field(default_factory=list)  # right-aligned columns
    rows: list[tuple[Sequence[str], bool] | None] = field(default_factory=list)  # (cells, dim); None: an empty line

    def column(self, header: str, number: bool = True) -> None:
        self.headers.append(header)
        self.numbers.append(number)

    def row(self, cells: Sequence[str], dim: bool = False) -> None:
        self.rows.append((cells, dim))

    def show(self, file: TextIO | None = None) -> None:
        """Print the table. Only on a terminal it is bold, dim and folded to the width."""
        stream = sys.stdout if file is None else file
        for line in self.lines(stream.isatty(), width_of(stream)):
            print(_encodable(line, stream), file=stream)

    def lines(self, styled: bool = False, width: int | None = None) -> list[str]:
        """The table with a line for each row. Columns that do not fit into `width` come below, after the first one.

        A long text goes on in further lines of its column. No text is ever cut.
        """
        heads = [[visible(part) for part in header.split("\n")] for header in self.headers]
        rows = [None if row is None else ([_in_a_line(cell) for cell in row[0]], row[1]) for row in self.rows]
        shown = [row[0] for row in rows if row is not None]
        widths = [
            max([*map(_width, head), *(_width(cells[place]) for cells in shown)]) for place, head in enumerate(heads)
        ]
        self._narrow(widths, width)
        found = [f"{_BOLD}{visible(self.title)}{_END}" if styled else visible(self.title), ""]
        for places in _folded(widths, width):
            most = max(len(heads[place]) for place in places)
            for line in range(most):
                parts = [head[line - most + len(head)] if line >= most - len(head) else "" for head in heads]
                found.append(self._line(parts, widths, places))
            found.append("─" * (sum(widths[place] for place in places) + 2 * (len(places) - 1)))
            for row in rows:
                if row is None:
                    found.append("")
                    continue
                texts = [self._line(cells, widths, places) for cells in _in_lines(row[0], widths, places)]
                found += [f"{_DIM}{text}{_END}" if styled and row[1] else text for text in texts]
            found.append("")
        return found

    def _narrow(self, widths: list[int], width: int | None) -> None:
        """Give the widest column of texts the room that the others leave, if that is enough to read it."""
        texts = [place for place, number in enumerate(self.numbers) if place and not number]
        if width is None or not texts:
            return
        widest = max(texts, key=lambda place: widths[place])
        rest = sum(widths) - widths[widest] + 2 * (len(widths) - 1)
        room = width - rest if width - rest >= _READABLE else width - widths[0] - 2
        if _READABLE <= room < widths[widest]:
            widths[widest] = room

    def _line(self, cells: Sequence[str], widths: Sequence[int], places: Sequence[int]) -> str:
        padded = []
        for place in places:
            space = " " * (widths[place] - _width(cells[place]))
            padded.append(space + cells[place] if self.numbers[place] else cells[place] + space)
        return "  ".join(padded).rstrip()


def _folded(widths: Sequence[int], width: int | None) -> list[list[int]]:
    """Groups of columns that fit side by side, each with the first column."""
    found = [[0]] if widths else []
    for place in range(1, len(widths)):
        now = found[-1]
        taken = sum(widths[other] + 2 for other in now) + widths[place]
        if width is None or taken <= width or len(now) == 1:
            now.append(place)
        else:
            found.append([0, place])
    return found


def _in_lines(cells: Sequence[str], widths: Sequence[int], places: Sequence[int]) -> list[list[str]]:
    """The cells of these columns, line by line. A cell that is wider than its column goes on below."""
    split = [
        textwrap.wrap(cell, widths[place], break_on_hyphens=False) if _width(cell) > widths[place] else [cell]
        for place, cell in enumerate(cells)
    ]
    most = max(len(split[place]) for place in places)
    return [[parts[line] if line < len(parts) else "" for parts in split] for line in range(most)]


def _in_a_line(text: str) -> str:
    return " ".join(visible(text).split("\n"))


def _width(text: str) -> int:
    """The width of a text in cells of a terminal."""
    if text.isascii():
        return len(text)
    return sum(0 if combining(sign) else 2 if east_asian_width(sign) in "WF" else 1 for sign in text)
