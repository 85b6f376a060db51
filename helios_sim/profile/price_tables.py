"""Converts a profile's tables to the arrays that `core.price` reads, and compositions to its records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from helios_sim.core import machine
from helios_sim.core.layout import (
    CHUNK,
    ITERATION,
    NEVER,
    SPAN,
    WORK,
    FloatArray,
    IntArray,
    Record,
    Storage,
    Table,
    raw,
)
from helios_sim.core.operate import POINT, estimate
from helios_sim.core.price import (
    FIRST_OF_CLASS,
    FLOOR,
    OF_CLASS,
    OUTSIDE,
    SCALARS,
    TIME,
    ByRows,
    DecodeAttention,
    MixedAttention,
    PrefillAttention,
    PriceTables,
    UnequalLengths,
)
from helios_sim.profile.composition import Composition, PrefillChunk
from helios_sim.profile.formats import FP4, FP8, INT8
from helios_sim.profile.spec import HardwareSpec, ModelSpec, Runtime
from helios_sim.profile.tables import GridTable, LayerTables, MixedTable, RowsTable, UnequalTable

_ROOMS = 256  # rooms that are kept for each model and its bands
_DECODES = (False, True, True, False, False, False, False)  # `_Room.there` of plain decodes
_NO_POINT = np.zeros(8, np.int64), np.zeros(9)  # arguments of `estimate` for an operating point


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """Bands of layers: the start and end of each, and its layers of each class, (C, S)."""

    bounds: tuple[int, ...]
    starts: tuple[int, ...]
    class_layers: IntArray

    @classmethod
    def of(cls, bounds: tuple[int, ...], layer_class: Sequence[int], n_classes: int) -> Spans:
        """The bands that end at these depths. Raises ValueError unless they ascend within the model."""
        starts = (0, *bounds[:-1])
        if not bounds or any(b <= a for a, b in zip(starts, bounds, strict=True)) or bounds[-1] > len(layer_class):
            raise ValueError(f"bounds {bounds} must ascend from 1 to at most {len(layer_class)}")
        members = [layer_class[a:b] for a, b in zip(starts, bounds, strict=True)]
        return cls(bounds, starts, np.array([[m.count(c) for m in members] for c in range(n_classes)], np.int64))

    def table(self, storage: Storage) -> Table:
        return storage.filled(SPAN, zip(self.starts, self.bounds, strict=True))


class Pricing:
    """Prices compositions of one model on one card under one runtime, and provides its tables to the serving loop."""

    def __init__(
        self,
        model: ModelSpec,
        hardware: HardwareSpec,
        runtime: Runtime,
        classes: Sequence[LayerTables],
        layer_class: Sequence[int],
        head: RowsTable,
        check: RowsTable | None,
        check_classifier: RowsTable | None,
        embedding: RowsTable,
        factors: dict[str, float],
        padded_kv: bool,
    ) -> None:
        """`factors` are load_slowdown, mixed_factor, kv_factor, time_factor, and those of late layers."""
        checks = head if check is None else check
        # Without a classifier's table it is never read: the profile raises an error.
        by_classifier = checks if check_classifier is None else check_classifier
        self._parts = _Parts(classes, (head, checks, by_classifier, embedding), runtime.graph_batch_sizes)
        self.tables = _price_tables((self._parts,))
        self._scalars = _scalar_values(model, hardware, runtime, factors, padded_kv)
        self._layer_class, self._n_classes = tuple(layer_class), len(classes)
        self._spans: dict[tuple[int, ...], Spans] = {}
        self._laid_out: dict[tuple[bool, tuple[int, ...]], _LaidOut] = {}
        self._lock = Lock()  # guards the laid out tables

    def spans(self, bounds: tuple[int, ...]) -> Spans:
        found = self._spans.get(bounds)
        if found is None:
            found = self._spans[bounds] = Spans.of(bounds, self._layer_class, self._n_classes)
        return found

    def scalars(self, storage: Storage) -> Table:
        """The scalars as a table of one row."""
        names = SCALARS.dtype.names or ()
        return storage.filled(SCALARS, [[self._scalars[name] for name in names]])

    def with_drafter(self, other: Pricing, storage: Storage) -> tuple[PriceTables, Table, tuple[Table, Any]]:
        """Tables of both models, scalars of this one and of the drafter, and the drafter's band: all of its layers."""
        names, own = SCALARS.dtype.names or (), len(self._parts.classes)
        first = FIRST_OF_CLASS + OF_CLASS * (own + len(other._parts.classes))
        of_other = {**other._scalars, "of_model": first, "of_class": own}
        scalars = storage.filled(SCALARS, [[of[name] for name in names] for of in (self._scalars, of_other)])
        band = other.spans((len(other._layer_class),))
        layers = np.concatenate([np.zeros((own, 1), np.int64), band.class_layers])
        return _price_tables((self._parts, other._parts)), scalars, (band.table(storage), storage.array(layers))

    def time_s(self, c: Composition) -> FloatArray:
        return self._priced(c, TIME)[:, TIME]

    def floor_s(self, c: Composition) -> FloatArray:
        return self._priced(c, FLOOR)[:, FLOOR]

    def outside_grid(self, c: Composition) -> NDArray[np.bool_]:
        """(K,) whether a table had to be extrapolated."""
        return np.asarray(self._priced(c, OUTSIDE)[:, OUTSIDE], np.bool_)

    def decodes(self, layers: int, batch: IntArray, kv_tokens: IntArray, *asked: int) -> FloatArray:
        """(K, 3) prices (`_priced`) of iterations with nothing but decodes, all to one depth."""
        return self._found((layers,), len(batch), asked, lambda room: room.fill_decodes(batch, kv_tokens))

    def _priced(self, c: Composition, *asked: int) -> FloatArray:
        """(K, 3) time, floor and whether it is outside the grid, as far as they are asked for."""
        if c.prefill:
            if len(c.sampled_tokens) != 1:
                raise ValueError("a composition with prefill is one iteration")
            for chunk in c.prefill:
                if chunk.layers not in c.bounds:
                    raise ValueError(f"prefill depths {[p.layers for p in c.prefill]} must be among bounds {c.bounds}")
        how = (c.drafting, c.host_sync_at_checks, c.host_ahead, c.loading)
        return self._found(c.bounds, len(c.sampled_tokens), asked, lambda room: room.fill(c), c.prefill, how)

    def _found(
        self,
        bounds: tuple[int, ...],
        n: int,
        asked: tuple[int, ...],
        fill: Callable[[_Room], None],
        prefill: Sequence[PrefillChunk] = (),
        how: tuple[bool, ...] = (False, True, False, False),
    ) -> FloatArray:
        """Price n iterations that `fill` writes into their room. Interpreted, equal iterations are priced once.

        `how` has four flags: drafting, syncs at checks, the host ahead, and weights being loaded.
        """
        code, back = machine.loaded(), None
        with self._lock:
            at = self._laid_out.get((code is not None, bounds)) or self._lay_out(code, bounds)
            room = at.room(n, asked)
            fill(room)
            if code is None and n > 1:
                counts, back = np.unique(room.counts, axis=0, return_inverse=True)
                room = at.room(len(counts), asked)
                room.counts[:], room.there = counts, None
            it, chunks = at.iteration, at.chunk
            if len(prefill) > 1:
                chunks = at.storage.filled(CHUNK, [(0, p.tokens, p.context_tokens, p.layers) for p in prefill])
            for p in prefill[:1]:
                first = at.first_chunk
                first.tokens, first.context_tokens, first.layers = p.tokens, p.context_tokens, p.layers
            if at.how != (len(prefill), how):
                at.how = len(prefill), how
                it.chunks = len(prefill)
                it.drafting, it.syncs, it.host_ahead, it.loading = map(int, how)
            room.price(*at.tables, chunks, *room.read)
            found = room.found.copy()
        return found if back is None else found[back.ravel()]

    def _lay_out(self, code: machine.Machine | None, bounds: tuple[int, ...]) -> _LaidOut:
        storage, spans = Storage(compiled=code is not None), self.spans(bounds)
        iteration, chunk = storage.record(ITERATION), storage.rows(CHUNK, 1)
        tables = (
            storage.group(self.tables), self.scalars(storage), raw(iteration), spans.table(storage),
            storage.array(spans.class_layers), storage.rows(WORK, len(bounds)),
        )  # fmt: skip
        found = _LaidOut(code, storage, tables, iteration, chunk, storage.views(CHUNK, chunk)[0])
        self._laid_out[code is not None, bounds] = found
        return found


