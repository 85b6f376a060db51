"""Kernel times that others measured, as arrays. Knows the files and how to read between their points, no model.

Source: aiconfigurator's measurements of vLLM (bf16): matrix products by (m, n, k), flash attention by batch, length
and heads. Gaps are closed here, each in one function, so that a profile's provenance can name them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from helios_sim.errors import UserError
from helios_sim.profile.composition import IntArray
from helios_sim.profile.models import HARDWARE
from helios_sim.profile.operations import Gemm
from helios_sim.profile.spec import HardwareSpec
from helios_sim.profile.tables import FloatArray
from helios_sim.shared_data import VARIABLE, shared_data_folder

MS = 1e-3
BF16_BYTES = 2


@dataclass(frozen=True, slots=True)
class KernelSource:
    """A card's folder in the data and the card on which it was measured."""

    folder: str
    vllm: str
    head_dims: tuple[int, ...]  # for which attention was measured
    card: HardwareSpec


A100 = KernelSource("a100_sxm", "0.14.0", (128,), HARDWARE["a100-80gb"])
H100 = KernelSource("h100_sxm", "0.19.0", (64, 128), HARDWARE["h100-80gb"])
SOURCES = {"a100-40gb": A100, "a100-80gb": A100, "h100-80gb": H100}


def _read(source: KernelSource, kind: str, name: str, **equal: Any) -> dict[str, Any]:
    path = shared_data_folder() / "kernels" / "aiconfigurator" / source.folder / kind / "vllm" / source.vllm
    path = path / f"{name}_perf.parquet"
    if not path.is_file():
        fix = f"set {VARIABLE} to the folder that holds kernels/aiconfigurator (github ai-dynamo/aiconfigurator)"
        raise UserError(VARIABLE, str(path), "a file of measured kernel times", fix)
    table = pq.read_table(path)
    for column, value in equal.items():
        if column in table.column_names:
            table = table.filter(pc.equal(table[column], value))
    if table.num_rows == 0:
        raise UserError(name, equal, "a case in the measured table", "choose a head shape that was measured")
    return {c: table[c].to_numpy() for c in table.column_names}


def _grid(columns: dict[str, Any], axes: tuple[str, ...]) -> tuple[list[IntArray], FloatArray]:
    """Values of the axes and latencies in seconds on their product, NaN where nothing was measured."""
    values, places = zip(*(np.unique(columns[a], return_inverse=True) for a in axes), strict=True)
    time_s = np.full([len(v) for v in values], np.nan)
    time_s[places] = columns["latency"] * MS
    return [np.asarray(v, dtype=np.int64) for v in values], time_s


class GemmTimes:
    """Seconds of rows x k times k x n on the source's card, at the row counts that were measured."""

    def __init__(self, source: KernelSource) -> None:
        self.card = source.card
        columns = _read(source, "gemm", "gemm", gemm_dtype="bfloat16")
        (self.rows, self._n, self._k), self._time_s = _grid(columns, ("m", "n", "k"))
        self.fixed_s = float(np.nanmin(self._time_s))
        n, k = np.meshgrid(self._n, self._k, indexing="ij")
        streamed = BF16_BYTES * (n * k + n + k) / self._time_s[list(self.rows).index(1)]
        self.best_bandwidth = float(np.nanmax(streamed)) / self.card.hbm_bytes_per_s

    def roofline_s(self, gemm: Gemm, card: HardwareSpec) -> FloatArray:
        """(rows,) the larger of bytes over bandwidth and operations over peak."""
        moved = np.array([gemm.bytes_moved(int(m), BF16_BYTES) for m in self.rows])
        operations = np.array([gemm.operations(int(m)) for m in self.rows])
        return np.maximum(moved / card.hbm_bytes_per_s, operations / card.flops_per_s)

    def time_s(self, gemm: Gemm) -> FloatArray:
        """(rows,) measured where the shape was; else from its neighbours in (log n, log k).

        What is interpolated is the share of the roofline that a neighbour reaches after the fixed part: achieved
        bandwidth where bytes bind, achieved rate where operations do. Beyond the table the edge's share is kept.
        More rows never take less: a slower measurement at fewer rows is taken down to the later one.
        """
        share = np.zeros(len(self.rows))
        for i, n_weight in _neighbours(self._n, gemm.n):
            for j, k_weight in _neighbours(self._k, gemm.k):
                near = Gemm(int(self._n[i]), int(self._k[j]))
                body_s = rising(self._time_s[:, i, j]) - self.fixed_s
                share += n_weight * k_weight * (self.roofline_s(near, self.card) / body_s)
        return rising(self.fixed_s + self.roofline_s(gemm, self.card) / share)


