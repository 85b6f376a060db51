"""Weights of a model in memory, filled in place from a checkpoint.

A layer's parts lie in one block of memory. A part is filled from one or more stored tensors (`StoredPiece`), which may
be laid out differently in the file (`Change`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from helios_sim.errors import WeightsError
from helios_sim.live.device import aligned, block
from helios_sim.live.model.architecture import Architecture, Shape, values

_LARGEST_WEIGHT = 1e6
_CHUNK_VALUES = 4 << 20  # read at once: 16 MB as float32


class Change(Enum):
    """How a stored tensor differs from the part that it fills."""

    NONE = "none"
    TRANSPOSED = "transposed"  # GPT-2 stores (in, out)
    PLUS_ONE = "plus one"  # Gemma's norms are stored less one
    INTERLEAVED_HEADS = (
        "interleaved heads"  # llama.cpp stores Llama's q and k with the two halves of a head interleaved
    )
    SKIP_TWO_ROWS = "skip two rows"  # OPT's table of positions begins with two rows that no token uses


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """A stored tensor that fills some rows of a part. The pieces of a part follow each other."""

    name: str
    change: Change = Change.NONE


class Storage(Protocol):
    """Stored weights: their shape, and rows of their tensors."""

    @property
    def architecture(self) -> Architecture: ...
    def pieces(self, part: str, layer: int | None) -> tuple[StoredPiece, ...]: ...
    def shape(self, name: str) -> Shape: ...
    def rows(self, name: str, start: int, stop: int) -> Tensor: ...


class TensorSource(Storage, Protocol):
    """A checkpoint as the loader sees it: stored weights, and what to add to their parts, in float32."""

    def added(self, part: str, layer: int | None) -> Tensor | None: ...


@dataclass(slots=True)
class LayerWeights:
    """The weights of one layer. Matrices are (out, in). Training may replace a field by a tensor with gradients."""

    attention_norm: Tensor
    qkv: Tensor  # (q_width + 2 kv_width, d_model)
    attention_out: Tensor
    mlp_norm: Tensor
    mlp_in: Tensor  # (2 d_ff, d_model), gate first; (d_ff, d_model) without a gate
    mlp_out: Tensor
    attention_norm_bias: Tensor | None = None
    qkv_bias: Tensor | None = None
    attention_out_bias: Tensor | None = None
    mlp_norm_bias: Tensor | None = None
    mlp_in_bias: Tensor | None = None
    mlp_out_bias: Tensor | None = None
    attention_post_norm: Tensor | None = None
    mlp_post_norm: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(slots=True)
class OuterWeights:
    """The weights outside the layers. `head` is the embedding tensor itself if the two are tied."""

    embedding: Tensor  # (vocab, d_model)
    final_norm: Tensor
    head: Tensor  # (vocab, d_model)
    final_norm_bias: Tensor | None = None
    positions: Tensor | None = None  # (max_context, d_model)


def weight_bytes(weights: LayerWeights | OuterWeights) -> int:
    """Bytes in memory; a tied head counts once."""
    return sum(tensor.nbytes for tensor in tensors(weights))


def tensors(weights: LayerWeights | OuterWeights) -> Iterator[Tensor]:
    """Every tensor of the weights, each once."""
    seen: set[int] = set()
    for field in fields(weights):
        tensor = getattr(weights, field.name)
        if tensor is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def load_layer(source: TensorSource, layer: int, dtype: torch.dtype, device: torch.device) -> LayerWeights:
    """Read one layer into a block of memory of its own."""
    shapes = source.architecture.layer_shapes()
    parts = parts_in(block(block_bytes(shapes, dtype), device), shapes, dtype)
    fill(source, layer, parts)
    return LayerWeights(**parts)


def load_outer(source: TensorSource, dtype: torch.dtype, device: torch.device) -> OuterWeights:
    shapes = source.architecture.outer_shapes()
    parts = parts_in(block(block_bytes(shapes, dtype), device), shapes, dtype)
    fill(source, None, parts)
    return OuterWeights(**{"head": parts["embedding"]} | parts)


def block_bytes(shapes: Mapping[str, Shape], dtype: torch.dtype) -> int:
    """Bytes of a block with these parts one after the other, each at an aligned offset."""
    return sum(_part_bytes(shape, dtype) for shape in shapes.values())


def parts_in(memory: Tensor, shapes: Mapping[str, Shape], dtype: torch.dtype) -> dict[str, Tensor]:
    """The parts as views of `memory` (n_bytes,), which holds their block."""
    found, start = {}, 0
    for part, shape in shapes.items():
        n_bytes = values({part: shape}) * dtype.itemsize
        found[part] = memory[start : start + n_bytes].view(dtype).view(shape)
        start += _part_bytes(shape, dtype)
    return found


def fill(source: TensorSource, layer: int | None, parts: Mapping[str, Tensor]) -> None:
    """Read the parts of a layer, or for None those outside the layers, into `parts`, with the source's additions.

    Besides the parts, at most 16 MB (or one piece that must be transposed, or a part to which something is added) are
    in memory at a time.
    """
    for part, target in parts.items():
        added = source.added(part, layer)
        # summed before it is rounded to the part's dtype, in which a small change would be lost
        into = target if added is None else torch.empty(target.shape, dtype=torch.float32)
        row = 0
        for piece in source.pieces(part, layer):
            row = _fill(source, piece, into, row)
        if added is not None:
            target.copy_(into.add_(added))
        if row != len(into):
            raise _damaged(part, (row, *into.shape[1:]), tuple(into.shape))


def stored_names(source: Storage) -> set[str]:
    """The names of all stored tensors that the model is read from, after checking that each is there and fits."""
    a, names = source.architecture, set()
    for layer in (None, *range(a.n_layers)):
        for part, shape in (a.outer_shapes() if layer is None else a.layer_shapes()).items():
            pieces = source.pieces(part, layer)
            rows = (a.q_width, a.kv_width, a.kv_width) if len(pieces) == 3 else (shape[0] // len(pieces),) * len(pieces)
            for piece, n_rows in zip(pieces, rows, strict=True):
                stored, wanted = source.shape(piece.name), (n_rows, *shape[1:])
                if piece.change is Change.TRANSPOSED and len(wanted) == 2:
                    wanted = (wanted[1], wanted[0])
                elif piece.change is Change.SKIP_TWO_ROWS:
                    wanted = (wanted[0] + 2, *wanted[1:])
                if stored != wanted:
                    raise _damaged(piece.name, stored, wanted)
                names.add(piece.name)
    return names


def _part_bytes(shape: Shape, dtype: torch.dtype) -> int:
    return aligned(values({"": shape}) * dtype.itemsize)


def _fill(source: Storage, piece: StoredPiece, into: Tensor, row: int) -> int:
    stored = source.shape(piece.name)
    skipped = 2 if piece.change is Change.SKIP_TWO_ROWS else 0
    rows = stored[1] if piece.change is Change.TRANSPOSED else stored[0] - skipped
    fits = stored[0] if piece.change is Change.TRANSPOSED else stored[-1]
    if row + rows > len(into) or (into.dim() == 2 and fits != into.shape[1]):
        raise _damaged(piece.name, stored, tuple(into.shape))
    target = into[row : row + rows]
    if piece.change is Change.TRANSPOSED:
        whole = source.rows(piece.name, 0, stored[0])
        _check_finite(piece.name, whole)
        target.copy_(whole.t())
    elif piece.change is Change.INTERLEAVED_HEADS:
        head_dim = source.architecture.head_dim
        whole = source.rows(piece.name, 0, rows)
        _check_finite(piece.name, whole)
        halves = whole.view(rows // head_dim, head_dim // 2, 2, -1).transpose(1, 2)
        target.view(rows // head_dim, 2, head_dim // 2, -1).copy_(halves)
    else:
        chunk = max(1, _CHUNK_VALUES // (stored[1] if len(stored) > 1 else 1))
        for start in range(0, rows, chunk):
            stop = min(start + chunk, rows)
            read = source.rows(piece.name, start + skipped, stop + skipped)
            _check_finite(piece.name, read)
            target[start:stop].copy_(read.float() + 1.0 if piece.change is Change.PLUS_ONE else read)
    return row + rows


def _check_finite(name: str, values: Tensor) -> None:
    """Raise WeightsError for NaN, infinity and numbers that no trained model has, since they spoil every logit."""
    low, high = (float(end) for end in values.aminmax())
    if not -_LARGEST_WEIGHT <= low <= high <= _LARGEST_WEIGHT:
        allowed = f"numbers from {-_LARGEST_WEIGHT:g} to {_LARGEST_WEIGHT:g}"
        raise WeightsError(f"tensor {name}", f"{low:g} to {high:g}", allowed, "fetch the checkpoint again")


def _damaged(name: str, found: Shape, expected: Shape) -> WeightsError:
    return WeightsError(
        f"tensor {name}", found, f"{expected} by the checkpoint's own configuration", "fetch the checkpoint again"
    )
