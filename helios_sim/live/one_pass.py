"""Decode iterations that run through all exits as one captured graph, so that the host waits only once, at the end.

At an exit the card itself compares each row's confidence with the threshold. A row that leaves stays in the batch but
only writes: its state does not change any more, and the layers above compute K and V from that state, as
`SegmentedModel.propagate` does. No attention is computed for it. In a batch of few rows, no other matrix product is
computed either once all rows have left. A larger batch reads all weights in any case, so if all of its rows left early
the last time, the host looks at every exit instead (`OnePass.pays`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from helios_sim.exits.rule import Confidence, ExitRule, PerToken
from helios_sim.live.device import Device, Step
from helios_sim.live.exits import ExitReader, Row, Tally
from helios_sim.live.graphs import GraphedDecodes
from helios_sim.live.kernels.interface import UNKNOWN, Inside
from helios_sim.live.kernels.launch import MOST_ROWS
from helios_sim.live.memory.decodes import ExactStep
from helios_sim.live.memory.kv import KvCache
from helios_sim.live.memory.paged import PagedStep, Plans
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.policy.deployment import BatchingRule, KvRule

_IDS, _SLOTS, _POSITIONS, _THRESHOLD, _RECORDED = range(5)


@dataclass(frozen=True, slots=True)
class Rule:
    """The part of an exit rule that is fixed in a captured pass."""

    bounds: tuple[int, ...]
    checked: tuple[bool, ...]  # whether rows may leave at each of the bounds below the last
    measure: Confidence
    lazy: bool  # all rows leave together, once each was confident
    watched: bool  # there are layers above: a row that gets there without confidence is a breach

    @classmethod
    def of(
        cls, rule: ExitRule, batching: BatchingRule, kv_rule: KvRule, bounds: Sequence[int], n_layers: int
    ) -> Rule | None:
        """Return the rule of a pass, or None if the iteration cannot run as one pass.

        K and V that are computed later, and rows that wait at an exit, need the states there. If the exits that check
        a token depend on the token (`rule.looks`), the host decides which do.
        """
        lazy = batching is BatchingRule.LAZY
        if not isinstance(rule, PerToken) or rule.looks or not (lazy or kv_rule is KvRule.PROPAGATE):
            return None
        if batching is BatchingRule.REBATCH:
            return None
        checked = tuple(rule.checks_at(depth) for depth in bounds[:-1])
        return cls(tuple(bounds), checked, rule.confidence, lazy, bounds[-1] < n_layers)


@dataclass(frozen=True, slots=True)
class _Captured:
    launch: Step
    reads: tuple[object, ...]
    numbers: Tensor  # (4 + exits, size)
    said: Tensor  # (4, size): token, largest logit, depth, whether it is a breach


class OnePass:
    """Captured passes of one model over one cache, by rule and batch size."""

    def __init__(self, graphs: GraphedDecodes, device: Device) -> None:
        self._graphs, self._device = graphs, device
        self._passes: dict[tuple[Rule, int], _Captured] = {}
        self._staged: Tensor | None = None
        self._read = device.mark()
        self._all_left = False

    def pays(self, rows: int) -> bool:
        """Whether this batch should run to the last layer without a transfer to the host in between."""
        return rows <= MOST_ROWS or not self._all_left

    def note(self, rows: Sequence[Row], last: int) -> None:
        """Note whether all rows of an iteration left before the last layer."""
        self._all_left = all(row.layers < last for row in rows)

    @torch.inference_mode()
    def capture(self, exits: ExitReader, rule: Rule) -> int:
        """Capture the passes of all batch sizes. Returns how many."""
        sizes = self._graphs.sizes
        for size in reversed(sizes):
            self._pass(rule, size, exits)
        return len(sizes)

    @torch.inference_mode()
    def run(self, exits: ExitReader, rule: Rule, threshold: float, rows: Sequence[Row], tally: Tally) -> None:
        """Give every row its token and its depth."""
        n, size = len(rows), self._graphs.size_for(len(rows))
        known = self._pass(rule, size, exits)
        self._stage(known.numbers, rule, threshold, rows)
        known.launch()
        tokens, best, depths, breaches = known.said[:, :n].tolist()
        for row, token, logit, depth, breach in zip(rows, tokens, best, depths, breaches, strict=True):
            row.chosen, row.layers, row.breach = int(token), int(depth), breach > 0
            row.finite = logit - logit == 0.0
        count(rule, rows, tally)
        self.note(rows, rule.bounds[-1])

    def _stage(self, numbers: Tensor, rule: Rule, threshold: float, rows: Sequence[Row]) -> None:
        parts, size = numbers.shape
        if self._staged is None or self._staged.numel() < numbers.numel():
            self._staged = self._device.host_empty(8 * parts * self._graphs.most_rows).view(torch.float64)
        room = self._staged[: numbers.numel()].view(parts, size)
        self._read.synchronize()
        to = room.numpy()
        to[:] = UNKNOWN
        to[_IDS], to[_POSITIONS], to[_THRESHOLD] = 0, self._graphs.last_position, threshold
        for i, row in enumerate(rows):
            to[:_THRESHOLD, i] = row.token, row.slot, row.position
            if row.recorded is not None:
                to[_RECORDED:, i] = [row.recorded[depth] for depth in rule.bounds]
        numbers.copy_(room, non_blocking=True)
        self._read = self._device.mark()
        if self._graphs.plans is not None:
            self._graphs.plans.plan(size, [row.slot for row in rows], [row.position for row in rows])

    def _pass(self, rule: Rule, size: int, exits: ExitReader) -> _Captured:
        graphs = self._graphs
        reads = (*graphs.reads(0, rule.bounds[-1]), graphs.model.outer, exits)
        known = self._passes.get((rule, size))
        if known is None or any(a is not b for a, b in zip(known.reads, reads, strict=True)):
            on = graphs.cache.device
            numbers = torch.zeros((_RECORDED + len(rule.bounds), size), dtype=torch.float64, device=on)
            numbers[_SLOTS] = -1
            said = torch.zeros((4, size), dtype=torch.float64, device=on)
            model, cache, plans = graphs.model, graphs.cache, graphs.plans  # the pass holds no more than these
            if plans is not None:
                plans.ready(size)
            launch = self._device.prepare(lambda: said.copy_(_through(model, cache, plans, rule, exits, numbers)))
            self._passes[rule, size] = known = _Captured(launch, reads, numbers, said)
        return known


def _through(
    model: SegmentedModel, cache: KvCache, plans: Plans | None, rule: Rule, exits: ExitReader, numbers: Tensor
) -> Tensor:
    """Run all bands for the staged `numbers`. Returns the values of `_Captured.said`."""
    last = rule.bounds[-1]
    ids, now, positions = (numbers[part].long() for part in (_IDS, _SLOTS, _POSITIONS))
    rows = Inside(now, torch.zeros_like(now), torch.zeros_like(numbers[:4]))
    hidden = waiting = model.embed(ids, positions)  # `waiting`: adapted states, if rows leave by a check on the state
    for band, (start, end) in enumerate(pairwise((0, *rule.bounds))):
        attend: ExactStep | PagedStep
        if plans is None:
            attend = ExactStep(cache, now, positions, frozen=band > 0)
        else:  # rows that have left attend too, and nothing is added to their states
            attend = plans.step(len(now), now, positions, frozen=band > 0)
        hidden = model.run(hidden, start, end, attend)
        if end < last and not rule.checked[band]:
            continue
        asks, sure, look = end < last or rule.watched, None, None
        if rule.measure.by_head:
            tokens, sure, best, _ = exits.on_device(model, end, hidden, rule.measure if asks else None)
            look = tokens, best
        else:
            sure = exits.check(end, hidden, rule.measure) if asks else None
            inside = (now >= 0)[:, None]
            waiting = torch.where(inside, exits.adapted(model, end, hidden), waiting)
        model.kernels.leave(
            rows, end, sure, look, numbers[_THRESHOLD], numbers[_RECORDED + band], rule.lazy, end == last
        )
    if not rule.measure.by_head:
        for to, value in zip(rows.said, exits.tokens_on_device(model, waiting), strict=False):
            to.copy_(value)
    return rows.said


def count(rule: Rule, rows: Sequence[Row], tally: Tally) -> None:
    """Add what the rows ran, by their depths, to the tally."""
    last = rule.bounds[-1]
    for band, (start, end) in enumerate(pairwise((0, *rule.bounds))):
        inside = [row for row in rows if row.layers > start]
        if not inside:
            return
        left = sum(row.layers == end for row in inside)
        tally.ran(band, [row.position + 1 for row in inside])
        checks, by_head = rule.watched if end == last else rule.checked[band], rule.measure.by_head
        if by_head and end < last:
            tally.add("check_tokens", band, len(inside) if checks else 0)  # the same head output gives the token
        else:
            tally.sampled(left)
        if checks and not by_head:
            tally.add("classifier_tokens", band, len(inside))
        if left and end < last:
            tally.propagated_above(band, left)
