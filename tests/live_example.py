"""Shared by the tests of live models: tiny checkpoints written once, whole texts through both implementations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from helios_sim.live.memory.kv import DecodeStep, KvCache, Packed, PromptStep
from helios_sim.live.model.decoder import SegmentedModel

TOLERANCE = 1e-4  # of logits of size 1 to 5 in float32


def token_ids(batch: int, tokens: int, seed: int = 0, vocab_size: int = 320) -> Tensor:
    return torch.randint(3, vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def layers_of(reference: Any) -> tuple[Any, str]:
    """Where a transformers model keeps its layers: the module and the attribute's name."""
    inner = reference.get_decoder() if reference.config.model_type == "opt" else reference.base_model
    inner = getattr(inner, "decoder", inner)
    return inner, "h" if hasattr(inner, "h") else "layers"


def reference_logits(reference: Any, ids: Tensor, layers: int | None = None) -> Tensor:
    """transformers' logits (B, T, vocab), of the model cut after `layers` layers."""
    owner, name = layers_of(reference)
    whole = getattr(owner, name)
    setattr(owner, name, whole[:layers])
    try:
        with torch.no_grad():
            return reference(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        setattr(owner, name, whole)


@torch.no_grad()
def packed_logits(model: SegmentedModel, ids: Tensor, cuts: Sequence[int] = ()) -> Tensor:
    """Our logits (B, T, vocab), the layers run in segments that end at `cuts` and at the last layer loaded."""
    step = Packed(model.architecture, *ids.shape, model.dtype)
    hidden, start = model.embed(ids.flatten(), step.positions), 0
    for end in (*cuts, model.n_loaded):
        hidden, start = model.run(hidden, start, end, step), end
    return model.logits(hidden).view(*ids.shape, -1)


@torch.no_grad()
def prompt_logits(model: SegmentedModel, cache: KvCache, slot: int, ids: Tensor, chunks: Sequence[int]) -> Tensor:
    """Logits (T, vocab) of a prompt put into `slot` in chunks of these sizes."""
    out, start = [], 0
    for size in chunks:
        step = PromptStep(cache, slot, size, start)
        hidden = model.run(model.embed(ids[start : start + size], step.positions), 0, model.n_loaded, step)
        out.append(model.logits(hidden))
        start += size
    assert start == len(ids)
    return torch.cat(out)


@torch.no_grad()
def decode_logits(model: SegmentedModel, step: DecodeStep, ids: Tensor) -> Tensor:
    return model.logits(model.run(model.embed(ids, step.positions), 0, model.n_loaded, step))
