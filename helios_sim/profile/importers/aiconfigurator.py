"""Profiles of models from kernel times that others measured, as aiconfigurator publishes them.

Its measurements of vLLM (bf16): matrix products by (m, n, k), flash attention by batch, length and heads. A layer is
the sum of its kernels: matrix products and attention are measured; norms, activation, rope, KV writes and sampling are
bytes over an achieved bandwidth plus a fixed time for each kernel, which is assumed. What is scaled, and each gap that
is closed, is named in the profile's provenance.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from helios_sim.errors import UserError
from helios_sim.profile.catalog import HARDWARE, LOAD_BYTES_PER_S, activation_reserve_bytes
from helios_sim.profile.composition import IntArray
from helios_sim.profile.importers.reading import MS, times
from helios_sim.profile.profile import Profile
from helios_sim.profile.roofline import (
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
)
from helios_sim.profile.spec import Basis, HardwareSpec, ModelSpec, Runtime, preset
from helios_sim.profile.tables import FloatArray, GridTable, LayerTables, RowsTable
from helios_sim.provenance import Assumption, Provenance, ProvenanceClass
from helios_sim.shared_data import VARIABLE, shared_data_folder
from helios_sim.untrusted import reading

BF16_BYTES = 2
LEAST_S = 1e-9


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
        return {c: table[c].to_numpy() for c in table.column_names}


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
                body_s = np.maximum(rising(self._time_s[:, i, j]) - self.fixed_s, LEAST_S)  # the quickest has none
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


MAX_ROWS = 8192
BATCHES = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024], dtype=np.int64)
TABLE_KV_HEADS = 8  # the most that decode attention was measured with
TABLE_HEAD_DIM = 128
# aiconfigurator's own estimates for memory-bound kernels on these cards (mem_bw_empirical_scaling_factor,
# mem_empirical_constant_latency in its system files)
SMALL_KERNEL_BANDWIDTH = 0.8
SMALL_KERNEL_S = 3e-6


class LayerTimes:
    """Times of one model's operations on one card, from the tables of the nearest measured card."""

    def __init__(self, model: ModelSpec, card: HardwareSpec, source: KernelSource) -> None:
        self.model, self.card, self.measured_card = model, card, source.card
        self.gemms: GemmTimes = gemm_times(source)
        self.keep = self.gemms.rows <= MAX_ROWS
        self.rows: IntArray = self.gemms.rows[self.keep]
        ratio = model.n_heads // model.n_kv_heads
        self.table_kv_heads = min(model.n_kv_heads, TABLE_KV_HEADS)
        self.batch_scale = model.n_kv_heads / self.table_kv_heads
        head_dim = model.head_dim if model.head_dim in source.head_dims else TABLE_HEAD_DIM
        self.head_scale = model.head_dim / head_dim
        self.decode = DecodeAttentionTimes(source, ratio * self.table_kv_heads, self.table_kv_heads, head_dim)
        self.prefill = PrefillAttentionTimes(source, model.n_heads, model.n_kv_heads, head_dim)

    def gemm_s(self, gemm: Gemm) -> FloatArray:
        """(rows,) with the bytes' share moved to this card's bandwidth, never below the roofline."""
        here_s, there_s = self.gemms.roofline_s(gemm, self.card), self.gemms.roofline_s(gemm, self.measured_card)
        time_s = self.gemms.time_s(gemm) + (here_s - there_s) / self.gemms.best_bandwidth
        return rising(np.maximum(time_s, here_s))[self.keep]

    def small_s(self, small: Elementwise) -> FloatArray:
        """(rows,) kernels without a table."""
        moved = small.values_per_row * self.model.weight_bytes_per_value * self.rows
        return small.kernels * SMALL_KERNEL_S + moved / (self.card.hbm_bytes_per_s * SMALL_KERNEL_BANDWIDTH)

    def decode_s(self, batch: int, kv_tokens: int) -> float:
        """h/h heads at batch b like 8/8 at b h/8; a narrower head like the table's with as much less KV."""
        moved = batch * kv_tokens * self.model.kv_bytes_per_token_layer
        slower_s = moved / self.card.hbm_bytes_per_s - moved / self.measured_card.hbm_bytes_per_s
        time_s = self.decode.time_s(batch * self.batch_scale, kv_tokens * self.head_scale)
        return max(time_s + slower_s / self.decode.best_bandwidth, moved / self.card.hbm_bytes_per_s)

    def prefill_s(self, tokens: int, context_tokens: int) -> float:
        """Bound by operations, so the card's bandwidth does not enter except as a floor."""
        time_s = self.prefill.with_context_s(tokens, context_tokens)
        time_s = self.prefill.fixed_s + (time_s - self.prefill.fixed_s) * self.head_scale
        read = (tokens + context_tokens) * self.model.kv_bytes_per_token_layer
        return max(time_s, read / self.card.hbm_bytes_per_s)