@dataclass(slots=True, eq=False)
class _Room:
    """Arrays for the work and the prices of K iterations."""

    price: Callable[..., int]  # the function for these arrays alone: a caller keeps the addresses of its arrays
    counts: IntArray
    found: FloatArray
    read: tuple[Any, ...]  # arguments of `estimate`: what is asked for, and both arrays
    there: tuple[bool, ...] | None = None  # which kinds of work were written; the others are 0 already

    def fill_decodes(self, decodes: IntArray, kv_tokens: IntArray) -> None:
        """Write iterations of one band with nothing but decodes."""
        counts = self.counts
        if self.there != _DECODES:
            counts[:, 1:3], counts[:, 3:] = NEVER, 0
            self.there = _DECODES
        counts[:, 0], counts[:, 3], counts[:, 4] = decodes, decodes, kv_tokens

    def fill(self, c: Composition) -> None:
        """Write compositions, (K, 3 + 6 S): sampled rows, least and most KV tokens, then each band's work by field."""
        counts = self.counts
        counts[:, 0] = c.sampled_tokens
        columns = (
            c.decode_tokens, c.decode_kv_tokens, c.check_tokens, c.classifier_tokens, c.propagated_tokens,
            c.verified_tokens,
        )  # fmt: skip
        spread = c.decode_kv_least is not None and c.decode_kv_most is not None
        there = (spread, *(column is not None for column in columns))
        if self.there != there:
            counts[:, 1:3], counts[:, 3:] = NEVER, 0
            self.there = there
        if c.decode_kv_least is not None and c.decode_kv_most is not None:
            counts[:, 1], counts[:, 2] = c.decode_kv_least, c.decode_kv_most
        for place, column in enumerate(columns, 3):
            if column is not None:
                counts[:, place::6] = column


