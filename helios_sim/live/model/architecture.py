"""The shape of a decoder-only model: sizes, tensor shapes and bytes, independent of the file it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from helios_sim.errors import WeightsError
from helios_sim.profile.spec import ModelSpec

Shape = tuple[int, ...]

MOST = {  # largest sizes that are read, far above any model's
    "n_layers": 1024, "d_model": 1 << 17, "n_heads": 4096, "head_dim": 4096, "d_ff": 1 << 20, "vocab_size": 1 << 22,
    "max_context_tokens": 1 << 28,
}  # fmt: skip
_SAME = ("family", "n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size", "tied_embeddings")
FAMILIES = ("llama", "opt", "gpt2", "qwen2", "gemma3")
VALUE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions: pair i rotates by position / (divisors[i] theta^(2i / head_dim)); divisors default to 1."""

    theta: float
    divisors: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Architecture:
    """One of the five families with its sizes. What follows from the family alone is a property."""

    family: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    max_context_tokens: int
    norm_eps: float
    activation: str  # silu, relu, gelu, gelu_tanh
    tied_embeddings: bool
    attention_scale: float  # scores are q k times this
    embedding_scale: float = 1.0
    rope: Rope | None = None  # None for learned positions
    window_tokens: int | None = None  # in sliding layers, a token sees itself and window - 1 tokens before it
    sliding_rope: Rope | None = None  # rotary positions of the sliding layers
    sliding: tuple[bool, ...] = ()  # one per layer; empty if no layer slides

    @property
    def q_width(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.n_kv_heads * self.head_dim

    @property
    def bias(self) -> bool:
        """Whether the family has LayerNorm and biases everywhere (OPT, GPT-2), rather than RMSNorm."""
        return self.family in ("opt", "gpt2")

    @property
    def qkv_bias(self) -> bool:
        return self.bias or self.family == "qwen2"

    @property
    def gated_mlp(self) -> bool:
        return not self.bias

    @property
    def learned_positions(self) -> bool:
        return self.rope is None

    @property
    def sandwich_norms(self) -> bool:
        """Whether there are norms after attention and after the MLP too, and norms of every q and k head (Gemma-3)."""
        return self.family == "gemma3"

    def slides(self, layer: int) -> bool:
        return bool(self.sliding) and self.sliding[layer]

    def check(self, where: str, fix: str) -> None:
        """Raise WeightsError for sizes that no model has, or that do not fit together."""
        for name, most in MOST.items():
            if not isinstance(value := getattr(self, name), int) or not 1 <= value <= most:
                raise WeightsError(f"{name} of {where}", value, f"a whole number from 1 to {most}", fix)
        for name, low, high in (("norm_eps", 1e-12, 0.1), ("attention_scale", 1e-6, 1e3), ("embedding_scale", 0, 1e6)):
            if not low <= getattr(self, name) <= high:
                raise WeightsError(f"{name} of {where}", getattr(self, name), f"from {low:g} to {high:g}", fix)
        for rope in (self.rope, self.sliding_rope):
            if rope is not None and not all(0 < x < 1e15 for x in (rope.theta, *(rope.divisors or ()))):
                raise WeightsError(f"rope of {where}", rope.theta, "finite numbers above 0", fix)
        parts = {
            f"KV heads that divide them, not {self.n_kv_heads}": self.n_heads % max(1, self.n_kv_heads) == 0,
            "an even size of heads, for rotary positions": self.rope is None or self.head_dim % 2 == 0,
            "one entry of `sliding` per layer": len(self.sliding) in (0, self.n_layers),
            "a window of the sliding layers": not self.sliding or (self.window_tokens or 0) >= 1,
        }
        for allowed, holds in parts.items():
            if not holds:
                raise WeightsError(f"sizes of {where}", f"{self.n_heads} heads of {self.head_dim}", allowed, fix)

    def differences(self, spec: ModelSpec) -> list[str]:
        """The sizes in which the simulator's description of a model differs, as "SIZE is HERE, not THERE"."""
        return [
            f"{name} is {getattr(self, name)}, not {getattr(spec, name)}"
            for name in _SAME
            if getattr(self, name) != getattr(spec, name)
        ]

    def layer_shapes(self) -> dict[str, Shape]:
        """Shapes of one layer's parts as they are kept in memory: q, k and v in one matrix, gate and up in one."""
        d, ff = self.d_model, self.d_ff
        shapes: dict[str, Shape] = {
            "attention_norm": (d,),
            "qkv": (self.q_width + 2 * self.kv_width, d),
            "attention_out": (d, self.q_width),
            "mlp_norm": (d,),
            "mlp_in": ((2 if self.gated_mlp else 1) * ff, d),
            "mlp_out": (d, ff),
        }
        if self.bias:
            shapes |= {f"{part}_bias": shapes[part][:1] for part in tuple(shapes)}
        elif self.qkv_bias:
            shapes["qkv_bias"] = shapes["qkv"][:1]
        if self.sandwich_norms:
            shapes |= {"attention_post_norm": (d,), "mlp_post_norm": (d,)}
            shapes |= {"q_norm": (self.head_dim,), "k_norm": (self.head_dim,)}
        return shapes

    def outer_shapes(self) -> dict[str, Shape]:
        """Shapes of the parts outside the layers. `head` is listed only if it is not tied to the embedding."""
        shapes: dict[str, Shape] = {"embedding": (self.vocab_size, self.d_model), "final_norm": (self.d_model,)}
        if self.learned_positions:
            shapes["positions"] = (self.max_context_tokens, self.d_model)
        if self.bias:
            shapes["final_norm_bias"] = (self.d_model,)
        if not self.tied_embeddings:
            shapes["head"] = (self.vocab_size, self.d_model)
        return shapes

    def weight_values(self, layers: int) -> int:
        """How many weight values are resident with the first `layers` layers loaded."""
        return values(self.outer_shapes()) + layers * values(self.layer_shapes())


def values(shapes: Mapping[str, Shape]) -> int:
    return sum(prod(shape) for shape in shapes.values())


def model_spec(architecture: Architecture, name: str, chars_per_token: float, dtype: str = "float32") -> ModelSpec:
    """The simulator's view of the model: `weight_bytes` is what `SegmentedModel` keeps, to the byte.

    `dtype` (float32 or bfloat16) holds for weights and for the KV cache.
    """
    a = architecture
    return ModelSpec(
        name=name, family=a.family, n_layers=a.n_layers, d_model=a.d_model, n_heads=a.n_heads,
        n_kv_heads=a.n_kv_heads, head_dim=a.head_dim, d_ff=a.d_ff, gated_mlp=a.gated_mlp, vocab_size=a.vocab_size,
        tied_embeddings=a.tied_embeddings, max_context_tokens=a.max_context_tokens,
        learned_positions=a.learned_positions, bias=a.bias, weight_bytes_per_value=VALUE_BYTES[dtype],
        kv_bytes_per_value=VALUE_BYTES[dtype], chars_per_token=chars_per_token,
        other_layer_values=_other_layer_values(a),
    )  # fmt: skip


def _other_layer_values(a: Architecture) -> int:
    """Values of a layer that ModelSpec's formula leaves out: Qwen-2's biases of q, k and v, Gemma-3's further norms."""
    shapes = a.layer_shapes()
    parts = () if a.bias else ("qkv_bias", "attention_post_norm", "mlp_post_norm", "q_norm", "k_norm")
    return values({part: shapes[part] for part in parts if part in shapes})
