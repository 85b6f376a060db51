"""The cap rule: how shallow a model may be cut so that its tokens stay its own, by an upper bound over prompts.

The paper publishes no rule; this one is ours. The bound is that of a ratio estimator: a prompt is one draw, since its
tokens are alike, and shares of disagreement are skewed, since most prompts show none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

UPPER_SHARE = 0.95
Z = 1.6448536269514722  # the normal quantile of `UPPER_SHARE`


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


def sum_in_order(first: ArrayLike, terms: NDArray[np.float64]) -> NDArray[np.float64]:
    """`first` plus each of the terms (P, ...), one after the other; `np.sum` adds them in an order of its own.

    `first` is added to the first of the terms in its place.
    """
    if not len(terms):
        return np.asarray(first, np.float64)
    terms[0] += first
    return np.asarray(np.add.accumulate(terms, axis=0)[-1])


def share_and_bound(sources: Sequence[Evidence]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(E,) the share of tokens that differ, sum(w d) / sum(w t), and its one-sided upper 95 % bound.

    Each source is a stratum whose prompts were drawn apart from the others'. With residuals e = w (d - share t),
    centred in their source, of n prompts there:

        variance of the sum V = sum over sources of n / (n - 1) sum(e^2),  third moment K = sum(e^3)
        bound = share + sqrt(V) / sum(w t) (z + K / V^1.5 (2 z^2 + 1) / 6)

    The first term is the ratio estimator's (Cochran, Sampling Techniques, 1977, 6.4), the second corrects it for skew
    (Hall, "Inverting an Edgeworth expansion", Annals of Statistics 11, 1983). It never turns the bound below the share,
    since |K| <= V^1.5 and (2 z^2 + 1) / 6 < z. A source of one prompt shows no spread.
    """
    tokens = float(sum_in_order(0.0, np.concatenate([s.weights * s.tokens for s in sources])))
    n_exits = sources[0].disagreements.shape[1]
    none = np.zeros(n_exits)
    differs = sum_in_order(none, np.concatenate([s.weights[:, None] * s.disagreements for s in sources]))
    share = differs / tokens
    variance, third = none, none
    for source in sources:
        n = len(source.tokens)
        residuals = source.weights[:, None] * (source.disagreements - share * source.tokens[:, None])
        residuals -= sum_in_order(none, residuals) / n
        squares = residuals * residuals
        variance = variance + sum_in_order(none, squares) * (n / max(1, n - 1))
        third = third + sum_in_order(none, squares * residuals)
    spread = np.sqrt(variance)
    cubed = variance * spread
    skew = np.divide(third, cubed, out=np.zeros(n_exits), where=cubed > 0)
    return share, np.minimum(1.0, share + spread / tokens * (Z + skew * (2 * Z * Z + 1) / 6))


def choose_cap(
    exits: tuple[int, ...],
    sources: Sequence[Evidence],
    max_disagreement: float,
    allowed: tuple[bool, ...] | None = None,
) -> CapChoice:
    """The shallowest exit whose upper bound is at most `max_disagreement`, else full depth, which never differs.

    `allowed` (E,) bars exits for other reasons, such as bits per character; full depth is never barred here.
    """
    share, bound = share_and_bound(sources)
    within = bound <= max_disagreement
    if allowed is not None:
        within &= np.asarray(allowed)
    within[-1] = True
    return CapChoice(exits[int(within.argmax())], tuple(share.tolist()), tuple(bound.tolist()))
