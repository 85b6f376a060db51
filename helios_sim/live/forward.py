"""One iteration through the layers: which rows run which band, and what happens to K and V of rows that exit.

A band runs once for all rows in it: decodes, chunks of prompts, and tokens that exited earlier and are computed now
(KvRule.RECOMPUTE). On devices that capture graphs, a band that holds only decodes is one launch (`GraphedDecodes`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helios_sim.exits.rule import Confidence, PerToken
from helios_sim.live.device import Device, Step
from helios_sim.live.exits import Chunk, ExitDecider, ExitReader, HeadOutput, OwedToken, Row, Tally
from helios_sim.live.memory.decodes import Decodes, decode_step, decode_step_on_device
from helios_sim.live.memory.kv import KvCache, MixedStep, PromptStep
from helios_sim.live.model.decoder import Attend, SegmentedModel
from helios_sim.policy.deployment import BatchingRule, KvRule
from helios_sim.serving.iteration import Plan

SIZES = (1, 2, 4, *range(8, 513, 8))  # batch sizes, as vLLM captures them by default
LEAST_SPAN = 128  # tokens of context; larger spans are powers of two
_IDS, _SLOTS, _POSITIONS = range(3)


def spans(max_tokens: int) -> list[int]:
    """The numbers of tokens of context that captured steps read in slots of `max_tokens`, ascending."""
    found = [LEAST_SPAN]
    while found[-1] < max_tokens:
        found.append(2 * found[-1])
    return [*found[:-1], max_tokens]


@dataclass(frozen=True, slots=True)
class _Shape:
    """What is fixed in a captured step."""

    start: int
    end: int
    size: int
    span: int  # tokens read of each request; 0: each is read as long as it is, in any slots
    in_row: bool  # slots are 0, 1, ...


@dataclass(frozen=True, slots=True)
class _Head:
    """What is fixed in a captured look at the logits."""

    depth: int
    size: int
    measure: Confidence | None


@dataclass(frozen=True, slots=True)
class _Captured:
    launch: Step
    reads: tuple[object, ...]  # weights and keys of its layers: the graph holds their addresses


class GraphedDecodes:
    """Captured decode steps of one model over one cache. A shape is captured beforehand, or when it first runs."""

    def __init__(self, model: SegmentedModel, cache: KvCache, device: Device) -> None:
        self.model, self._cache, self._device = model, cache, device
        self._steps: dict[_Shape, _Captured] = {}
        sizes = tuple(size for size in SIZES if size < cache.slots)
        self._sizes = (*sizes, cache.slots)
        self._exact = cache.kernels.any_lengths
        self._spans = [0] if self._exact else spans(cache.max_tokens)
        on = cache.device
        self._numbers = {size: torch.zeros((3, size), dtype=torch.int64, device=on) for size in self._sizes}
        self._states = {size: self._hidden_of(size) for size in self._sizes}
        staged = device.host_empty(3 * 8 * cache.slots)
        self._staged = staged.view(torch.int64)  # the host writes here before one copy to the device
        self._read = device.mark()  # that copy
        self._heads: dict[_Head, _Captured] = {}
        self._said = {size: torch.zeros((3, size), dtype=torch.float64, device=on) for size in self._sizes}
        self._latest: tuple[Tensor, int] | None = None  # the hidden states that the latest step gave, and its size

    @torch.inference_mode()
    def capture(self, segments: Iterable[tuple[int, int]]) -> int:
        """Capture the steps through these segments (start, end) for all batch sizes and spans. Returns how many.

        Large ones come first, so that the others find their memory in the graphs' pool. Only a segment above an exit
        has requests in any slots: the requests that begin an iteration are in slots 0, 1, ...
        """
        shapes = [
            _Shape(start, end, size, span, in_row)
            for start, end in segments
            for size in reversed(self._sizes)
            for span in reversed(self._spans)
            for in_row in ((True, False) if start and not self._exact else (True,))
        ]
        for shape in shapes:
            self._step(shape)
        return len(shapes)

    @torch.inference_mode()
    def capture_heads(self, exits: ExitReader, depths: Iterable[int], measure: Confidence | None) -> int:
        """Capture the look at the logits after these depths for all batch sizes. Returns how many.

        `measure`: the confidence that is looked at as well. One of a check on the hidden state is not captured.
        """
        if measure is not None and not measure.by_head:
            return 0
        heads = [_Head(depth, size, measure) for depth in depths for size in reversed(self._sizes)]
        for head in heads:
            self._head(head, exits)
        return len(heads)

    @torch.inference_mode()
    def read(self, exits: ExitReader, depth: int, states: Tensor, measure: Confidence | None) -> HeadOutput | None:
        """What the head says of `states`, with one launch and one transfer to the host.

        None if they are not what the latest step gave, or if this look has not been captured.
        """
        if self._latest is None or self._latest[0] is not states:
            return None
        head = _Head(depth, self._latest[1], measure)
        if head not in self._heads:
            return None
        self._head(head, exits).launch()
        tokens, best, sure = self._said[head.size][:, : len(states)].tolist()
        finite = [value - value == 0.0 for value in best]
        return HeadOutput([int(t) for t in tokens], None if measure is None else sure, finite, states[:0])

    def _head(self, head: _Head, exits: ExitReader) -> _Captured:
        reads = (self.model.outer, exits)
        known = self._heads.get(head)
        if known is None or any(a is not b for a, b in zip(known.reads, reads, strict=True)):
            model, (_, states), said = self.model, self._states[head.size], self._said[head.size]

            def look() -> None:
                tokens, sure, best, _ = exits.on_device(model, head.depth, states, head.measure)
                said.copy_(torch.stack([tokens.double(), best.double(), (best if sure is None else sure).double()]))

            self._heads[head] = known = _Captured(self._device.prepare(look), reads)
        return known

    @torch.inference_mode()
    def run(self, rows: Sequence[Row], hidden: Tensor | None, start: int, end: int) -> Tensor:
        """Hidden states (n, d_model) after layers start..end-1. `hidden` None: start from the rows' tokens.

        The result is valid until a segment runs again.
        """
        n = len(rows)
        size, in_row = self.stage(rows)
        longest = 0 if self._exact else max(row.position for row in rows) + 1
        span = next(span for span in self._spans if span >= longest)
        before, after = self._states[size]
        if hidden is not None:
            before[:n].copy_(hidden)  # which may be `after`, and a capture would write to that
        self._step(_Shape(start, end, size, span, in_row)).launch()
        self._latest = after[:n], size
        return self._latest[0]

    def _hidden_of(self, size: int) -> tuple[Tensor, Tensor]:
        """Hidden states (size, d_model) before the layers, not read by a first segment, and after them."""
        shape = (size, self.model.architecture.d_model)
        before, after = (torch.zeros(shape, dtype=self.model.dtype, device=self._cache.device) for _ in range(2))
        return before, after

    def stage(self, rows: Sequence[Row]) -> tuple[int, bool]:
        """Copy token ids, slots and positions to the device at once.

        Returns the size of the step that reads them, and whether the slots count as 0, 1, ...
        """
        n, last = len(rows), self._cache.max_tokens - 1
        size = next(size for size in self._sizes if size >= n)
        slots = [row.slot for row in rows]
        if self._exact:
            in_row, padding = True, [-1] * (size - n)
        else:
            in_row = slots == list(range(n))
            padding = list(range(n, size)) if in_row else [0] * (size - n)
        numbers = [
            [row.token for row in rows] + [0] * (size - n),
            slots + padding,
            [row.position for row in rows] + [last] * (size - n),
        ]
        staged = self._staged[: 3 * size].view(3, size)
        self._read.synchronize()  # a band before this one may still be waiting for its numbers
        staged.numpy()[:] = numbers
        self._numbers[size].copy_(staged, non_blocking=True)
        self._read = self._device.mark()
        return size, in_row

    def _step(self, shape: _Shape) -> _Captured:
        of = slice(shape.start, shape.end)
        reads = (*self.model.layers[of], *self._cache.keys[of])
        known = self._steps.get(shape)
        if known is None or any(a is not b for a, b in zip(known.reads, reads, strict=True)):
            self._steps[shape] = known = self._capture(shape, reads)  # weights or cache have moved since
        return known

    def _capture(self, shape: _Shape, reads: tuple[object, ...]) -> _Captured:
        model, cache = self.model, self._cache
        numbers, (hidden, out) = self._numbers[shape.size], self._states[shape.size]

        def step() -> None:
            attend = decode_step_on_device(cache, numbers[_SLOTS], numbers[_POSITIONS], shape.span, shape.in_row)
            into = hidden if shape.start else model.embed(numbers[_IDS], numbers[_POSITIONS])
            out.copy_(model.run(into, shape.start, shape.end, attend))

        return _Captured(self._device.prepare(step), reads)


@dataclass(slots=True)
class _Inside:
    """The rows in a band. `hidden` holds the rows of decodes first, then those of the pieces one after the other."""

    rows: list[Row]
    pieces: list[tuple[Chunk, PromptStep]]
    hidden: Tensor | None  # None: a captured first segment embeds for itself
    step: Decodes | None  # the rows' step; None: no rows, or it has to be built anew


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
    ) -> None:
        """`captured`: runs bands that hold only decodes as captured graphs."""
        self._model, self._cache, self._plan, self._bounds = model, cache, plan, tuple(bounds)
        self._captured = captured
        self._lazy = plan.batching is BatchingRule.LAZY
        self._leaving = ExitDecider(model, exits, plan.exit_rule, self._lazy, captured)

    @torch.inference_mode()
    def run(self, rows: Sequence[Row], chunks: Sequence[Chunk]) -> Tally:
        """Run the iteration. Afterwards every row, and every chunk's row, has its next token."""
        tally = Tally(self._bounds)
        now, start = self._embedded(list(rows), chunks), 0
        for band, end in enumerate(self._bounds):
            self._band(band, start, end, now, tally)
            self._leave(band, end, now, tally)
            if not now.rows and not now.pieces:
                break
            start = end
        self._leaving.finish()
        return tally

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
        if self._captured is not None and not owed and not now.pieces:
            now.hidden = self._captured.run(rows, now.hidden, start, end)
            return
        if now.hidden is None:  # a token that exited before runs along, for which there is no graph
            now.hidden = self._embedded_alone(rows)
        if not owed:
            if now.step is None and rows:
                now.step = self._decode_step(rows, [])
            now.hidden = self._model.run(now.hidden, start, end, _attend(now.step, n, now.pieces))
            return
        step, late = self._decode_step(rows, owed), torch.cat([token.hidden for _, token in owed])
        joined = torch.cat((now.hidden[:n], late, now.hidden[n:]))
        joined = self._model.run(joined, start, end, _attend(step, n + len(owed), now.pieces))
        now.hidden = torch.cat((joined[:n], joined[n + len(owed) :]))
        for (_, token), state in zip(owed, joined[n : n + len(owed)].split(1), strict=True):
            token.depth, token.hidden = end, state
        if end == self._plan.loaded_layers:
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
        going = [i for i, (chunk, _) in enumerate(now.pieces) if chunk.layers > end]
        if not gone and len(going) == len(now.pieces):
            return
        stay = [i for i, row in enumerate(now.rows) if not row.layers]
        now.hidden = now.hidden[[*stay, *(place for i in going for place in range(edges[i], edges[i + 1]))]]
        now.pieces = [now.pieces[i] for i in going]
        if gone:
            now.rows, now.step = [now.rows[i] for i in stay], None

    def _keep_kv(self, band: int, end: int, gone: Sequence[Row], hidden: Tensor, tally: Tally) -> None:
        """Provide K and V of rows that exited in the layers that they did not run."""
        plan = self._plan
        if not isinstance(plan.exit_rule, PerToken):
            return  # nothing reads K and V above a fixed cap
        if plan.kv_rule is KvRule.PROPAGATE or self._lazy:
            self._model.propagate(hidden, end, plan.loaded_layers, self._decode_step(gone, []))
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
