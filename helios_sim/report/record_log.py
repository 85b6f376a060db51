"""Takes records as requests leave and keeps them in columns. Knows no metric and no file.

A record as an object takes several times the memory of its row, so objects are kept only until a block is full.
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

_Parts = dict[str, list[NDArray[Any]]]


class RecordLog:
    """A sink for `simulate`; `records` ends it."""

    def __init__(self) -> None:
        self._waiting: list[RequestRecord] = []
        self._columns: _Parts = {name: [] for name in _NAMES}
        self._present: _Parts = {name: [] for name in _MAYBE}
        self._codes: dict[str, dict[str | None, int]] = {name: {} for name in LABELS}

    def add(self, record: RequestRecord) -> None:
        self._waiting.append(record)
        if len(self._waiting) == BLOCK_RECORDS:
            self._flush()

    def records(self) -> Records:
        """All that was added, in order of request id. Ends the log, whose memory it takes over."""
        self._flush()
        order = np.argsort(_joined(self._columns["request_id"], np.int32), kind="stable")
        found: dict[str, Any] = {}
        for name, kind in _KINDS.items():  # one after the other, so that only one of them is there twice at any time
            column = _joined(self._columns.pop(name), kind)[order]
            if name in _MAYBE:
                found[name] = Maybe(column, _joined(self._present.pop(name), np.bool_)[order])
            elif name in LABELS:
                found[name] = Labels(column, tuple(self._codes[name]))
            else:
                found[name] = column
        return Records(**found)

    def _flush(self) -> None:
        if not self._waiting:
            return
        for name, values in zip(_NAMES, zip(*map(_row, self._waiting), strict=True), strict=True):
            if name in LABELS:
                codes = self._codes[name]
                column: NDArray[Any] = np.array([codes.setdefault(value, len(codes)) for value in values], np.int16)
            elif name in _MAYBE:
                column, present = _maybe(values)
                self._present[name].append(present)
            else:
                column = np.array(values, _KINDS[name])
            self._columns[name].append(column)
        self._waiting.clear()


def _maybe(values: Sequence[int | None]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    if None not in values:
        return np.array(values, np.int64), np.ones(len(values), np.bool_)
    present = np.array([value is not None for value in values], np.bool_)
    return np.array([0 if value is None else value for value in values], np.int64), present


def _joined(parts: list[NDArray[Any]], kind: type[np.generic]) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, kind)
