"""One iteration through the layers: which rows run which band, and what happens to K and V of rows that exit.

A band runs once for all rows in it: decodes, chunks of prompts, and tokens that exited earlier and are computed now
(KvRule.RECOMPUTE). Decodes that waited at an exit go on from there. On devices that capture graphs, a band that holds
only decodes is one launch (`GraphedDecodes`), as far as its layers are resident. Late layers, which come from host
memory in each iteration, are launched one by one; that takes less time than their transfer. A late layer comes once in
an iteration. Its K and V of rows that have left are computed when other rows run it, or at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns

import torch
from torch import Tensor

from helios_sim.exits.rule import PerToken, ReleaseEarly
from helios_sim.live.ahead import RunAhead
from helios_sim.live.exits import Chunk, ExitReader, OwedToken, Row, Tally
from helios_sim.live.graphs import GraphedDecodes
from helios_sim.live.looks import decider
from helios_sim.live.memory.decodes import Decodes, decode_step
from helios_sim.live.memory.kv import KvCache, MixedStep, PromptStep
from helios_sim.live.model.decoder import Attend, Left, SegmentedModel
from helios_sim.live.one_pass import OnePass, Rule
from helios_sim.live.regroup import SplitDecider, copy_kv, resumed, waits_at
from helios_sim.live.release import ReleaseDecider
from helios_sim.policy.deployment import BatchingRule, KvRule
from helios_sim.serving.iteration import Plan


@dataclass(slots=True)
class _Inside:
    """The rows in a band. `hidden` holds the rows of decodes first, then those of the pieces one after the other."""

    rows: list[Row]
    pieces: list[tuple[Chunk, PromptStep]]
    hidden: Tensor | None  # None if a captured first segment embeds the tokens itself
    step: Decodes | None  # the rows' attention step; None without rows, or if it has to be built anew


class Forward:
    """Runs iterations of one plan. `bounds` are the depths at which rows may exit."""

    def __init__(
        self,
        model: SegmentedModel,
        exits: ExitReader,
        cache: KvCache,
        plan: Plan,
        bounds: Sequence[int],
        captured: GraphedDecodes | None = None,
        ahead: RunAhead | None = None,
        one_pass: OnePass | None = None,
        clock: Callable[[], int] = perf_counter_ns,
    ) -> None:
        """`captured`: runs bands that hold only decodes as graphs. `ahead`: launches the next iteration, too.

        `one_pass`: runs all bands as one graph. `clock`: the time in ns, for answers that are delivered at ramps.
        """
        self._model, self._cache, self._plan, self._bounds = model, cache, plan, tuple(bounds)
        self._exits, self._captured, self._ahead = exits, captured, ahead
        self._one_pass = one_pass
        self._staying = plan.loaded_layers if model.staying is None else min(model.staying, plan.loaded_layers)
        self._left: list[Left] = []  # rows that have left and need K and V in late layers
        self._lazy = plan.batching is BatchingRule.LAZY
        self._leaving = decider(model, exits, plan.exit_rule, self._lazy, captured)
        if plan.batching is BatchingRule.REBATCH and isinstance(plan.exit_rule, PerToken):
            self._leaving = SplitDecider(model, exits, plan, self._bounds, captured)
        elif isinstance(plan.exit_rule, ReleaseEarly):
            self._leaving = ReleaseDecider(model, exits, plan.exit_rule, clock, captured)

    @torch.inference_mode()
    def run(self, rows: Sequence[Row], chunks: Sequence[Chunk]) -> Tally:
        """Run the iteration. Afterwards every row, and every chunk's row, has its next token."""
        tally = Tally(self._bounds)
        if self._ran_ahead(rows, chunks, tally):
            rows = []
            if not chunks:
                return tally
        asking = not chunks and all(row.asks and row.seen is None for row in rows)
        if asking and self._ran_at_once(rows, tally):
            return tally
        first = self._plan.first_band
        if first:
            now, start = _Inside(list(rows), [], resumed(rows), None), self._bounds[first - 1]
        else:
            now, start = self._embedded(list(rows), chunks), 0
        for band, end in enumerate(self._bounds[first:], first):
            self._band(band, start, end, now, tally)
            self._leave(band, end, now, tally)
            start = end
            if not now.rows and not now.pieces:
                break
        if self._left:
            self._model.propagate_all(self._left, max(start, self._staying), self._plan.loaded_layers)
        self._leaving.finish()
        if asking and self._one_pass is not None:
            self._one_pass.note(rows, self._bounds[-1])
        return tally

    def _ran_at_once(self, rows: Sequence[Row], tally: Tally) -> bool:
        """Run rows that ask at every exit through all bands as one graph, if possible. Returns whether they ran."""
        plan, rule = self._plan, self._plan.exit_rule
        free = all(row.choice is None and not row.owed for row in rows)
        if self._one_pass is None or not free or not self._one_pass.pays(len(rows)):
            return False
        fixed = Rule.of(rule, plan.batching, plan.kv_rule, self._bounds, self._model.architecture.n_layers)
        if fixed is None or self._bounds[-1] > self._staying:
            return False
        assert isinstance(rule, PerToken)
        self._one_pass.run(self._exits, fixed, rule.threshold, rows, tally)
        return True

    def _ran_ahead(self, rows: Sequence[Row], chunks: Sequence[Chunk], tally: Tally) -> bool:
        """Run the rows by `RunAhead`, if possible, which also launches their next step. Returns whether they ran.

        In an iteration with prompt chunks the rows run together with the chunks, unless they were launched before.
        """
        ahead, end = self._ahead, self._bounds[-1]
        if ahead is None:
            return False
        measure = self._leaving.measure_at(end)
        alike = len(self._bounds) == 1 and end <= self._staying and (measure is None or measure.by_head)
        plain = all(row.seen is None and row.choice is None and not row.owed and not row.judged for row in rows)
        if (
            not (self._plan.host_ahead and rows and alike and plain)
            or (chunks and not ahead.knows(rows, end, measure, self._exits))
        ):  # fmt: skip
            ahead.forget()
            return False
        said = ahead.run(self._exits, rows, end, measure, go_on=not chunks)
        tally.ran(0, [row.position + 1 for row in rows])
        self._leaving.decide(0, end, rows, said.logits.expand(len(rows), 0), tally, said)
        return True

    def _embedded(self, rows: list[Row], chunks: Sequence[Chunk]) -> _Inside:
        if self._captured is not None and not chunks:
            return _Inside(rows, [], None, None)
        pieces = [(c, PromptStep(self._cache, c.slot, len(c.tokens), c.context)) for c in chunks]
        step = self._decode_step(rows, []) if rows else None
        ids = [row.token for row in rows] + [token for chunk in chunks for token in chunk.tokens]
        positions = ([] if step is None else [step.positions]) + [prompt.positions for _, prompt in pieces]
        at = positions[0] if len(positions) == 1 else torch.cat(positions)
        return _Inside(rows, pieces, self._model.embed(torch.tensor(ids, device=self._cache.device), at), step)

    def _embedded_alone(self, rows: Sequence[Row]) -> Tensor:
        ids = torch.tensor([row.token for row in rows], device=self._cache.device)
        return self._model.embed(ids, torch.tensor([row.position for row in rows], device=self._cache.device))

    def _decode_step(self, rows: Sequence[Row], owed: Sequence[tuple[Row, OwedToken]]) -> Decodes:
        slots = [row.slot for row in rows] + [row.slot for row, _ in owed]
        lengths = [row.position for row in rows] + [token.position for _, token in owed]
        return decode_step(self._cache, slots, lengths)

    def _band(self, band: int, start: int, end: int, now: _Inside, tally: Tally) -> None:
        rows, n = now.rows, len(now.rows)
        owed = [(row, token) for row in rows for token in row.owed if token.depth == start]
        tally.ran(band, [row.position + 1 for row in rows] + [token.position + 1 for _, token in owed])
        if self._captured is not None and not now.pieces and start < self._staying:
            there = min(end, self._staying)
            now.hidden = self._launched(start, there, now, owed)
            if there == end:
                self._note_late(owed, end, rows)
                return
            start = there
        if now.hidden is None:  # no captured segment embedded the tokens, since all layers come late
            now.hidden = self._embedded_alone(rows)
        if not owed:
            if now.step is None and rows:
                now.step = self._decode_step(rows, [])
            now.hidden = self._run(now.hidden, start, end, _attend(now.step, n, now.pieces))
            return
        step, late = self._decode_step(rows, owed), torch.cat([token.hidden for _, token in owed])
        joined = torch.cat((now.hidden[:n], late, now.hidden[n:]))
        joined = self._run(joined, start, end, _attend(step, n + len(owed), now.pieces))
        now.hidden = torch.cat((joined[:n], joined[n + len(owed) :]))
        for (_, token), state in zip(owed, joined[n : n + len(owed)].split(1), strict=True):
            token.hidden = state
        self._note_late(owed, end, rows)

    def _run(self, hidden: Tensor, start: int, end: int, attend: Attend) -> Tensor:
        """Return the states after layers start..end-1. Late layers also compute K and V of rows that have left."""
        if not self._left or end <= self._staying:
            return self._model.run(hidden, start, end, attend)
        if start < self._staying:
            hidden, start = self._model.run(hidden, start, self._staying, attend), self._staying
        return self._model.run(hidden, start, end, attend, self._left)

    def _launched(self, start: int, end: int, now: _Inside, owed: Sequence[tuple[Row, OwedToken]]) -> Tensor:
        """The rows' hidden states after a captured band. Tokens that exited before run it as rows of their own."""
        assert self._captured is not None
        if not owed:
            return self._captured.run(now.rows, now.hidden, start, end)
        assert now.hidden is not None  # no token exits before the first band
        room = self._captured.most_rows - len(now.rows)
        parts = [owed[at : at + room] for at in range(0, len(owed), room)]
        hidden = now.hidden.clone() if len(parts) > 1 else now.hidden  # a step may overwrite it
        for part in parts:  # a request's earlier tokens come first; the rows run with the last of them
            rows = now.rows if part is parts[-1] else []
            states = torch.cat([hidden[: len(rows)], *(token.hidden for _, token in part)])
            late = [Row(row.slot, token.position, 0, end) for row, token in part]
            after = self._captured.run(rows, states, start, end, late)
            for (_, token), state in zip(part, self._captured.late_states.clone().split(1), strict=True):
                token.hidden = state
        return after

    def _note_late(self, owed: Sequence[tuple[Row, OwedToken]], end: int, rows: Sequence[Row]) -> None:
        for _, token in owed:
            token.depth = end
        if owed and end == self._plan.loaded_layers:
            for row in rows:
                row.owed.clear()  # each of them has run all layers by now

    def _leave(self, band: int, end: int, now: _Inside, tally: Tally) -> None:
        """Apply the exit rule, and remove the rows that are done."""
        assert now.hidden is not None
        n = len(now.rows)
        edges = [n]
        for chunk, _ in now.pieces:
            edges.append(edges[-1] + len(chunk.tokens))
        finishing = [(c.row, edge - 1) for (c, _), edge in zip(now.pieces, edges[1:], strict=True) if c.row is not None]
        deciding = now.rows + [row for row, _ in finishing]
        if deciding:
            at = [*range(n), *(place for _, place in finishing)]
            states = now.hidden if len(at) == len(now.hidden) else now.hidden[at]
            self._leaving.decide(band, end, deciding, states, tally)
        gone = [i for i, row in enumerate(now.rows) if row.layers]
        if gone and end < self._plan.loaded_layers:
            self._keep_kv(band, end, [now.rows[i] for i in gone], now.hidden[gone], tally)
        gone += [i for i, row in enumerate(now.rows) if waits_at(row, end)]
        going = [i for i, (chunk, _) in enumerate(now.pieces) if chunk.layers > end]
        if not gone and len(going) == len(now.pieces):
            return
        stay = [i for i in range(n) if i not in gone]
        now.hidden = now.hidden[[*stay, *(place for i in going for place in range(edges[i], edges[i + 1]))]]
        now.pieces = [now.pieces[i] for i in going]
        if gone:
            now.rows, now.step = [now.rows[i] for i in stay], None

    def _keep_kv(self, band: int, end: int, gone: Sequence[Row], hidden: Tensor, tally: Tally) -> None:
        """Provide K and V of rows that exited in the layers that they did not run."""
        plan = self._plan
        if not isinstance(plan.exit_rule, PerToken):
            return  # nothing reads K and V above a fixed cap
        if plan.kv_rule is KvRule.COPY:
            copy_kv(self._cache, gone, end, plan.loaded_layers)
            return
        if plan.kv_rule is KvRule.PROPAGATE or self._lazy:
            step = self._decode_step(gone, [])
            self._model.propagate(hidden, end, max(end, self._staying), step)
            if self._staying < plan.loaded_layers:
                self._left.append((hidden, step))
            tally.propagated_above(band, len(gone))
            return
        for row, state in zip(gone, hidden.split(1), strict=True):
            row.owed.append(OwedToken(row.position, end, state.clone()))  # the next iteration may overwrite it


def _attend(step: Decodes | None, rows: int, pieces: Sequence[tuple[Chunk, PromptStep]]) -> Attend:
    if step is not None and not pieces:
        return step
    if step is None and len(pieces) == 1:
        return pieces[0][1]
    steps: list[Attend] = [] if step is None else [step]
    sizes = [] if step is None else [rows]
    return MixedStep([*steps, *(prompt for _, prompt in pieces)], [*sizes, *(len(c.tokens) for c, _ in pieces)])
