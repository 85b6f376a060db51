"""Profiles of models from kernel times that others measured (`kernel_tables`).

A layer is the sum of its kernels: matrix products and attention are measured; norms, activation, rope, KV writes and
sampling are bytes over an achieved bandwidth plus a fixed time for each kernel, which is assumed. The profile's
provenance names what is scaled and which gaps are filled. In a tensor-parallel group each card runs its shard, and
a layer ends in two all-reduces.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from helios_sim.profile.catalog import LOAD_BYTES_PER_S, PCIE_LINK, activation_reserve_bytes, published_card
from helios_sim.profile.composition import IntArray
from helios_sim.profile.devices import Device, ring_s, shard, whole_model
from helios_sim.profile.formats import FP4, FP8, INT8, WEIGHTS
from helios_sim.profile.importers.between import DecodeTimes, PrefillTimes, ProductTimes
from helios_sim.profile.importers.kernel_tables import (
    BF16,
    FUSED,
    INTEGERS,
    OF_FP4,
    OF_FP8,
    OF_TRTLLM,
    SOURCES,
    AllReduceTimes,
    DecodeAttentionTimes,
    GemmTimes,
    KernelSource,
    Measured,
    PrefillAttentionTimes,
    measured_heads,
    rising,
)
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

TIME_BAND = TimeBand(0.89, 1.17, "90 % of 188 published runs lie within: experiments/fidelity_silicon")
BETWEEN = (
    "sizes that were not measured: how many times the roofline and its fixed part a kernel takes, interpolated",
    "times made non-decreasing in rows, batch and length by taking slower measurements at smaller sizes down",
)
BETWEEN_AS_SHIPPED = (
    "matrix widths that were not measured: share of the roofline interpolated in (log n, log k)",
    "times made non-decreasing in rows, batch and length by taking slower measurements at smaller sizes down",
)


@lru_cache(maxsize=32)
def gemm_times(source: KernelSource, kind: Measured = BF16) -> GemmTimes:
    """Times of matrix products in the source's table, which is read once.

    A shipped table gets the interpolation of `between`; one of shared data the simpler one of the shipped profiles.
    """
    return (ProductTimes if source.shipped else GemmTimes)(source, kind)


@lru_cache(maxsize=32)
def decode_times(source: KernelSource, heads: int, kv_heads: int, head_dim: int, kv_bytes: int) -> DecodeAttentionTimes:
    """Times of decode attention in the source's table, chosen as in `gemm_times`."""
    return (DecodeTimes if source.shipped else DecodeAttentionTimes)(source, heads, kv_heads, head_dim, kv_bytes)


@lru_cache(maxsize=32)
def prefill_times(
    source: KernelSource, heads: int, kv_heads: int, head_dim: int, kv_bytes: int
) -> PrefillAttentionTimes:
    """Times of attention over prompts in the source's table, chosen as in `gemm_times`."""
    return (PrefillTimes if source.shipped else PrefillAttentionTimes)(source, heads, kv_heads, head_dim, kv_bytes)


MAX_ROWS = 8192
BATCHES = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024], dtype=np.int64)
TABLE_KV_HEADS = 8  # the most that decode attention was measured with
TABLE_HEAD_DIM = 128
# aiconfigurator's own estimates for memory-bound kernels on these cards (mem_bw_empirical_scaling_factor,
# mem_empirical_constant_latency in its system files)
SMALL_KERNEL_BANDWIDTH = 0.8
SMALL_KERNEL_S = 3e-6


