"""What self-speculation would achieve: arithmetic on a profile and on the share of drafts that full depth confirms."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from helios_sim.policy.prediction import LEAST_S, decode_time_s, fixed_depth
from helios_sim.profile.composition import Composition
from helios_sim.profile.profile import Profile


def tokens_per_pass(acceptance: float, drafts: int) -> float:
    """Tokens that one pass with so many drafts yields on average: (1 - a^(K+1)) / (1 - a).

    `acceptance`: the probability that a draft is confirmed where those before it were, the same for each.
    """
    if acceptance >= 1.0:
        return drafts + 1.0
    return float((1.0 - acceptance ** (drafts + 1)) / (1.0 - acceptance))


@dataclass(frozen=True, slots=True)
class PassTime:
    """Seconds of one pass of a batch: its drafts together, and the verification."""

    draft_s: float
    verify_s: float

    @property
    def total_s(self) -> float:
        return self.draft_s + self.verify_s


def pass_time(profile: Profile, exit_layers: int, drafts: int, batch: int, context_tokens: int) -> PassTime:
    """One pass in which `batch` requests, each with so many tokens in the KV cache, draft as many tokens each.

    As the serving loop prices it (`core/depths.py:lay_out_pass`).
    """
    n_layers = profile.model.n_layers
    if drafts == 0:
        at_full_depth = decode_time_s(profile, fixed_depth(n_layers), np.array([batch]), context_tokens + 1)
        return PassTime(0.0, float(at_full_depth[0]))

    def time_s(rows: tuple[int, int], context: int, more: int, drafting: bool) -> float:
        composition = Composition(
            bounds=(exit_layers, n_layers),
            decode_tokens=np.array([rows], np.int64),
            decode_kv_tokens=np.array([rows], np.int64) * context,
            verified_tokens=np.array([[0, more]], np.int64),
            sampled_tokens=np.array([batch + more], np.int64),
            host_sync_at_checks=False,
            drafting=drafting,
        )
        return max(float(profile.iteration_time_s(composition)[0]), LEAST_S)

    draft_s = sum(time_s((batch, 0), context_tokens + k, 0, True) for k in range(1, drafts + 1))
    return PassTime(draft_s, time_s((batch, batch), context_tokens + drafts + 1, batch * drafts, False))


@dataclass(frozen=True, slots=True)
class Drafting:
    """The number of drafts that yields most tokens a second; 0: none does better than decoding at full depth."""

    exit_layers: int
    drafts: int
    tokens_per_s: float  # of the whole batch


def best_drafting(
    profile: Profile, exits: Iterable[tuple[int, float]], most_drafts: int, batch: int, context_tokens: int
) -> Drafting:
    """The best of these exits, each with its acceptance, and of 0 to `most_drafts` drafts. Of equals the fewest."""
    found: list[Drafting] = []
    for layers, acceptance in exits:
        for drafts in range(most_drafts + 1):
            total_s = pass_time(profile, layers, drafts, batch, context_tokens).total_s
            found.append(Drafting(layers, drafts, batch * tokens_per_pass(acceptance, drafts) / total_s))
    return max(found, key=lambda each: (each.tokens_per_s, -each.drafts))
