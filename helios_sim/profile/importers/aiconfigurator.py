"""Profiles of models from kernel times that others measured, as aiconfigurator publishes them.

Its measurements of vLLM (bf16 and fp8) and of TensorRT-LLM (nvfp4 too): matrix products by (m, n, k), flash attention
by batch, length and heads, all-reduces by cards and size. A layer is the sum of its kernels: matrix products and
attention are measured; norms, activation, rope, KV writes and sampling are bytes over an achieved bandwidth plus a
fixed time for each kernel, which is assumed. What is scaled, and each gap that is closed, is named in the profile's
provenance.

A table lies in the package (`SHIPPED`, for six cards), or in the folder of shared data, from which older profiles were
made. In a tensor-parallel group each card runs its shard, and a layer ends in two all-reduces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from helios_sim.errors import UserError
from helios_sim.profile.catalog import CARDS, HARDWARE, LOAD_BYTES_PER_S, PCIE_LINK, activation_reserve_bytes, card_spec
from helios_sim.profile.composition import IntArray
from helios_sim.profile.devices import Device, shard, whole_model
from helios_sim.profile.formats import FP4, FP8, INT8, WEIGHTS
from helios_sim.profile.importers.reading import MS, times
from helios_sim.profile.precision import assumed_of, products_on, scaled_by
from helios_sim.profile.profile import Profile
from helios_sim.profile.roofline import (
    FITTED,
    Elementwise,
    Gemm,
    embedding_elementwise,
    head_elementwise,
    head_gemm,
    kv_elementwise,
    kv_gemm,
    kv_grid,
    layer_elementwise,
    layer_gemms,
    quantized_s,
)
from helios_sim.profile.runtimes import preset
from helios_sim.profile.spec import Basis, HardwareSpec, ModelSpec, Runtime, TimeBand
from helios_sim.profile.tables import FloatArray, GridTable, LayerTables, RowsTable
from helios_sim.provenance import Assumption, Provenance, ProvenanceClass
from helios_sim.shared_data import VARIABLE, shared_data_folder
from helios_sim.untrusted import reading

BF16_BYTES = 2
LEAST_S = 1e-9
TIME_BAND = TimeBand(0.89, 1.17, "90 % of 188 published runs lie within: experiments/fidelity_silicon")


@dataclass(frozen=True, slots=True)
class Measured:
    """A kind of matrix product in the tables: its name there, bytes of a weight and of an input, and what bounds it."""

    dtype: str
    weight_bytes: float = BF16_BYTES
    input_bytes: float = BF16_BYTES
    multiplies: str = WEIGHTS  # or FP8, INT8, FP4: which of the card's rates

    def rate(self, card: HardwareSpec) -> float:
        """Operations per second that the card can do at most."""
        rates = {FP8: card.fp8_flops_per_s, INT8: card.int8_flops_per_s, FP4: card.fp4_flops_per_s}
        found = rates.get(self.multiplies, card.flops_per_s)
        assert found is not None
        return found


BF16 = Measured("bfloat16")
OF_FP8 = Measured("fp8", 1.0, 1, FP8)  # its time includes making the inputs fp8
OF_FP4 = Measured("nvfp4", 0.5625, 0.5625, FP4)  # the same; a byte of scale for 16 values
OF_TRTLLM = {  # by the name of the weights' format
    "fp8": OF_FP8, "fp8-block": Measured("fp8_block", 1.0, 1, FP8), "nvfp4": OF_FP4,
}  # fmt: skip
FUSED = ("fp8", "nvfp4")  # formats whose inputs have scales that are fixed: TensorRT-LLM's kernels before make them
INTEGERS = {  # by what is multiplied, and bits of a weight
    (INT8, 8): Measured("sq", 1.0, 1, INT8), (WEIGHTS, 8): Measured("int8_wo", 1.0),
    (WEIGHTS, 4): Measured("int4_wo", 0.5),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class KernelSource:
    """A card's folder in the data and the card on which it was measured."""

    folder: str
    version: str  # of the engine
    head_dims: tuple[int, ...]  # for which attention was measured
    card: HardwareSpec
    shipped: bool = False  # its tables are in the package
    integers: bool = False  # they have products with integer weights
    engine: str = "vLLM"

    def path(self, kind: str, name: str) -> Path:
        if self.shipped:
            folder = SHIPPED / self.folder
            return (folder.parent if name == "nccl" and self.engine != "vLLM" else folder) / f"{name}.parquet"
        folder = shared_data_folder() / "kernels" / "aiconfigurator" / self.folder / kind / "vllm" / self.version
        return folder / f"{name}_perf.parquet"


