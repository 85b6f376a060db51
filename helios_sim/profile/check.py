"""Sample iterations of a profile, with their prices and roofline floors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from helios_sim.profile.composition import Composition, PrefillChunk
from helios_sim.profile.profile import MemoryBudget, Profile

UTILISATION = 0.9  # share of the card's memory


def decodes(profile: Profile, batches: Sequence[int], context_tokens: int) -> Composition:
    """Iterations of all layers, one for each batch, in which every request decodes at this context."""
    rows = np.array(batches, np.int64)[:, None]
    return Composition(
        bounds=(profile.model.n_layers,), decode_tokens=rows, decode_kv_tokens=rows * context_tokens,
        sampled_tokens=rows[:, 0],
    )  # fmt: skip


def prompt(profile: Profile, tokens: int) -> Composition:
    """The iteration of a whole prompt on its own."""
    layers, none = profile.model.n_layers, np.zeros((1, 1), np.int64)
    return Composition(
        bounds=(layers,), decode_tokens=none, decode_kv_tokens=none, sampled_tokens=np.array([1]),
        prefill=(PrefillChunk(tokens, 0, layers),),
    )  # fmt: skip


def prompts_that_fit(profile: Profile, lengths: Iterable[int]) -> list[int]:
    """The lengths in tokens that are within the model's context."""
    return [tokens for tokens in lengths if tokens <= profile.model.max_context_tokens]


def price_and_floor(
    profile: Profile, compositions: Iterable[Composition]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Prices and floors in seconds of n iterations, each (n,)."""
    compositions = list(compositions)
    price_s = [profile.iteration_time_s(composition) for composition in compositions]
    floor_s = [profile.iteration_floor_s(composition) for composition in compositions]
    return np.concatenate(price_s), np.concatenate(floor_s)


def tokens_that_fit(profile: Profile) -> int:
    """Tokens with K and V that fit beside the whole model; 0 if the model itself does not fit."""
    layers = profile.model.n_layers
    pool = MemoryBudget(profile.hardware.hbm_bytes, UTILISATION).pool_bytes([(profile, layers)])
    return max(0, pool // profile.kv_bytes_per_token(layers))
