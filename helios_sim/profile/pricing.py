"""Time of an iteration from lookups and the host's costs. Knows no memory, no file and no policy.

Between two points at which the host waits for the device, both run side by side and the slower one counts. Without
checks that the host must see, an iteration is one such group; each check ends one. The host's own overhead comes on
top, unless it prepares the next iteration while this one runs (`host_ahead`, without such checks): then it is part of
the host's side. A gap of the runtime is time in which neither works.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from helios_sim.profile.composition import Composition, IntArray, PrefillChunk
from helios_sim.profile.lookup import DecodeLookup, Flags, PrefillLookup, RowLookup, columns
from helios_sim.profile.spec import Runtime
from helios_sim.profile.tables import FloatArray, LayerTables, RowsTable
from helios_sim.profile.term_lookup import MixedLookup, UnequalLookup

FEW = 8  # iterations times bands up to which plain numbers are quicker than arrays


class LayerPricing:
    """Lookups of one layer class. Only the dense part of a batch without prefill is padded to a graph's size."""

    def __init__(self, tables: LayerTables, pad_to: tuple[int, ...] | None, padded_kv: bool = False) -> None:
        self.padded_kv = padded_kv
        self.dense = RowLookup(tables.dense)
        self.padded_dense = RowLookup(tables.dense, pad_to)
        self.kv_projection = RowLookup(tables.kv_projection)
        self.decode_attention = DecodeLookup(tables.decode_attention)
        self.prefill_attention = PrefillLookup(tables.prefill_attention)
        self.mixed_attention = None if tables.mixed_attention is None else MixedLookup(tables.mixed_attention)
        self.unequal_kv = None if tables.unequal_kv is None else UnequalLookup(tables.unequal_kv)

    def decode_s(
        self, decode: int, kv: int, spread: tuple[int, int, int, int] | None, chunks: tuple[PrefillChunk, ...]
    ) -> float:
        """Attention of one iteration's decodes. `spread`: their sum, least and most KV tokens and their number."""
        if self.padded_kv and spread is not None:
            kv = decode * spread[2]
        longest = max(chunks, key=_size) if chunks else None
        if longest is None or self.mixed_attention is None:
            time_s = self.decode_attention.scalar(decode, kv)
        else:
            time_s = self.mixed_attention.scalar(longest.tokens, longest.context_tokens, decode, kv)
        if self.unequal_kv is None or spread is None:
            return time_s
        total, least, most, batch = spread
        chunk = 0 if longest is None else longest.tokens
        return time_s * (1.0 + self.unequal_kv.scalar(chunk, batch, total, least, most))

    def decodes_s(self, c: Composition) -> FloatArray:
        """(K, S) of iterations without prefill: `decode_s` of each."""
        time_s = self.decode_attention.array(c.decode_tokens, self.read_kv_tokens(c))
        if self.unequal_kv is None or c.decode_kv_least is None or c.decode_kv_most is None:
            return time_s
        excess = self.unequal_kv.array(
            c.decode_tokens[:, 0], c.decode_kv_tokens[:, 0], c.decode_kv_least, c.decode_kv_most
        )
        slower_s: FloatArray = time_s * (1.0 + excess)[:, None]
        return slower_s

    def read_kv_tokens(self, c: Composition) -> IntArray:
        """(K, S) that the decodes attend to, or where contexts are padded: that they read."""
        if self.padded_kv and c.decode_kv_most is not None:
            return c.decode_tokens * c.decode_kv_most[:, None]
        return c.decode_kv_tokens


def _size(chunk: PrefillChunk) -> tuple[int, int]:
    return chunk.tokens, chunk.context_tokens


class Bands:
    """What pricing needs to know of a composition's bounds: layers per band, in all and of each class."""

    def __init__(self, bounds: tuple[int, ...], layer_class: Sequence[int], n_classes: int) -> None:
        starts = (0, *bounds[:-1])
        if not bounds or any(b <= a for a, b in zip(starts, bounds, strict=True)) or bounds[-1] > len(layer_class):
            raise ValueError(f"bounds {bounds} must ascend from 1 to at most {len(layer_class)}")
        self.starts = starts
        self.layers = tuple(b - a for a, b in zip(starts, bounds, strict=True))
        members = [layer_class[a:b] for a, b in zip(starts, bounds, strict=True)]
        self.of_class = tuple(tuple(m.count(c) for m in members) for c in range(n_classes))
        self.of_class_array = tuple(np.array(counts, dtype=np.int64) for counts in self.of_class)