SHIPPED = Path(__file__).parents[2] / "data" / "kernels"
A100 = KernelSource("a100_sxm", "0.14.0", (128,), HARDWARE["a100-80gb"])
H100 = KernelSource("h100_sxm", "0.19.0", (64, 128), HARDWARE["h100-80gb"])
SOURCES = {"a100-40gb": A100, "a100-80gb": A100, "h100-80gb": H100}


def _shipped(folder: str, vllm: str, card: str, head_dims: tuple[int, ...] = (64, 128, 256)) -> KernelSource:
    return KernelSource(folder, vllm, head_dims, card_spec(card, CARDS[card]), shipped=True)


_SXM_A100 = replace(_shipped("a100_sxm", "0.14.0", "a100-80gb", (128,)), integers=True)
SHIPPED_SOURCES = {  # by the card's key in the catalogue
    "a100-40gb": _SXM_A100, "a100-80gb": _SXM_A100, "h100": _shipped("h100_sxm", "0.24.0", "h100"),
    "h200": _shipped("h200_sxm", "0.24.0", "h200"), "b200": _shipped("b200_sxm", "0.24.0", "b200"),
    "l40s": _shipped("l40s", "0.24.0", "l40s"),
    "rtxpro6000": _shipped("rtx_pro_6000_server", "0.24.0", "rtxpro6000"),
}  # fmt: skip
TRTLLM_SOURCES = {
    key: replace(source, folder=f"{source.folder}/trtllm", version="1.3.0rc20", engine="TensorRT-LLM")
    for key, source in SHIPPED_SOURCES.items()
    if not key.startswith("a100")
}
KERNELS = {"vllm": SHIPPED_SOURCES, "trtllm": TRTLLM_SOURCES}  # by `server.kernels`


def _read(source: KernelSource, kind: str, name: str, **equal: Any) -> dict[str, Any]:
    path = source.path(kind, name)
    if not path.is_file():
        fix = f"set {VARIABLE} to the folder that holds kernels/aiconfigurator (github ai-dynamo/aiconfigurator)"
        raise UserError(VARIABLE, str(path), "a file of measured kernel times", fix)
    with reading(str(path), "damaged", "a Parquet file of kernel times", "fetch the file again"):
        table = pq.read_table(path)
        for column, value in equal.items():
            if column in table.column_names:
                table = table.filter(pc.equal(table[column], value))
            elif column != "window_size":  # older tables have full attention alone
                raise UserError(str(path), table.column_names, f"a column {column}", "fetch the file again")
        if table.num_rows == 0:
            raise UserError(name, equal, "a case in the measured table", "choose a head shape that was measured")
        times(path, "latency", table["latency"].to_numpy(), MS)
        columns = {c: table[c].to_numpy() for c in table.column_names}
        return columns | {"latency": columns["latency"].astype(np.float64)}


def _grid(columns: dict[str, Any], axes: tuple[str, ...]) -> tuple[list[IntArray], FloatArray]:
    """Values of the axes and latencies in seconds on their product, NaN where nothing was measured."""
    values, places = zip(*(np.unique(columns[a], return_inverse=True) for a in axes), strict=True)
    time_s = np.full([len(v) for v in values], np.nan)
    if len(np.unique(np.ravel_multi_index(places, time_s.shape))) < len(places[0]):
        raise UserError("latency", f"{len(places[0])} rows", f"one for each {', '.join(axes)}", "drop the others")
    time_s[places] = columns["latency"] * MS
    return [np.asarray(v, dtype=np.int64) for v in values], time_s


