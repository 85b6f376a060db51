"""Decode steps of one model as captured graphs: segments of layers for a batch of rows, and exit heads.

A graph holds addresses, so its inputs lie in tensors that never move. `stage` copies token ids, slots and positions
from the host into them. Hidden states go from one segment to the next through tensors of their batch size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helios_sim.exits.rule import Confidence
from helios_sim.live.device import Device, Step
from helios_sim.live.exits import ExitReader, HeadOutput, Row
from helios_sim.live.memory.decodes import Decodes, decode_step_on_device
from helios_sim.live.memory.kv import KvCache
from helios_sim.live.memory.paged import PagedStep, Plans
from helios_sim.live.model.decoder import SegmentedModel

SIZES = (1, 2, 4, *range(8, 513, 8))  # batch sizes, as vLLM captures them by default
LEAST_SPAN = 128  # tokens of context; larger spans are powers of two
_IDS, _SLOTS, _POSITIONS = range(3)


def spans(max_tokens: int) -> list[int]:
    """The numbers of tokens of context that captured steps read in slots of `max_tokens`, ascending."""
    found = [LEAST_SPAN]
    while found[-1] < max_tokens:
        found.append(2 * found[-1])
    return [*found[:-1], max_tokens]


def sizes_of(slots: int) -> tuple[int, ...]:
    """Batch sizes of captured steps of up to `slots` requests. The last, 2 slots, is for several rows per request."""
    return (*(size for size in SIZES if size < slots), slots, 2 * slots)


@dataclass(frozen=True, slots=True)
class _Shape:
    """The fixed properties of a captured step."""

    start: int
    end: int
    size: int
    span: int  # tokens read per request; 0 if each is read up to its own length, in any slot
    in_row: bool  # slots are 0, 1, ...
    repeated: bool = False  # several rows may be of one request; later rows see earlier ones


@dataclass(frozen=True, slots=True)
class _Head:
    """The fixed properties of a captured exit head."""

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
        self.model, self.cache, self._device = model, cache, device
        self._steps: dict[_Shape, _Captured] = {}
        self._of_rows = sizes_of(cache.slots)
        self.sizes = self._of_rows[:-1]
        self._exact = cache.kernels.any_lengths
        self._spans = [0] if self._exact else spans(cache.max_tokens)
        self.plans = Plans(cache, device, self._of_rows[-1]) if cache.kernels.page_tokens else None
        on = cache.device
        self.numbers = {size: torch.zeros((3, size), dtype=torch.int64, device=on) for size in self._of_rows}
        self._states = {size: self._hidden_of(size) for size in self._of_rows}
        staged = device.host_empty(3 * 8 * self._of_rows[-1])
        self._staged = staged.view(torch.int64)  # the host writes here before one copy to the device
        self._read = device.mark()  # the end of that copy
        self._heads: dict[_Head, _Captured] = {}
        # Output of the latest head, by batch size: tokens, the largest logits, confidences.
        self.said = {size: torch.zeros((3, size), dtype=torch.float64, device=on) for size in self.sizes}
        self._latest: tuple[Tensor, int] | None = None  # the hidden states that the latest step gave, and its size
        self.late_states: Tensor  # hidden states of the `late` rows of that step

    @property
    def most_rows(self) -> int:
        """The most rows of a step: one of every request, and as many more."""
        return self._of_rows[-1]

    @property
    def last_position(self) -> int:
        """The last position of a slot, which padding rows use."""
        return self.cache.max_tokens - 1

    @torch.inference_mode()
    def capture(self, segments: Iterable[tuple[int, int]], owing: bool = False) -> int:
        """Capture the steps through these segments (start, end) for all batch sizes and spans. Returns how many.

        Large ones come first, so that the others find their memory in the graphs' pool. The requests that begin an
        iteration are in slots 0, 1, ...; only above an exit may they be in any slots. `owing`: above an exit, tokens
        that exited before run beside later tokens of their requests.
        """
        shapes = [shape for start, end in segments for shape in self._shapes(start, end, owing)]
        for shape in shapes:
            self._step(shape)
        return len(shapes)

    def _shapes(self, start: int, end: int, owing: bool) -> Iterator[_Shape]:
        above = start > 0
        ways = [(in_row, False) for in_row in ((True, False) if above and not self._exact else (True,))]
        if above and owing and self._exact:
            ways.insert(0, (True, True))
        for size in reversed(self._of_rows if above and owing else self.sizes):
            for span in reversed(self._spans):
                for in_row, repeated in ways:
                    if size <= self.cache.slots or repeated or not in_row:
                        yield _Shape(start, end, size, span, in_row, repeated)

    @torch.inference_mode()
    def capture_heads(self, exits: ExitReader, depths: Iterable[int], measure: Confidence | None) -> int:
        """Capture the exit heads at these depths for all batch sizes. Returns how many.

        `measure`: the confidence to compute as well. Confidences that need only the hidden state are not captured.
        """
        if measure is not None and not measure.by_head:
            return 0
        heads = [_Head(depth, size, measure) for depth in depths for size in reversed(self.sizes)]
        for head in heads:
            self._head(head, exits)
        return len(heads)

    @torch.inference_mode()
    def read(self, exits: ExitReader, depth: int, states: Tensor, measure: Confidence | None) -> HeadOutput | None:
        """Return the head's output for `states`, with one launch and one transfer to the host.

        None if `states` are not the output of the latest step, or if this head has not been captured.
        """
        if self._latest is None or self._latest[0] is not states:
            return None
        head = _Head(depth, self.size_for(len(states)), measure)
        if head not in self._heads:
            return None
        if head.size != self._latest[1]:  # other rows ran beside these
            self._states[head.size][1][: len(states)].copy_(states)
        self._head(head, exits).launch()
        tokens, best, sure = self.said[head.size][:, : len(states)].tolist()
        finite = [value - value == 0.0 for value in best]
        return HeadOutput([int(t) for t in tokens], None if measure is None else sure, finite, states[:0])

    def _head(self, head: _Head, exits: ExitReader) -> _Captured:
        reads = (self.model.outer, exits)
        known = self._heads.get(head)
        if known is None or any(a is not b for a, b in zip(known.reads, reads, strict=True)):
            model, (_, states), said = self.model, self._states[head.size], self.said[head.size]

            def look() -> None:
                tokens, sure, best, _ = exits.on_device(model, head.depth, states, head.measure)
                said.copy_(torch.stack([tokens.double(), best.double(), (best if sure is None else sure).double()]))

            self._heads[head] = known = _Captured(self._device.prepare(look), reads)
        return known

    @torch.inference_mode()
    def run(
        self, rows: Sequence[Row], hidden: Tensor | None, start: int, end: int, late: Sequence[Row] = ()
    ) -> Tensor:
        """Return the rows' hidden states (n, d_model) after layers start..end-1, from their tokens if `hidden` is None.

        `late`: rows that run beside them and may be of the same requests. In `hidden` their states come after the
        others; `late_states` holds their results. Both results are valid until a segment runs again.
        """
        n, all_rows = len(rows), [*rows, *late]
        size, in_row = self.stage(all_rows)
        longest = 0 if self._exact else max(row.position for row in all_rows) + 1
        span = next(span for span in self._spans if span >= longest)
        before, after = self._states[size]
        if hidden is not None:
            before[: len(all_rows)].copy_(hidden)  # `hidden` may be `after`, which a capture would overwrite
        self._step(_Shape(start, end, size, span, in_row, self._exact and bool(late))).launch()
        self._latest, self.late_states = (after[:n], size), after[n : len(all_rows)]
        return self._latest[0]

    @torch.inference_mode()
    def launch(self, size: int, end: int, exits: ExitReader, measure: Confidence | None) -> None:
        """Launch the first `end` layers for the staged `numbers` of this size, and the head that writes into `said`.

        Only for kernels that read each request up to its own length.
        """
        self._step(_Shape(0, end, size, 0, True)).launch()
        self._head(_Head(end, size, measure), exits).launch()
        self._latest = None

    def size_for(self, rows: int) -> int:
        return next(size for size in self._of_rows if size >= rows)

    def _hidden_of(self, size: int) -> tuple[Tensor, Tensor]:
        """Hidden states (size, d_model) before the layers, not read by a first segment, and after them."""
        shape = (size, self.model.architecture.d_model)
        before, after = (torch.zeros(shape, dtype=self.model.dtype, device=self.cache.device) for _ in range(2))
        return before, after

    def stage(self, rows: Sequence[Row]) -> tuple[int, bool]:
        """Copy token ids, slots and positions to the device at once.

        Returns the batch size of the step that reads them, and whether the slots count as 0, 1, ...
        """
        n, last = len(rows), self.last_position
        size = self.size_for(n)
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
        self.numbers[size].copy_(staged, non_blocking=True)
        self._read = self._device.mark()
        if self.plans is not None:
            self.plans.plan(size, slots, [row.position for row in rows])
        return size, in_row

    def reads(self, start: int, end: int) -> tuple[object, ...]:
        """The objects that a graph of these layers holds addresses of: weights and keys."""
        return (*self.model.layers[start:end], *self.cache.keys[start:end])

    def _step(self, shape: _Shape) -> _Captured:
        reads = self.reads(shape.start, shape.end)
        known = self._steps.get(shape)
        if known is None or any(a is not b for a, b in zip(known.reads, reads, strict=True)):
            self._steps[shape] = known = self._capture(shape, reads)  # weights or cache have moved since
        return known

    def _capture(self, shape: _Shape, reads: tuple[object, ...]) -> _Captured:
        model, cache, plans = self.model, self.cache, self.plans  # the step holds no more than these
        numbers, (hidden, out) = self.numbers[shape.size], self._states[shape.size]
        if plans is not None:
            plans.ready(shape.size)

        def step() -> None:
            slots, positions = numbers[_SLOTS], numbers[_POSITIONS]
            attend: Decodes | PagedStep
            if plans is not None:  # its steps write K and V of all rows before any row attends
                attend = plans.step(shape.size, slots, positions)
            else:
                attend = decode_step_on_device(cache, slots, positions, shape.span, shape.in_row, shape.repeated)
            into = hidden if shape.start else model.embed(numbers[_IDS], numbers[_POSITIONS])
            out.copy_(model.run(into, shape.start, shape.end, attend))

        return _Captured(self._device.prepare(step), reads)
