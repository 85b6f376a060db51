"""Prices of a profile on a device that is faster or slower now than when it was measured.

The times of two steps, the profile's anchors, are compared with those of the calibration: a few decodes, which are
bound by memory, and a prompt, which is bound by computing. Work with as many tokens as one of the steps scales like
that step, work in between by the logarithm of its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from helios_sim.profile.composition import IntArray
from helios_sim.profile.profile import Profile
from helios_sim.profile.spec import Anchors
from helios_sim.profile.tables import FloatArray, GridTable, LayerTables, MixedTable, RowsTable

DECODE, PROMPT = "decode", "prompt"
DECODE_ROWS, DECODE_KV_TOKENS = 4, 128  # a step that has room beside what is served
PROMPT_ROWS = 64


def at_pace(profile: Profile, decode: float, prompt: float | None = None) -> Profile:
    """Return the profile with times scaled by the pace of decodes and the pace of prompts.

    The host's costs scale like decodes, and so do prompts if their pace is not known. Loads do not change.
    """
    if prompt is None or prompt == decode:
        return profile if decode == 1.0 else profile.scaled(decode)
    known = profile.anchors or Anchors()
    first = DECODE_ROWS if known.decode is None else known.decode.rows
    last = PROMPT_ROWS if known.prompt is None else known.prompt.rows
    pace = _Pace(first, max(first + 1, last), prompt / decode)
    return replace(
        profile.scaled(decode),
        layer_tables=tuple(pace.layer(tables) for tables in profile.layer_tables),
        head=pace.rows(profile.head),
        embedding=pace.rows(profile.embedding),
        check=None if profile.check is None else pace.rows(profile.check),
        check_classifier=None if profile.check_classifier is None else pace.rows(profile.check_classifier),
        check_predictor=None if profile.check_predictor is None else pace.rows(profile.check_predictor),
    )


@dataclass(frozen=True, slots=True)
class _Pace:
    """A factor by rows: 1 up to `first` rows, `factor` from `last` rows on."""

    first: int
    last: int
    factor: float

    def layer(self, tables: LayerTables) -> LayerTables:
        return replace(
            tables,
            dense=self.rows(tables.dense),
            kv_projection=self.rows(tables.kv_projection),
            decode_attention=self.decodes(tables.decode_attention),
            prefill_attention=self.grid(tables.prefill_attention),
            mixed_attention=None if tables.mixed_attention is None else self.mixed(tables.mixed_attention),
        )

    def rows(self, table: RowsTable) -> RowsTable:
        return RowsTable(*self._scaled(table.rows, table.time_s))

    def grid(self, table: GridTable) -> GridTable:
        """Scale a table of prompts, which are extrapolated by the last slope."""
        first, time_s = self._scaled(table.first, table.time_s)
        return GridTable(first, table.second, time_s)

    def decodes(self, table: GridTable) -> GridTable:
        """Scale a table of decodes, which are extrapolated in proportion to the batch."""
        first, time_s = self._scaled(table.first, table.time_s, beyond=False)
        return GridTable(first, table.second, time_s)

    def mixed(self, table: MixedTable) -> MixedTable:
        chunk, time_s = self._scaled(table.chunk, table.time_s)
        return replace(table, chunk=chunk, time_s=time_s)

    def _scaled(self, axis: IntArray, time_s: FloatArray, beyond: bool = True) -> tuple[IntArray, FloatArray]:
        """Times (G, ...) of an axis that has every count between the two as well, so that each is at its own pace.

        Where the axis ends before the pace does, its last slope goes on until that is so: with `beyond`.
        """
        between = np.arange(self.first, self.last + 2)  # a slope that goes on is of two counts at one pace
        most = between[-1] if beyond else axis[-1]
        counts = np.union1d(axis, between[(between > axis[0]) & (between <= most)])
        after = np.clip(np.searchsorted(axis, counts), 1, len(axis) - 1)
        share = (counts - axis[after - 1]) / (axis[after] - axis[after - 1])
        paces = np.interp(np.log(counts), np.log([self.first, self.last]), [1.0, self.factor])
        over = (slice(None), *[None] * (time_s.ndim - 1))
        here_s, next_s = time_s[after - 1], time_s[after]
        found: FloatArray = (here_s + (next_s - here_s) * share[over]) * paces[over]
        return counts, np.maximum(found, 0.0)