class GemmTimes:
    """Seconds of rows x k times k x n on the source's card, at the row counts that were measured."""

    def __init__(self, source: KernelSource, kind: Measured = BF16) -> None:
        self.card, self.kind = source.card, kind
        columns = _read(source, "gemm", "gemm", gemm_dtype=kind.dtype)
        (self.rows, self._n, self._k), self._time_s = _grid(columns, ("m", "n", "k"))
        self.fixed_s = float(np.nanmin(self._time_s))
        n, k = np.meshgrid(self._n, self._k, indexing="ij")
        streamed = self._moved(n, k, kind.weight_bytes * n * k, 1) / self._time_s[list(self.rows).index(1)]
        self.best_bandwidth = float(np.nanmax(streamed)) / self.card.hbm_bytes_per_s
        self.from_memory = _from_memory(kind.weight_bytes * n * k, streamed / self.card.hbm_bytes_per_s)
        self.measured = ~np.isnan(self._time_s)
        self._fill()

    def _fill(self) -> None:
        """Where a product was not measured, it reaches the share of the roofline of one that is somewhat smaller."""
        for i, j in np.argwhere(np.isnan(self._time_s).any(axis=0)).tolist():
            floor_s = self.roofline_s(Gemm(int(self._n[i]), int(self._k[j])), self.card)
            known = np.flatnonzero(~np.isnan(self._time_s[:, i, j]))
            if len(known):
                like = known[np.maximum(np.searchsorted(known, np.arange(len(floor_s)), "right") - 1, 0)]
                near_floor_s, near_s = floor_s[like], self._time_s[like, i, j]
            else:
                near = (i, j - 1) if j else (i - 1, j)
                near_floor_s = self.roofline_s(Gemm(int(self._n[near[0]]), int(self._k[near[1]])), self.card)
                near_s = self._time_s[:, near[0], near[1]]
            filled = self.fixed_s + floor_s * (near_s - self.fixed_s) / near_floor_s
            self._time_s[:, i, j] = np.where(np.isnan(self._time_s[:, i, j]), filled, self._time_s[:, i, j])

    def _moved(self, n: Any, k: Any, weights: Any, rows: Any) -> Any:
        """Bytes that a product moves: weights, inputs and, in bf16, outputs."""
        return weights + rows * (BF16_BYTES * n + self.kind.input_bytes * k)

    def roofline_s(self, gemm: Gemm, card: HardwareSpec, weights: int | None = None) -> FloatArray:
        """(rows,) the larger of bytes over bandwidth and operations over peak. `weights`: their bytes, if others."""
        n_bytes = self.kind.weight_bytes * gemm.n * gemm.k if weights is None else weights
        moved = self._moved(gemm.n, gemm.k, n_bytes, self.rows.astype(np.float64))
        operations = np.array([gemm.operations(int(m)) for m in self.rows])
        return np.asarray(np.maximum(moved / card.hbm_bytes_per_s, operations / self.kind.rate(card)))

    def time_s(self, gemm: Gemm, weights: int | None = None) -> FloatArray:
        """(rows,) measured where the shape was; else from its neighbours in (log n, log k).

        What is interpolated is the share of the roofline that a neighbour reaches after the fixed part: achieved
        bandwidth where bytes bind, achieved rate where operations do. Beyond the table the edge's share is kept.
        More rows never take less: a slower measurement at fewer rows is taken down to the later one.
        """
        share = np.zeros(len(self.rows))
        for i, n_weight in _neighbours(self._n, gemm.n):
            for j, k_weight in _neighbours(self._k, gemm.k):
                near = Gemm(int(self._n[i]), int(self._k[j]))
                body_s = np.maximum(rising(self._time_s[:, i, j]) - self.fixed_s, LEAST_S)  # the quickest has none
                share += n_weight * k_weight * (self.roofline_s(near, self.card) / body_s)
        return rising(self.fixed_s + self.roofline_s(gemm, self.card, weights) / share)


