"""What one decoder layer computes, for all families. Knows tensors; attention over what came before is handed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from helios_sim.live.architecture import Architecture
from helios_sim.live.rope import Rotation, rotate
from helios_sim.live.weights import LayerWeights

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class Attend(Protocol):
    """One step's attention: which tokens there are, where they stand, and what each of them sees."""

    @property
    def rotations(self) -> Sequence[Rotation | None]:
        """Per layer: how q and k are turned."""
        ...

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, heads, head_dim), k and v (N, kv_heads, head_dim), turned -> (N, heads x head_dim). Keeps k and v."""
        ...

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keep k and v without attending."""
        ...


def run_layer(a: Architecture, w: LayerWeights, layer: int, hidden: Tensor, attend: Attend) -> Tensor:
    """hidden (N, d_model) -> (N, d_model)."""
    q, k, v = _qkv(a, w, layer, norm(a, hidden, w.attention_norm, w.attention_norm_bias), attend)
    mixed = F.linear(attend(layer, q, k, v), w.attention_out, w.attention_out_bias)
    if w.attention_post_norm is not None:
        mixed = norm(a, mixed, w.attention_post_norm, None)
    hidden = hidden + mixed
    inner = F.linear(norm(a, hidden, w.mlp_norm, w.mlp_norm_bias), w.mlp_in, w.mlp_in_bias)
    activation = ACTIVATIONS[a.activation]
    if a.gated_mlp:
        gate, up = inner.chunk(2, -1)
        inner = activation(gate) * up
    else:
        inner = activation(inner)
    out = F.linear(inner, w.mlp_out, w.mlp_out_bias)
    if w.mlp_post_norm is not None:
        out = norm(a, out, w.mlp_post_norm, None)
    return hidden + out


def write_kv(a: Architecture, w: LayerWeights, layer: int, hidden: Tensor, attend: Attend) -> None:
    """K and V of the layer for hidden (N, d_model), and nothing else of it."""
    x = norm(a, hidden, w.attention_norm, w.attention_norm_bias)
    bias = None if w.qkv_bias is None else w.qkv_bias[a.q_width :]
    kv = F.linear(x, w.qkv[a.q_width :], bias).view(len(x), 2 * a.n_kv_heads, a.head_dim)
    k, v = kv[:, : a.n_kv_heads], kv[:, a.n_kv_heads :]
    if w.k_norm is not None:
        k = norm(a, k, w.k_norm, None)
    rotation = attend.rotations[layer]
    attend.write(layer, k if rotation is None else rotate(k, rotation), v)


def norm(a: Architecture, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Over the last dimension: LayerNorm where the family has biases, else RMSNorm."""
    shape = weight.shape
    if a.bias:
        return F.layer_norm(x, shape, weight, bias, a.norm_eps)
    return F.rms_norm(x, shape, weight, a.norm_eps)


def _qkv(a: Architecture, w: LayerWeights, layer: int, x: Tensor, attend: Attend) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads = a.n_heads, a.n_kv_heads
    qkv = F.linear(x, w.qkv, w.qkv_bias).view(len(x), heads + 2 * kv_heads, a.head_dim)
    qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
    if w.q_norm is not None and w.k_norm is not None:
        qk = torch.cat((norm(a, qk[:, :heads], w.q_norm, None), norm(a, qk[:, heads:], w.k_norm, None)), 1)
    rotation = attend.rotations[layer]
    if rotation is not None:
        qk = rotate(qk, rotation)  # queries and keys in one go
    return qk[:, :heads], qk[:, heads:], v
