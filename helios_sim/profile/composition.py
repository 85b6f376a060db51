"""The work of iterations, in the numbers that a profile prices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """A piece of one prompt: `tokens` new ones that attend to `context_tokens` earlier ones and to each other."""

    tokens: int
    context_tokens: int
    layers: int  # layers that it runs


@dataclass(frozen=True, slots=True)
class Composition:
    """K consecutive iterations of one model, over S bands of layers.

    Band s runs the layers bounds[s-1] to bounds[s] (bounds[-1] of nothing is 0), so that tokens which run to
    different depths are counted exactly. K is 1 for a single iteration; a leap prices many at once.

    Arrays are int64. A token that was left out earlier and is recomputed here counts in `decode_tokens` and
    `decode_kv_tokens` like a decode.
    """

    bounds: tuple[int, ...]  # depth at the end of each band, ascending
    decode_tokens: IntArray  # (K, S) rows that run band s
    decode_kv_tokens: IntArray  # (K, S) context lengths of those rows, summed, the new token included
    sampled_tokens: IntArray  # (K,) rows that go through the final norm and LM head after their last layer
    check_tokens: IntArray | None = None  # (K, S) rows checked for an exit at the end of band s, through the head
    classifier_tokens: IntArray | None = None  # (K, S) rows checked at the end of band s by a classifier
    # (K,) shortest and longest context of iteration k's decodes, the new token included; None if not known, so that
    # lengths enter by their mean. Rows that leave early are taken to be a fair sample.
    decode_kv_least: IntArray | None = None
    decode_kv_most: IntArray | None = None
    propagated_tokens: IntArray | None = None  # (K, S) rows for which band s computes K and V only
    prefill: tuple[PrefillChunk, ...] = ()  # chunks of the one iteration: with chunks K is 1
    host_sync_at_checks: bool = True  # the host must see a check's answer before it launches the next band
    host_ahead: bool = False  # the host prepares the next iteration meanwhile, beside the device
    loading: bool = False  # weights stream into the card meanwhile
    # (K, S) further rows of the requests that decode: they verify drafts and read the same K and V in the same pass
    verified_tokens: IntArray | None = None
    drafting: bool = False  # a draft pass: the host's overhead is paid with the verification

    @property
    def n_iterations(self) -> int:
        return len(self.sampled_tokens)