class DecodeAttentionTimes:
    """Seconds of one layer's decode attention by (batch, KV tokens) for a group of query heads per KV head."""

    def __init__(self, source: KernelSource, heads: int, kv_heads: int, head_dim: int, kv_bytes: int = 2) -> None:
        columns = _read(
            source, "attention", "generation_attention", num_heads=heads, num_key_value_heads=kv_heads,
            head_dim=head_dim, kv_cache_dtype=KV_DTYPES[kv_bytes], window_size=0,
        )  # fmt: skip
        (self.batch, steps), time_s = _grid(columns, ("batch_size", "step"))
        self.kv_tokens = steps + 1  # the new token included
        self.measured = ~np.isnan(time_s)
        self.fixed_s = float(np.nanmin(time_s))
        moved = 2 * kv_heads * head_dim * kv_bytes * np.outer(self.batch, self.kv_tokens)
        self.best_bandwidth = float(np.nanmax(moved / time_s)) / source.card.hbm_bytes_per_s
        self.from_memory = _from_memory(moved, moved / time_s / source.card.hbm_bytes_per_s)
        for j in range(len(self.kv_tokens)):
            known = np.flatnonzero(self.measured[:, j])
            last = int(known[-1])
            gaps = np.flatnonzero(~self.measured[:last, j])  # between measured batches, or before the first
            time_s[gaps, j] = np.interp(self.batch[gaps], self.batch[known], time_s[known, j])
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

    def __init__(self, source: KernelSource, heads: int, kv_heads: int, head_dim: int, kv_bytes: int = 2) -> None:
        columns = _read(
            source, "attention", "context_attention", num_heads=heads, num_key_value_heads=kv_heads,
            head_dim=head_dim, batch_size=1, kv_cache_dtype=KV_DTYPES[kv_bytes], window_size=0,
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


class AllReduceTimes:
    """Seconds of one all-reduce of a tensor-parallel group, by bytes.

    vLLM runs its own kernel up to 8 MiB where the cards see each other directly, or where there are two; NCCL else
    (its custom_all_reduce.py). Between measured sizes linear in bytes; beyond the last at the last bandwidth. A slower
    measurement of fewer bytes is taken down to the later one.
    """

    OWN_BYTES = 8 << 20

    def __init__(self, source: KernelSource, device: Device) -> None:
        tables = [_read(source, "comm", name, num_gpus=device.cards) for name in ("custom_allreduce", "nccl")]
        orders = [np.argsort(t["message_size"]) for t in tables]
        self._own, self._nccl = (
            (t["message_size"][order] * BF16_BYTES, rising(t["latency"][order] * MS))
            for t, order in zip(tables, orders, strict=True)
        )
        self._direct = device.cards == 2 or device.link != PCIE_LINK

    def time_s(self, n_bytes: FloatArray) -> FloatArray:
        """(K,) seconds."""
        return np.where(
            self._direct & (n_bytes <= self.OWN_BYTES), _by_size(n_bytes, *self._own), _by_size(n_bytes, *self._nccl)
        )


def _from_memory(n_bytes: Any, share: FloatArray) -> float:
    """The best share of the card's bandwidth among cases that no cache holds.

    A kernel that is timed again and again finds smaller operands in the card's cache, which a served model, with its
    other layers between, does not.
    """
    known = ~np.isnan(share)
    large = known & (n_bytes >= UNCACHED_BYTES)
    return float(min(1.0, share[large if large.any() else known].max()))


def _by_size(n_bytes: FloatArray, sizes: FloatArray, time_s: FloatArray) -> FloatArray:
    found = np.interp(n_bytes, sizes, time_s)
    return np.where(n_bytes > sizes[-1], time_s[-1] * n_bytes / sizes[-1], found)


def rising(time_s: FloatArray, axis: int = 0) -> FloatArray:
    """The largest non-decreasing sequence that is nowhere above the measurements: noise is mostly upward."""
    return np.flip(np.minimum.accumulate(np.flip(time_s, axis), axis), axis)


def _neighbours(grid: IntArray, value: int) -> list[tuple[int, float]]:
    """Indices and weights of the grid points around `value`, linear in its logarithm; the edge beyond the grid."""
    position = float(np.interp(np.log(value), np.log(grid), np.arange(len(grid))))
    low = int(position)
    weight = position - low
    return [(low, 1.0)] if weight == 0.0 else [(low, 1.0 - weight), (low + 1, weight)]


def _measured_heads(
    source: KernelSource, name: str, heads: int, kv_heads: int, head_dim: int, kv_bytes: int
) -> tuple[int, int]:
    """The measured pair of heads and KV heads that is nearest, itself where it was measured.

    KV heads count first: decodes read K and V, whatever the number of queries that share them.
    """
    pairs = _pairs(source, name, head_dim, KV_DTYPES[kv_bytes])

    def distance(pair: tuple[int, int]) -> tuple[float, float]:
        return abs(math.log(pair[1] / kv_heads)), abs(math.log(pair[0] / pair[1] / (heads / kv_heads)))

    return (heads, kv_heads) if (heads, kv_heads) in pairs else min(sorted(pairs), key=distance)


@lru_cache(maxsize=16)
def _pairs(source: KernelSource, name: str, head_dim: int, kv_dtype: str) -> frozenset[tuple[int, int]]:
    found = _read(source, "attention", name, head_dim=head_dim, kv_cache_dtype=kv_dtype, window_size=0)
    return frozenset(zip(found["num_heads"].tolist(), found["num_key_value_heads"].tolist(), strict=True))


@lru_cache(maxsize=8)
def gemm_times(source: KernelSource, kind: Measured = BF16) -> GemmTimes:
    return GemmTimes(source, kind)


MAX_ROWS = 8192
BATCHES = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024], dtype=np.int64)
TABLE_KV_HEADS = 8  # the most that decode attention was measured with
TABLE_HEAD_DIM = 128
KV_DTYPES = {2: "bfloat16", 1: "fp8"}  # of K and V in the tables, by bytes of a value
# aiconfigurator's own estimates for memory-bound kernels on these cards (mem_bw_empirical_scaling_factor,
# mem_empirical_constant_latency in its system files)
SMALL_KERNEL_BANDWIDTH = 0.8
SMALL_KERNEL_S = 3e-6
UNCACHED_BYTES = 512e6  # four times the largest cache of the cards measured


