"""Prices one iteration by the same operations as `pricing` and `floor`, compiled. Knows no request and no policy.

Those are the definition; a test compares every bit. An iteration's `work` is its counts by band, in S or more columns
of WORK_ROWS rows, and its `chunks` of prompts are columns of CHUNK_ROWS rows, P or more.
"""

from __future__ import annotations

import numpy as np

from helios_sim.compiled import compiled
from helios_sim.profile.composition import IntArray
from helios_sim.profile.price_tables import (
    BY_CLASS,
    CHECK,
    CHECKED,
    CLASSIFIED,
    CLASSIFIER,
    CONTEXT,
    DECODE,
    DENSE,
    EMBEDDING,
    ENDS,
    FIRST_OF_CLASS,
    HEAD,
    KV,
    KV_PROJECTION,
    LAYERS,
    OF_CLASS,
    PADDED_DENSE,
    PROPAGATED,
    STARTS,
    TOKENS,
    PriceTables,
    Scalars,
)
from helios_sim.profile.tables import FloatArray

NS_PER_S = 1e9


@compiled
def whole_ns(seconds: float) -> int:
    return max(int(np.rint(seconds * NS_PER_S)), 1)


@compiled
def time_s(
    t: PriceTables,
    x: Scalars,
    bands: IntArray,
    work: IntArray,
    chunks: IntArray,
    n_chunks: int,
    sampled: int,
    syncs: int,
    loading: int,
) -> float:
    """`Pricing.time_s` of the work and the first so many of the chunks."""
    slowdown = x.load_slowdown if loading else 1.0
    mixed = x.mixed_factor if n_chunks and work[DECODE, 0] else 1.0
    total_s, layers = 0.0, 0
    rows = work[DECODE, 0]
    for p in range(n_chunks):
        rows += chunks[TOKENS, p]
    device_s = _by_rows_s(t.rows_s, t.rows_range, t.rows_slope_s, EMBEDDING, rows)
    for s in range(bands.shape[1]):
        rows, reach = work[DECODE, s], 0  # chunks that run this band
        for p in range(n_chunks):
            if chunks[LAYERS, p] > bands[STARTS, s]:
                rows += chunks[TOKENS, p]
                reach += 1
        moved, band_s = work[PROPAGATED, s], 0.0
        for c in range(bands.shape[0] - BY_CLASS):
            first = FIRST_OF_CLASS + c * OF_CLASS
            dense = first + (DENSE if n_chunks else PADDED_DENSE)
            decode_s = _decode_s(
                t.decode_s, t.decode_kv, t.decode_interval, t.decode_range, c, work[DECODE, s], work[KV, s]
            )
            layer_s = _by_rows_s(t.rows_s, t.rows_range, t.rows_slope_s, dense, rows) + decode_s * x.kv_factor
            if reach:
                fixed_s, over_s = t.prefill_fixed_s[c], 0.0
                for p in range(n_chunks):
                    if chunks[LAYERS, p] > bands[STARTS, s]:
                        chunk_s = _prefill_s(
                            t.prefill_s, t.prefill_grid, t.prefill_sizes, c, chunks[TOKENS, p], chunks[CONTEXT, p]
                        )
                        over_s += max(fixed_s, chunk_s) - fixed_s
                layer_s = (layer_s + (fixed_s + over_s)) * mixed
            kv_s = _by_rows_s(t.rows_s, t.rows_range, t.rows_slope_s, first + KV_PROJECTION, moved)
            band_s += bands[BY_CLASS + c, s] * (layer_s + kv_s)
        device_s += band_s
        if rows or moved:
            layers += bands[ENDS, s] - bands[STARTS, s]
        if work[CHECKED, s] or work[CLASSIFIED, s]:
            device_s += _by_rows_s(t.rows_s, t.rows_range, t.rows_slope_s, CHECK, work[CHECKED, s]) + _by_rows_s(
                t.rows_s, t.rows_range, t.rows_slope_s, CLASSIFIER, work[CLASSIFIED, s]
            )
            if syncs:
                total_s += _group_s(x, device_s, layers, slowdown) + x.sync_s
                device_s, layers = 0.0, 0
    if sampled or layers:
        head_s = _by_rows_s(t.rows_s, t.rows_range, t.rows_slope_s, HEAD, sampled)
        total_s += _group_s(x, device_s + head_s, layers, slowdown)
    total_s += x.host_overhead_s
    gap_s = x.gap_s + x.prefill_gap_s if n_chunks else x.gap_s
    return (total_s + gap_s) * x.time_factor


@compiled
def _group_s(x: Scalars, device_s: float, layers: int, slowdown: float) -> float:
    return max(device_s * slowdown, layers * x.launch_s_per_layer + x.launch_s_per_graph)


@compiled
def _by_rows_s(rows_s: FloatArray, rows_range: IntArray, slope_s: FloatArray, table: int, rows: int) -> float:
    """`RowLookup.scalar`."""
    end = rows_range[table, 1]
    if rows <= end:
        return rows_s[table, rows]
    return rows_s[table, end] + (rows - end) * slope_s[table]


@compiled
def _decode_s(
    decode_s: FloatArray, kv: FloatArray, interval: IntArray, ranges: IntArray, c: int, batch: int, kv_tokens: int
) -> float:
    """`DecodeLookup.scalar`."""
    if batch == 0:
        return 0.0
    end_batch, end_kv = ranges[c, 1], ranges[c, 3]
    mean = kv_tokens / batch
    j = interval[c, min(int(mean), end_kv)]
    at = min(batch, end_batch)
    seconds = decode_s[c, 0, at, j] + decode_s[c, 1, at, j] * (mean - kv[c, j])
    return seconds if batch <= end_batch else seconds * (batch / end_batch)


