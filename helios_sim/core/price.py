"""The price of one iteration: its time, its roofline floor, and whether a table had to be extrapolated.

Host and device work side by side between two points at which the host waits for the device; the slower one counts.
Each check that the host must see is such a point; without one, the whole iteration is one group. The host's own
overhead is added, unless the host prepares the next iteration while this one runs (`iteration.host_ahead`, without such
checks): then it is part of the host's side. A gap of the runtime is time in which neither works. Draft passes are
launched together with the verification, so the host's overhead and the gap are paid once for all of them.

Rows that verify drafts go through matrix products like any other row. Their attention reads the K and V of a request
once, together with the request's first row, as kernels do that process several queries in a tile. So memory-bound
attention takes as long as for one row.

Tables are linear inside the measured grid. Beyond it rows, prompts and KV lengths go on with the last slope, and
batches in proportion. Tables of several layer classes differ in size; they lie in arrays as large as the largest.
"""

from __future__ import annotations

from typing import NamedTuple

from helios_sim.core.layout import FOREVER_NS, NEVER, Kind, Numbers, Record, Table

NS_PER_S = 1e9
# Tables by number of rows: four of the model, then three for each layer class.
HEAD, CHECK, CLASSIFIER, EMBEDDING, FIRST_OF_CLASS = range(5)
DENSE, PADDED_DENSE, KV_PROJECTION, OF_CLASS = range(4)
# Axes of the term for decodes beside a chunk, and of the term for unequal lengths.
CHUNK_AXIS, CONTEXT_AXIS, BATCH_AXIS, KV_AXIS = range(4)
LENGTH_AXIS = 1
TIME, FLOOR, OUTSIDE = range(3)  # quantities that `price_many` computes

SCALARS = Kind.of(
    "ScalarsRow",
    (
        "head_values", "layer_values", "layer_bytes", "kv_values", "kv_weight_bytes",  # for the floor, as are
        "kv_bytes", "value_bytes", "width",
        "padded_kv",
        "of_model", "of_class",  # first table by rows and first class of this model: tables may hold two models
        "resident_layers",  # layers above this come from host memory in each iteration that runs them
    ),
    floats=(
        "launch_s_per_layer", "launch_s_per_graph", "sync_s", "host_overhead_s", "host_s_per_request", "gap_s",
        "prefill_gap_s", "gap_s_per_request", "prefill_launch_s_per_layer", "regroup_s",
        "load_slowdown", "mixed_factor", "kv_factor", "time_factor", "hbm_bytes_per_s", "flops_per_s",
        "layer_flops_per_s", "attention_flops_per_s",
        "late_s_per_layer", "late_write_s_per_layer",  # a late layer's time on the link, and on the card's memory
    ),
)  # fmt: skip


class ByRows(NamedTuple):
    """Times by number of rows, R tables."""

    seconds: Numbers  # (R, rows); no rows take no time
    first: Numbers  # (R,) rows measured
    last: Numbers
    slope_s: Numbers  # (R,) beyond the last


class DecodeAttention(NamedTuple):
    """Attention of decodes by batch size and mean KV tokens, for C layer classes."""

    seconds: Numbers  # (C, 2, batch, interval) and their slopes
    kv: Numbers  # (C, interval) KV tokens at which each interval begins
    interval: Numbers  # (C, KV tokens) the interval of each whole number
    first_batch: Numbers  # (C,) smallest measured batch
    last_batch: Numbers
    first_kv: Numbers  # (C,) fewest measured KV tokens
    last_kv: Numbers


class PrefillAttention(NamedTuple):
    """Attention of a chunk by its new tokens and the context before it."""

    seconds: Numbers  # (C, tokens, context)
    grid: Numbers  # (C, 2, points) of new tokens and of context
    sizes: Numbers  # (C, 2) points of each axis
    fixed_s: Numbers  # (C,)


class MixedAttention(NamedTuple):
    """Time that decodes add beside a chunk, for layer classes with this term."""

    seconds: Numbers  # (C, chunk, context, batch, KV)
    grid: Numbers  # (C, 4, points)
    sizes: Numbers  # (C, 4); 0: no such term