class LayerTimes:
    """Times of one model's operations on one device, from the tables of the nearest measured card."""

    def __init__(self, whole: ModelSpec, device: Device, source: KernelSource) -> None:
        """In a group, times are those of one card with its shard of the model `whole`."""
        self.model = model = shard(whole, device.cards)
        self.device, self.card, self.measured_card, self.source = device, device.card, source.card, source
        self.gemms: GemmTimes = gemm_times(source)
        self.products = products_on(whole, device.card)
        kind = self._kind()
        self.of_layers = None if kind is None else gemm_times(source, kind)
        form = model.quantization
        fused = source.engine != "vLLM" and form is not None and form.name in FUSED and self.of_layers is not None
        # What the smallest product takes longer than in bf16: the making of its inputs.
        self.inputs_s = max(0.0, self.of_layers.fixed_s - self.gemms.fixed_s) if fused and self.of_layers else 0.0
        self.keep = self.gemms.rows <= MAX_ROWS
        self.rows: IntArray = self.gemms.rows[self.keep]
        ratio = model.n_heads // model.n_kv_heads
        kv_heads = min(model.n_kv_heads, TABLE_KV_HEADS)
        head_dim = model.head_dim if model.head_dim in source.head_dims else TABLE_HEAD_DIM
        self.head_scale = model.head_dim / head_dim
        kv_bytes = model.kv_bytes_per_value
        self.decode_heads = _measured_heads(
            source, "generation_attention", ratio * kv_heads, kv_heads, head_dim, kv_bytes
        )
        self.table_kv_heads = self.decode_heads[1]
        self.batch_scale = model.n_kv_heads / self.table_kv_heads
        self.decode = DecodeAttentionTimes(source, *self.decode_heads, head_dim, kv_bytes)
        self.prefill_heads = _measured_heads(
            source, "context_attention", model.n_heads, model.n_kv_heads, head_dim, kv_bytes
        )
        self.prefill_scale = self.head_scale * model.n_heads / self.prefill_heads[0]
        self.prefill = PrefillAttentionTimes(source, *self.prefill_heads, head_dim, kv_bytes)

    def _kind(self) -> Measured | None:
        """Which products of the tables those of the layers are priced from; None: times are by fitted shares."""
        form, products = self.model.quantization, self.products
        if form is None or products is None:
            return BF16
        if self.source.engine != "vLLM" and form.name in OF_TRTLLM and products != WEIGHTS:
            return OF_TRTLLM[form.name]
        if self.source.integers:
            return INTEGERS[products, form.bits]
        if products == WEIGHTS:
            return None
        return {FP8: OF_FP8, FP4: OF_FP4, INT8: replace(OF_FP8, multiplies=INT8)}[products]

    @property
    def measured(self) -> str | None:
        """The name of those products in the tables."""
        return None if self.of_layers is None else self.of_layers.kind.dtype

    def all_reduces_s(self) -> FloatArray:
        """(rows,) the two all-reduces of a layer."""
        if self.device.cards == 1:
            return np.zeros(len(self.rows))
        moved = self.rows * self.model.d_model * self.model.weight_bytes_per_value
        return 2 * AllReduceTimes(self.source, self.device).time_s(moved.astype(np.float64))

    def gather_s(self) -> FloatArray:
        """(rows,) logits of all cards brought together on one, over the link; no such table is read."""
        n = self.device.cards
        if n == 1:
            return np.zeros(len(self.rows))
        moved = self.rows * (n - 1) * self.model.vocab_size * self.model.weight_bytes_per_value
        return np.asarray(self.device.link.latency_s + moved / self.device.link.bytes_per_s)

    def gemm_s(self, gemm: Gemm) -> FloatArray:
        """(rows,) of a product in bf16."""
        return self._gemm_s(self.gemms, gemm, None)

    def layer_gemm_s(self, gemm: Gemm) -> FloatArray:
        """(rows,) of a product of the layers, whose weights may be quantized."""
        quantized = self.model.quantization
        if quantized is None or self.products is None:
            return self.gemm_s(gemm)
        weights = quantized.matrix_bytes(gemm.n, gemm.k)
        if self.of_layers is not None:
            return self._gemm_s(self.of_layers, gemm, weights)
        rows = self.rows.astype(np.float64)
        fitted_s = quantized_s(self.products, gemm, rows, weights, self.card, FITTED)
        # Made bf16, they are multiplied no quicker than the card's own products in bf16 that operations bind.
        moved = 2.0 * (gemm.n * gemm.k + rows * (gemm.n + gemm.k))
        bound = 2.0 * rows * gemm.n * gemm.k / self.card.flops_per_s >= moved / self.card.hbm_bytes_per_s
        return rising(np.where(bound, np.maximum(fitted_s, self.gemm_s(gemm)), fitted_s))

    def _gemm_s(self, of: GemmTimes, gemm: Gemm, weights: int | None) -> FloatArray:
        """(rows,) with the bytes' share moved to this card's bandwidth, never below the roofline."""
        here_s, there_s = (of.roofline_s(gemm, card, weights) for card in (self.card, self.measured_card))
        time_s = of.time_s(gemm, weights) + (here_s - there_s) / of.best_bandwidth
        if of is self.of_layers:
            time_s = time_s - self.inputs_s
        time_s = rising(np.maximum(time_s, here_s / self._reached(of.from_memory)))
        return time_s[self.keep] if np.array_equal(of.rows, self.gemms.rows) else np.interp(self.rows, of.rows, time_s)

    def _reached(self, from_memory: float) -> float:
        """The share of bandwidth that bounds a price; 1 in tables of shared data, as in the profiles made from them."""
        return from_memory if self.source.shipped else 1.0

    def small_s(self, small: Elementwise) -> FloatArray:
        """(rows,) kernels without a table."""
        moved = small.values_per_row * self.model.weight_bytes_per_value * self.rows
        return small.kernels * SMALL_KERNEL_S + moved / (self.card.hbm_bytes_per_s * SMALL_KERNEL_BANDWIDTH)

    def decode_s(self, batch: int, kv_tokens: int) -> float:
        """h/h heads at batch b like 8/8 at b h/8; a narrower head like the table's with as much less KV."""
        moved = batch * kv_tokens * self.model.kv_bytes_per_token_layer
        slower_s = moved / self.card.hbm_bytes_per_s - moved / self.measured_card.hbm_bytes_per_s
        time_s = self.decode.time_s(batch * self.batch_scale, kv_tokens * self.head_scale)
        floor_s = moved / self.card.hbm_bytes_per_s / self._reached(self.decode.from_memory)
        return max(time_s + slower_s / self.decode.best_bandwidth, floor_s)

    def prefill_s(self, tokens: int, context_tokens: int, window: int = 0) -> float:
        """Bound by operations, so the card's bandwidth does not enter except as a floor.

        A layer with a window takes the share of pairs of query and key that it looks at.
        """
        time_s = self.prefill.with_context_s(tokens, context_tokens)
        scale = self.prefill_scale
        if window:
            seen = np.minimum(context_tokens + np.arange(1, tokens + 1), window).sum()
            scale *= float(seen) / (tokens * context_tokens + tokens * (tokens + 1) / 2)
            context_tokens = min(context_tokens, window)
        time_s = self.prefill.fixed_s + (time_s - self.prefill.fixed_s) * scale
        read = (tokens + context_tokens) * self.model.kv_bytes_per_token_layer
        return max(time_s, read / self.card.hbm_bytes_per_s)