@dataclass(slots=True, eq=False)
class _LaidOut:
    """Tables that `estimate` reads for a model with its layers cut into these bands, and arrays to work in."""

    code: machine.Machine | None
    storage: Storage
    tables: tuple[Any, ...]
    iteration: Record
    chunk: Table
    first_chunk: Record
    how: tuple[int, tuple[bool, ...]] | None = None  # flags and chunks that `iteration` holds now
    rooms: dict[Any, _Room] = field(default_factory=dict)  # by K and by what is asked for

    def room(self, n: int, asked: tuple[int, ...]) -> _Room:
        found = self.rooms.get((n, asked))
        if found is None:
            counts, prices = np.zeros((n, 3 + 6 * len(self.tables[3])), np.int64), np.zeros((n, 3))
            wanted = np.array([int(what in asked) for what in (TIME, FLOOR, OUTSIDE, POINT)])
            price = estimate if self.code is None else self.code.estimate()
            read = counts, wanted, prices, *_NO_POINT
            found = _Room(price, counts, prices, tuple(map(self.storage.array, read)))
            if len(self.rooms) < _ROOMS:
                self.rooms[n, asked] = found
        return found


class _Parts(NamedTuple):
    """The tables of one model from which price tables are made."""

    classes: Sequence[LayerTables]
    whole: tuple[RowsTable, RowsTable, RowsTable, RowsTable]  # head, check, classifier, embedding
    pad_to: tuple[int, ...] | None