class UnequalLengths(NamedTuple):
    """Share by which decodes of unequal lengths take longer, for layer classes with this term."""

    share: Numbers  # (C, chunk, batch, longest, share of the long ones)
    grid: Numbers  # (C, 2, points) chunk and longest
    of_long: Numbers  # (C, points) share of the long ones
    sizes: Numbers  # (C, 4) chunk, longest, share of the long ones, last batch; 0: no such term


class PriceTables(NamedTuple):
    """All tables of a profile. Each array is as large as its largest table needs."""

    rows: ByRows
    decode: DecodeAttention
    prefill: PrefillAttention
    mixed: MixedAttention
    unequal: UnequalLengths
    windows: Numbers  # (C,) attention window of the class in tokens; 0 if it is not limited


def whole_ns(seconds: float) -> int:
    """A duration in whole nanoseconds, halves rounded to even, at least 1, so that time always advances.

    FOREVER_NS if it is not finite or does not fit: the loop then stops with HORIZON, and the server raises an error.
    """
    ns = seconds * NS_PER_S
    if not -FOREVER_NS < ns < FOREVER_NS:
        return FOREVER_NS
    whole = round(ns)
    return whole if whole > 1 else 1


def time_s(
    t: PriceTables, x: Record, it: Record, spans: Table, class_layers: Numbers, work: Table, chunks: Table, bands: int
) -> float:
    """Seconds of one iteration: `it` has its chunks and sampled rows, `work` its rows by band.

    `spans` are the bands, of which the first `bands` are priced; `class_layers` (C, bands) is the number of layers of
    each class in each band.
    """
    # Local names hold what is read once an iteration: interpreted, each look and each call takes time, and so do
    # `max`, `min` and empty loops.
    n_chunks, by_rows = it.chunks, t.rows
    slowdown = x.load_slowdown if it.loading else 1.0
    decodes = work[it.first_band].decode_tokens
    mixed = x.mixed_factor if n_chunks and decodes else 1.0
    launch_s = _launch_s_per_layer(x, n_chunks)
    classes, dense = len(class_layers), DENSE if n_chunks else PADDED_DENSE
    total_s, layers = 0.0, 0
    rows = work[0].decode_tokens
    if n_chunks:
        for p in range(n_chunks):
            rows += chunks[p].tokens
    device_s = _by_rows_s(by_rows, x.of_model + EMBEDDING, rows)
    for s in range(bands):
        span, w = spans[s], work[s]
        rows = w.decode_tokens + w.verified_tokens
        reach, longest = 0, NEVER  # chunks that run this band, and the longest of them
        if n_chunks:
            for p in range(n_chunks):
                chunk = chunks[p]
                if chunk.layers > span.start:
                    rows += chunk.tokens
                    reach += 1
                    if longest == NEVER or _is_longer(chunk, chunks[longest]):
                        longest = p
        moved = w.propagated_tokens
        if rows or moved:
            layers += span.end - span.start
        chunk_tokens, chunk_context = 0, 0
        if reach:
            chunk_tokens, chunk_context = chunks[longest].tokens, chunks[longest].context_tokens
        band_s = 0.0
        for c in range(x.of_class, classes):
            first, layer_s = FIRST_OF_CLASS + c * OF_CLASS, 0.0
            if rows:
                layer_s = _by_rows_s(by_rows, first + dense, rows)
                if w.decode_tokens:
                    layer_s += _decodes_s(t, x, it, c, work, w, reach, chunk_tokens, chunk_context) * x.kv_factor
            if reach:
                fixed_s, over_s = t.prefill.fixed_s[c], 0.0
                for p in range(n_chunks):
                    chunk = chunks[p]
                    if chunk.layers > span.start:
                        chunk_s = _prefill_s(t.prefill, c, chunk.tokens, chunk.context_tokens)
                        over_s += max(fixed_s, chunk_s) - fixed_s
                layer_s = (layer_s + (fixed_s + over_s)) * mixed
            if moved:
                layer_s += _by_rows_s(by_rows, first + KV_PROJECTION, moved)
            band_s += class_layers[c, s] * layer_s
        device_s += band_s
        checked, classified = w.checked_tokens, w.classified_tokens
        if checked or classified:
            by_head_s = _by_rows_s(by_rows, x.of_model + CHECK, checked)
            device_s += by_head_s + _by_rows_s(by_rows, x.of_model + CLASSIFIER, classified)
            if it.syncs:
                total_s += _later_s(device_s * slowdown, layers * launch_s + x.launch_s_per_graph) + x.sync_s
                device_s, layers = 0.0, 0
    sampled = it.sampled_tokens
    if sampled or layers:
        device_s += _by_rows_s(by_rows, x.of_model + HEAD, sampled)
        total_s += _later_s(device_s * slowdown, layers * launch_s + x.launch_s_per_graph)
    if it.drafting:
        total_s *= x.time_factor
    else:
        host_s = x.host_overhead_s + x.host_s_per_request * (decodes + n_chunks)
        if it.host_ahead:
            total_s = _later_s(total_s, layers * launch_s + x.launch_s_per_graph + host_s)
        else:
            total_s += host_s
        if it.splits:
            total_s += x.regroup_s
        gap_s = x.gap_s + x.prefill_gap_s if n_chunks else x.gap_s
        gap_s += x.gap_s_per_request * (decodes + n_chunks)
        total_s = (total_s + gap_s) * x.time_factor
    if spans[bands - 1].end > x.resident_layers:
        total_s = _with_late_layers_s(x, it, spans, work, chunks, bands, total_s)
    return total_s