def kernel_profile(model: ModelSpec, hardware: HardwareSpec, runtime: Runtime | None = None) -> Profile:
    """The profile of `model` on one card for which profiles are shipped, from the tables of shared data.

    Raises UserError when they are absent.
    """
    device = Device(hardware, PCIE_LINK, LOAD_BYTES_PER_S[hardware.name])
    command = f"python -m helios_sim.profile.build model={model.name} hardware={hardware.name}"
    return device_profile(model, device, SOURCES[hardware.name], command, runtime)


def device_profile(
    model: ModelSpec,
    device: Device,
    source: KernelSource,
    command: str,
    runtime: Runtime | None = None,
    windows: tuple[int, ...] = (),
) -> Profile:
    """The profile of `model` on a device whose card is measured in `source`, or is like that one.

    `windows`: for each layer how far a token looks back, 0 for all. UserError where a group cannot split the model.
    """
    times = LayerTimes(model, device, source)
    kinds = tuple(dict.fromkeys(windows)) or (0,)
    runtime = runtime or preset("captured_graphs")
    whole = device.whole
    return Profile(
        model=whole_model(model, device.cards), hardware=whole, runtime=runtime,
        provenance=_provenance(times, runtime, command, windows),
        layer_tables=tuple(_layer(model, times, window) for window in kinds),
        layer_class=tuple(kinds.index(window) for window in windows) or (0,) * model.n_layers,
        head=RowsTable(
            times.rows,
            times.gemm_s(head_gemm(times.model)) + times.small_s(head_elementwise(times.model)) + times.gather_s(),
        ),
        embedding=RowsTable(times.rows, times.small_s(embedding_elementwise(model)) + 0.5 * times.all_reduces_s()),
        check=None, activation_reserve_bytes=device.cards * activation_reserve_bytes(times.model),
        load_bytes_per_s=device.cards * device.load_bytes_per_s,
        load_slowdown=1.0 / (1.0 - device.load_bytes_per_s / device.card.hbm_bytes_per_s),
        time_band=TIME_BAND,
    )  # fmt: skip


