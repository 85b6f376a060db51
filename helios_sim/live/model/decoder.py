"""A decoder-only transformer with early exits: rotary positions, one layer for all families, and the segmented model.

A `SegmentedModel` runs any range of its layers on its own. Tokens are flat: hidden states are (N, d_model), whichever
requests or texts the N tokens belong to. The attention step that is passed in (see `live/memory/kv.py`) decides which
token sees which. Everything is differentiable when gradients are enabled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from helios_sim.errors import UserError
from helios_sim.live.device import check_fits
from helios_sim.live.kernels.interface import TORCH, Kernels, normed
from helios_sim.live.model.architecture import Architecture, Rope, values
from helios_sim.live.model.weights import LayerWeights, OuterWeights, TensorSource, load_layer, load_outer, weight_bytes

Rotation = tuple[Tensor, Tensor]  # cosine and signed sine, each (N, 1, head_dim)


class Rotary:
    """The model's rotary frequencies on a device. `at` gives every layer its rotation at some positions."""

    def __init__(self, architecture: Architecture, dtype: torch.dtype, device: torch.device | str) -> None:
        self._dtype = dtype
        ropes = [
            architecture.sliding_rope if architecture.slides(layer) else architecture.rope
            for layer in range(architecture.n_layers)
        ]
        self._kinds = list(dict.fromkeys(ropes))
        self._kind_of_layer = [self._kinds.index(rope) for rope in ropes]
        self._frequencies = [_frequencies(rope, architecture.head_dim, device) for rope in self._kinds]

    def at(self, positions: Tensor) -> list[Rotation | None]:
        """One rotation per layer at `positions` (N,); None with learned positions. Layers of a kind share one."""
        kinds = [None if f is None else self._rotation(positions, f) for f in self._frequencies]
        return [kinds[kind] for kind in self._kind_of_layer]

    def tables(self, tokens: int) -> list[Tensor | None]:
        """Cosines and sines (head_dim / 2 each) of all positions below `tokens`, one tensor per layer.

        Each is float32 (tokens, head_dim), or None with learned positions.
        """
        kinds = [None if f is None else self._table(tokens, f) for f in self._frequencies]
        return [kinds[kind] for kind in self._kind_of_layer]

    def _table(self, tokens: int, frequencies: Tensor) -> Tensor:
        angles = torch.arange(tokens, device=frequencies.device).float()[:, None] * frequencies
        return torch.cat((angles.cos(), angles.sin()), -1)

    def _rotation(self, positions: Tensor, frequencies: Tensor) -> Rotation:
        angles = positions.float()[:, None, None] * frequencies  # (N, 1, head_dim / 2)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1).to(self._dtype), torch.cat((-sin, sin), -1).to(self._dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate x (N, heads, head_dim): pair i is (x[i], x[i + head_dim / 2])."""
    cos, signed_sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


def _frequencies(rope: Rope | None, head_dim: int, device: torch.device | str) -> Tensor | None:
    if rope is None:
        return None
    inverse = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.divisors is not None:
        inverse = inverse / torch.tensor(rope.divisors)
    return inverse.to(device)


class Attend(Protocol):
    """The attention of one step: which tokens take part, their positions, and what each of them sees."""

    @property
    def rotations(self) -> Sequence[Rotation | None]:
        """One per layer: the rotation of q and k, or None."""
        ...

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with rotated q (N, heads, head_dim), k and v (N, kv_heads, head_dim) -> (N, heads x head_dim).

        Stores k and v.
        """
        ...

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store k and v without attending."""
        ...


class FusedAttend(ABC):
    """An `Attend` that takes q, k and v as the layer's product gives them, and norms and rotates them by itself.

    `frozen` (N,), if any: rows with a number below 0 keep their hidden states, and layers only write their K and V.
    """

    frozen: Tensor | None = None

    @abstractmethod
    def fused(self, layer: int, qkv: Tensor, w: LayerWeights) -> Tensor:
        """Attend with qkv (N, heads + 2 kv_heads, head_dim) -> (N, heads x head_dim). Stores k and v."""

    @abstractmethod
    def fused_write(self, layer: int, kv: Tensor, w: LayerWeights) -> None:
        """Store k and v of kv (N, 2 kv_heads, head_dim) without attending."""


