"""Profiles of models from kernels that others measured. Knows what is scaled and says so in the provenance.

A layer is the sum of its kernels: matrix products and attention are measured; norms, activation, rope, KV writes
and sampling are bytes over an achieved bandwidth plus a fixed time for each kernel, which is assumed.
"""

from __future__ import annotations

import numpy as np

from helios_sim.profile.composition import IntArray
from helios_sim.profile.kernel_tables import (
    SOURCES,
    DecodeAttentionTimes,
    GemmTimes,
    KernelSource,
    PrefillAttentionTimes,
    gemm_times,
    rising,
)
from helios_sim.profile.models import LOAD_BYTES_PER_S, activation_reserve_bytes
from helios_sim.profile.operations import (
    Elementwise,
    Gemm,
    embedding_elementwise,
    head_elementwise,
    head_gemm,
    kv_elementwise,
    kv_gemm,
    layer_elementwise,
    layer_gemms,
)
from helios_sim.profile.profile import Profile
from helios_sim.profile.roofline import kv_grid
from helios_sim.profile.runtime import preset
from helios_sim.profile.spec import HardwareSpec, ModelSpec, Runtime
from helios_sim.profile.tables import FloatArray, GridTable, LayerTables, RowsTable
from helios_sim.provenance import Assumption, Provenance, ProvenanceClass

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
                Assumption(f"runtime.{key}", _runtime_value(runtime, key), why, f"runtime.{key}")
                for key, why in runtime.sources if why.startswith("assumed")
            ),
        ),
    )  # fmt: skip


def _runtime_value(runtime: Runtime, key: str) -> float:
    value: float = getattr(runtime, key)
    return value
