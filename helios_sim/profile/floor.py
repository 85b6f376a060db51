"""Roofline floor of an iteration: bytes over the card's bandwidth, operations over its peak. Knows no kernel.

No kernel can be faster, so measured time over floor is at least 1, and floor over time is the utilisation.
"""

from __future__ import annotations

import numpy as np

from helios_sim.profile.composition import Composition
from helios_sim.profile.lookup import columns
from helios_sim.profile.spec import HardwareSpec, ModelSpec
from helios_sim.profile.tables import FloatArray


def iteration_floor_s(model: ModelSpec, hardware: HardwareSpec, c: Composition) -> FloatArray:
    """(K,) seconds: max(bytes / bandwidth, operations / peak), where

    bytes = weights of each band that runs (K and V projections alone where it only propagates), KV read, LM head for
    each check and for sampling; operations = 2 per weight and row, 4 per query, key and head width in attention.
    Activations are left out, which keeps it a floor.
    """
    width, value_bytes, layer_values = model.n_heads * model.head_dim, model.weight_bytes_per_value, model.layer_values
    kv_values, head_values = 2 * model.d_model * model.kv_width, model.vocab_size * model.d_model
    kv_bytes = model.kv_bytes_per_token_layer
    none = [0] * len(c.bounds)
    sampled = columns(c.sampled_tokens[:, None])[0]
    n_bytes, operations = (sampled > 0) * (head_values * value_bytes), 2 * head_values * sampled
    bands = zip(
        c.bounds, (0, *c.bounds), columns(c.decode_tokens), columns(c.decode_kv_tokens),
        none if c.propagated_tokens is None else columns(c.propagated_tokens),
        none if c.check_tokens is None else columns(c.check_tokens), strict=False,
    )  # fmt: skip
    for end, start, decode, kv, moved, checked in bands:
        layers = end - start
        rows = decode + sum(p.tokens for p in c.prefill if p.layers >= end)
        weights = (rows > 0) * layer_values + ((rows == 0) & (moved > 0)) * kv_values
        n_bytes = n_bytes + layers * (weights * value_bytes + kv * kv_bytes)
        n_bytes = n_bytes + (checked > 0) * (head_values * value_bytes)
        operations = operations + layers * (2 * (rows * layer_values + moved * kv_values) + 4 * width * kv)
        operations = operations + 2 * head_values * checked
    for p in c.prefill:
        pairs = p.tokens * p.context_tokens + p.tokens * (p.tokens + 1) // 2
        n_bytes = n_bytes + p.layers * p.context_tokens * kv_bytes
        operations = operations + p.layers * 4 * width * pairs
    floor_s = np.maximum(n_bytes / hardware.hbm_bytes_per_s, operations / hardware.flops_per_s)
    return np.atleast_1d(floor_s)