def _with_late_layers_s(
    x: Record, it: Record, spans: Table, work: Table, chunks: Table, bands: int, total_s: float
) -> float:  # fmt: skip
    """Seconds of the iteration if some layers come from host memory meanwhile: the slower of the link and all else.

    Late layers come one after the other throughout the iteration, each into the room of one that has run. Writing them
    takes memory bandwidth from the kernels. Beside a load they have half of the link, and the slowdown of loads stands
    for the bandwidth of both.
    """
    layers = 0
    for s in range(bands):
        late = spans[s].end - max(spans[s].start, x.resident_layers)
        if late > 0:
            used = work[s].decode_tokens + work[s].verified_tokens + work[s].propagated_tokens > 0
            for p in range(it.chunks):
                used = used or chunks[p].layers > spans[s].start
            layers += late if used else 0
    link_s, write_s = layers * x.late_s_per_layer, layers * x.late_write_s_per_layer
    late_s = max(total_s, 2 * link_s) if it.loading else max(total_s + write_s, link_s)
    it.late_layers += layers
    it.late_ns += whole_ns(late_s) - whole_ns(total_s)
    return late_s


def price_many(
    t: PriceTables,
    scalar_table: Table,
    iterations: Table,
    spans: Table,
    class_layers: Numbers,
    work: Table,
    chunks: Table,
    counts: Numbers,
    asked: Numbers,
    found: Numbers,
) -> int:
    """Compute `time_s`, `floor_s` and `outside_grid` of K iterations, into `found` (K, 3). Returns K.

    `asked` (3,) says which of the three are computed. `counts` (K, 3 + 6 S) has the sampled rows, the least and most KV
    tokens, then the fields of `work` for each of S bands. `scalar_table` and `iterations` have one row each; each of
    the K iterations has the chunks of `iterations`.
    """
    it = iterations[0]
    for k in range(counts.shape[0]):
        it.sampled_tokens = counts[k, 0]
        it.kv_least = counts[k, 1]
        it.kv_most = counts[k, 2]
        for s in range(len(spans)):
            w, at = work[s], 3 + 6 * s
            w.decode_tokens = counts[k, at]
            w.kv_tokens = counts[k, at + 1]
            w.checked_tokens = counts[k, at + 2]
            w.classified_tokens = counts[k, at + 3]
            w.propagated_tokens = counts[k, at + 4]
            w.verified_tokens = counts[k, at + 5]
        price_one(t, scalar_table, iterations, spans, class_layers, work, chunks, asked, found, k)
    return counts.shape[0]