class DecodeAttentionTimes:
    """Seconds of one layer's decode attention by (batch, KV tokens) for a group of query heads per KV head."""

    def __init__(self, source: KernelSource, heads: int, kv_heads: int, head_dim: int) -> None:
        columns = _read(
            source, "attention", "generation_attention", num_heads=heads, num_key_value_heads=kv_heads,
            head_dim=head_dim, kv_cache_dtype="bfloat16", window_size=0,
        )  # fmt: skip
        (self.batch, steps), time_s = _grid(columns, ("batch_size", "step"))
        self.kv_tokens = steps + 1  # the new token included
        self.measured = ~np.isnan(time_s)
        self.fixed_s = float(np.nanmin(time_s))
        kv_bytes = 2 * kv_heads * head_dim * BF16_BYTES * np.outer(self.batch, self.kv_tokens)
        self.best_bandwidth = float(np.nanmax(kv_bytes / time_s)) / source.card.hbm_bytes_per_s
        for j in range(len(self.kv_tokens)):
            last = int(np.flatnonzero(self.measured[:, j])[-1])
            beyond = self.batch[last + 1 :] / self.batch[last]
            time_s[last + 1 :, j] = self.fixed_s + (time_s[last, j] - self.fixed_s) * beyond
        self._time_s = rising(rising(time_s, axis=1), axis=0)

    def time_s(self, batch: float, kv_tokens: float) -> float:
        """Linear in KV; between two batches requests per second are interpolated, beyond the last they are kept."""
        columns = np.array([np.interp(kv_tokens, self.kv_tokens, row) for row in self._time_s])
        if batch > self.batch[-1]:
            return float(self.fixed_s + (columns[-1] - self.fixed_s) * (batch / self.batch[-1]))
        if batch <= 1:
            return float(columns[0])
        return float(batch / np.interp(batch, self.batch, self.batch / columns))


class PrefillAttentionTimes:
    """Seconds of one layer's attention over one whole prompt (no earlier context), by its tokens."""

    def __init__(self, source: KernelSource, heads: int, kv_heads: int, head_dim: int) -> None:
        columns = _read(
            source, "attention", "context_attention", num_heads=heads, num_key_value_heads=kv_heads,
            head_dim=head_dim, batch_size=1, kv_cache_dtype="bfloat16", window_size=0,
        )  # fmt: skip
        (self.tokens,), time_s = _grid(columns, ("isl",))
        self.time_s = rising(time_s)
        self.fixed_s = float(self.time_s.min())

    def with_context_s(self, tokens: int, context_tokens: int) -> float:
        """`tokens` new ones after `context_tokens`: no such case was measured.

        Pairs of query and key beyond those of the prompt alone take as long as in a whole prompt of the full length.
        """
        alone_s = float(np.interp(tokens, self.tokens, self.time_s))
        full = tokens + context_tokens
        s_per_pair = (float(np.interp(full, self.tokens, self.time_s)) - self.fixed_s) / (full * (full + 1) / 2)
        return alone_s + tokens * context_tokens * s_per_pair


def rising(time_s: FloatArray, axis: int = 0) -> FloatArray:
    """The largest non-decreasing sequence that is nowhere above the measurements: noise is mostly upward."""
    return np.flip(np.minimum.accumulate(np.flip(time_s, axis), axis), axis)


def _neighbours(grid: IntArray, value: int) -> list[tuple[int, float]]:
    """Indices and weights of the grid points around `value`, linear in its logarithm; the edge beyond the grid."""
    position = float(np.interp(np.log(value), np.log(grid), np.arange(len(grid))))
    low = int(position)
    weight = position - low
    return [(low, 1.0)] if weight == 0.0 else [(low, 1.0 - weight), (low + 1, weight)]


@lru_cache(maxsize=4)
def gemm_times(source: KernelSource) -> GemmTimes:
    return GemmTimes(source)
