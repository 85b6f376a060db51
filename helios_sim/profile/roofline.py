"""Makes a profile from a card's data sheet: bytes, operations, and shares of the peak that kernels reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from helios_sim.profile.catalog import LOAD_BYTES_PER_S, PCIE_LINK, activation_reserve_bytes
from helios_sim.profile.composition import IntArray
from helios_sim.profile.devices import Device, ring_s, shard, whole_model
from helios_sim.profile.formats import FP4, FP8, INT8, WEIGHTS
from helios_sim.profile.precision import assumed_of, products_on, scaled_by
from helios_sim.profile.profile import Profile
from helios_sim.profile.runtimes import preset
from helios_sim.profile.spec import HardwareSpec, ModelSpec, Runtime, TimeBand
from helios_sim.profile.tables import FloatArray, GridTable, LayerTables, RowsTable
from helios_sim.provenance import Assumption, Provenance, ProvenanceClass


@dataclass(frozen=True, slots=True)
class Gemm:
    """A matrix product, rows x k times k x n."""

    n: int
    k: int

    def bytes_moved(self, rows: int, value_bytes: int) -> int:
        return value_bytes * (self.n * self.k + rows * (self.n + self.k))

    def operations(self, rows: Any) -> Any:
        """Operations of so many rows, or of each number of rows in an array."""
        return 2 * rows * self.n * self.k


@dataclass(frozen=True, slots=True)
class Elementwise:
    """Small kernels: launches on the device, and values read and written for each row."""

    kernels: int
    values_per_row: int


def layer_gemms(model: ModelSpec) -> tuple[Gemm, ...]:
    """QKV in one matrix, output projection, MLP up (gate and up in one where gated), MLP down: as vLLM fuses them."""
    q_width = model.n_heads * model.head_dim
    return (
        Gemm(q_width + 2 * model.kv_width, model.d_model),
        Gemm(model.d_model, q_width),
        Gemm((2 if model.gated_mlp else 1) * model.d_ff, model.d_model),
        Gemm(model.d_model, model.d_ff),
    )


def kv_gemm(model: ModelSpec) -> Gemm:
    """The K and V projections alone, for tokens that left at an earlier exit."""
    return Gemm(2 * model.kv_width, model.d_model)


def head_gemm(model: ModelSpec) -> Gemm:
    return Gemm(model.vocab_size, model.d_model)


def layer_elementwise(model: ModelSpec) -> Elementwise:
    """Two norms that add the residual (2 reads, 2 writes each), activation, KV write, rope where positions rotate."""
    q_width = model.n_heads * model.head_dim
    activation = 3 * model.d_ff if model.gated_mlp else 2 * model.d_ff
    values = 2 * 4 * model.d_model + activation + 2 * 2 * model.kv_width
    if model.learned_positions:
        return Elementwise(4, values)
    return Elementwise(5, values + 2 * (q_width + model.kv_width))


def kv_elementwise(model: ModelSpec) -> Elementwise:
    """Norm of the exit's hidden state (read, write) and the KV write, with rope on K where positions rotate."""
    values = 2 * model.d_model + 2 * 2 * model.kv_width
    return Elementwise(2, values) if model.learned_positions else Elementwise(3, values + 2 * model.kv_width)


def head_elementwise(model: ModelSpec) -> Elementwise:
    """Final norm; logits read as a float32 copy is written, and read twice (largest value, sum of exponents)."""
    return Elementwise(4, 2 * model.d_model + model.vocab_size * (1 + 3 * 2))


def embedding_elementwise(model: ModelSpec) -> Elementwise:
    tables = 2 if model.learned_positions else 1
    return Elementwise(tables, 2 * tables * model.d_model)