def price_one(
    t: PriceTables,
    scalar_table: Table,
    iterations: Table,
    spans: Table,
    class_layers: Numbers,
    work: Table,
    chunks: Table,
    asked: Numbers,
    found: Numbers,
    k: int,
) -> None:
    """Compute what `asked` says of the iteration in `iterations` and `work`, into the k-th row of `found`."""
    x, it = scalar_table[0], iterations[0]
    if asked[TIME]:
        found[k, TIME] = time_s(t, x, it, spans, class_layers, work, chunks, len(spans))
    if asked[FLOOR]:
        found[k, FLOOR] = floor_s(t.windows, x, it, spans, class_layers, work, chunks)
    if asked[OUTSIDE]:
        found[k, OUTSIDE] = outside_grid(t, x, it, spans, class_layers, work, chunks)


def floor_s(
    windows: Numbers, x: Record, it: Record, spans: Table, class_layers: Numbers, work: Table, chunks: Table
) -> float:
    """Roofline floor in seconds that no kernel on this card can beat: max(bytes / bandwidth, operations / peak), where

    bytes = weights of each band that runs (only K and V projections in a band that only propagates), K and V read, and
    the LM head for each check and for sampling; operations = 2 per weight and row, 4 per query, key and head width in
    attention. Activations are left out, which keeps it a floor. A layer with a window reads no more K and V than the
    window. Quantized weights, and K and V in fp8, may be multiplied at rates of their own.
    """
    n_chunks, sampled, classes = it.chunks, it.sampled_tokens, len(class_layers)
    head_bytes = x.head_values * x.value_bytes
    n_bytes, operations = head_bytes if sampled else 0, 2 * x.head_values * sampled
    of_layers, of_attention = 0, 0
    for s in range(len(spans)):
        span, w = spans[s], work[s]
        layers, decodes, moved, checked = span.end - span.start, w.decode_tokens, w.propagated_tokens, w.checked_tokens
        rows, of_decodes = decodes + w.verified_tokens, w.kv_tokens
        if n_chunks:
            for p in range(n_chunks):
                if chunks[p].layers >= span.end:
                    rows += chunks[p].tokens
        if checked:
            n_bytes += head_bytes
            operations += 2 * x.head_values * checked
        if moved:
            of_layers += layers * 2 * moved * x.kv_values
            n_bytes += 0 if rows else layers * x.kv_weight_bytes
        if rows == 0:
            continue
        n_bytes += layers * x.layer_bytes
        of_layers += layers * 2 * rows * x.layer_values
        for c in range(x.of_class, classes):
            of_class, window, read = class_layers[c, s], windows[c], of_decodes
            if window and decodes * window < read:
                read = decodes * window
            pairs = read
            if n_chunks:
                for p in range(n_chunks):
                    chunk = chunks[p]
                    if chunk.layers >= span.end:
                        read += chunk.context_tokens if window == 0 else min(chunk.context_tokens, window)
                        pairs += _pairs(chunk.tokens, chunk.context_tokens, window)
            n_bytes += of_class * read * x.kv_bytes
            of_attention += of_class * 4 * x.width * pairs
    flops_per_s, of_layers_per_s, of_attention_per_s = x.flops_per_s, x.layer_flops_per_s, x.attention_flops_per_s
    if of_layers_per_s == flops_per_s and of_attention_per_s == flops_per_s:
        compute_s = (operations + of_layers + of_attention) / flops_per_s
    else:
        compute_s = operations / flops_per_s + of_layers / of_layers_per_s
        compute_s += of_attention / of_attention_per_s
    return _later_s(n_bytes / x.hbm_bytes_per_s, compute_s)


def _pairs(tokens: int, context: int, window: int) -> int:
    """Pairs of query and key of new tokens after a context, each looking back over `window` tokens, 0 for all."""
    growing = tokens if window == 0 else min(tokens, max(window - context, 0))  # tokens that see all before them
    return growing * context + growing * (growing + 1) // 2 + (tokens - growing) * window


