"""Shapes of models, limits of cards, and the time that the host adds to the device's."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.profile.formats import WeightFormat
from helios_sim.request import token_counts

_Ranges = dict[str, tuple[float, float]]
_OF_A_MODEL: _Ranges = {
    "n_layers": (1, 10_000), "d_model": (1, 1 << 20), "n_heads": (1, 1 << 16), "n_kv_heads": (1, 1 << 16),
    "head_dim": (1, 1 << 16), "d_ff": (1, 1 << 24), "vocab_size": (1, 1 << 24), "max_context_tokens": (1, 1 << 31),
    "weight_bytes_per_value": (1, 16), "kv_bytes_per_value": (1, 16), "chars_per_token": (0.1, 1000),
    "other_layer_values": (0, 1 << 40),
}  # fmt: skip
_OF_A_CARD: _Ranges = {
    "hbm_bytes": (1, 1 << 60), "hbm_bytes_per_s": (1, math.inf), "flops_per_s": (1, math.inf), "tdp_w": (1e-3, 1e6),
    "idle_w": (0, 1e6), "fp8_flops_per_s": (1, math.inf), "int8_flops_per_s": (1, math.inf),
    "fp4_flops_per_s": (1, math.inf), "least_busy_w": (0, 1e6), "most_busy_w": (0, 1e6),
}  # fmt: skip


def require_name(key: str, name: str) -> None:
    """Raise UserError unless the name can be a folder's and be shown: no separator, no control character."""
    if not name or name in (".", "..") or len(name) > 200 or re.search(r"[/\\\x00-\x1f\x7f]", name):
        raise UserError(key, name[:80], "1 to 200 characters without / and control characters", "correct the name")


