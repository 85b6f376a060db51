"""Predicted rates of speculative decoding: arithmetic on profiles and the share of drafts that full depth confirms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from helios_sim.core.operate import LEAST_S
from helios_sim.exits.rule import OwnCard
from helios_sim.policy.prediction import decode_floor_s, decode_time_s, fixed_depth
from helios_sim.profile.composition import Composition
from helios_sim.profile.profile import Profile

SOME_TOKENS = 512  # tokens in the KV cache, to compare drafters


def tokens_per_pass(acceptance: float, drafts: int) -> float:
    """Mean number of tokens from one pass with K `drafts`: (1 - a^(K+1)) / (1 - a).

    `acceptance`, a, is the probability that a draft is accepted if the drafts before it were, the same for each.
    """
    if acceptance >= 1.0:
        return drafts + 1.0
    return float((1.0 - acceptance ** (drafts + 1)) / (1.0 - acceptance))


@dataclass(frozen=True, slots=True)
class PassTime:
    """Seconds of one pass of a batch: all its drafts, and the verification."""

    draft_s: float
    verify_s: float

    @property
    def total_s(self) -> float:
        return self.draft_s + self.verify_s


def pass_time(profile: Profile, exit_layers: int, drafts: int, batch: int, context_tokens: int) -> PassTime:
    """Time of one pass in which `batch` requests, each with `context_tokens` in the KV cache, draft `drafts` each.

    The serving loop prices passes in the same way (`core/depths.py:lay_out_pass`).
    """
    n_layers = profile.model.n_layers
    if drafts == 0:
        at_full_depth = decode_time_s(profile, fixed_depth(n_layers), np.array([batch]), context_tokens + 1)
        return PassTime(0.0, float(at_full_depth[0]))
    *draft_s, verify_s = (
        max(float(profile.iteration_time_s(each)[0]), LEAST_S)
        for each in _steps(profile, exit_layers, drafts, np.array([batch]), context_tokens)
    )
    return PassTime(sum(draft_s), verify_s)


def _steps(
    profile: Profile, exit_layers: int, drafts: int, batch: NDArray[np.int64], context_tokens: int
) -> Iterator[Composition]:
    """Yields the iterations of one pass at each batch size (K,): every draft, then the verification."""
    n_layers, none = profile.model.n_layers, np.zeros_like(batch)

    def step(deep: NDArray[np.int64], context: int, more: NDArray[np.int64], drafting: bool) -> Composition:
        rows = np.stack([batch, deep], axis=1)
        return Composition(
            bounds=(exit_layers, n_layers),
            decode_tokens=rows,
            decode_kv_tokens=rows * context,
            verified_tokens=np.stack([none, more], axis=1),
            sampled_tokens=batch + more,
            host_sync_at_checks=False,
            drafting=drafting,
        )

    for k in range(1, drafts + 1):
        yield step(none, context_tokens + k, none, True)
    yield step(batch, context_tokens + drafts + 1, batch * drafts, False)


def pass_time_with(profile: Profile, drafter: Profile, drafts: int, batch: int, context_tokens: int) -> PassTime:
    """Time of one pass in which another model drafts with all its layers. Tokens it has yet to read are left out."""
    if drafts == 0:
        return pass_time(profile, profile.model.n_layers, 0, batch, context_tokens)

    draft_s = sum(_step_s(drafter, batch, context_tokens + k, drafting=True) for k in range(1, drafts + 1))
    return PassTime(draft_s, _step_s(profile, batch, context_tokens + drafts + 1, more=drafts))


def _step_s(profile: Profile, batch: int, context_tokens: int, more: int = 0, drafting: bool = False) -> float:
    """Seconds of one step of a whole model. Each request has a row, and `more` rows that read the same K and V."""
    rows = np.array([[batch]], np.int64)
    step = Composition(
        bounds=(profile.model.n_layers,), decode_tokens=rows, decode_kv_tokens=rows * context_tokens,
        verified_tokens=rows * more, sampled_tokens=rows[:, 0] * (1 + more), host_sync_at_checks=False,
        drafting=drafting,
    )  # fmt: skip
    return max(float(profile.iteration_time_s(step)[0]), LEAST_S)


def slowest_drafter(profiles: Mapping[str, Profile]) -> str:
    """The slowest of models that draft side by side, for a step of one request with `SOME_TOKENS` in the KV cache."""
    return max(profiles, key=lambda name: _step_s(profiles[name], 1, SOME_TOKENS))


def stage_time(
    profile: Profile, drafter: Profile, drafts: int, batch: int, context_tokens: int, compare_s: float = 0.0
) -> PassTime:
    """Time to draft for `batch` requests on the drafter's own card, with its own host, and time to verify the drafts.

    `compare_s` is the time after each draft in which cards that draft side by side exchange their proposals.
    """
    first_s = _step_s(drafter, batch, context_tokens + 1) if drafts else 0.0
    then_s = sum(_step_s(drafter, batch, context_tokens + k, drafting=True) for k in range(2, drafts + 1))
    verify_s = _step_s(profile, batch, context_tokens + drafts + 1, more=drafts)
    return PassTime(first_s + then_s + drafts * compare_s, verify_s)


def pass_time_apart(
    profile: Profile, drafter: Profile, drafts: int, batch: int, context_tokens: int, own: OwnCard, fused: bool = False
) -> float:
    """Seconds from one verification of a request to the next if the drafter has its own card.

    With two parts the halves of a batch take turns, and each stage takes as long as the slower of the two cards. With
    one part, or a single request, one card waits for the other, as if all requests had arrived together. Without drafts
    all requests decode.
    """
    if drafts == 0:
        return pass_time_with(profile, drafter, 0, batch, context_tokens).total_s
    compare_s = own.exchange_s if fused else 0.0
    halves = (batch + own.parts - 1) // own.parts, batch // own.parts
    if own.parts == 1 or batch == 1:
        return stage_time(profile, drafter, drafts, batch, context_tokens, compare_s).total_s + 2 * own.exchange_s
    more, fewer = (stage_time(profile, drafter, drafts, half, context_tokens, compare_s) for half in halves)
    stages_s = max(more.draft_s, fewer.verify_s) + max(fewer.draft_s, more.verify_s)
    return stages_s + 2 * own.exchange_s


def best_drafts_of(
    profile: Profile, drafter: Profile, acceptance: float, most_drafts: int, batch: int, context_tokens: int,
    own: OwnCard | None = None, fused: bool = False,
) -> int:  # fmt: skip
    """The number of drafts of another model with most tokens a second, the fewest among equals; 0 if decoding is best.

    With `own` the drafter has its own card. With `fused` several draft side by side, and `drafter` is the slowest."""

    def total_s(drafts: int) -> float:
        if own is not None:
            return pass_time_apart(profile, drafter, drafts, batch, context_tokens, own, fused)
        return pass_time_with(profile, drafter, drafts, batch, context_tokens).total_s

    return int(np.argmax([tokens_per_pass(acceptance, drafts) / total_s(drafts) for drafts in range(most_drafts + 1)]))


@dataclass(frozen=True, slots=True)
class Drafts:
    """Self-speculation as input to `predict`: a decode iteration is a pass, divided by the tokens that it yields."""

    exit_layers: int
    draft_tokens: int  # 1 or more
    acceptance: float  # share of drafts that full depth confirms
    layers: int  # number of layers of the whole model
    largest_batch: int  # if more requests decode, none drafts

    def decode_time_s(self, profile: Profile, batch: NDArray[np.int64], context_tokens: float) -> NDArray[np.float64]:
        """Seconds per token at each batch size, (K,)."""
        steps = _steps(profile, self.exit_layers, self.draft_tokens, batch, round(context_tokens))
        total_s = sum((np.maximum(profile.iteration_time_s(each), LEAST_S) for each in steps), np.zeros(len(batch)))
        plain_s = decode_time_s(profile, fixed_depth(self.layers), batch, context_tokens)
        return np.where(batch > self.largest_batch, plain_s, total_s / self._tokens)

    def decode_floor_s(self, profile: Profile, batch: NDArray[np.int64], context_tokens: float) -> NDArray[np.float64]:
        """Roofline floor of `decode_time_s`, (K,)."""
        steps = _steps(profile, self.exit_layers, self.draft_tokens, batch, round(context_tokens))
        total_s = sum((profile.iteration_floor_s(each) for each in steps), np.zeros(len(batch)))
        plain_s = decode_floor_s(profile, fixed_depth(self.layers), batch, context_tokens)
        return np.where(batch > self.largest_batch, plain_s, total_s / self._tokens)

    @property
    def _tokens(self) -> float:
        return tokens_per_pass(self.acceptance, self.draft_tokens)


def as_long_as_they_pay(profile: Profile, drafts: Drafts, most: int, context_tokens: int) -> Drafts:
    """These drafts, limited to the largest batch (1 to `most` requests) at which they are faster than decoding."""
    batch = np.arange(1, most + 1, dtype=np.int64)
    plain_s = decode_time_s(profile, fixed_depth(drafts.layers), batch, context_tokens)
    pays = replace(drafts, largest_batch=most).decode_time_s(profile, batch, context_tokens) < plain_s
    return replace(drafts, largest_batch=int(batch[pays][-1]) if pays.any() else 0)


@dataclass(frozen=True, slots=True)
class Drafting:
    """The number of drafts with most tokens a second; 0 if decoding at full depth is best."""

    exit_layers: int
    drafts: int
    tokens_per_s: float  # of the whole batch


def best_drafting(
    profile: Profile, exits: Iterable[tuple[int, float]], most_drafts: int, batch: int, context_tokens: int
) -> Drafting:
    """The best pair of an exit (given with its acceptance) and 0 to `most_drafts` drafts, the fewest among equals."""
    found: list[Drafting] = []
    for layers, acceptance in exits:
        for drafts in range(most_drafts + 1):
            total_s = pass_time(profile, layers, drafts, batch, context_tokens).total_s
            found.append(Drafting(layers, drafts, batch * tokens_per_pass(acceptance, drafts) / total_s))
    return max(found, key=lambda each: (each.tokens_per_s, -each.drafts))
