"""DREX's rule (arXiv 2512.15705) for when it pays to split a batch at an exit, applied to a profile."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from helios_sim.policy.prediction import decode_time_s, fixed_depth
from helios_sim.profile.composition import Composition
from helios_sim.profile.profile import Profile


def split_shares(profile: Profile, exits: Sequence[int], batch: int, context_tokens: int) -> tuple[float, ...]:
    """The share c / t_deep at each exit before the last: tokens leave there if they exceed this share of the batch.

    t_deep is the time of the layers after the exit for the whole batch, each request with `context_tokens` in the KV
    cache. If b' of b requests leave, b' / b of t_deep is saved, since the others run these layers later in a batch of
    the same size. The cost c is the time to regroup (`runtime.regroup_s`) and the fixed time of an iteration, since
    there is one iteration more. The share is at most 1: then tokens leave all together or not at all.
    """
    cost_s = profile.runtime.regroup_s + _of_any_iteration_s(profile)
    times_s = [_decode_s(profile, layers, batch, context_tokens) for layers in exits]
    return tuple(min(1.0, cost_s / max(times_s[-1] - time_s, 1e-12)) for time_s in times_s[:-1])


def _decode_s(profile: Profile, layers: int, batch: int, context_tokens: int) -> float:
    return float(decode_time_s(profile, fixed_depth(layers), np.array([batch], np.int64), context_tokens)[0])


def _of_any_iteration_s(profile: Profile) -> float:
    """The fixed time of an iteration, even if it runs no tokens: the host's part, and the gap after it."""
    nothing = np.zeros((1, 1), np.int64)
    return float(profile.iteration_time_s(Composition((profile.model.n_layers,), nothing, nothing, nothing[0]))[0])
