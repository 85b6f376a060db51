"""A profile's tables as plain arrays, for the compiled prices. Knows how they are laid out, not what they mean.

Tables of several layer classes differ in size; they lie one behind the other in arrays as large as the largest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from helios_sim.profile.composition import IntArray
from helios_sim.profile.pricing import Bands, Pricing
from helios_sim.profile.spec import HardwareSpec, ModelSpec
from helios_sim.profile.tables import FloatArray

# rows of the tables by number of tokens: four of the model, then three of each layer class
HEAD, CHECK, CLASSIFIER, EMBEDDING, FIRST_OF_CLASS = range(5)
DENSE, PADDED_DENSE, KV_PROJECTION, OF_CLASS = range(4)


# The counts of one iteration by band, and its chunks of prompts.
DECODE, KV, CHECKED, CLASSIFIED, PROPAGATED, WORK_ROWS = range(6)
TOKENS, CONTEXT, LAYERS, CHUNK_ROWS = range(4)
# A composition's bands: where they start and end, then how many layers of each class they have.
STARTS, ENDS, BY_CLASS = range(3)

SCALARS = np.dtype(
    [
        *((name, np.float64) for name in (
            "launch_s_per_layer", "launch_s_per_graph", "sync_s", "host_overhead_s", "gap_s", "prefill_gap_s",
            "load_slowdown", "mixed_factor", "kv_factor", "time_factor", "hbm_bytes_per_s", "flops_per_s",
        )),
        *((name, np.int64) for name in (
            "head_values", "layer_values", "kv_values", "kv_bytes", "value_bytes", "width",  # for the roofline floor
        )),
    ]
)  # fmt: skip


class PriceTables(NamedTuple):
    """R tables by rows; C layer classes; shapes beyond these are as large as the largest table needs."""

    rows_s: FloatArray  # (R, rows)
    rows_range: IntArray  # (R, 2) first and last rows measured
    rows_slope_s: FloatArray  # (R,) beyond the last
    decode_s: FloatArray  # (C, 2, batch, interval) times and their slopes
    decode_kv: FloatArray  # (C, interval)
    decode_interval: IntArray  # (C, KV tokens)
    decode_range: IntArray  # (C, 4) first and last batch, first and last KV tokens
    prefill_s: FloatArray  # (C, tokens, context)
    prefill_grid: IntArray  # (C, 2, points) tokens and context
    prefill_sizes: IntArray  # (C, 2) points of each
    prefill_fixed_s: FloatArray  # (C,)


Scalars = Any  # a record of SCALARS; numba has no name for its type


def band_table(bands: Bands) -> IntArray:
    """(BY_CLASS + C, S)"""
    starts = np.array(bands.starts, np.int64)
    return np.stack([starts, starts + np.array(bands.layers, np.int64), *bands.of_class_array])


def price_tables(model: ModelSpec, hardware: HardwareSpec, pricing: Pricing) -> tuple[PriceTables, Scalars] | None:
    """None where there are terms that the compiled prices do not know: mixed batches and unequal lengths."""
    classes = pricing.classes
    if any(layer.mixed_attention is not None or layer.unequal_kv is not None or layer.padded_kv for layer in classes):
        return None
    by_rows = [pricing.head, pricing.check, pricing.classifier, pricing.embedding]
    for layer in classes:
        by_rows += [layer.dense, layer.padded_dense, layer.kv_projection]
    decode = [layer.decode_attention for layer in classes]
    prefill = [layer.prefill_attention for layer in classes]
    tables = PriceTables(
        rows_s=_stacked([table.values for table in by_rows]),
        rows_range=np.array([(table.first, table.end) for table in by_rows], np.int64),
        rows_slope_s=np.array([table.slope_s for table in by_rows]),
        decode_s=_stacked([np.stack([t.values, t.slopes]).reshape(2, -1, t.width) for t in decode]),
        decode_kv=_stacked([table.kv for table in decode]),
        decode_interval=_stacked([table.interval for table in decode]).astype(np.int64),
        decode_range=np.array([(t.first_batch, t.end_batch, t.first_kv, t.end_kv) for t in decode], np.int64),
        prefill_s=_stacked([np.array(table.time_s) for table in prefill]),
        prefill_grid=_stacked([_stacked([np.array(t.tokens), np.array(t.context)]) for t in prefill]).astype(np.int64),
        prefill_sizes=np.array([(len(table.tokens), len(table.context)) for table in prefill], np.int64),
        prefill_fixed_s=np.array([table.fixed_s for table in prefill]),
    )
    return tables, _scalars(model, hardware, pricing)


def _scalars(model: ModelSpec, hardware: HardwareSpec, pricing: Pricing) -> Scalars:
    found = np.zeros(1, SCALARS)
    for name in ("launch_s_per_layer", "launch_s_per_graph", "sync_s", "host_overhead_s", "gap_s", "prefill_gap_s"):
        found[name] = getattr(pricing.runtime, name)
    for name in ("load_slowdown", "mixed_factor", "kv_factor", "time_factor"):
        found[name] = getattr(pricing, name)
    for name in ("hbm_bytes_per_s", "flops_per_s"):
        found[name] = getattr(hardware, name)
    found["head_values"] = model.vocab_size * model.d_model
    found["layer_values"] = model.layer_values
    found["kv_values"] = 2 * model.d_model * model.kv_width  # of one layer's K and V projections
    found["kv_bytes"] = model.kv_bytes_per_token_layer
    found["value_bytes"] = model.weight_bytes_per_value
    found["width"] = model.n_heads * model.head_dim
    return found[0]


def _stacked(arrays: list[NDArray[np.float64]] | list[NDArray[np.int64]]) -> FloatArray:
    """Arrays of the same number of dimensions in one, with zeros where one of them is smaller."""
    shape = tuple(max(sizes) for sizes in zip(*(array.shape for array in arrays), strict=True))
    found = np.zeros((len(arrays), *shape))
    for i, array in enumerate(arrays):
        part: Any = (i, *(slice(n) for n in array.shape))
        found[part] = array
    return found