def _layer(model: ModelSpec, times: LayerTimes, window: int) -> LayerTables:
    """Tables of a layer whose tokens look back over `window` tokens, 0 for all."""
    kv_tokens = kv_grid(model)
    chunks = times.prefill.tokens[times.prefill.tokens <= min(MAX_ROWS, model.max_context_tokens)]
    contexts = np.unique(np.append([0, 128], kv_tokens[kv_tokens >= 256]))
    small = times.small_s(layer_elementwise(times.model))
    dense = sum((times.layer_gemm_s(g) for g in layer_gemms(times.model)), small) + times.all_reduces_s()
    moved = times.layer_gemm_s(kv_gemm(times.model)) + times.small_s(kv_elementwise(times.model))
    return LayerTables(
        dense=RowsTable(times.rows, dense),
        kv_projection=RowsTable(times.rows, moved),
        decode_attention=GridTable(
            BATCHES, kv_tokens,
            np.array([[times.decode_s(int(b), min(int(kv), window or int(kv))) for kv in kv_tokens] for b in BATCHES]),
        ),
        prefill_attention=GridTable(
            chunks, contexts, np.array([[times.prefill_s(int(t), int(c), window) for c in contexts] for t in chunks])
        ),
        window=window,
    )  # fmt: skip


def _provenance(times: LayerTimes, runtime: Runtime, command: str, windows: tuple[int, ...]) -> Provenance:
    model, card, there, source = times.model, times.card, times.measured_card, times.source
    load_bytes_per_s = times.device.load_bytes_per_s
    scaled = [
        "matrix widths that were not measured: share of the roofline interpolated in (log n, log k)",
        "times made non-decreasing in rows, batch and length by taking slower measurements at smaller sizes down",
        "prefill attention after context: operations, at the rate of a whole prompt of the full length",
        "decode attention beyond the measured batch: the last measured bandwidth",
    ]
    if card.hbm_bytes_per_s != there.hbm_bytes_per_s:
        scaled.append(
            f"memory-bound part of matrix products and decode attention: measured at {there.hbm_bytes_per_s / 1e9:.0f} "
            f"GB/s, moved to {card.hbm_bytes_per_s / 1e9:.0f} GB/s"
        )
    if times.batch_scale != 1:
        scaled.append(f"decode attention of batch b: {times.table_kv_heads} KV heads at batch {times.batch_scale:g} b")
    if times.head_scale != 1:
        scaled.append(
            f"attention of heads of {model.head_dim}: decode like heads of {TABLE_HEAD_DIM} with {times.head_scale:g} "
            f"of the KV length (same bytes), prefill {times.head_scale:g} of the time (same operations per second)"
        )
    ratio, table_ratio = model.n_heads / model.n_kv_heads, times.decode_heads[0] / times.decode_heads[1]
    if ratio != table_ratio:
        scaled.append(f"decode attention of {ratio:g} queries a KV head: as measured for {table_ratio:g}")
    if times.prefill_heads != (model.n_heads, model.n_kv_heads):
        scaled.append(
            f"prefill attention of {model.n_heads} heads and {model.n_kv_heads} KV heads: by operations from "
            f"{times.prefill_heads[0]} and {times.prefill_heads[1]}"
        )
    if times.device.cards > 1:
        scaled += [
            f"{times.device.cards} cards: each runs its shard of every matrix; two measured all-reduces a layer and "
            "one after the embedding; NCCL's above 8 MiB, and without direct links between more than two cards",
            "logits of all cards are gathered over the link at its data sheet's bandwidth",
        ]
    scaled += scaled_by(model, times.products, times.measured)
    if times.inputs_s:
        scaled.append(
            f"products of quantized layers: less {times.inputs_s * 1e6:.1f} us, the making of their inputs, which is "
            "part of the kernels before where scales are fixed"
        )
    if any(windows):
        scaled += [
            "layers with a window: decode attention of a context as long as the window, prefill by pairs of tokens",
            "K and V of layers with a window are kept as long as those of the others: an engine may keep less",
        ]
    return Provenance(
        provenance_class=ProvenanceClass.DERIVED,
        source=(
            f"aiconfigurator (ai-dynamo/aiconfigurator, Apache-2.0): {source.engine} {source.version} {_kinds(times)} "
            f"kernels measured on {there.name}; card limits: {card.source}"
        ),
        command=command,
        scaled=tuple(scaled),
        assumptions=(
            Assumption(
                "small_kernel_s", SMALL_KERNEL_S,
                "norms, activation, rope, KV write, sampling have no table; aiconfigurator's own constant", "rebuild",
            ),
            Assumption(
                "small_kernel_bandwidth", SMALL_KERNEL_BANDWIDTH,
                "share of the card's bandwidth for those kernels; aiconfigurator's own constant", "rebuild",
            ),
            Assumption(
                "load_bytes_per_s", load_bytes_per_s, "0.8 of PCIe x16; no copy was measured",
                "profile.load_bytes_per_s",
            ),
            Assumption(
                "load_slowdown", 1.0 / (1.0 - load_bytes_per_s / card.hbm_bytes_per_s),
                "arriving weights take their share of memory bandwidth from kernels; not measured",
                "profile.load_slowdown",
            ),
            Assumption(
                "mixed_factor", None, "prefill and decode in one iteration: sum of their kernels",
                "profile.mixed_factor",
            ),
            Assumption("unequal_kv_factor", None, "KV lengths enter by their mean", "profile.unequal_kv_factor"),
            Assumption(
                "idle_w", card.idle_w, "nvidia-smi readings of cards that held nothing: a lower bound",
                "hardware.idle_w",
            ),
            Assumption(
                "chars_per_token", model.chars_per_token, "English text; no tokenizer at hand",
                "model.chars_per_token",
            ),
            *(
                Assumption(f"runtime.{s.quantity}", getattr(runtime, s.quantity), s.text, f"runtime.{s.quantity}")
                for s in runtime.sources if s.basis is Basis.ASSUMED
            ),
            *assumed_of(model),
        ),
    )  # fmt: skip


def _kinds(times: LayerTimes) -> str:
    """In which precisions the kernels were measured that the profile is made of."""
    of_kv = "fp8" if times.model.kv_bytes_per_value == 1 else "bf16"
    of_layers = str(times.measured) if times.measured in ("fp8", "fp8_block", "nvfp4") else "bf16"
    return " and ".join(dict.fromkeys(("bf16", of_layers, of_kv)))