def _price_tables(models: Sequence[_Parts]) -> PriceTables:
    """Make price tables. Only the dense part of a batch without prefill is padded to a graph's size.

    Classes of a further model follow those of the first; its tables of the whole model come after all classes.
    """
    sources, classes = list(models[0].whole), [tables for model in models for tables in model.classes]
    by_rows = [_by_rows(table) for table in sources]
    for model in models:
        for tables in model.classes:
            by_rows += [_by_rows(tables.dense), _by_rows(tables.dense, model.pad_to), _by_rows(tables.kv_projection)]
            sources += [tables.dense, tables.dense, tables.kv_projection]
    for model in models[1:]:
        by_rows += [_by_rows(table) for table in model.whole]
        sources += model.whole
    decode = [_Decode.of(tables.decode_attention) for tables in classes]
    prefill = [tables.prefill_attention for tables in classes]
    mixed = [tables.mixed_attention for tables in classes]
    unequal = [tables.unequal_kv for tables in classes]
    return PriceTables(
        ByRows(
            seconds=_stacked(by_rows),
            first=np.array([int(t.rows[0]) for t in sources], np.int64),
            last=np.array([int(t.rows[-1]) for t in sources], np.int64),
            slope_s=np.array([float((t.time_s[-1] - t.time_s[-2]) / (t.rows[-1] - t.rows[-2])) for t in sources]),
        ),
        DecodeAttention(
            seconds=_stacked([np.stack([t.values, t.slopes]) for t in decode]),
            kv=_stacked([t.kv for t in decode]),
            interval=_stacked([t.interval for t in decode]).astype(np.int64),
            first_batch=np.array([int(tables.decode_attention.first[0]) for tables in classes], np.int64),
            last_batch=np.array([int(tables.decode_attention.first[-1]) for tables in classes], np.int64),
            first_kv=np.array([int(tables.decode_attention.second[0]) for tables in classes], np.int64),
            last_kv=np.array([int(tables.decode_attention.second[-1]) for tables in classes], np.int64),
        ),
        PrefillAttention(
            seconds=_stacked([t.time_s.astype(np.float64) for t in prefill]),
            grid=_stacked([_stacked([t.first, t.second]) for t in prefill]).astype(np.int64),
            sizes=np.array([t.time_s.shape for t in prefill], np.int64),
            fixed_s=np.array([float(t.time_s.min()) for t in prefill]),
        ),
        MixedAttention(
            seconds=_stacked([np.zeros((0, 0, 0, 0)) if t is None else t.time_s.astype(np.float64) for t in mixed]),
            grid=_stacked([_axes(t) for t in mixed]).astype(np.int64),
            sizes=np.array([(0, 0, 0, 0) if t is None else t.time_s.shape for t in mixed], np.int64),
        ),
        unequal_lengths(unequal),
        np.array([tables.window for tables in classes], np.int64),
    )  # fmt: skip


def unequal_lengths(tables: Sequence[UnequalTable | None]) -> UnequalLengths:
    """The term for unequal lengths of each layer class; None for a class without it."""
    grids = [np.zeros((2, 0)) if t is None else _stacked([t.chunk, t.longest]) for t in tables]
    sizes = [
        (0, 0, 0, 0) if t is None else (len(t.chunk), len(t.longest), len(t.share), int(t.batch[-1])) for t in tables
    ]
    return UnequalLengths(
        share=_stacked([np.zeros((0, 0, 0, 0)) if t is None else _by_batch(t) for t in tables]),
        grid=_stacked(grids).astype(np.int64),
        of_long=_stacked([np.zeros(0) if t is None else t.share.astype(np.float64) for t in tables]),
        sizes=np.array(sizes, np.int64),
    )


def _by_rows(table: RowsTable, pad_to: tuple[int, ...] | None = None) -> FloatArray:
    """Seconds of every number of rows up to the last measured one; 0 rows take no time.

    With `pad_to`, rows are first raised to the next of these sizes; beyond the largest they are not padded.
    """
    end = int(table.rows[-1])
    values: FloatArray = np.interp(np.arange(end + 1), table.rows, table.time_s)
    values[0] = 0.0
    if sizes := sorted({s for s in pad_to or () if s <= end}):
        padded = np.array(sizes)[np.searchsorted(sizes, np.arange(sizes[-1] + 1))]
        values[1 : sizes[-1] + 1] = values[padded[1:]]
    return values


