"""The text of a log, read once: its beginning, by which the tool is recognised, and the place of each object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from helios_sim.errors import UserError
from helios_sim.logs.record import FIX
from helios_sim.untrusted import MIB, in_short, lines_of, parse_json, parse_yaml, reading, shortened

MOST_BYTES = 512 * MIB
_HEAD = 1 << 16
_LINE = "correct or remove the line"


@dataclass(frozen=True)
class Document:
    """A file's text in UTF-8, unpacked."""

    path: Path
    content: bytes

    @property
    def name(self) -> str:
        """The file's name for messages."""
        return self.path.name

    @property
    def source(self) -> str:
        return self.path.name

    @cached_property
    def head(self) -> bytes:
        return self.content[:_HEAD].lstrip()

    def begins_with(self, text: bytes) -> bool:
        return self.head.startswith(text)

    def names(self, *keys: str) -> bool:
        """Whether all of these stand as keys of JSON in its first line, or anywhere if the file is one value.

        Texts of prompts and answers may stand before them, since keys come in any order.
        """
        return all(f'"{key}"'.encode() in self._first for key in keys)

    @cached_property
    def _first(self) -> bytes:
        """The text that is searched for names: all of one object or array, or the beginning of lines."""
        line = self.head.partition(b"\n")[0]
        is_one = self.begins_with(b"[") or (self.begins_with(b"{") and not _is_json(line.decode(errors="replace")))
        return self.content if is_one else self.head

    def lines(self) -> list[tuple[int, str]]:
        """The non-empty lines with their numbers."""
        return [(n, line) for n, line in enumerate(lines_of(self.content.decode()), 1) if line.strip()]

    def objects(self) -> list[dict[str, Any]]:
        """The JSON objects of a file with one object, or one in each line. Raises UserError if a line has none."""
        return [found for _, found in self.numbered_objects()]

    def numbered_objects(self) -> list[tuple[str, dict[str, Any]]]:
        """The JSON objects (`objects`), each with its place for messages."""
        lines = self.lines()
        if lines and not _is_json(lines[0][1]) and len(lines) > 1 and not lines[1][1].startswith("{"):
            return [(self.name, self.mapping())]  # one object over several lines
        found = []
        for number, line in lines:
            place = f"{self.name}, line {number}"
            try:
                value = parse_json(line, plain_names=True)
            except (ValueError, RecursionError) as error:
                cut = len(lines) == 1 and isinstance(error, json.JSONDecodeError) and error.pos >= len(line.rstrip())
                fix = "it ends in the middle: take the whole file" if cut else _LINE
                raise UserError(place, line.strip()[:80], f"a JSON object ({in_short(error)})", fix) from error
            if not isinstance(value, dict):
                raise UserError(place, shortened(value), "a JSON object", _LINE)
            found.append((place, value))
        return found

    def array(self) -> list[Any]:
        """The JSON array in the file. Raises UserError if it has none."""
        if not self.content.rstrip().endswith(b"]"):
            fix = "it ends in the middle: take the whole file"
            raise UserError(self.name, "damaged", "one JSON array, which ends with ]", fix)
        with reading(self.name, "damaged", "one JSON array", FIX):
            found = parse_json(self.content, plain_names=True)
            if not isinstance(found, list):
                raise ValueError(f"it holds a {type(found).__name__}")
            return found

    def mapping(self) -> dict[str, Any]:
        """The JSON object or YAML mapping in the file. Raises UserError if it has none."""
        is_json = self.begins_with(b"{")
        with reading(self.name, "damaged", "one JSON object" if is_json else "one YAML mapping", FIX):
            found = parse_json(self.content, plain_names=True) if is_json else parse_yaml(self.content)
            if not isinstance(found, dict):
                raise ValueError(f"it holds a {type(found).__name__}")
            return found

    def chosen(self, part: int | None, told: Sequence[str], what: str) -> int:
        """The index of the chosen part. Raises UserError if there are several and none is named."""
        if part is None:
            if len(told) == 1:
                return 0
            listed = "; ".join(f"{n}: {text}" for n, text in enumerate(told[:8], 1))
            raise UserError("from_log.part", None, f"which of the {len(told)} {what} of {self.name}: {listed}",
                            "name one by its number")  # fmt: skip
        if not 1 <= part <= len(told):
            allowed = f"one of the {len(told)} {what} of {self.name}, from 1"
            raise UserError("from_log.part", part, allowed, "correct it")
        return part - 1


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
