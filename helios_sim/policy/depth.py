"""How deep tokens run on average, and what a decode iteration and a prompt then cost. Knows no load."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from helios_sim.exits.replay import OfflineExits
from helios_sim.exits.rule import Confidence
from helios_sim.profile.composition import Composition, PrefillChunk
from helios_sim.profile.profile import Profile
from helios_sim.request import NS_PER_S

LEAST_S = 1 / NS_PER_S  # of an iteration: what is free still takes the clock's step, as it does when served
STRATA = 64  # rows per batch when tokens leave at different exits


@dataclass(frozen=True, slots=True)
class Depths:
    """Bands of layers and the share of tokens that run each. Prompts run all bands."""

    bounds: tuple[int, ...]  # depth at the end of each band, ascending
    reach: tuple[float, ...]  # share of tokens that run the band; the first is 1, and they do not rise
    checked: Confidence | None = None  # an exit check of this kind at the end of every band but the last
    propagated: bool = False  # K and V of tokens that left are computed in the bands above

    @property
    def layers(self) -> int:
        return self.bounds[-1]


def fixed_depth(layers: int) -> Depths:
    """All tokens run `layers`: full depth or a fixed cap, whose confidence comes with the token's own logits."""
    return Depths((layers,), (1.0,))


def per_token_depths(offline: OfflineExits, propagated: bool = True) -> Depths:
    """Tokens leave alone, all layers loaded, in the recorded shares."""
    left = np.concatenate([[0.0], np.cumsum(offline.exit_share)[:-1]])
    reach = tuple(np.clip(1.0 - left, 0.0, 1.0).tolist())
    return Depths(offline.exits, reach, checked=offline.confidence, propagated=propagated)


def decode_time_s(
    profile: Profile, depths: Depths, batch: NDArray[np.int64], context_tokens: float
) -> NDArray[np.float64]:
    """(K,) mean seconds of a decode iteration at each batch size.

    With tokens that leave at different exits, the rows of a band are floor(batch x reach + u) with u spread evenly
    over (0, 1): unbiased, nested from band to band, and at batch 1 exactly the mixture of the exits.
    """
    time_s = profile.iteration_time_s(_decodes(depths, batch, context_tokens))
    return np.asarray(np.maximum(time_s, LEAST_S).reshape(len(batch), -1).mean(axis=1))


def decode_floor_s(
    profile: Profile, depths: Depths, batch: NDArray[np.int64], context_tokens: float
) -> NDArray[np.float64]:
    """(K,) its roofline floor."""
    floor_s = profile.iteration_floor_s(_decodes(depths, batch, context_tokens))
    return np.asarray(floor_s.reshape(len(batch), -1).mean(axis=1))


def _decodes(depths: Depths, batch: NDArray[np.int64], context_tokens: float) -> Composition:
    """Iterations at each batch size, one after the other; several of each where tokens leave at different exits."""
    strata = 1 if len(depths.bounds) == 1 else STRATA
    u = (np.arange(strata) + 0.5) / strata
    rows = np.floor(batch[:, None, None] * np.asarray(depths.reach) + u[None, :, None]).astype(np.int64)
    rows = np.minimum(rows, batch[:, None, None]).reshape(-1, len(depths.bounds))
    last = np.arange(len(depths.bounds)) == len(depths.bounds) - 1
    whole = np.repeat(batch, strata)
    checks = None if depths.checked is None else np.where(last, 0, rows)
    by_classifier = depths.checked is not None and not depths.checked.by_head
    return Composition(
        bounds=depths.bounds,
        decode_tokens=rows,
        decode_kv_tokens=np.rint(rows * context_tokens).astype(np.int64),
        sampled_tokens=whole if checks is None or by_classifier else rows[:, -1],
        check_tokens=None if by_classifier else checks,
        classifier_tokens=checks if by_classifier else None,
        propagated_tokens=whole[:, None] - rows if depths.propagated else None,
    )


def prefill_time_s(profile: Profile, layers: int, prompt_tokens: int, max_batch_tokens: int) -> tuple[float, float]:
    """Seconds to run one prompt to `layers` on its own, in chunks of the token budget; and the roofline floor."""
    time_s = floor_s = 0.0
    for context in range(0, prompt_tokens, max_batch_tokens):
        tokens = min(max_batch_tokens, prompt_tokens - context)
        finishes = context + tokens == prompt_tokens
        composition = Composition(
            bounds=(layers,),
            decode_tokens=np.zeros((1, 1), dtype=np.int64),
            decode_kv_tokens=np.zeros((1, 1), dtype=np.int64),
            sampled_tokens=np.array([int(finishes)]),
            prefill=(PrefillChunk(tokens, context, layers),),
        )
        time_s += max(float(profile.iteration_time_s(composition)[0]), LEAST_S)
        floor_s += float(profile.iteration_floor_s(composition)[0])
    return time_s, floor_s
