"""Decode steps as captured graphs: one launch per segment of layers, captured per batch size, context span and segment.

Batches are padded up to a captured size. Padding rows write to the last position of a slot, which no text reaches, and
their results are not read. Only devices that capture graphs use this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helios_sim.live.device import Device, Step
from helios_sim.live.memory.kv import DecodeStep, KvCache
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.rows import Row

SIZES = (1, 2, 4, *range(8, 513, 8))  # batch sizes, as vLLM captures them by default
LEAST_SPAN = 128  # tokens of context; larger spans are powers of two
_IDS, _SLOTS, _POSITIONS = range(3)


@dataclass(frozen=True, slots=True)
class _Shape:
    """What is fixed in a captured step."""

    start: int
    end: int
    size: int
    span: int
    in_row: bool  # slots are 0, 1, ...


@dataclass(frozen=True, slots=True)
class _Captured:
    launch: Step
    hidden: Tensor  # (size, d_model), the input; not read by a first segment
    out: Tensor  # (size, d_model)
    reads: tuple[object, ...]  # weights and keys of its layers: the graph holds their addresses


class GraphedDecodes:
    """Captured decode steps of one model over one cache. A shape is captured when it first runs."""

    def __init__(self, model: SegmentedModel, cache: KvCache, device: Device) -> None:
        self._model, self._cache, self._device = model, cache, device
        self._steps: dict[_Shape, _Captured] = {}
        sizes = tuple(size for size in SIZES if size < cache.slots)
        self._sizes = (*sizes, cache.slots)
        on = cache.device
        self._numbers = {size: torch.zeros((3, size), dtype=torch.int64, device=on) for size in self._sizes}
        staged = device.host_empty(3 * 8 * cache.slots)
        self._staged = staged.view(torch.int64)  # the host writes here before one copy to the device

    @torch.inference_mode()
    def run(self, rows: Sequence[Row], hidden: Tensor | None, start: int, end: int) -> Tensor:
        """Hidden states (n, d_model) after layers start..end-1. `hidden` None: start from the rows' tokens.

        The result is valid until the same segment runs again.
        """
        n = len(rows)
        size = next(size for size in self._sizes if size >= n)
        span = self._span(max(row.position for row in rows) + 1)
        in_row = [row.slot for row in rows] == list(range(n))
        self._stage(rows, size, in_row)
        step = self._step(_Shape(start, end, size, span, in_row))
        if hidden is not None:
            step.hidden[:n].copy_(hidden)
        step.launch()
        return step.out[:n]

    def _span(self, tokens: int) -> int:
        span = LEAST_SPAN
        while span < tokens:
            span *= 2
        return min(span, self._cache.max_tokens)

    def _stage(self, rows: Sequence[Row], size: int, in_row: bool) -> None:
        """Copy token ids, slots and positions to the device at once."""
        n, last = len(rows), self._cache.max_tokens - 1
        padding = range(n, size) if in_row else [0] * (size - n)
        numbers = [
            [row.token for row in rows] + [0] * (size - n),
            [*(row.slot for row in rows), *padding],
            [row.position for row in rows] + [last] * (size - n),
        ]
        staged = self._staged[: 3 * size].view(3, size)
        staged.numpy()[:] = numbers
        self._numbers[size].copy_(staged, non_blocking=True)

    def _step(self, shape: _Shape) -> _Captured:
        of = slice(shape.start, shape.end)
        reads = (*self._model.layers[of], *self._cache.keys[of])
        known = self._steps.get(shape)
        if known is None or any(a is not b for a, b in zip(known.reads, reads, strict=True)):
            self._steps[shape] = known = self._capture(shape, reads)  # weights or cache have moved since
        return known

    def _capture(self, shape: _Shape, reads: tuple[object, ...]) -> _Captured:
        model, cache = self._model, self._cache
        numbers = self._numbers[shape.size]
        width = model.architecture.d_model
        hidden, out = (torch.zeros((shape.size, width), dtype=model.dtype, device=cache.device) for _ in range(2))

        def step() -> None:
            first = 0 if shape.in_row else None
            attend = DecodeStep.on_device(cache, numbers[_SLOTS], numbers[_POSITIONS], shape.span, first)
            into = hidden if shape.start else model.embed(numbers[_IDS], numbers[_POSITIONS])
            out.copy_(model.run(into, shape.start, shape.end, attend))

        return _Captured(self._device.prepare(step), hidden, out, reads)