# States (N, d_model) with which tokens exited, and the step that writes their K and V.
Left = tuple[Tensor, Attend | FusedAttend]


def run_layer(
    a: Architecture, w: LayerWeights, layer: int, hidden: Tensor, delta: Tensor | None, post: Tensor | None,
    attend: Attend | FusedAttend, kernels: Kernels,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run one layer. Returns hidden states, and the MLP's output that is still to be added, (N, d_model) each.

    `delta`: output of the layer before, still to be added to `hidden` after its norm `post`; None for nothing.
    """
    frozen = attend.frozen if isinstance(attend, FusedAttend) else None
    hidden, qkv = kernels.enter(
        a, hidden, delta, post, w.attention_norm, w.attention_norm_bias, w.qkv, w.qkv_bias, False, frozen
    )
    qkv = qkv.view(len(qkv), a.n_heads + 2 * a.n_kv_heads, a.head_dim)
    if isinstance(attend, FusedAttend):
        mixed = attend.fused(layer, qkv, w)
    else:
        mixed = attend(layer, *turned(a, w, layer, qkv, attend))
    mixed = kernels.product(mixed, w.attention_out, w.attention_out_bias, frozen)
    hidden, inner = kernels.enter(
        a, hidden, mixed, w.attention_post_norm, w.mlp_norm, w.mlp_norm_bias, w.mlp_in, w.mlp_in_bias, True, frozen
    )
    return hidden, kernels.product(inner, w.mlp_out, w.mlp_out_bias, frozen)


def write_kv(
    a: Architecture, w: LayerWeights, layer: int, hidden: Tensor, attend: Attend | FusedAttend, kernels: Kernels
) -> None:
    """Compute and store only the layer's K and V for hidden (N, d_model)."""
    bias = None if w.qkv_bias is None else w.qkv_bias[a.q_width :]
    norm = w.attention_norm, w.attention_norm_bias
    _, kv = kernels.enter(a, hidden, None, None, *norm, w.qkv[a.q_width :], bias, mlp=False)
    kv = kv.view(len(hidden), 2 * a.n_kv_heads, a.head_dim)
    if isinstance(attend, FusedAttend):
        attend.fused_write(layer, kv, w)
        return
    k, v = kv[:, : a.n_kv_heads], kv[:, a.n_kv_heads :]
    if w.k_norm is not None:
        k = normed(a, k, w.k_norm, None)
    rotation = attend.rotations[layer]
    attend.write(layer, k if rotation is None else rotate(k, rotation), v)


def turned(a: Architecture, w: LayerWeights, layer: int, qkv: Tensor, attend: Attend) -> tuple[Tensor, Tensor, Tensor]:
    """Split qkv into q, k and v. q and k are normed if the family does that, and rotated to their positions."""
    heads, kv_heads = a.n_heads, a.n_kv_heads
    qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
    if w.q_norm is not None and w.k_norm is not None:
        qk = torch.cat((normed(a, qk[:, :heads], w.q_norm, None), normed(a, qk[:, heads:], w.k_norm, None)), 1)
    rotation = attend.rotations[layer]
    if rotation is not None:
        qk = rotate(qk, rotation)  # queries and keys in one go
    return qk[:, :heads], qk[:, heads:], v


class SegmentedModel:
    """The first layers of a checkpoint with its embedding, final norm and LM head.

    `layers` holds the loaded layers; every method takes the range of layers to run. Layers above `staying` are on the
    device only while they run (`live/memory/late.py`).
    """

    def __init__(
        self,
        source: TensorSource,
        outer: OuterWeights,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        kernels: Kernels = TORCH,
    ) -> None:
        self.architecture: Architecture = source.architecture
        self.dtype, self.device = dtype, torch.device(device)
        self.outer, self.kernels = outer, kernels
        self.layers: list[LayerWeights] = []
        self.staying: int | None = None  # number of layers that are never late (`live/memory/late.py`); None for all
        self.source = source
        # As in transformers, the scale is rounded like the weights.
        self._embedding_scale = float(torch.tensor(self.architecture.embedding_scale).to(dtype))

    @classmethod
    def load(
        cls,
        checkpoint: TensorSource,
        layers: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kernels: Kernels = TORCH,
    ) -> SegmentedModel:
        """Load the first `layers` layers (None for all). Layers above are never read.

        Raises UserError for a cap outside 1..n_layers, too little memory or a damaged file.
        """
        a = checkpoint.architecture
        cap = a.n_layers if layers is None else layers
        _check_cap(cap, a)
        check_fits(f"{cap} layers", a.weight_values(cap) * dtype.itemsize, torch.device(device))
        model = cls(checkpoint, load_outer(checkpoint, dtype, torch.device(device)), dtype, device, kernels)
        model.load_layers(cap)
        return model

    @property
    def n_loaded(self) -> int:
        return len(self.layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights that are resident now."""
        return weight_bytes(self.outer) + sum(weight_bytes(layer) for layer in self.layers)

    def load_layers(self, end: int) -> None:
        """Read those of the first `end` layers that are missing, one tensor at a time. Raises as `load` does."""
        _check_cap(end, self.architecture)
        missing = max(0, end - self.n_loaded)
        layer_bytes = values(self.architecture.layer_shapes()) * self.dtype.itemsize
        check_fits(f"{missing} more layers", missing * layer_bytes, self.device)
        for layer in range(self.n_loaded, end):
            self.layers.append(load_layer(self.source, layer, self.dtype, self.device))

    def drop_layers(self, start: int) -> None:
        """Forget the layers from `start` on. Their memory is freed once nothing else refers to them."""
        del self.layers[start:]

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Embed tokens at their positions, both (N,) -> hidden states (N, d_model) before the first layer."""
        hidden = F.embedding(tokens, self.outer.embedding)
        if self._embedding_scale != 1.0:
            hidden = hidden * self._embedding_scale
        if self.outer.positions is not None:
            hidden = hidden + F.embedding(positions, self.outer.positions)
        return hidden

    def run(
        self, hidden: Tensor, start: int, end: int, attend: Attend | FusedAttend, beside: Sequence[Left] = ()
    ) -> Tensor:
        """Run hidden states (N, d_model) through layers start..end-1.

        `beside`: tokens that left before; these layers write their K and V too.
        """
        a, delta, post = self.architecture, None, None
        for layer, w in zip(range(start, end), self.layers[start:end], strict=True):
            hidden, delta = run_layer(a, w, layer, hidden, delta, post, attend, self.kernels)
            post = w.mlp_post_norm
            for states, step in beside:
                write_kv(a, w, layer, states, step, self.kernels)
        frozen = attend.frozen if isinstance(attend, FusedAttend) else None
        return hidden if delta is None else self.kernels.add(a, hidden, delta, post, frozen)

    def propagate(self, hidden: Tensor, start: int, end: int, attend: Attend | FusedAttend) -> None:
        """Write K and V of layers start..end-1 for tokens that exited with these hidden states (N, d_model)."""
        self.propagate_all([(hidden, attend)], start, end)

    def propagate_all(self, left: Sequence[Left], start: int, end: int) -> None:
        """Write K and V as `propagate` does, for groups of tokens that exited at several depths, each with its step."""
        for layer, w in zip(range(start, end), self.layers[start:end], strict=True):
            for states, step in left:
                write_kv(self.architecture, w, layer, states, step, self.kernels)

    def normed(self, hidden: Tensor) -> Tensor:
        """Apply the model's final norm, as the LM head expects."""
        return normed(self.architecture, hidden, self.outer.final_norm, self.outer.final_norm_bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head: (N, d_model) -> (N, vocab). An exit without its own head uses this (LayerSkip)."""
        o = self.outer
        return self.kernels.logits(self.architecture, hidden, o.final_norm, o.final_norm_bias, o.head)


def _check_cap(layers: int, a: Architecture) -> None:
    if not 1 <= layers <= a.n_layers:
        raise UserError("layers", layers, f"1 to {a.n_layers}, the model's own", "choose a cap within the model")