def kernel_profile(model: ModelSpec, hardware: HardwareSpec, runtime: Runtime | None = None) -> Profile:
    """The profile of `model` on `hardware`; raises UserError when the measured tables are absent."""
    times = LayerTimes(model, hardware, SOURCES[hardware.name])
    kv_tokens = kv_grid(model)
    chunks = times.prefill.tokens[times.prefill.tokens <= min(MAX_ROWS, model.max_context_tokens)]
    contexts = np.unique(np.append([0, 128], kv_tokens[kv_tokens >= 256]))
    layer = LayerTables(
        dense=RowsTable(
            times.rows, sum((times.gemm_s(g) for g in layer_gemms(model)), times.small_s(layer_elementwise(model)))
        ),
        kv_projection=RowsTable(times.rows, times.gemm_s(kv_gemm(model)) + times.small_s(kv_elementwise(model))),
        decode_attention=GridTable(
            BATCHES, kv_tokens, np.array([[times.decode_s(int(b), int(kv)) for kv in kv_tokens] for b in BATCHES])
        ),
        prefill_attention=GridTable(
            chunks, contexts, np.array([[times.prefill_s(int(t), int(c)) for c in contexts] for t in chunks])
        ),
    )
    load_bytes_per_s = LOAD_BYTES_PER_S[hardware.name]
    runtime = runtime or preset("captured_graphs")
    return Profile(
        model=model, hardware=hardware, runtime=runtime, provenance=_provenance(times, runtime),
        layer_tables=(layer,), layer_class=(0,) * model.n_layers,
        head=RowsTable(times.rows, times.gemm_s(head_gemm(model)) + times.small_s(head_elementwise(model))),
        embedding=RowsTable(times.rows, times.small_s(embedding_elementwise(model))), check=None,
        activation_reserve_bytes=activation_reserve_bytes(model), load_bytes_per_s=load_bytes_per_s,
        load_slowdown=1.0 / (1.0 - load_bytes_per_s / hardware.hbm_bytes_per_s),
    )  # fmt: skip


def _provenance(times: LayerTimes, runtime: Runtime) -> Provenance:
    model, card, there = times.model, times.card, times.measured_card
    source = SOURCES[card.name]
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
    return Provenance(
        provenance_class=ProvenanceClass.DERIVED,
        source=(
            f"aiconfigurator (ai-dynamo/aiconfigurator, Apache-2.0): vLLM {source.vllm} bf16 kernels measured on "
            f"{there.name}; card limits: {card.source}"
        ),
        command=f"python -m helios_sim.profile.build model={model.name} hardware={card.name}",
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
                "load_bytes_per_s", LOAD_BYTES_PER_S[card.name], "0.8 of PCIe x16; no copy was measured",
                "profile.load_bytes_per_s",
            ),
            Assumption(
                "load_slowdown", 1.0 / (1.0 - LOAD_BYTES_PER_S[card.name] / card.hbm_bytes_per_s),
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
        ),
    )  # fmt: skip