def require_within(where: str, part: object, ranges: _Ranges) -> None:
    """Raise UserError unless each attribute named in `ranges` is None or lies in its range; false for NaN."""
    for key, (low, high) in ranges.items():
        value = getattr(part, key)
        if value is not None and not low <= value <= high:
            raise UserError(f"{where}.{key}", value, f"a number from {low:g} to {high:g}", "correct it")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer with uniform layers.

    `chars_per_token` is the tokenizer's mean on the texts of interest: requests are counted in characters.
    """

    name: str
    family: str  # opt, llama, gpt2, qwen2, gemma3
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    gated_mlp: bool  # three matrices (gate, up, down) in place of two
    vocab_size: int
    tied_embeddings: bool  # the LM head shares the embedding's weights
    max_context_tokens: int
    learned_positions: bool  # a table of max_context_tokens rows (OPT, GPT-2)
    bias: bool
    weight_bytes_per_value: int  # of activations and weights that are not quantized; 2 for bf16
    kv_bytes_per_value: int  # 1 for fp8
    chars_per_token: float
    other_layer_values: int = 0  # of a layer, beyond the formula below (Qwen-2's q, k, v biases, Gemma-3's norms)
    quantization: WeightFormat | None = None  # format of the layers' matrices; None if they are not quantized

    def __post_init__(self) -> None:
        require_name("model.name", self.name)
        require_within("model", self, _OF_A_MODEL)
        if self.n_heads % self.n_kv_heads:
            raise UserError("model.n_kv_heads", self.n_kv_heads, f"a divisor of n_heads, {self.n_heads}", "correct it")

    @property
    def kv_width(self) -> int:
        return self.n_kv_heads * self.head_dim

    @property
    def kv_bytes_per_token_layer(self) -> int:
        return 2 * self.kv_width * self.kv_bytes_per_value

    @property
    def layer_values(self) -> int:
        """Weights of one layer: attention projections, MLP, two norms, and biases if the family has them."""
        q_width = self.n_heads * self.head_dim
        norms = 2 * self.d_model * (2 if self.bias else 1)
        biases = (q_width + 2 * self.kv_width + self.d_model + self.d_ff + self.d_model) if self.bias else 0
        return self.matrix_values + norms + biases + self.other_layer_values

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Outputs and inputs of a layer's matrices: Q, K, V, attention output, MLP up (with gate), MLP down."""
        q_width, up = self.n_heads * self.head_dim, (self.d_ff, self.d_model)
        attention = (q_width, self.d_model), (self.kv_width, self.d_model), (self.kv_width, self.d_model)
        return (*attention, (self.d_model, q_width), *([up] * (2 if self.gated_mlp else 1)), (self.d_model, self.d_ff))

    @property
    def matrix_values(self) -> int:
        """Weights of a layer's matrices."""
        return sum(n * k for n, k in self.matrices)

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's weights."""
        if self.quantization is None:
            return self.weight_bytes_per_value * self.layer_values
        kept = self.weight_bytes_per_value * (self.layer_values - self.matrix_values)
        return kept + sum(self.quantization.matrix_bytes(n, k) for n, k in self.matrices)

    def matrix_bytes(self, n: int, k: int) -> int:
        """Bytes of a matrix of a layer with n outputs and k inputs."""
        form = self.quantization
        return self.weight_bytes_per_value * n * k if form is None else form.matrix_bytes(n, k)

    @property
    def embedding_values(self) -> int:
        """Weights outside the layers: embedding, LM head if it is not tied, positions, final norm."""
        tables = 1 if self.tied_embeddings else 2
        positions = self.max_context_tokens * self.d_model if self.learned_positions else 0
        return tables * self.vocab_size * self.d_model + positions + self.d_model * (2 if self.bias else 1)

    def weight_bytes(self, layers: int) -> int:
        """Bytes of the model loaded up to `layers`, embedding and LM head included."""
        return self.weight_bytes_per_value * self.embedding_values + layers * self.layer_bytes

    def tokens(self, chars: int) -> int:
        """Tokens of a text with so many characters, at least one."""
        return max(1, round(chars / self.chars_per_token))

    def tokens_of_many(self, chars: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of n texts, (n,)."""
        return token_counts(chars, self.chars_per_token)


@dataclass(frozen=True, slots=True)
class HardwareSpec:
    """A card as its maker describes it, or a device by the ceilings measured on it; `source` says which."""

    name: str
    hbm_bytes: int
    hbm_bytes_per_s: float
    flops_per_s: float  # dense bf16 tensor cores
    tdp_w: float | None  # None if the device does not say; energy is then null
    idle_w: float | None  # None if no source is known; energy is then null
    source: str
    fp8_flops_per_s: float | None = None  # dense, sums in float32; None if the card has no units for it
    int8_flops_per_s: float | None = None  # dense; None without units, or without vLLM kernels for them
    fp4_flops_per_s: float | None = None  # dense; None if the card has no units for it
    # Least and most power of kernels, if measured; None: between idle power and the limit, by the roofline
    least_busy_w: float | None = None
    most_busy_w: float | None = None

    def __post_init__(self) -> None:
        require_name("hardware.name", self.name)
        require_within("hardware", self, _OF_A_CARD)
        if self.tdp_w is not None and self.idle_w is not None and self.idle_w > self.tdp_w:
            raise UserError("hardware.idle_w", self.idle_w, f"at most tdp_w, {self.tdp_w}", "correct one of them")

    def busy_w(self, share: float) -> tuple[float, float] | None:
        """Least and most watts while iterations run that reach this share of the roofline; None if not known.

        If no kernel's power was measured, the least is idle power plus that share of what is above it, and the most is
        the limit.
        """
        if self.least_busy_w is not None and self.most_busy_w is not None:
            return self.least_busy_w, self.most_busy_w
        if self.idle_w is None or self.tdp_w is None:
            return None
        return self.idle_w + share * (self.tdp_w - self.idle_w), self.tdp_w


class Basis(StrEnum):
    """The kind of evidence for a host cost."""

    MEASURED = "measured"
    DEFINITION = "by definition"
    ASSUMED = "assumed"
    FITTED = "fitted"  # fitted to published measurements
    STATED = "stated"  # stated by a setting, an engine's defaults or a test


@dataclass(frozen=True, slots=True)
class CostSource:
    """The source of one of a runtime's values."""

    quantity: str  # a field of Runtime
    basis: Basis
    why: str

    @property
    def text(self) -> str:
        return self.why if self.basis is Basis.STATED else f"{self.basis.value}: {self.why}"

    @classmethod
    def parsed(cls, quantity: str, text: str) -> CostSource:
        """The source in this `text`, the form of older profiles."""
        basis, colon, why = text.partition(": ")
        if colon and basis in (Basis.MEASURED, Basis.DEFINITION, Basis.ASSUMED, Basis.FITTED):
            return cls(quantity, Basis(basis), why)
        return cls(quantity, Basis.STATED, text)


@dataclass(frozen=True, slots=True)
class Runtime:
    """The time that the host adds to the device's. Each value has a source, zeros included.

    Between two points at which the host waits for the device, host and device work side by side and the slower
    one counts. With captured graphs the host launches one graph per group of layers; eager, it launches each layer.
    """

    launch_s_per_layer: float  # eager launch of one layer's kernels; 0 with captured graphs
    launch_s_per_graph: float  # one captured graph; 0 when eager
    sync_s: float  # device to host and back, at an exit check with an answer that the host needs
    host_overhead_s: float  # scheduling, sampling and bookkeeping of one iteration, while the device waits
    graph_batch_sizes: tuple[int, ...] | None  # decode batches are padded up to one of these; None: no padding
    sources: tuple[CostSource, ...] = ()
    gap_s: float = 0.0  # idle time of the device between two iterations, even if the host prepares ahead
    host_s_per_request: float = 0.0  # added to `host_overhead_s` for each request of an iteration
    prefill_gap_s: float = 0.0  # added to `gap_s` in an iteration with prefill, which no captured graph launches
    gap_s_per_request: float = 0.0  # added to `gap_s` for each request of the iteration
    prefill_launch_s_per_layer: float = 0.0  # eager launch of a layer with prefill, if only decodes are captured
    load_fixed_s: float = 0.0  # time of a load beyond its bytes: memory is mapped, graphs are captured
    regroup_s: float = 0.0  # time to split a batch at an exit and keep the hidden states of waiting tokens

    def __post_init__(self) -> None:
        require_within("runtime", self, {name: (0.0, 1e6) for name, _ in self.costs()})
        sizes = self.graph_batch_sizes or (1,)
        if len(sizes) > 10_000 or min(sizes) < 1 or max(sizes) > 1 << 20:
            allowed = f"at most 10000 sizes from 1 to {1 << 20}"
            raise UserError("runtime.graph_batch_sizes", sizes[:8], allowed, "correct them")

    def costs(self) -> list[tuple[str, float]]:
        """Every cost in seconds, by its name."""
        return [(f.name, float(getattr(self, f.name))) for f in fields(self) if f.type == "float"]

    def changed(self, **costs: float) -> Runtime:
        """The runtime with these costs, each with its setting as the source."""
        kept = [source for source in self.sources if source.quantity not in costs]
        of_settings = [CostSource(key, Basis.STATED, f"set by runtime.{key}") for key in costs]
        return replace(self, sources=(*kept, *of_settings), **costs)  # type: ignore[arg-type]


@dataclass
class RuntimeConfig:
    """The settings `runtime`: a named set of host costs, and costs that replace those of the set."""

    preset: str = "captured_graphs"  # see profile/runtimes.py; profile: the costs that came with the profile
    launch_s_per_layer: float | None = None  # each of these replaces the preset's value; see Runtime
    launch_s_per_graph: float | None = None
    sync_s: float | None = None
    host_overhead_s: float | None = None
    host_s_per_request: float | None = None
    gap_s: float | None = None
    gap_s_per_request: float | None = None
    prefill_gap_s: float | None = None
    load_fixed_s: float | None = None
    regroup_s: float | None = None
    load_gb_per_s: float | None = None  # weights from host memory, all cards together; null: the profile's
    disk_gb_per_s: float | None = None  # weights read from files (server.sleep_level=2); null: the profile's

    def costs(self) -> dict[str, float]:
        """The costs that settings give, by name."""
        others = ("preset", "load_gb_per_s", "disk_gb_per_s")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in others}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class TimeBand:
    """The range of real times of iterations divided by a profile's times."""

    low: float
    high: float
    source: str  # which cases the range is from, and which share of them lies within

    def __post_init__(self) -> None:
        require_within("time_band", self, {"low": (0.01, 1.0), "high": (1.0, 100.0)})


@dataclass(frozen=True, slots=True)
class Anchor:
    """A step that tells how fast a device is at a time, with its seconds of one layer during calibration."""

    rows: int
    layer_s: float
    kv_tokens: int = 0  # KV tokens of each decode

    def __post_init__(self) -> None:
        require_within("anchors", self, {"rows": (1, 1 << 20), "layer_s": (0.0, 1e3), "kv_tokens": (0, 1 << 31)})


@dataclass(frozen=True, slots=True)
class Anchors:
    """Times of the two anchor steps while a profile was measured; None if one was not timed.

    A few decodes are bound by memory and a prompt by computing; other users of a machine slow them down differently.
    """

    decode: Anchor | None = None
    prompt: Anchor | None = None