def outside_grid(
    t: PriceTables, x: Record, it: Record, spans: Table, class_layers: Numbers, work: Table, chunks: Table
) -> bool:
    """Whether a table had to be extrapolated."""
    n_chunks, first, last, classes = it.chunks, t.rows.first, t.rows.last, len(class_layers)
    rows = work[0].decode_tokens
    if n_chunks:
        for p in range(n_chunks):
            rows += chunks[p].tokens
    own = x.of_model
    if _rows_outside(first, last, own + HEAD, it.sampled_tokens) or _rows_outside(first, last, own + EMBEDDING, rows):
        return True
    for s in range(len(spans)):
        w = work[s]
        decodes, moved, kv_tokens = w.decode_tokens, w.propagated_tokens, _read_kv_tokens(x, it, w)
        rows, checked, classified = decodes + w.verified_tokens, w.checked_tokens, w.classified_tokens
        if n_chunks:
            for p in range(n_chunks):
                if chunks[p].layers > spans[s].start:
                    rows += chunks[p].tokens
        for c in range(x.of_class, classes):
            table = FIRST_OF_CLASS + c * OF_CLASS
            if rows and _rows_outside(first, last, table + DENSE, rows):
                return True
            if decodes and _decode_outside(t.decode, c, decodes, kv_tokens):
                return True
            if moved and _rows_outside(first, last, table + KV_PROJECTION, moved):
                return True
        if checked and _rows_outside(first, last, own + CHECK, checked):
            return True
        if classified and _rows_outside(first, last, own + CLASSIFIER, classified):
            return True
    if n_chunks:
        for c in range(x.of_class, classes):
            if _chunk_outside(t.prefill, c, n_chunks, chunks):
                return True
    return False


def _chunk_outside(t: PrefillAttention, c: int, n_chunks: int, chunks: Table) -> bool:
    last_tokens, last_context = t.grid[c, 0, t.sizes[c, 0] - 1], t.grid[c, 1, t.sizes[c, 1] - 1]
    for p in range(n_chunks):
        tokens, context = chunks[p].tokens, chunks[p].context_tokens
        if tokens < t.grid[c, 0, 0] or tokens > last_tokens or context < t.grid[c, 1, 0] or context > last_context:
            return True
    return False


def _is_longer(chunk: Record, other: Record) -> bool:
    if chunk.tokens != other.tokens:
        return chunk.tokens > other.tokens
    return chunk.context_tokens > other.context_tokens


def _launch_s_per_layer(x: Record, n_chunks: int) -> float:
    return _later_s(x.launch_s_per_layer, x.prefill_launch_s_per_layer) if n_chunks else x.launch_s_per_layer


def _later_s(one_s: float, other_s: float) -> float:
    """The later end of two activities that run side by side."""
    return other_s if other_s > one_s else one_s


def _by_rows_s(t: ByRows, table: int, rows: int) -> float:
    """Seconds of `rows` rows; 0 rows take no time."""
    end = t.last[table]
    if rows <= end:
        return t.seconds[table, rows]
    return t.seconds[table, end] + (rows - end) * t.slope_s[table]


def _read_kv_tokens(x: Record, it: Record, w: Record) -> int:
    """KV tokens that a band's decodes read. If contexts are padded, each row reads as far as the longest."""
    if x.padded_kv and it.kv_most != NEVER:
        return w.decode_tokens * it.kv_most
    return w.kv_tokens