class LayerTimes:
    """Times of one model's operations on one device, from the tables of the nearest measured card."""

    def __init__(self, whole: ModelSpec, device: Device, source: KernelSource) -> None:
        """Read the tables for one card of the device, with its shard of the model `whole`."""
        self.model = model = shard(whole, device.cards)
        self.device, self.card, self.measured_card, self.source = device, device.card, source.card, source
        # Slowdown of compute-bound kernels if this card has the same chip but a lower power limit.
        self.slower = 1.0 if source.power is None else source.power.slower_than_measured(device.card)
        here, there = device.link, published_card(source.card.name)
        self.same_links = not source.shipped or there is None or there.link == here or here != PCIE_LINK
        self.gemms: GemmTimes = gemm_times(source)
        self.products = products_on(whole, device.card)
        kind = self._kind()
        self.of_layers = None if kind is None else gemm_times(source, kind)
        form = model.quantization
        fused = source.engine != "vLLM" and form is not None and form.name in FUSED and self.of_layers is not None
        # Extra time of the smallest product over bf16: quantizing its inputs.
        self.inputs_s = max(0.0, self.of_layers.fixed_s - self.gemms.fixed_s) if fused and self.of_layers else 0.0
        self.keep = self.gemms.rows <= MAX_ROWS
        self.rows: IntArray = self.gemms.rows[self.keep]
        ratio = model.n_heads // model.n_kv_heads
        kv_heads = min(model.n_kv_heads, TABLE_KV_HEADS)
        head_dim = model.head_dim if model.head_dim in source.head_dims else TABLE_HEAD_DIM
        self.head_scale = model.head_dim / head_dim
        kv_bytes = model.kv_bytes_per_value
        self.decode_heads = measured_heads(
            source, "generation_attention", ratio * kv_heads, kv_heads, head_dim, kv_bytes
        )
        self.table_kv_heads = self.decode_heads[1]
        self.batch_scale = model.n_kv_heads / self.table_kv_heads
        self.decode = decode_times(source, *self.decode_heads, head_dim, kv_bytes)
        self.prefill_heads = measured_heads(
            source, "context_attention", model.n_heads, model.n_kv_heads, head_dim, kv_bytes
        )
        self.prefill_scale = self.head_scale * model.n_heads / self.prefill_heads[0]
        self.prefill = prefill_times(source, *self.prefill_heads, head_dim, kv_bytes)

    @property
    def chunks(self) -> IntArray:
        """Tokens of a chunk at which attention is priced: it rises with their square, and prices are linear between."""
        tokens = self.prefill.tokens
        if not self.source.shipped:
            return tokens
        return np.unique(np.concatenate([tokens, (tokens[:-1] + tokens[1:]) // 2]))

    def _kind(self) -> Measured | None:
        """The measured kind of product that prices the layers' products; None if times come from fitted shares."""
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
        """The name in the tables of the products that price the layers; None if there are none."""
        return None if self.of_layers is None else self.of_layers.kind.dtype

    def all_reduces_s(self) -> FloatArray:
        """Seconds (rows,) of a layer's two all-reduces."""
        if self.device.cards == 1:
            return np.zeros(len(self.rows))
        moved = (self.rows * self.model.d_model * self.model.weight_bytes_per_value).astype(np.float64)
        if not self.same_links:
            return 2 * ring_s(self.device.link, self.device.cards, moved)
        return 2 * AllReduceTimes(self.source, self.device).time_s(moved)

    def gather_s(self) -> FloatArray:
        """Seconds (rows,) to gather the logits of all cards on one, from the link's latency and bandwidth."""
        n = self.device.cards
        if n == 1:
            return np.zeros(len(self.rows))
        moved = self.rows * (n - 1) * self.model.vocab_size * self.model.weight_bytes_per_value
        return np.asarray(self.device.link.latency_s + moved / self.device.link.bytes_per_s)

    def gemm_s(self, gemm: Gemm) -> FloatArray:
        """Seconds (rows,) of a product in bf16."""
        return self._gemm_s(self.gemms, gemm, None)

    def layer_gemm_s(self, gemm: Gemm) -> FloatArray:
        """Seconds (rows,) of a layer's product, with weights that may be quantized."""
        quantized = self.model.quantization
        if quantized is None or self.products is None:
            return self.gemm_s(gemm)
        weights = quantized.matrix_bytes(gemm.n, gemm.k)
        if self.of_layers is not None:
            return self._gemm_s(self.of_layers, gemm, weights)
        rows = self.rows.astype(np.float64)
        fitted_s = quantized_s(self.products, gemm, rows, weights, self.card, FITTED)
        # Weights converted to bf16 are multiplied no quicker than compute-bound products in bf16.
        moved = 2.0 * (gemm.n * gemm.k + rows * (gemm.n + gemm.k))
        bound = 2.0 * rows * gemm.n * gemm.k / self.card.flops_per_s >= moved / self.card.hbm_bytes_per_s
        return rising(np.where(bound, np.maximum(fitted_s, self.gemm_s(gemm)), fitted_s))

    def _gemm_s(self, of: GemmTimes, gemm: Gemm, weights: int | None) -> FloatArray:
        """Seconds (rows,) of a product, with memory time scaled to this card's bandwidth, never below the roofline."""
        here_s, there_s = (of.roofline_s(gemm, card, weights) for card in (self.card, self.measured_card))
        time_s = of.time_s(gemm, weights) + (here_s - there_s) / of.best_bandwidth
        if of is self.of_layers:
            time_s = time_s - self.inputs_s
        if self.source.power is not None and of.kind == BF16:
            time_s = self.source.power.slowed(self.card, time_s, of.rows.astype(np.float64) * (2 * gemm.n * gemm.k))
        elif self.slower != 1.0:
            time_s = np.where(of.operations_bind(gemm, self.card, weights), time_s * self.slower, time_s)
        time_s = rising(np.maximum(time_s, here_s / self._reached(of.from_memory)))
        return time_s[self.keep] if np.array_equal(of.rows, self.gemms.rows) else np.interp(self.rows, of.rows, time_s)

    def _reached(self, from_memory: float) -> float:
        """The share of bandwidth that bounds a price; 1 for shared data, as in the shipped profiles made from it."""
        return from_memory if self.source.shipped else 1.0

    def small_s(self, small: Elementwise) -> FloatArray:
        """Seconds (rows,) of kernels without a table."""
        moved = small.values_per_row * self.model.weight_bytes_per_value * self.rows
        return small.kernels * SMALL_KERNEL_S + moved / (self.card.hbm_bytes_per_s * SMALL_KERNEL_BANDWIDTH)

    def decode_s(self, batch: int, kv_tokens: int) -> float:
        """Seconds of decode attention.

        h/h heads at batch b take as long as 8/8 heads at batch b h/8. A narrower head takes as long as the table's head
        with proportionally fewer KV tokens.
        """
        moved = batch * kv_tokens * self.model.kv_bytes_per_token_layer
        slower_s = moved / self.card.hbm_bytes_per_s - moved / self.measured_card.hbm_bytes_per_s
        time_s = self.decode.time_s(batch * self.batch_scale, kv_tokens * self.head_scale)
        floor_s = moved / self.card.hbm_bytes_per_s / self._reached(self.decode.from_memory)
        return max(time_s + slower_s / self.decode.best_bandwidth, floor_s)

    def prefill_s(self, tokens: int, context_tokens: int, window: int = 0) -> float:
        """Seconds of prefill attention. It is compute-bound, so the card's bandwidth only sets a floor.

        With a window, the time is scaled by the share of query-key pairs within the window.
        """
        time_s = self.prefill.with_context_s(tokens, context_tokens)
        scale = self.prefill_scale * self.slower
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
    """The profile of `model` on a device with the card that `source` measured, or a similar one.

    `windows`: for each layer how far a token looks back, 0 for all. Raises UserError if a group cannot split the model.
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
    """Tables of a layer with an attention window of `window` tokens, 0 for none."""
    kv_tokens = kv_grid(model)
    chunks = times.chunks[times.chunks <= min(MAX_ROWS, model.max_context_tokens)]
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
        *(BETWEEN if source.shipped else BETWEEN_AS_SHIPPED),
        "prefill attention after context: operations, at the rate of a whole prompt of the full length",
        "decode attention beyond the measured batch: the last measured bandwidth",
    ]
    if card.hbm_bytes_per_s != there.hbm_bytes_per_s:
        scaled.append(
            f"memory-bound part of matrix products and decode attention: measured at {there.hbm_bytes_per_s / 1e9:.0f} "
            f"GB/s, moved to {card.hbm_bytes_per_s / 1e9:.0f} GB/s"
        )
    if source.power is not None:
        limit_w = source.power.measured_w if card.tdp_w is None else card.tdp_w
        scaled.append(
            f"products in bf16: timed with weights of zeros, slowed to the clock that {limit_w:.0f} W leave to real "
            "numbers, by measurements of A100s with 250 and 400 W"
        )
    if times.slower != 1.0:
        scaled.append(
            f"attention, and products with integer weights where operations bind: measured with {there.tdp_w:.0f} W, "
            f"{times.slower:.3f} times as long with {limit_w:.0f} W"
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
        reduced = "measured all-reduces a layer and one after the embedding; NCCL's above "
        reduced += "8 MiB, and without direct links between more than two cards"
        if not times.same_links:
            reduced = "all-reduces a layer and one after the embedding, as a ring moves them over the link"
        scaled += [
            f"{times.device.cards} cards: each runs its shard of every matrix; two {reduced}",
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
            *_power_assumed(card),
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


def _power_assumed(card: HardwareSpec) -> tuple[Assumption, ...]:
    if card.least_busy_w is None:
        return ()
    band = f"{card.least_busy_w:.0f} to {card.most_busy_w:.0f} W"
    why = "measured of attention under vLLM 0.22, taken for all kernels: experiments/kernels"
    return (Assumption("busy_w", band, why, "rebuild"),)


def _kinds(times: LayerTimes) -> str:
    """The precisions of the measured kernels from which the profile is made."""
    of_kv = "fp8" if times.model.kv_bytes_per_value == 1 else "bf16"
    of_layers = str(times.measured) if times.measured in ("fp8", "fp8_block", "nvfp4") else "bf16"
    return " and ".join(dict.fromkeys(("bf16", of_layers, of_kv)))
