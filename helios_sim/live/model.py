"""An early-exit model as segments of layers, each callable alone. Knows layers and heads, not when a token exits.

Tokens are flat: hidden states are (N, d_model), whatever requests or texts the N tokens belong to; the attention step
(`kv.py`) knows who sees whom. Everything is differentiable when gradients are enabled.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from helios_sim.errors import UserError
from helios_sim.live.architecture import Architecture, values
from helios_sim.live.layers import Attend, norm, run_layer, write_kv
from helios_sim.live.room import check_fits
from helios_sim.live.weights import LayerWeights, OuterWeights, TensorSource, load_layer, load_outer, weight_bytes


class SegmentedModel:
    """The first layers of a checkpoint with its embedding, final norm and LM head."""

    def __init__(
        self, source: TensorSource, outer: OuterWeights, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.architecture: Architecture = source.architecture
        self.dtype, self.device = dtype, torch.device(device)
        self.outer = outer
        self.layers: list[LayerWeights] = []
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
    ) -> SegmentedModel:
        """The model up to `layers` (None: all). Layers above are never read.

        Raises UserError for a cap outside 1..n_layers, too little memory or a damaged file.
        """
        a = checkpoint.architecture
        cap = a.n_layers if layers is None else layers
        _check_cap(cap, a)
        check_fits(f"{cap} layers", a.weight_values(cap) * dtype.itemsize, torch.device(device))
        model = cls(checkpoint, load_outer(checkpoint, dtype, torch.device(device)), dtype, device)
        model.load_layers(cap)
        return model

    @property
    def n_loaded(self) -> int:
        return len(self.layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights resident now."""
        return weight_bytes(self.outer) + sum(weight_bytes(layer) for layer in self.layers)

    def load_layers(self, end: int) -> None:
        """Read what is missing of the first `end` layers, one tensor at a time. Raises as `load` does."""
        _check_cap(end, self.architecture)
        missing = max(0, end - self.n_loaded)
        layer_bytes = values(self.architecture.layer_shapes()) * self.dtype.itemsize
        check_fits(f"{missing} more layers", missing * layer_bytes, self.device)
        for layer in range(self.n_loaded, end):
            self.layers.append(load_layer(self.source, layer, self.dtype, self.device))

    def drop_layers(self, start: int) -> None:
        """Forget the layers from `start` on; their memory is free once nobody else holds them."""
        del self.layers[start:]

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens and positions (N,) -> hidden states (N, d_model) before the first layer."""
        hidden = F.embedding(tokens, self.outer.embedding)
        if self._embedding_scale != 1.0:
            hidden = hidden * self._embedding_scale
        if self.outer.positions is not None:
            hidden = hidden + F.embedding(positions, self.outer.positions)
        return hidden

    def run(self, hidden: Tensor, start: int, end: int, attend: Attend) -> Tensor:
        """Hidden states (N, d_model) through layers start..end-1."""
        for layer in range(start, end):
            hidden = run_layer(self.architecture, self.layers[layer], layer, hidden, attend)
        return hidden

    def propagate(self, hidden: Tensor, start: int, end: int, attend: Attend) -> None:
        """Write K and V of layers start..end-1 for tokens that left with these hidden states (N, d_model)."""
        for layer in range(start, end):
            write_kv(self.architecture, self.layers[layer], layer, hidden, attend)

    def normed(self, hidden: Tensor) -> Tensor:
        """After the model's final norm, as the LM head reads it."""
        return norm(self.architecture, hidden, self.outer.final_norm, self.outer.final_norm_bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head: (N, d_model) -> (N, vocab). At an exit this is the model's own head (LayerSkip)."""
        return F.linear(self.normed(hidden), self.outer.head)


def _check_cap(layers: int, a: Architecture) -> None:
    if not 1 <= layers <= a.n_layers:
        raise UserError("layers", layers, f"1 to {a.n_layers}, the model's own", "choose a cap within the model")
