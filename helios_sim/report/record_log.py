"""Takes records as requests leave and keeps them in columns. Knows no metric and no file.

A record as an object takes several times the memory of its row, so objects are kept only until a block is full. Columns
grow in place: arrays of a block each would leave holes behind that the system does not get back.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.report.records import INTEGERS, LABELS, MOMENTS, Labels, Maybe, Records
from helios_sim.request import RequestRecord

BLOCK_RECORDS = 4096

_MAYBE = (*MOMENTS, "microbits")
_NAMES = (*INTEGERS, *_MAYBE, *LABELS)
_KINDS = INTEGERS | dict.fromkeys(_MAYBE, np.int64) | dict.fromkeys(LABELS, np.int16)
_row = attrgetter(*_NAMES)


class RecordLog:
    """A sink for `simulate`; `records` ends it."""

    def __init__(self) -> None:
        self._waiting: list[RequestRecord] = []
        self._columns: dict[str, NDArray[Any]] = {name: np.zeros(0, _KINDS[name]) for name in _NAMES}
        self._present: dict[str, NDArray[np.bool_]] = {name: np.zeros(0, np.bool_) for name in _MAYBE}
        self._codes: dict[str, dict[str | None, int]] = {name: {} for name in LABELS}
        self._rows = 0  # of the columns that are filled

    def add(self, record: RequestRecord) -> None:
        self._waiting.append(record)
        if len(self._waiting) == BLOCK_RECORDS:
            self._flush()

    def records(self) -> Records:
        """All that was added, in order of request id. Ends the log, whose memory it takes over."""
        self._flush()
        order = np.argsort(self._columns["request_id"][: self._rows], kind="stable")
        found: dict[str, Any] = {}
        for name in _NAMES:  # one after the other, so that only one of them is there twice at any time
            column = self._columns.pop(name)[order]
            if name in _MAYBE:
                found[name] = Maybe(column, self._present.pop(name)[order])
            elif name in LABELS:
                found[name] = Labels(column, tuple(self._codes[name]))
            else:
                found[name] = column
        return Records(**found)

    def _flush(self) -> None:
        if not self._waiting:
            return
        rows = slice(self._rows, self._rows + len(self._waiting))
        self._make_room(rows.stop)
        for name, values in zip(_NAMES, zip(*map(_row, self._waiting), strict=True), strict=True):
            if name in LABELS:
                codes = self._codes[name]
                column: NDArray[Any] = np.array([codes.setdefault(value, len(codes)) for value in values], np.int16)
            elif name in _MAYBE:
                column, self._present[name][rows] = _maybe(values)
            else:
                column = np.array(values, _KINDS[name])  # raises where one does not fit
            self._columns[name][rows] = column
        self._rows = rows.stop
        self._waiting.clear()

    def _make_room(self, rows: int) -> None:
        if rows > len(self._columns["request_id"]):
            for column in (*self._columns.values(), *self._present.values()):
                column.resize(rows + rows // 8, refcheck=False)  # nobody else has seen it


def _maybe(values: Sequence[int | None]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    if None not in values:
        return np.array(values, np.int64), np.ones(len(values), np.bool_)
    present = np.array([value is not None for value in values], np.bool_)
    return np.array([0 if value is None else value for value in values], np.int64), present
