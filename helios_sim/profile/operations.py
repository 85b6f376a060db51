"""The operations of one layer: matrix shapes and bytes moved. Knows no card and no time."""

from __future__ import annotations

from dataclasses import dataclass

from helios_sim.profile.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Gemm:
    """rows x k times k x n."""

    n: int
    k: int

    def bytes_moved(self, rows: int, value_bytes: int) -> int:
        return value_bytes * (self.n * self.k + rows * (self.n + self.k))

    def operations(self, rows: int) -> int:
        return 2 * rows * self.n * self.k


@dataclass(frozen=True, slots=True)
class Elementwise:
    """Small kernels: how many launches on the device, and values read and written for each row."""

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
    """K and V alone, for tokens that left above and are still needed below."""
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
