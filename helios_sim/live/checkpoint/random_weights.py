"""A model of a known shape with random weights, for measuring without a checkpoint.

Times, bytes and loads do not depend on the values of weights, so `random:NAME` can replace a checkpoint. Tokens,
confidences and (since moving data costs energy) power do depend on them, so nothing is reported about those.
`tiny:NAME` is the same family with a few small layers: for trying a command, never for a figure.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from helios_sim.errors import WeightsError
from helios_sim.live.model.architecture import Architecture, Rope, Shape
from helios_sim.live.model.weights import StoredPiece
from helios_sim.profile.catalog import MODELS
from helios_sim.profile.spec import ModelSpec
from helios_sim.profile.store import load_profile

RANDOM, TINY = "random:", "tiny:"
TINY_LAYERS, TINY_CONTEXT = 4, 1024
NOISE_VALUES = 1 << 24  # drawn once; every tensor is a slice of it at another offset
SCALE = 0.02
ROPE_THETA = 10_000.0  # times do not depend on it
MEASURED = {"smollm2-135m": "smollm2-135m@epyc-2core"}  # shapes taken from a shipped profile
CHARS = 4  # per token of the stand-in tokenizer


def is_random(weights: str) -> bool:
    return weights.startswith((RANDOM, TINY))


def draw(weights: str, device: str = "cpu", seed: int = 0) -> RandomWeights:
    """Weights for `random:NAME` or `tiny:NAME`. Raises UserError for a name of unknown shape."""
    spec = _spec(weights.partition(":")[2], weights)
    tiny = weights.startswith(TINY)
    shape = _tiny(spec) if tiny else _architecture(spec)
    return RandomWeights(shape, spec.chars_per_token, device, seed, tiny)


@dataclass(eq=False)
class RandomWeights:
    """Random weights in place of a weight file. The same seed gives the same values. They are drawn on `device`."""

    architecture: Architecture
    chars_per_token: float  # assumed for the family's tokenizer
    device: str = "cpu"
    seed: int = 0
    tiny: bool = False  # a few small layers of the shape
    files: tuple[Any, ...] = ()
    _noise: Tensor | None = field(default=None, repr=False)

    def pieces(self, part: str, layer: int | None) -> tuple[StoredPiece, ...]:
        return (StoredPiece(part if layer is None else f"{layer}.{part}"),)

    def shape(self, name: str) -> Shape:
        return (self.architecture.layer_shapes() | self.architecture.outer_shapes())[name.rpartition(".")[2]]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor: 1 in norms, else normal with a small variance, so that no layer overflows."""
        _, *rest = self.shape(name)
        if name.endswith("norm"):
            return torch.ones(stop - start, *rest, dtype=torch.bfloat16, device=self.device)
        noise, values = self._drawn(), (stop - start) * prod(rest)
        if values > len(noise):
            noise = noise.repeat(-(-values // len(noise)))
        first = zlib.crc32(f"{name} {start}".encode()) % (len(noise) - values + 1)
        return noise[first : first + values].view(stop - start, *rest)

    def tokenizer(self) -> StandInTokenizer:
        return StandInTokenizer(self.architecture.vocab_size)

    def _drawn(self) -> Tensor:
        if self._noise is None:
            generator = torch.Generator(device=self.device).manual_seed(self.seed)
            values = min(NOISE_VALUES, self.architecture.weight_values(1))
            drawn = torch.randn(values, generator=generator, device=self.device)
            self._noise = (SCALE * drawn).to(torch.bfloat16)
        return self._noise


class StandInTokenizer:
    """A tokenizer that cuts text into pieces of four characters. Its tokens carry no meaning."""

    is_fast, chat_template = True, None
    bos_token, eos_token = "<s>", "</s>"

    def __init__(self, vocab_size: int) -> None:
        self._known = {self.bos_token: 1, self.eos_token: 2}
        self._words = vocab_size - 3

    def __call__(self, text: str | Sequence[str], add_special_tokens: bool = False, **_: Any) -> dict[str, Any]:
        if not isinstance(text, str):
            return {"input_ids": [self(one)["input_ids"] for one in text]}
        starts = range(0, len(text), CHARS)
        return {
            "input_ids": [3 + zlib.crc32(text[i : i + CHARS].encode()) % self._words for i in starts],
            "offset_mapping": [(i, min(i + CHARS, len(text))) for i in starts],
        }

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(f"{token:04x}"[-CHARS:] for token in ids)

    def get_vocab(self) -> dict[str, int]:
        return self._known


def _spec(name: str, weights: str) -> ModelSpec:
    if name in MODELS:
        return MODELS[name]
    if name in MEASURED:
        return load_profile(MEASURED[name]).model
    raise WeightsError("weights", weights, f"a known shape: {', '.join((*MODELS, *MEASURED))}", "name one of these")


def _architecture(spec: ModelSpec) -> Architecture:
    return Architecture(
        family=spec.family, n_layers=spec.n_layers, d_model=spec.d_model, n_heads=spec.n_heads,
        n_kv_heads=spec.n_kv_heads, head_dim=spec.head_dim, d_ff=spec.d_ff, vocab_size=spec.vocab_size,
        max_context_tokens=spec.max_context_tokens, norm_eps=1e-5,
        activation="silu" if spec.gated_mlp else "relu", tied_embeddings=spec.tied_embeddings,
        attention_scale=spec.head_dim**-0.5, rope=None if spec.learned_positions else Rope(ROPE_THETA),
    )  # fmt: skip


def _tiny(spec: ModelSpec) -> Architecture:
    whole = _architecture(spec)
    return Architecture(
        family=whole.family, n_layers=TINY_LAYERS, d_model=32, n_heads=2,
        n_kv_heads=2 if whole.n_kv_heads == whole.n_heads else 1, head_dim=16, d_ff=64, vocab_size=320,
        max_context_tokens=TINY_CONTEXT, norm_eps=whole.norm_eps, activation=whole.activation,
        tied_embeddings=whole.tied_embeddings, attention_scale=0.25, rope=whole.rope,
    )  # fmt: skip
