"""Interface of the kernels for a layer and its head, with torch's operations as the reference and fallback.

A layer adds the output of the layer before it to the residual stream, so that the sum, the norm that follows and the
product after that can be one kernel. `TorchKernels` follows the models' definition, operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from helios_sim.live.model.architecture import Architecture

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


# A CPU's products take whole tiles of rows. Fewer, but more than one, take longer than a tile: the head of
# SmolLM2-135M in float32 11, 23, 35 and 18 ms for 1 to 4 rows (one thread of a Xeon), its layers 38, 58, 67 and 50 ms.
CPU_TILE_ROWS = 4
UNKNOWN = -1.0  # no recorded answer, so the card's own counts


@dataclass(frozen=True, slots=True)
class Inside:
    """The N rows of a pass through several exits, on the device."""

    now: Tensor  # (N,) slots; -2 - slot of rows that have left, -1 of padding
    was_sure: Tensor  # (N,) int64: 1 once a row was confident at some exit
    said: Tensor  # (4, N) float64: token, largest logit and depth of rows that have left; 1 for a breach


class Kernels(Protocol):
    """The operations of a layer except attention, on N rows. A norm's bias is None in families without biases."""

    name: str
    any_lengths: bool  # whether attention of decodes reads slots in any order, each up to its own length
    page_tokens: int  # of a page, if captured decodes attend by plans over pages (`memory/paged.py`); else 0

    def enter(
        self, a: Architecture, hidden: Tensor, delta: Tensor | None, post: Tensor | None, norm: Tensor,
        norm_bias: Tensor | None, weight: Tensor, bias: Tensor | None, mlp: bool, slots: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The sum of `hidden` and `delta` (N, d_model), and the product of its norm with `weight`.

        `post`: the norm of `delta` before the sum. `mlp`: the product goes through the activation and its gate.
        `slots` (N,): nothing is added to rows with a slot below 0, and with `mlp` their product is undefined.
        """
        ...

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, slots: Tensor | None = None) -> Tensor:
        """Multiply x (N, in) by weight (out, in) -> (N, out). Rows with a slot below 0 may be undefined."""
        ...

    def add(
        self, a: Architecture, hidden: Tensor, delta: Tensor, post: Tensor | None, slots: Tensor | None = None
    ) -> Tensor:
        """The sum of `hidden` and `delta`, both (N, d_model); `hidden` alone in rows with a slot below 0."""
        ...

    def logits(self, a: Architecture, hidden: Tensor, norm: Tensor, norm_bias: Tensor | None, head: Tensor) -> Tensor:
        """Final norm and LM head: (N, d_model) -> (N, vocab)."""
        ...

    def look_at(self, logits: Tensor, measure: str | None, temperature: float) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return likeliest tokens, largest logits and confidences, (N,) each, of logits (N, vocab) over a temperature.

        None for a measure that has no kernel. Without a measure the confidence is undefined.
        """
        ...

    def leave(
        self, rows: Inside, depth: int, sure: Tensor | None, look: tuple[Tensor, Tensor] | None, threshold: Tensor,
        recorded: Tensor, lazy: bool, last: bool,
    ) -> None:  # fmt: skip
        """Decide which rows leave after `depth` layers, and note what they leave with.

        `sure` (N,): confidences, compared with `threshold` (N,); if None, all rows leave. `recorded` (N,): 1 or 0 if a
        trace says instead whether the row is confident, else `UNKNOWN`. `look`: tokens and largest logits of the head
        (N,). `lazy`: all rows leave together, once each was confident. `last`: all rows leave, and a row that was never
        confident is a breach.
        """
        ...


class TorchKernels:
    """Torch's operations, one after the other."""

    name = "torch"
    any_lengths = False
    page_tokens = 0

    def enter(
        self, a: Architecture, hidden: Tensor, delta: Tensor | None, post: Tensor | None, norm: Tensor,
        norm_bias: Tensor | None, weight: Tensor, bias: Tensor | None, mlp: bool, slots: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if delta is not None:
            hidden = self.add(a, hidden, delta, post, slots)
        inner = self.product(normed(a, hidden, norm, norm_bias), weight, bias)
        if not mlp:
            return hidden, inner
        activation = ACTIVATIONS[a.activation]
        if a.gated_mlp:
            gate, up = inner.chunk(2, -1)
            return hidden, activation(gate) * up
        return hidden, activation(inner)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, slots: Tensor | None = None) -> Tensor:
        return linear(x, weight, bias)

    def logits(self, a: Architecture, hidden: Tensor, norm: Tensor, norm_bias: Tensor | None, head: Tensor) -> Tensor:
        return linear(normed(a, hidden, norm, norm_bias), head)

    def look_at(self, logits: Tensor, measure: str | None, temperature: float) -> None:
        """Return None, so that `exits.rule.MEASURES` are computed as they are written."""

    def leave(
        self, rows: Inside, depth: int, sure: Tensor | None, look: tuple[Tensor, Tensor] | None, threshold: Tensor,
        recorded: Tensor, lazy: bool, last: bool,
    ) -> None:  # fmt: skip
        inside = rows.now >= 0
        leaving = inside
        if sure is not None:
            was = (rows.was_sure > 0) | torch.where(recorded == UNKNOWN, sure >= threshold, recorded > 0)
            rows.was_sure.copy_(was)
            if last:
                rows.said[3].copy_(inside & ~was)
            else:
                leaving = inside & ((was | ~inside).all() if lazy else was)
        if look is not None:
            for to, value in zip(rows.said, look, strict=False):
                to.copy_(torch.where(leaving, value.double(), to))
        rows.said[2].masked_fill_(leaving, float(depth))
        rows.now.copy_(torch.where(leaving, -2 - rows.now, rows.now))

    def add(
        self, a: Architecture, hidden: Tensor, delta: Tensor, post: Tensor | None, slots: Tensor | None = None
    ) -> Tensor:
        total = hidden + (delta if post is None else normed(a, delta, post, None))
        return total if slots is None else torch.where((slots >= 0)[:, None], total, hidden)


TORCH = TorchKernels()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply x (N, in) by weight (out, in) -> (N, out).

    On a CPU, two or three rows of float32 are padded with zeros to four.
    """
    rows = len(x)
    if 1 < rows < CPU_TILE_ROWS and x.dtype is torch.float32 and x.device.type == "cpu":
        return F.linear(F.pad(x, (0, 0, 0, CPU_TILE_ROWS - rows)), weight, bias)[:rows]
    return F.linear(x, weight, bias)


def normed(a: Architecture, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Normalize the last dimension: LayerNorm in families with biases, RMSNorm in the others."""
    shape = weight.shape
    if a.bias:
        return F.layer_norm(x, shape, weight, bias, a.norm_eps)
    return F.rms_norm(x, shape, weight, a.norm_eps)