def _decodes_s(
    t: PriceTables, x: Record, it: Record, c: int, work: Table, w: Record, reach: int, chunk: int, context: int
) -> float:
    """Seconds of the attention of a band's decodes, beside the longest chunk if there is one (`reach`)."""
    kv_tokens = _read_kv_tokens(x, it, w)
    if reach and t.mixed.sizes[c, CHUNK_AXIS]:
        seconds = _mixed_s(t.mixed, c, chunk, context, w.decode_tokens, kv_tokens)
    else:
        seconds = _decode_s(t.decode, c, w.decode_tokens, kv_tokens)
    if it.kv_most == NEVER or t.unequal.sizes[c, CHUNK_AXIS] == 0:
        return seconds
    batch, kv_tokens = work[it.first_band].decode_tokens, work[it.first_band].kv_tokens
    return seconds * (1.0 + unequal_share(t.unequal, c, chunk, batch, kv_tokens, it.kv_least, it.kv_most))


def _decode_s(t: DecodeAttention, c: int, batch: int, kv_tokens: int) -> float:
    """Seconds by bilinear interpolation in the batch and the mean KV tokens; `kv_tokens` is the sum over the batch."""
    if batch == 0:
        return 0.0
    table, end_batch, end_kv = t.seconds, t.last_batch[c], t.last_kv[c]
    mean = kv_tokens / batch
    j = t.interval[c, int(mean) if mean < end_kv else end_kv]
    at = batch if batch < end_batch else end_batch
    seconds = table[c, 0, at, j] + table[c, 1, at, j] * (mean - t.kv[c, j])
    return seconds if batch <= end_batch else seconds * (batch / end_batch)


def _prefill_s(t: PrefillAttention, c: int, tokens: int, context_tokens: int) -> float:
    """Seconds by bilinear interpolation in a chunk's new tokens and its context, with the kernel's fixed part."""
    i = _interval(t.grid, c, 0, t.sizes[c, 0], tokens)
    other = i + 1 if i + 1 < t.sizes[c, 0] else i - 1
    j = _interval(t.grid, c, 1, t.sizes[c, 1], context_tokens)
    beside = j + 1 if j + 1 < t.sizes[c, 1] else j - 1
    beyond, width = context_tokens - t.grid[c, 1, j], t.grid[c, 1, beside] - t.grid[c, 1, j]
    here_s = t.seconds[c, i, j] + (t.seconds[c, i, beside] - t.seconds[c, i, j]) / width * beyond
    there_s = t.seconds[c, other, j] + (t.seconds[c, other, beside] - t.seconds[c, other, j]) / width * beyond
    slope_s = (there_s - here_s) / (t.grid[c, 0, other] - t.grid[c, 0, i])
    return here_s + slope_s * (tokens - t.grid[c, 0, i])


def _interval(grid: Numbers, c: int, axis: int, points: int, value: float) -> int:
    """The index of the last point of an axis that is not above the value; 0 if all are."""
    at = 0
    while at + 1 < points and grid[c, axis, at + 1] <= value:
        at += 1
    return at


def _mixed_s(t: MixedAttention, c: int, chunk: int, context: int, batch: int, kv_tokens: int) -> float:
    """Seconds that decodes add beside a chunk. Below the grid its edge counts; beyond its last batch, in proportion."""
    if batch == 0:
        return 0.0
    grid, sizes = t.grid, t.sizes
    end = grid[c, BATCH_AXIS, sizes[c, BATCH_AXIS] - 1]
    i = _lower(grid, c, CHUNK_AXIS, sizes[c, CHUNK_AXIS], chunk)
    j = _lower(grid, c, CONTEXT_AXIS, sizes[c, CONTEXT_AXIS], context)
    k = _lower(grid, c, BATCH_AXIS, sizes[c, BATCH_AXIS], min(batch, end))
    kv = kv_tokens / batch
    m = _lower(grid, c, KV_AXIS, sizes[c, KV_AXIS], kv)
    chunk_weight = _weight(grid, c, CHUNK_AXIS, i, chunk)
    context_weight = _weight(grid, c, CONTEXT_AXIS, j, context)
    batch_weight = _weight(grid, c, BATCH_AXIS, k, min(batch, end))
    kv_weight = _weight(grid, c, KV_AXIS, m, kv)
    total_s = 0.0
    for di in range(2):
        wi = chunk_weight if di else 1.0 - chunk_weight
        if di and chunk_weight == 0.0:
            break
        for dj in range(2):
            wj = context_weight if dj else 1.0 - context_weight
            if dj and context_weight == 0.0:
                break
            for dk in range(2):
                wk = batch_weight if dk else 1.0 - batch_weight
                if dk and batch_weight == 0.0:
                    break
                value = t.seconds[c, i + di, j + dj, k + dk, m]
                if kv_weight != 0.0:
                    value += kv_weight * (t.seconds[c, i + di, j + dj, k + dk, m + 1] - value)
                total_s += wi * wj * wk * value
    total_s = max(total_s, 0.0)
    return total_s if batch <= end else total_s * (batch / end)


