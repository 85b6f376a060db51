"""Roofline floor of an iteration: bytes over the card's bandwidth, operations over its peak. Knows no kernel.

No kernel can be faster, so measured time over floor is at least 1, and floor over time is the utilisation.
"""

from __future__ import annotations

import numpy as np

from helios_sim.profile.composition import Composition
from helios_sim.profile.spec import HardwareSpec, ModelSpec
from helios_sim.profile.tables import FloatArray


def iteration_floor_s(model: ModelSpec, hardware: HardwareSpec, c: Composition) -> FloatArray:
    """(K,) seconds: max(bytes / bandwidth, operations / peak), where

    bytes = weights of each band that runs (K and V projections alone where it only propagates), KV read, LM head for
    each check and for sampling; operations = 2 per weight and row, 4 per query, key and head width in attention.
    Activations are left out, which keeps it a floor.
    """
    width, value_bytes = model.n_heads * model.head_dim, model.weight_bytes_per_value
    kv_values = 2 * model.d_model * model.kv_width
    head_values = model.vocab_size * model.d_model
    layers = np.diff((0, *c.bounds))
    chunk_rows = np.array([sum(p.tokens for p in c.prefill if p.layers >= b) for b in c.bounds], dtype=np.int64)
    rows = c.decode_tokens + chunk_rows
    propagated = np.zeros_like(rows) if c.propagated_tokens is None else c.propagated_tokens
    checks = np.zeros_like(rows) if c.check_tokens is None else c.check_tokens

    layer_bytes = np.where(rows > 0, model.layer_values, np.where(propagated > 0, kv_values, 0)) * value_bytes
    context = sum(p.layers * p.context_tokens for p in c.prefill)
    kv_bytes = ((c.decode_kv_tokens * layers).sum(axis=1) + context) * model.kv_bytes_per_token_layer
    heads = (c.sampled_tokens > 0).astype(np.int64) + (checks > 0).sum(axis=1)
    total_bytes = (layer_bytes * layers).sum(axis=1) + kv_bytes + heads * (head_values * value_bytes)

    pairs = sum(p.layers * (p.tokens * p.context_tokens + p.tokens * (p.tokens + 1) // 2) for p in c.prefill)
    attention = 4.0 * width * ((c.decode_kv_tokens * layers).sum(axis=1) + pairs)
    per_layer = 2.0 * (rows * model.layer_values + propagated * kv_values)
    head = 2.0 * head_values * (c.sampled_tokens + checks.sum(axis=1))
    operations = (per_layer * layers).sum(axis=1) + attention + head
    floor_s: FloatArray = np.maximum(total_bytes / hardware.hbm_bytes_per_s, operations / hardware.flops_per_s)
    return floor_s