ROWS = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192], dtype=np.int64)
BATCHES = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024], dtype=np.int64)
CHUNKS = np.array([1, 16, 64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of the data sheet that kernels are assumed to reach, and the time of an empty kernel.

    0.8 of bandwidth and 3 us a kernel are aiconfigurator's own figures for these cards; the rest is assumed.
    """

    bandwidth: float = 0.8
    flops: float = 0.7
    attention_flops: float = 0.5
    kernel_s: float = 3e-6
    # Of products of quantized layers: the share of the rate for what they multiply, and the fixed part of their times,
    # which has the making of 8-bit inputs in it. Weights alone are made bf16 in the kernel, for the rate of bf16.
    fp8_flops: float = 0.5
    fp8_kernel_s: float = 8e-6
    int8_flops: float = 0.7
    int8_kernel_s: float = 13e-6
    weights_flops: float = 0.9
    weights_kernel_s: float = 15e-6
    fp4_flops: float = 0.4
    fp4_kernel_s: float = 8e-6


# Fitted to the measured kernels of six cards, A100 to B200, by experiments/kernels/fit.py: fp8 to five, fp4 to two,
# integers to the A100, the only one that has them. Where a card was left out of the fit, its measured times over the
# predicted ones had these bounds (5 % to 95 % of decodes and prompts). None was left out for integers: there the lower
# bound is what the fit misses of single products, and the upper one of weights alone what an 8-bit kernel of SGLang
# took on an H100.
FITTED = Efficiency(
    bandwidth=0.813, flops=0.726, attention_flops=0.785, kernel_s=3.8e-6, fp8_flops=0.534, fp8_kernel_s=7.6e-6,
    int8_flops=0.659, int8_kernel_s=13.3e-6, weights_flops=0.882, weights_kernel_s=15.3e-6,
    fp4_flops=0.461, fp4_kernel_s=8.8e-6,
)  # fmt: skip
FITTED_BANDS = {None: (0.83, 1.21), FP8: (0.79, 1.23), INT8: (0.73, 1.41), WEIGHTS: (0.77, 1.45), FP4: (0.72, 1.24)}


def fitted_band(model: ModelSpec, card: HardwareSpec) -> TimeBand:
    """The expected ratio of real times to times by the fitted shares, for the model's precision on this card."""
    low, high = FITTED_BANDS[products_on(model, card)]
    return TimeBand(low, high, "90 % of the kernels of cards left out of the fit lie within: experiments/kernels")


def quantized_s(
    products: str, gemm: Gemm, rows: FloatArray, weights: int, card: HardwareSpec, efficiency: Efficiency
) -> FloatArray:
    """(K,) seconds of a product with `weights` of so many bytes, for K numbers of rows.

    Weight-only formats are converted to bf16 before they are multiplied: such products take the times of their bytes
    and of their operations one after the other, as measured ones do, and no less than a product in bf16.
    """
    bytes_per_s, operations = card.hbm_bytes_per_s * efficiency.bandwidth, 2.0 * rows * gemm.n * gemm.k
    if products == WEIGHTS:
        moved_s = (weights + 2 * rows * (gemm.n + gemm.k)) / bytes_per_s
        both_s = moved_s + operations / (card.flops_per_s * efficiency.weights_flops)
        return efficiency.weights_kernel_s + np.maximum(both_s, operations / (card.flops_per_s * efficiency.flops))
    of = {
        FP8: (card.fp8_flops_per_s, efficiency.fp8_flops, efficiency.fp8_kernel_s),
        INT8: (card.int8_flops_per_s, efficiency.int8_flops, efficiency.int8_kernel_s),
        FP4: (card.fp4_flops_per_s, efficiency.fp4_flops, efficiency.fp4_kernel_s),
    }  # fmt: skip
    rate, share, kernel_s = of[products]
    assert rate is not None
    moved_s = (weights + rows * (2 * gemm.n + (0.5625 if products == FP4 else 1.0) * gemm.k)) / bytes_per_s
    return kernel_s + np.maximum(moved_s, operations / (rate * share))


def roofline_profile(
    model: ModelSpec,
    hardware: HardwareSpec,
    runtime: Runtime | None = None,
    efficiency: Efficiency | None = None,
    load_bytes_per_s: float | None = None,
) -> Profile:
    """`device_roofline` on one card, with the catalogue's rate of loads by default."""
    if load_bytes_per_s is None:
        load_bytes_per_s = LOAD_BYTES_PER_S[hardware.name]
    device = Device(hardware, PCIE_LINK, load_bytes_per_s)
    return device_roofline(model, device, runtime, efficiency, f"roofline_profile({model.name!r}, {hardware.name!r})")


def device_roofline(
    whole: ModelSpec,
    device: Device,
    runtime: Runtime | None = None,
    efficiency: Efficiency | None = None,
    command: str = "",
    windows: tuple[int, ...] = (),
) -> Profile:
    """Each kernel takes kernel_s + max(bytes / (bandwidth x share), operations / (peak x share)).

    In a group each card runs its shard, and two all-reduces a layer go round the link as a ring. `windows`: for each
    layer how far a token looks back, 0 for all.
    """
    efficiency = efficiency or Efficiency()
    card, model = device.card, shard(whole, device.cards)
    bytes_per_s = card.hbm_bytes_per_s * efficiency.bandwidth
    flops_per_s = card.flops_per_s * efficiency.flops
    value_bytes = model.weight_bytes_per_value
    products = products_on(whole, card)

    def gemm_s(gemm: Gemm, rows: int) -> float:
        moved_s = gemm.bytes_moved(rows, value_bytes) / bytes_per_s
        return float(efficiency.kernel_s + max(moved_s, gemm.operations(rows) / flops_per_s))

    def layer_gemm_s(gemm: Gemm, rows: int) -> float:
        if products is None:
            return gemm_s(gemm, rows)
        weights = model.matrix_bytes(gemm.n, gemm.k)
        return float(quantized_s(products, gemm, np.array([float(rows)]), weights, card, efficiency)[0])

    def small_s(small: Elementwise, rows: int) -> float:
        return small.kernels * efficiency.kernel_s + small.values_per_row * rows * value_bytes / bytes_per_s

    def decode_s(batch: int, kv_tokens: int) -> float:
        return efficiency.kernel_s + batch * kv_tokens * model.kv_bytes_per_token_layer / bytes_per_s

    def prefill_s(tokens: int, context_tokens: int, window: int) -> float:
        pairs = tokens * context_tokens + tokens * (tokens + 1) / 2
        if window:
            pairs = float(np.minimum(context_tokens + np.arange(1, tokens + 1), window).sum())
            context_tokens = min(context_tokens, window)
        operations_s = 4 * model.n_heads * model.head_dim * pairs / (card.flops_per_s * efficiency.attention_flops)
        moved_s = (tokens + context_tokens) * model.kv_bytes_per_token_layer / bytes_per_s
        return efficiency.kernel_s + max(operations_s, moved_s)

    def reduce_s(rows: int) -> float:
        moved = np.array([float(rows * model.d_model * value_bytes)])
        return float(ring_s(device.link, device.cards, moved)[0])

    def gather_s(rows: int) -> float:
        n = device.cards
        moved = rows * (n - 1) * model.vocab_size * value_bytes
        return 0.0 if n == 1 else device.link.latency_s + moved / device.link.bytes_per_s

    def layer_s(rows: int) -> float:
        gemms_s = sum(layer_gemm_s(g, rows) for g in layer_gemms(model))
        return gemms_s + small_s(layer_elementwise(model), rows) + 2 * reduce_s(rows)

    contexts = kv_grid(model)
    dense = by_rows(layer_s)
    moved = by_rows(lambda r: layer_gemm_s(kv_gemm(model), r) + small_s(kv_elementwise(model), r))

    def layer(window: int) -> LayerTables:
        return LayerTables(
            dense=dense,
            kv_projection=moved,
            decode_attention=on_grid(BATCHES, contexts, lambda b, kv: decode_s(b, min(kv, window or kv))),
            prefill_attention=on_grid(
                CHUNKS, np.concatenate([[0], contexts[1:]]), lambda t, c: prefill_s(t, c, window)
            ),
            window=window,
        )

    kinds = tuple(dict.fromkeys(windows)) or (0,)
    why = "no kernel measured: share of the data sheet"
    if efficiency == FITTED:
        why += ", fitted to the kernels of six other cards"
    others = tuple(f"{other}_" for other in (FP8, INT8, FP4, WEIGHTS) if other != products)
    used = {key: value for key, value in asdict(efficiency).items() if not key.startswith(others)}
    assumptions = tuple(Assumption(f"efficiency.{key}", value, why, f"efficiency.{key}") for key, value in used.items())
    assumptions += assumed_of(model)
    scaled = scaled_by(model, products, None)
    if efficiency == FITTED:
        band = fitted_band(whole, card)
        expected = f"{band.low:g} to {band.high:g} of these (90 % of cases)"
        scaled = (f"no kernel of this card was measured: times may be {expected}", *scaled)
    if device.cards > 1:
        link = f"{device.link.latency_s * 1e6:g} us, {device.link.bytes_per_s / 1e9:g} GB/s"
        assumptions += (Assumption("all-reduce link", link, device.link.source, "rebuild"),)
    return Profile(
        model=whole_model(whole, device.cards), hardware=device.whole, runtime=runtime or preset("captured_graphs"),
        provenance=Provenance(
            ProvenanceClass.DERIVED, f"roofline of the data sheet: {card.source}", command, scaled, assumptions
        ),
        layer_tables=tuple(layer(window) for window in kinds),
        layer_class=tuple(kinds.index(window) for window in windows) or (0,) * model.n_layers,
        head=by_rows(lambda r: gemm_s(head_gemm(model), r) + small_s(head_elementwise(model), r) + gather_s(r)),
        embedding=by_rows(lambda r: small_s(embedding_elementwise(model), r) + reduce_s(r)), check=None,
        activation_reserve_bytes=device.cards * activation_reserve_bytes(model),
        load_bytes_per_s=device.cards * device.load_bytes_per_s,
        time_band=fitted_band(whole, card) if efficiency == FITTED else None,
    )  # fmt: skip


def kv_grid(model: ModelSpec) -> IntArray:
    """KV lengths by powers of two from 1 to the model's context."""
    steps = int(np.log2(model.max_context_tokens))
    return np.unique(np.append(2 ** np.arange(steps + 1), model.max_context_tokens)).astype(np.int64)


def by_rows(time_s: Callable[[int], float], rows: IntArray = ROWS) -> RowsTable:
    return RowsTable(rows, np.array([time_s(int(r)) for r in rows]))


def on_grid(first: IntArray, second: IntArray, time_s: Callable[[int, int], float]) -> GridTable:
    values = np.array([[time_s(int(a), int(b)) for b in second] for a in first])
    return GridTable(first.astype(np.int64), second.astype(np.int64), values)
