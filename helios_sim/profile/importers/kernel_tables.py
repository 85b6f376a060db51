"""Kernel times that aiconfigurator publishes: their files, and classes that read and interpolate them.

The measurements are of vLLM (bf16 and fp8) and of TensorRT-LLM (nvfp4 too): matrix products by (m, n, k), flash
attention by batch, length and heads, all-reduces by cards and size. Tables are in the package (`SHIPPED`, six cards) or
in the folder of shared data. The shipped profiles were made from shared data with the classes here; profiles made for a
run interpolate as in `between`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from helios_sim.core.layout import BoolArray
from helios_sim.errors import UserError
from helios_sim.profile.catalog import CARDS, HARDWARE, PCIE_LINK, card_spec
from helios_sim.profile.composition import IntArray
from helios_sim.profile.devices import Device
from helios_sim.profile.formats import FP4, FP8, INT8, WEIGHTS
from helios_sim.profile.importers.clock import OF_A100, Power
from helios_sim.profile.importers.reading import MS, times
from helios_sim.profile.roofline import Gemm
from helios_sim.profile.spec import HardwareSpec
from helios_sim.profile.tables import FloatArray
from helios_sim.shared_data import VARIABLE, shared_data_folder
from helios_sim.untrusted import reading

BF16_BYTES = 2
LEAST_S = 1e-9
UNCACHED_BYTES = 512e6  # four times the largest cache of the cards measured
KV_DTYPES = {2: "bfloat16", 1: "fp8"}  # dtype of K and V in the tables, by bytes of a value
_AXES = (  # columns that distinguish a table's rows
    "m", "n", "k", "batch_size", "isl", "step", "num_heads", "num_key_value_heads", "message_size", "latency",
)
Keep = Callable[[Mapping[str, Any]], Any]
"""Maps the columns of a table, by name, to a boolean for each row: whether it is read."""


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
OF_FP4 = Measured("nvfp4", 0.5625, 0.5625, FP4)  # time as in fp8; a byte of scale for 16 values
OF_TRTLLM = {  # by the name of the weights' format
    "fp8": OF_FP8, "fp8-block": Measured("fp8_block", 1.0, 1, FP8), "nvfp4": OF_FP4,
}  # fmt: skip
FUSED = ("fp8", "nvfp4")  # formats with fixed scales of inputs, which TensorRT-LLM's preceding kernels apply
INTEGERS = {  # by what is multiplied, and bits of a weight
    (INT8, 8): Measured("sq", 1.0, 1, INT8), (WEIGHTS, 8): Measured("int8_wo", 1.0),
    (WEIGHTS, 4): Measured("int4_wo", 0.5),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class KernelSource:
    """A card's folder in the data and the card on which it was measured."""

    folder: str
    version: str  # version of the engine
    head_dims: tuple[int, ...]  # head dimensions for which attention was measured
    card: HardwareSpec
    shipped: bool = False  # its tables are in the package
    integers: bool = False  # its tables have products with integer weights
    engine: str = "vLLM"
    power: Power | None = None  # power model of its chip; None if not known

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


