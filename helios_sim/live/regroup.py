"""Batches that are split at exits, on the device (DREX, arXiv 2512.15705).

At an exit, the rows that are confident there, or were before, leave if the loop's own rule (`core.depths.parts`) says
that there are enough of them. The other rows wait until the loop lets them run on (`core.schedule.blocks_to_regroup`).
Meanwhile their hidden states stay on the device with their requests, and their K and V in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from helios_sim.core.depths import parts
from helios_sim.live.exits import CapturedHeads, ExitDecider, ExitReader, HeadOutput, OwedToken, Row, Tally, confident
from helios_sim.live.memory.kv import KvCache, rows_of
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.serving.exit_rules import split_above
from helios_sim.serving.iteration import Plan


class SplitDecider(ExitDecider):
    """Decides at the end of each band which rows leave and which wait. `bounds`: depths at the ends of bands."""

    def __init__(
        self,
        model: SegmentedModel,
        exits: ExitReader,
        plan: Plan,
        bounds: Sequence[int],
        captured: CapturedHeads | None = None,
    ) -> None:
        super().__init__(model, exits, plan.exit_rule, False, captured)
        self._chunks, self._last = len(plan.prefill), bounds[-1]
        self._above = split_above(plan.regrouping, len(bounds) - 1).tolist()

    def decide(
        self, band: int, end: int, rows: Sequence[Row], states: Tensor, tally: Tally, said: HeadOutput | None = None
    ) -> None:
        """Decide as `ExitDecider` does at the last depth. At other exits, rows that wait get their state in `waits`."""
        if end == self._last:
            super().decide(band, end, rows, states, tally, said)
            return
        at = [i for i, row in enumerate(rows) if row.asks]
        asking = [rows[i] for i in at]
        if not asking:
            return
        states = states if len(at) == len(states) else states[at]
        said = self._look(band, end, asking, states, tally)
        leaving = [i for i, row in enumerate(asking) if row.sure]
        if not leaving or not parts(len(leaving), len(asking), self._chunks, self._above[band]):
            return
        if said is None:
            self._exit_later(end, asking, leaving, states, tally)
        else:
            for i in leaving:
                row = asking[i]
                row.chosen, row.layers, row.finite = said.token(i, row.choice), end, said.finite[i]
        for row, state in zip(asking, states.split(1), strict=True):
            if not row.layers:
                row.waits = OwedToken(row.position, end, state.clone())  # the next iteration may overwrite it

    def _look(self, band: int, end: int, rows: Sequence[Row], states: Tensor, tally: Tally) -> HeadOutput | None:
        """Note which rows are confident, if this exit checks. Returns the head's output, if the head was used."""
        if not self._checks_at(end):
            return None
        assert self._measure is not None
        said = None
        if self._by_head:
            said = self._said(end, rows, states, self._measure)
            assert said.confidence is not None
            sure = [value >= self._threshold for value in said.confidence]
        else:
            sure = (self._exits.check(end, states, self._measure) >= self._threshold).tolist()
        tally.add("check_tokens" if self._by_head else "classifier_tokens", band, len(rows))
        for row, here in zip(rows, sure, strict=True):
            row.sure = row.sure or confident(row, end, here)
        return said


def resumed(rows: Sequence[Row]) -> Tensor:
    """The hidden states (n, d_model) of rows that waited at an exit and now go on."""
    return torch.cat([row.waits.hidden for row in rows if row.waits is not None])


def waits_at(row: Row, depth: int) -> bool:
    """Whether the row has come to this depth and waits there now."""
    return row.waits is not None and row.waits.depth == depth


def copy_kv(cache: KvCache, rows: Sequence[Row], start: int, end: int) -> None:
    """Copy K and V of layer start - 1 into layers start..end-1, for these rows' tokens (`KvRule.COPY`)."""
    slots, positions = ([getattr(row, name) for row in rows] for name in ("slot", "position"))
    on = cache.device
    places = rows_of(cache, torch.tensor(slots, device=on), torch.tensor(positions, device=on))
    for tensors in (cache.keys, cache.values):
        width = tensors[0].shape[-1]
        found = tensors[start - 1].view(-1, width).index_select(0, places)
        for layer in range(start, end):
            tensors[layer].view(-1, width).index_copy_(0, places, found)