@dataclass(frozen=True, slots=True, eq=False)
class _Decode:
    """Decode attention at every batch up to the last measured one: seconds and slopes by interval of KV tokens."""

    values: FloatArray  # (batch, interval)
    slopes: FloatArray
    kv: FloatArray  # (interval,)
    interval: IntArray  # interval of each whole number of KV tokens; a mean is in that of its whole part

    @classmethod
    def of(cls, table: GridTable) -> _Decode:
        end_batch, end_kv = int(table.first[-1]), int(table.second[-1])
        batches = np.arange(end_batch + 1)
        values = np.stack([np.interp(batches, table.first, column) for column in table.time_s.T], axis=1)
        values[0] = 0.0
        slopes = np.diff(values, axis=1) / np.diff(table.second)
        slopes = np.concatenate([slopes, slopes[:, -1:]], axis=1)
        below = np.searchsorted(table.second, np.arange(end_kv + 1), side="right") - 1
        interval = np.maximum(below, 0).astype(np.int64)
        return cls(values, slopes, table.second.astype(np.float64), interval)


def _axes(table: MixedTable | None) -> FloatArray:
    if table is None:
        return np.zeros((4, 0))
    return _stacked([table.chunk, table.context, table.batch, table.kv])


def _by_batch(table: UnequalTable) -> FloatArray:
    """(C, batch + 1, G, P) excess at every batch, linear in between and constant beyond the edges."""
    batches = np.arange(int(table.batch[-1]) + 1)
    right = np.clip(np.searchsorted(table.batch, batches), 1, len(table.batch) - 1)
    low, high = table.batch[right - 1], table.batch[right]
    weight = np.clip((batches - low) / (high - low), 0.0, 1.0)[None, :, None, None]
    found: FloatArray = table.excess[:, right - 1] * (1.0 - weight) + table.excess[:, right] * weight
    return found


def _scalar_values(
    model: ModelSpec, hardware: HardwareSpec, runtime: Runtime, factors: dict[str, float], padded_kv: bool
) -> dict[str, float]:
    """The scalars of `core.price` by name. Costs of the runtime keep their names."""
    return {
        **dict(runtime.costs()),
        **factors,
        "hbm_bytes_per_s": float(hardware.hbm_bytes_per_s),
        "flops_per_s": float(hardware.flops_per_s),
        "layer_flops_per_s": _layer_rate(model, hardware),
        "attention_flops_per_s": _kv_rate(model, hardware),
        "head_values": model.vocab_size * model.d_model,
        "layer_values": model.layer_values,
        "layer_bytes": model.layer_bytes,
        "kv_values": 2 * model.d_model * model.kv_width,  # K and V projections of one layer
        "kv_weight_bytes": 2 * model.matrix_bytes(model.kv_width, model.d_model),
        "kv_bytes": model.kv_bytes_per_token_layer,
        "value_bytes": model.weight_bytes_per_value,
        "width": model.n_heads * model.head_dim,
        "padded_kv": int(padded_kv),
        "of_model": 0,
        "of_class": 0,
    }


def _layer_rate(model: ModelSpec, hardware: HardwareSpec) -> float:
    """Operations per second that no matrix product of a layer can exceed."""
    products = None if model.quantization is None else model.quantization.products
    rates = {FP8: hardware.fp8_flops_per_s, INT8: hardware.int8_flops_per_s, FP4: hardware.fp4_flops_per_s}
    return float(rates.get(products or "") or hardware.flops_per_s)


def _kv_rate(model: ModelSpec, hardware: HardwareSpec) -> float:
    """Operations per second that no attention can exceed: kernels may multiply K and V as they are stored."""
    of_fp8 = hardware.fp8_flops_per_s if model.kv_bytes_per_value == 1 else None
    return float(of_fp8 or hardware.flops_per_s)


def _stacked(arrays: Sequence[NDArray[Any]]) -> FloatArray:
    """Stack arrays with the same number of dimensions, smaller ones padded with zeros."""
    shape = tuple(max(sizes) for sizes in zip(*(array.shape for array in arrays), strict=True))
    found = np.zeros((len(arrays), *shape))
    for i, array in enumerate(arrays):
        part: Any = (i, *(slice(n) for n in array.shape))
        found[part] = array
    return found
