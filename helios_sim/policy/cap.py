"""The cap rule: how shallow a model may be cut so that its tokens stay its own. Knows counts per prompt, no time.

The paper publishes no rule; this one is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 500
UPPER_SHARE = 0.95


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """Counts of P prompts at E exits; the last exit is full depth."""

    tokens: NDArray[np.int64]  # (P,)
    disagreements: NDArray[np.int64]  # (P, E) tokens that differ from full depth, confident or not
    weights: NDArray[np.float64]  # (P,) above 0; older prompts weigh less


@dataclass(frozen=True, slots=True)
class CapChoice:
    layers: int
    share: tuple[float, ...]  # (E,) weighted share of tokens that differ
    upper_bound: tuple[float, ...]  # (E,) of that share


def upper_bounds(evidence: Evidence, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(E,) weighted share of tokens that differ, and its upper 95 % bound, one-sided.

    Percentile bootstrap of the ratio sum(w d) / sum(w t), prompts resampled with replacement; all exits share the
    draws, so that bounds are ordered where counts are.
    """
    n_prompts = len(evidence.tokens)
    tokens = evidence.weights * evidence.tokens
    differs = evidence.weights[:, None] * evidence.disagreements
    share = differs.sum(axis=0) / tokens.sum()
    drawn = rng.multinomial(n_prompts, np.full(n_prompts, 1.0 / n_prompts), size=RESAMPLES).astype(np.float64)
    resampled = (drawn @ differs) / (drawn @ tokens)[:, None]
    return share, np.quantile(resampled, UPPER_SHARE, axis=0)


def choose_cap(
    exits: tuple[int, ...],
    evidence: Evidence,
    max_disagreement: float,
    rng: np.random.Generator,
    allowed: tuple[bool, ...] | None = None,
) -> CapChoice:
    """The shallowest exit whose upper bound is at most `max_disagreement`, else full depth, which never differs.

    `allowed` (E,) bars exits for other reasons, such as bits per character; full depth is never barred here.
    """
    share, bound = upper_bounds(evidence, rng)
    within = bound <= max_disagreement
    if allowed is not None:
        within &= np.asarray(allowed)
    within[-1] = True
    return CapChoice(exits[int(within.argmax())], tuple(share.tolist()), tuple(bound.tolist()))