def _lower(grid: Numbers, c: int, axis: int, points: int, value: float) -> int:
    """The index of the lower end of the value's interval; beyond the axis, of the last interval."""
    return min(_interval(grid, c, axis, points, value), points - 2)


def _weight(grid: Numbers, c: int, axis: int, low: int, value: float) -> float:
    """Weight of the interval's upper end in linear interpolation: above 1 beyond the axis, 0 before it."""
    return max((value - grid[c, axis, low]) / (grid[c, axis, low + 1] - grid[c, axis, low]), 0.0)


def unequal_share(t: UnequalLengths, c: int, chunk: int, batch: int, kv_tokens: int, least: int, most: int) -> float:
    """The share by which decode attention takes longer because lengths differ; beyond the grid its edge counts.

    `chunk` is the tokens of the longest chunk beside the decodes, 0 if there is none; `kv_tokens` the batch's sum.
    """
    if batch < 2 or most <= least:
        return 0.0
    points = t.sizes[c, CHUNK_AXIS]
    if chunk == 0 or points == 1:
        return _unequal_plane(t, c, 0, batch, kv_tokens, least, most)
    i, weight = 1, 0.0
    if points > 2:
        last = t.grid[c, CHUNK_AXIS, points - 1]
        value = min(chunk, last)
        while i + 2 < points and t.grid[c, CHUNK_AXIS, i + 1] <= value:
            i += 1
        low, high = t.grid[c, CHUNK_AXIS, i], t.grid[c, CHUNK_AXIS, i + 1]
        weight = max((value - low) / (high - low), 0.0)
    here = _unequal_plane(t, c, i, batch, kv_tokens, least, most)
    if weight == 0.0:
        return here
    return here + weight * (_unequal_plane(t, c, i + 1, batch, kv_tokens, least, most) - here)


def _unequal_plane(t: UnequalLengths, c: int, plane: int, batch: int, kv_tokens: int, least: int, most: int) -> float:
    lengths, shares, end = t.sizes[c, 1], t.sizes[c, 2], t.sizes[c, 3]
    share = min(max((kv_tokens / batch - least) / (most - least), 0.0), 1.0)
    g = _lower(t.grid, c, LENGTH_AXIS, lengths, most)
    p = 0
    while p + 2 < shares and t.of_long[c, p + 1] <= share:
        p += 1
    low, high = t.grid[c, LENGTH_AXIS, g], t.grid[c, LENGTH_AXIS, g + 1]
    of_longest = min(max((most - low) / (high - low), 0.0), 1.0)
    of_share = (share - t.of_long[c, p]) / (t.of_long[c, p + 1] - t.of_long[c, p])
    b = min(batch, end)
    here, above = t.share[c, plane, b, g, p], t.share[c, plane, b, g, p + 1]
    first = here + (above - here) * of_share
    here, above = t.share[c, plane, b, g + 1, p], t.share[c, plane, b, g + 1, p + 1]
    second = here + (above - here) * of_share
    return first + (second - first) * of_longest


def _rows_outside(first: Numbers, last: Numbers, table: int, rows: int) -> bool:
    return rows > last[table] or 0 < rows < first[table]


def _decode_outside(t: DecodeAttention, c: int, batch: int, kv_tokens: int) -> bool:
    if batch > t.last_batch[c] or kv_tokens > t.last_kv[c] * batch:
        return True
    return batch < t.first_batch[c] or kv_tokens < t.first_kv[c] * batch