_SXM_A100 = replace(_shipped("a100_sxm", "0.14.0", "a100-80gb", (128,)), integers=True, power=OF_A100)
SHIPPED_SOURCES = {  # by the card's key in the catalogue
    "a100-40gb": _SXM_A100, "a100-80gb": _SXM_A100, "a100pcie40gb": _SXM_A100, "a100pcie80gb": _SXM_A100,
    "h100": _shipped("h100_sxm", "0.24.0", "h100"),
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


def read_kernels(source: KernelSource, kind: str, name: str, keep: Keep | None = None, **equal: Any) -> dict[str, Any]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path = source.path(kind, name)
    if not path.is_file():
        fix = f"set {VARIABLE} to the folder that holds kernels/aiconfigurator (github ai-dynamo/aiconfigurator)"
        raise UserError(VARIABLE, str(path), "a file of measured kernel times", fix)
    with reading(str(path), "damaged", "a Parquet file of kernel times", "fetch the file again"):
        table = pq.read_table(path)
        for column, value in equal.items():
            if column in table.column_names:
                table = table.filter(pc.equal(table[column], value))
            elif column != "window_size":  # older tables have full attention only
                raise UserError(str(path), table.column_names, f"a column {column}", "fetch the file again")
        if table.num_rows == 0:
            raise UserError(name, equal, "a case in the measured table", "choose a head shape that was measured")
        times(path, "latency", table["latency"].to_numpy(), MS)
        columns = {c: table[c].to_numpy() for c in table.column_names}
        if keep is not None:
            kept = keep(columns)
            columns = {c: values[kept] for c, values in columns.items()}
        _check_alike(path, columns, [c for c in table.column_names if c not in (*_AXES, *equal)])
        return columns | {"latency": columns["latency"].astype(np.float64)}


def _check_alike(path: Path, columns: Mapping[str, Any], others: list[str]) -> None:
    """Raise UserError if the used rows differ in a column that is not used."""
    for name in others:
        values = columns[name]
        if len(values) and (other := values != values[0]).any():
            told = f"{values[0]} and {values[other][0]} among the {len(values)} rows that are used"
            raise UserError(f"{path}: {name}", told, "one value: they were measured under one condition", "drop others")


def on_axes(columns: dict[str, Any], axes: tuple[str, ...]) -> tuple[list[IntArray], FloatArray]:
    """Values of the axes, and seconds on their product; NaN for unmeasured places."""
    values, places = zip(*(np.unique(columns[a], return_inverse=True) for a in axes), strict=True)
    time_s = np.full([len(v) for v in values], np.nan)
    if len(np.unique(np.ravel_multi_index(places, time_s.shape))) < len(places[0]):
        raise UserError("latency", f"{len(places[0])} rows", f"one for each {', '.join(axes)}", "drop the others")
    time_s[places] = columns["latency"] * MS
    return [np.asarray(v, dtype=np.int64) for v in values], time_s


class GemmTimes:
    """Seconds of rows x k times k x n on the source's card, at the row counts that were measured."""

    def __init__(self, source: KernelSource, kind: Measured = BF16, keep: Keep | None = None) -> None:
        self.card, self.kind = source.card, kind
        columns = read_kernels(source, "gemm", "gemm", keep, gemm_dtype=kind.dtype)
        (self.rows, self._n, self._k), self._time_s = on_axes(columns, ("m", "n", "k"))
        self.fixed_s = float(np.nanmin(self._time_s))
        n, k = np.meshgrid(self._n, self._k, indexing="ij")
        streamed = self._moved(n, k, kind.weight_bytes * n * k, 1) / self._time_s[list(self.rows).index(1)]
        self.best_bandwidth = float(np.nanmax(streamed)) / self.card.hbm_bytes_per_s
        self.from_memory = from_memory(kind.weight_bytes * n * k, streamed / self.card.hbm_bytes_per_s)
        self.measured = ~np.isnan(self._time_s)
        self._fill()

    def _fill(self) -> None:
        """Fill gaps: a product that was not measured reaches the roofline share of a somewhat smaller one."""
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

    def operations_bind(self, gemm: Gemm, card: HardwareSpec, weights: int | None = None) -> BoolArray:
        """A mask (rows,) of compute-bound rows: their roofline is operations over peak."""
        operations = gemm.operations(self.rows)
        return np.asarray(self.roofline_s(gemm, card, weights) <= operations / self.kind.rate(card))

    def roofline_s(self, gemm: Gemm, card: HardwareSpec, weights: int | None = None) -> FloatArray:
        """Seconds (rows,): the larger of bytes over bandwidth and operations over peak.

        `weights`: bytes of the weights; None for those of the table's kind.
        """
        n_bytes = self.kind.weight_bytes * gemm.n * gemm.k if weights is None else weights
        moved = self._moved(gemm.n, gemm.k, n_bytes, self.rows.astype(np.float64))
        operations = gemm.operations(self.rows)
        return np.asarray(np.maximum(moved / card.hbm_bytes_per_s, operations / self.kind.rate(card)))

    def time_s(self, gemm: Gemm, weights: int | None = None) -> FloatArray:
        """Seconds (rows,): measured ones for a measured shape, else from its neighbours in (log n, log k).

        The share of the roofline that a neighbour reaches after the fixed part is interpolated: achieved bandwidth if
        memory-bound, achieved rate if compute-bound. Beyond the table the edge's share is kept. More rows never take
        less time: a slower measurement at fewer rows is lowered to that of more rows.
        """
        share = np.zeros(len(self.rows))
        for i, n_weight in neighbours(self._n, gemm.n):
            for j, k_weight in neighbours(self._k, gemm.k):
                near = Gemm(int(self._n[i]), int(self._k[j]))
                body_s = np.maximum(rising(self._time_s[:, i, j]) - self.fixed_s, LEAST_S)  # the quickest has none
                share += n_weight * k_weight * (self.roofline_s(near, self.card) / body_s)
        return rising(self.fixed_s + self.roofline_s(gemm, self.card, weights) / share)


class DecodeAttentionTimes:
    """Seconds of one layer's decode attention by (batch, KV tokens) for a group of query heads per KV head."""

    def __init__(
        self, source: KernelSource, heads: int, kv_heads: int, head_dim: int, kv_bytes: int = 2,
        keep: Keep | None = None,
    ) -> None:  # fmt: skip
        columns = read_kernels(
            source, "attention", "generation_attention", keep, num_heads=heads, num_key_value_heads=kv_heads,
            head_dim=head_dim, kv_cache_dtype=KV_DTYPES[kv_bytes], window_size=0,
        )  # fmt: skip
        (self.batch, steps), time_s = on_axes(columns, ("batch_size", "step"))
        self.kv_tokens = steps + 1  # the new token included
        self.measured = ~np.isnan(time_s)
        self.fixed_s = float(np.nanmin(time_s))
        moved = 2 * kv_heads * head_dim * kv_bytes * np.outer(self.batch, self.kv_tokens)
        self.best_bandwidth = float(np.nanmax(moved / time_s)) / source.card.hbm_bytes_per_s
        self.from_memory = from_memory(moved, moved / time_s / source.card.hbm_bytes_per_s)
        self._time_s = self._filled(time_s, moved / source.card.hbm_bytes_per_s)

    def _filled(self, time_s: FloatArray, roofline_s: FloatArray) -> FloatArray:
        """Seconds (batch, KV) with gaps filled: linear between batches, beyond the last batch at its bandwidth."""
        for j in range(len(self.kv_tokens)):
            known = np.flatnonzero(self.measured[:, j])
            last = int(known[-1])
            gaps = np.flatnonzero(~self.measured[:last, j])  # between measured batches, or before the first
            time_s[gaps, j] = np.interp(self.batch[gaps], self.batch[known], time_s[known, j])
            beyond = self.batch[last + 1 :] / self.batch[last]
            time_s[last + 1 :, j] = self.fixed_s + (time_s[last, j] - self.fixed_s) * beyond
        return rising(rising(time_s, axis=1), axis=0)

    def time_s(self, batch: float, kv_tokens: float) -> float:
        """Seconds, linear in KV. Requests/s are interpolated between batches, and kept beyond the last batch."""
        columns = np.array([np.interp(kv_tokens, self.kv_tokens, row) for row in self._time_s])
        if batch > self.batch[-1]:
            return float(self.fixed_s + (columns[-1] - self.fixed_s) * (batch / self.batch[-1]))
        if batch <= 1:
            return float(columns[0])
        return float(batch / np.interp(batch, self.batch, self.batch / columns))


class PrefillAttentionTimes:
    """Seconds of one layer's attention over one whole prompt (no earlier context), by its tokens."""

    def __init__(
        self, source: KernelSource, heads: int, kv_heads: int, head_dim: int, kv_bytes: int = 2,
        keep: Keep | None = None,
    ) -> None:  # fmt: skip
        columns = read_kernels(
            source, "attention", "context_attention", keep, num_heads=heads, num_key_value_heads=kv_heads,
            head_dim=head_dim, batch_size=1, kv_cache_dtype=KV_DTYPES[kv_bytes], window_size=0,
        )  # fmt: skip
        (self.tokens,), time_s = on_axes(columns, ("isl",))
        self.operations, self.card = 4 * heads * head_dim, source.card  # operations for a pair of query and key
        self.time_s = rising(time_s)
        self.fixed_s = float(self.time_s.min())

    def alone_s(self, tokens: float) -> float:
        """Seconds of a prompt without earlier context."""
        return float(np.interp(tokens, self.tokens, self.time_s))

    def with_context_s(self, tokens: int, context_tokens: int) -> float:
        """Seconds of `tokens` new tokens after `context_tokens`, which was not measured.

        The additional query-key pairs take as long per pair as in a whole prompt of the full length.
        """
        full = tokens + context_tokens
        s_per_pair = (self.alone_s(full) - self.fixed_s) / (full * (full + 1) / 2)
        return self.alone_s(tokens) + tokens * context_tokens * s_per_pair


class AllReduceTimes:
    """Seconds of one all-reduce of a tensor-parallel group, by bytes.

    vLLM runs its own kernel up to 8 MiB where the cards see each other directly, or where there are two; NCCL else
    (its custom_all_reduce.py). Times are linear in bytes between measured sizes; the last bandwidth is kept
    beyond. A slower measurement of fewer bytes is lowered to that of more bytes.
    """

    OWN_BYTES = 8 << 20

    def __init__(self, source: KernelSource, device: Device) -> None:
        tables = [read_kernels(source, "comm", name, num_gpus=device.cards) for name in ("custom_allreduce", "nccl")]
        orders = [np.argsort(t["message_size"]) for t in tables]
        self._own, self._nccl = (
            (t["message_size"][order] * BF16_BYTES, rising(t["latency"][order] * MS))
            for t, order in zip(tables, orders, strict=True)
        )
        self._direct = device.cards == 2 or device.link != PCIE_LINK

    def time_s(self, n_bytes: FloatArray) -> FloatArray:
        """Seconds (K,) of all-reduces of `n_bytes` (K,)."""
        return np.where(
            self._direct & (n_bytes <= self.OWN_BYTES), _by_size(n_bytes, *self._own), _by_size(n_bytes, *self._nccl)
        )


def from_memory(n_bytes: Any, share: FloatArray) -> float:
    """The best share of the card's bandwidth among cases too large for its cache.

    A kernel that is timed repeatedly finds smaller operands in the cache. A served model does not, since other layers
    run in between.
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


def neighbours(grid: IntArray, value: int) -> list[tuple[int, float]]:
    """Indices and weights of the grid points around `value`, linear in its logarithm; the edge beyond the grid."""
    position = float(np.interp(np.log(value), np.log(grid), np.arange(len(grid))))
    low = int(position)
    weight = position - low
    return [(low, 1.0)] if weight == 0.0 else [(low, 1.0 - weight), (low + 1, weight)]


def measured_heads(
    source: KernelSource, name: str, heads: int, kv_heads: int, head_dim: int, kv_bytes: int
) -> tuple[int, int]:
    """The nearest measured pair of heads and KV heads: the given pair if it was measured.

    KV heads count first, since the bytes that decodes read do not depend on the number of query heads.
    """
    pairs = head_pairs(source, name, head_dim, KV_DTYPES[kv_bytes])

    def distance(pair: tuple[int, int]) -> tuple[float, float]:
        return abs(math.log(pair[1] / kv_heads)), abs(math.log(pair[0] / pair[1] / (heads / kv_heads)))

    return (heads, kv_heads) if (heads, kv_heads) in pairs else min(sorted(pairs), key=distance)


@lru_cache(maxsize=16)
def head_pairs(source: KernelSource, name: str, head_dim: int, kv_dtype: str) -> frozenset[tuple[int, int]]:
    found = read_kernels(source, "attention", name, head_dim=head_dim, kv_cache_dtype=kv_dtype, window_size=0)
    return frozenset(zip(found["num_heads"].tolist(), found["num_key_value_heads"].tolist(), strict=True))
