"""Shapes of models and limits of cards. Knows sizes and published limits, nothing measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from helios_sim.request import token_counts


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
    weight_bytes_per_value: int  # 2 for bf16
    kv_bytes_per_value: int
    chars_per_token: float
    other_layer_values: int = 0  # of one layer, beyond the formula below (Qwen-2's q, k, v biases, Gemma-3's norms)

    @property
    def kv_width(self) -> int:
        return self.n_kv_heads * self.head_dim

    @property
    def kv_bytes_per_token_layer(self) -> int:
        return 2 * self.kv_width * self.kv_bytes_per_value

    @property
    def layer_values(self) -> int:
        """Weights of one layer: attention projections, MLP, two norms, biases where the family has them."""
        q_width = self.n_heads * self.head_dim
        attention = self.d_model * (q_width + 2 * self.kv_width) + q_width * self.d_model
        mlp = (3 if self.gated_mlp else 2) * self.d_model * self.d_ff
        norms = 2 * self.d_model * (2 if self.bias else 1)
        biases = (q_width + 2 * self.kv_width + self.d_model + self.d_ff + self.d_model) if self.bias else 0
        return attention + mlp + norms + biases + self.other_layer_values

    @property
    def embedding_values(self) -> int:
        """Weights outside the layers: embedding, LM head where it is not tied, positions, final norm."""
        tables = 1 if self.tied_embeddings else 2
        positions = self.max_context_tokens * self.d_model if self.learned_positions else 0
        return tables * self.vocab_size * self.d_model + positions + self.d_model * (2 if self.bias else 1)

    def weight_bytes(self, layers: int) -> int:
        """Bytes of the model loaded up to `layers`, embedding and LM head included."""
        return self.weight_bytes_per_value * (self.embedding_values + layers * self.layer_values)

    def tokens(self, chars: int) -> int:
        """Tokens of a text of that many characters, at least one."""
        return max(1, round(chars / self.chars_per_token))

    def tokens_of_many(self, chars: NDArray[np.int64]) -> NDArray[np.int64]:
        """The same of n texts, shape (n,)."""
        return token_counts(chars, self.chars_per_token)


@dataclass(frozen=True, slots=True)
class HardwareSpec:
    """A card as its maker describes it, or a device by the ceilings measured on it; `source` says which."""

    name: str
    hbm_bytes: int
    hbm_bytes_per_s: float
    flops_per_s: float  # dense bf16 tensor cores
    tdp_w: float | None  # None where the device does not say: energy is then null
    idle_w: float | None  # None where no source is known: energy is then null
    source: str


@dataclass(frozen=True, slots=True)
class Runtime:
    """What the host adds to the device's time. Nothing here is zero silently: each value has a source line.

    Between two points at which the host waits for the device, host and device run side by side and the slower
    one counts. With captured graphs the host launches one graph per group of layers; eager, it launches each layer.
    """

    launch_s_per_layer: float  # eager launch of one layer's kernels; 0 with captured graphs
    launch_s_per_graph: float  # one captured graph; 0 when eager
    sync_s: float  # device to host and back at an exit check whose answer the host must see
    host_overhead_s: float  # scheduling, sampling and bookkeeping of one iteration, while the device waits
    graph_batch_sizes: tuple[int, ...] | None  # decode batches are padded up to one of these; None: no padding
    sources: tuple[tuple[str, str], ...] = ()  # (quantity, source or "assumed: why")
    gap_s: float = 0.0  # the device waits so long between two iterations, even if the host prepares ahead
    prefill_gap_s: float = 0.0  # and so much longer in an iteration with prefill, which no captured graph launches


@dataclass(frozen=True, slots=True)
class Anchor:
    """A step that tells how fast a device is just now, as the calibration timed it: seconds of one layer."""

    rows: int
    layer_s: float
    kv_tokens: int = 0  # of each decode


@dataclass(frozen=True, slots=True)
class Anchors:
    """What the two steps took while a profile was measured; None: not timed.

    A few decodes wait for memory, a prompt computes: other users of a machine slow down the one more than the other.
    """

    decode: Anchor | None = None
    prompt: Anchor | None = None