class Pricing:
    """Prices compositions of one model on one card under one runtime."""

    def __init__(
        self,
        classes: Sequence[LayerTables],
        layer_class: Sequence[int],
        head: RowsTable,
        check: RowsTable | None,
        embedding: RowsTable,
        runtime: Runtime,
        load_slowdown: float,
        mixed_factor: float | None,
        unequal_kv_factor: float | None,
        time_factor: float,
        check_classifier: RowsTable | None = None,
        padded_kv: bool = False,
    ) -> None:
        self.classes = tuple(LayerPricing(tables, runtime.graph_batch_sizes, padded_kv) for tables in classes)
        self._layer_class = tuple(layer_class)
        self.head = RowLookup(head)
        self.check = self.head if check is None else RowLookup(check)
        # without a table nothing asks for it: the profile refuses
        self.classifier = self.check if check_classifier is None else RowLookup(check_classifier)
        self.embedding = RowLookup(embedding)
        self.runtime = runtime
        self.load_slowdown = load_slowdown
        self.mixed_factor = 1.0 if mixed_factor is None else mixed_factor
        self.kv_factor = 1.0 if unequal_kv_factor is None else unequal_kv_factor
        self.time_factor = time_factor
        self._bands: dict[tuple[int, ...], Bands] = {}

    def bands(self, bounds: tuple[int, ...]) -> Bands:
        found = self._bands.get(bounds)
        if found is None:
            found = self._bands[bounds] = Bands(bounds, self._layer_class, len(self.classes))
        return found

    def time_s(self, c: Composition) -> FloatArray:
        iterations = len(c.sampled_tokens)
        if c.prefill and iterations != 1:
            raise ValueError("a composition with prefill is one iteration")
        if iterations == 1 or iterations * len(c.bounds) <= FEW:
            return np.array([self._one(c, i) for i in range(iterations)])
        return self._many(c)

    def _one(self, c: Composition, i: int) -> float:
        """Iteration i, with or without prefill, in plain floats: numpy calls would cost more than the sums."""
        bands, runtime = self.bands(c.bounds), self.runtime
        decode, kv = c.decode_tokens[i].tolist(), c.decode_kv_tokens[i].tolist()
        propagated = None if c.propagated_tokens is None else c.propagated_tokens[i].tolist()
        checks = None if c.check_tokens is None else c.check_tokens[i].tolist()
        classified = None if c.classifier_tokens is None else c.classifier_tokens[i].tolist()
        spread = None
        if c.decode_kv_least is not None and c.decode_kv_most is not None:
            spread = kv[0], int(c.decode_kv_least[i]), int(c.decode_kv_most[i]), decode[0]
        sampled = int(c.sampled_tokens[i])
        slowdown = self.load_slowdown if c.loading else 1.0
        mixed = self.mixed_factor if c.prefill and decode[0] else 1.0
        total_s, layers = 0.0, 0
        rows, chunks = decode[0], c.prefill
        if chunks:
            rows += sum(p.tokens for p in chunks)
        device_s = self.embedding.scalar(rows)
        for s, band_layers in enumerate(bands.layers):
            rows = decode[s]
            if c.prefill:
                chunks = tuple(p for p in c.prefill if p.layers > bands.starts[s])
                if any(p.layers < c.bounds[s] for p in chunks):
                    raise ValueError(f"prefill depths {[p.layers for p in c.prefill]} must be among bounds {c.bounds}")
                rows += sum(p.tokens for p in chunks)
            moved = 0 if propagated is None else propagated[s]
            band_s = 0.0
            for layer, counts in zip(self.classes, bands.of_class, strict=True):
                dense = layer.dense if c.prefill else layer.padded_dense
                decode_s = layer.decode_s(decode[s], kv[s], spread, chunks)
                layer_s = dense.scalar(rows) + decode_s * self.kv_factor
                if chunks:
                    attention, over_s = layer.prefill_attention, 0.0
                    for p in chunks:  # one by one: from Python 3.12 on `sum` rounds floats in another way
                        over_s += attention.scalar(p.tokens, p.context_tokens) - attention.fixed_s
                    layer_s = (layer_s + (attention.fixed_s + over_s)) * mixed
                band_s += counts[s] * (layer_s + layer.kv_projection.scalar(moved))
            device_s += band_s
            if rows or moved:
                layers += band_layers
            by_head = 0 if checks is None else checks[s]
            by_classifier = 0 if classified is None else classified[s]
            if by_head or by_classifier:
                device_s += self.check.scalar(by_head) + self.classifier.scalar(by_classifier)
                if c.host_sync_at_checks:
                    total_s += self._group_s(device_s, layers, slowdown) + runtime.sync_s
                    device_s, layers = 0.0, 0
        if sampled or layers:
            total_s += self._group_s(device_s + self.head.scalar(sampled), layers, slowdown)
        if c.host_ahead:
            total_s = max(total_s, self._launch_s(layers) + runtime.host_overhead_s)
        else:
            total_s += runtime.host_overhead_s
        gap_s = runtime.gap_s + runtime.prefill_gap_s if c.prefill else runtime.gap_s
        return (total_s + gap_s) * self.time_factor

    def _launch_s(self, layers: int) -> float:
        return layers * self.runtime.launch_s_per_layer + self.runtime.launch_s_per_graph

    def _group_s(self, device_s: float, layers: int, slowdown: float) -> float:
        return max(device_s * slowdown, self._launch_s(layers))

    def _many(self, c: Composition) -> FloatArray:
        """Many iterations without prefill; the operations of `_one`, in its order, over arrays of shape (K, S)."""
        bands, runtime = self.bands(c.bounds), self.runtime
        slowdown = self.load_slowdown if c.loading else 1.0
        band_s: FloatArray | float = 0.0
        for layer, counts in zip(self.classes, bands.of_class_array, strict=True):
            attention_s = layer.decodes_s(c) * self.kv_factor
            layer_s = layer.padded_dense.array(c.decode_tokens) + attention_s
            if c.propagated_tokens is not None:
                layer_s = layer_s + layer.kv_projection.array(c.propagated_tokens)
            band_s = band_s + counts * layer_s
        assert isinstance(band_s, np.ndarray)
        active = c.decode_tokens > 0
        if c.propagated_tokens is not None:
            active |= c.propagated_tokens > 0
        layers_run = active * np.array(bands.layers)
        check_s: FloatArray | None = None
        checked: IntArray | None = None
        for tokens, table in ((c.check_tokens, self.check), (c.classifier_tokens, self.classifier)):
            if tokens is not None:
                check_s = table.array(tokens) if check_s is None else check_s + table.array(tokens)
                checked = tokens if checked is None else checked + tokens

        total_s: FloatArray = np.zeros(c.n_iterations)
        layers: IntArray = np.zeros(c.n_iterations, dtype=np.int64)
        device_s = self.embedding.array(c.decode_tokens[:, 0])
        for s in range(len(bands.layers)):
            device_s = device_s + band_s[:, s]
            layers = layers + layers_run[:, s]
            if check_s is not None and checked is not None:
                device_s = device_s + check_s[:, s]
                if c.host_sync_at_checks:
                    ends = checked[:, s] > 0
                    if ends.any():
                        group_s = self._groups_s(device_s, layers, slowdown) + runtime.sync_s
                        total_s = np.where(ends, total_s + group_s, total_s)
                        device_s, layers = np.where(ends, 0.0, device_s), np.where(ends, 0, layers)
        last_s = self._groups_s(device_s + self.head.array(c.sampled_tokens), layers, slowdown)
        runs = (c.sampled_tokens > 0) | (layers > 0)
        total_s = np.where(runs, total_s + last_s, total_s)
        if c.host_ahead:
            host_s = (layers * runtime.launch_s_per_layer + runtime.launch_s_per_graph) + runtime.host_overhead_s
            total_s = np.maximum(total_s, host_s)
        else:
            total_s = total_s + runtime.host_overhead_s
        return (total_s + runtime.gap_s) * self.time_factor

    def _groups_s(self, device_s: FloatArray, layers: IntArray, slowdown: float) -> FloatArray:
        host_s = layers * self.runtime.launch_s_per_layer + self.runtime.launch_s_per_graph
        slower_s: FloatArray = np.maximum(device_s * slowdown, host_s)
        return slower_s

    def outside_grid(self, c: Composition) -> NDArray[np.bool_]:
        """(K,) true where a table had to be extrapolated."""
        bands = self.bands(c.bounds)
        decode, kv = columns(c.decode_tokens), columns(self.classes[0].read_kv_tokens(c))
        outside: Flags = self.head.outside(columns(c.sampled_tokens[:, None])[0])
        for layer in self.classes:
            for s, start in enumerate(bands.starts):
                rows = decode[s] + sum(p.tokens for p in c.prefill if p.layers > start)
                outside = outside | layer.dense.outside(rows) | layer.decode_attention.outside(decode[s], kv[s])
            outside = outside | any(layer.prefill_attention.outside(p.tokens, p.context_tokens) for p in c.prefill)
            if c.propagated_tokens is not None:
                for moved in columns(c.propagated_tokens):
                    outside = outside | layer.kv_projection.outside(moved)
        outside = outside | self.embedding.outside(decode[0] + sum(p.tokens for p in c.prefill))
        for tokens, table in ((c.check_tokens, self.check), (c.classifier_tokens, self.classifier)):
            if tokens is not None:
                for checked in columns(tokens):
                    outside = outside | table.outside(checked)
        return np.atleast_1d(outside)