@compiled
def _prefill_s(
    prefill_s: FloatArray, grid: IntArray, sizes: IntArray, c: int, tokens: int, context_tokens: int
) -> float:
    """`PrefillLookup.scalar`, which is at least the fixed part besides."""
    i, other = _ends(grid[c, 0], sizes[c, 0], tokens)
    j, next_to = _ends(grid[c, 1], sizes[c, 1], context_tokens)
    beyond, width = context_tokens - grid[c, 1, j], grid[c, 1, next_to] - grid[c, 1, j]
    here_s = prefill_s[c, i, j] + (prefill_s[c, i, next_to] - prefill_s[c, i, j]) / width * beyond
    there_s = prefill_s[c, other, j] + (prefill_s[c, other, next_to] - prefill_s[c, other, j]) / width * beyond
    slope_s = (there_s - here_s) / (grid[c, 0, other] - grid[c, 0, i])
    return here_s + slope_s * (tokens - grid[c, 0, i])


@compiled
def _ends(grid: IntArray, n: int, value: int) -> tuple[int, int]:
    """The last of the first n points that is not above the value, at least the first one; and the one next to it."""
    at = 0
    while at + 1 < n and grid[at + 1] <= value:
        at += 1
    return at, at + 1 if at + 1 < n else at - 1


@compiled
def floor_s(x: Scalars, bands: IntArray, work: IntArray, chunks: IntArray, n_chunks: int, sampled: int) -> float:
    """`iteration_floor_s`. All counts are whole numbers."""
    head_bytes = x.head_values * x.value_bytes
    n_bytes, operations = head_bytes if sampled else 0, 2 * x.head_values * sampled
    for s in range(bands.shape[1]):
        layers, rows, moved = bands[ENDS, s] - bands[STARTS, s], work[DECODE, s], work[PROPAGATED, s]
        for p in range(n_chunks):
            if chunks[LAYERS, p] >= bands[ENDS, s]:
                rows += chunks[TOKENS, p]
        weights = 0
        if rows:
            weights = x.layer_values
        elif moved:
            weights = x.kv_values
        n_bytes += layers * (weights * x.value_bytes + work[KV, s] * x.kv_bytes)
        if work[CHECKED, s]:
            n_bytes += head_bytes
        operations += layers * (2 * (rows * x.layer_values + moved * x.kv_values) + 4 * x.width * work[KV, s])
        operations += 2 * x.head_values * work[CHECKED, s]
    for p in range(n_chunks):
        tokens, context = chunks[TOKENS, p], chunks[CONTEXT, p]
        pairs = tokens * context + tokens * (tokens + 1) // 2
        n_bytes += chunks[LAYERS, p] * context * x.kv_bytes
        operations += chunks[LAYERS, p] * 4 * x.width * pairs
    return max(n_bytes / x.hbm_bytes_per_s, operations / x.flops_per_s)


@compiled
def outside_grid(
    t: PriceTables, bands: IntArray, work: IntArray, chunks: IntArray, n_chunks: int, sampled: int
) -> bool:
    """`Pricing.outside_grid`."""
    outside = _rows_outside(t.rows_range, HEAD, sampled)
    all_rows = work[DECODE, 0]
    for p in range(n_chunks):
        all_rows += chunks[TOKENS, p]
    outside |= _rows_outside(t.rows_range, EMBEDDING, all_rows)
    classes = bands.shape[0] - BY_CLASS
    for s in range(bands.shape[1]):
        rows = work[DECODE, s]
        for p in range(n_chunks):
            if chunks[LAYERS, p] > bands[STARTS, s]:
                rows += chunks[TOKENS, p]
        for c in range(classes):
            first = FIRST_OF_CLASS + c * OF_CLASS
            outside |= _rows_outside(t.rows_range, first + DENSE, rows)
            outside |= _decode_outside(t.decode_range, c, work[DECODE, s], work[KV, s])
            outside |= _rows_outside(t.rows_range, first + KV_PROJECTION, work[PROPAGATED, s])
        outside |= _rows_outside(t.rows_range, CHECK, work[CHECKED, s])
        outside |= _rows_outside(t.rows_range, CLASSIFIER, work[CLASSIFIED, s])
    for c in range(classes):
        end_tokens = t.prefill_grid[c, 0, t.prefill_sizes[c, 0] - 1]
        end_context = t.prefill_grid[c, 1, t.prefill_sizes[c, 1] - 1]
        for p in range(n_chunks):
            tokens, context = chunks[TOKENS, p], chunks[CONTEXT, p]
            outside |= tokens < t.prefill_grid[c, 0, 0] or tokens > end_tokens
            outside |= context < t.prefill_grid[c, 1, 0] or context > end_context
    return outside


@compiled
def _rows_outside(rows_range: IntArray, table: int, rows: int) -> bool:
    return rows > rows_range[table, 1] or 0 < rows < rows_range[table, 0]


@compiled
def _decode_outside(ranges: IntArray, c: int, batch: int, kv_tokens: int) -> bool:
    if batch > ranges[c, 1] or kv_tokens > ranges[c, 3] * batch:
        return True
    return batch > 0 and (batch < ranges[c, 0] or kv_tokens < ranges[c, 2] * batch)
