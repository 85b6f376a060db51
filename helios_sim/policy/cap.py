"""The cap rule: how shallow a model may be cut so that its tokens stay its own, by a bootstrap over prompts.

The paper publishes no rule; this one is ours. `Generator.multinomial` takes an exponential and a logarithm for every
count of a resample. With equal shares both depend only on the place and on how many draws are left, so the compiled
form computes each of them once. Counts and the generator's state afterwards are the same to the last bit; whether they
are is tried before it is used, since numpy may change its method.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from helios_sim.core import machine

FloatArray = NDArray[np.float64]

MOST_COMPILED = 2048  # things; room for what is computed once grows with their square


def counts_drawn(n: int, resamples: int, rng: np.random.Generator) -> FloatArray:
    """(R, n) how often each of n things is drawn in each of R resamples of n draws, with replacement."""
    if n <= MOST_COMPILED and compiled_is_numpys():
        code = machine.load()
        assert code is not None
        before, counts = rng.bit_generator.state, np.zeros((resamples, n))
        if code.draw(rng, counts, *places(n)):
            return counts
        rng.bit_generator.state = before
    return by_numpy(n, resamples, rng)


def by_numpy(n: int, resamples: int, rng: np.random.Generator) -> FloatArray:
    """The definition of `counts_drawn`."""
    return rng.multinomial(n, np.full(n, 1.0 / n), size=resamples).astype(np.float64)


@cache
def compiled_is_numpys() -> bool:
    """False too where nothing has been compiled yet: the first runs are not to wait for it."""
    code = machine.load() if machine.is_made() else None
    if code is None:
        return False
    for n in (1, 2, 60):
        ours, theirs = np.random.default_rng(n), np.random.default_rng(n)
        counts = np.zeros((16, n))
        if not code.draw(ours, counts, *places(n)) or (counts != by_numpy(n, 16, theirs)).any():
            return False
    return True


@lru_cache(maxsize=8)
def places(n: int) -> tuple[FloatArray, FloatArray]:
    """What `draw` needs to know of n places, and room for what it computes once."""
    chances, left = np.zeros(n), 1.0
    for place in range(n - 1):
        chances[place] = 1.0 / n / left
        left -= 1.0 / n
    return chances, np.zeros((n, n + 1))


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


@dataclass(frozen=True, slots=True, eq=False)
class Resampled:
    """Weighted sums over prompts, as they are and over R resamples. Sources that were sampled apart add up."""

    tokens: float
    differs: NDArray[np.float64]  # (E,)
    tokens_drawn: NDArray[np.float64]  # (R,)
    differs_drawn: NDArray[np.float64]  # (R, E)

    def plus(self, other: Resampled, weight: float) -> Resampled:
        """With each of the other's prompts weighted by so much more."""
        return Resampled(
            self.tokens + weight * other.tokens,
            self.differs + weight * other.differs,
            self.tokens_drawn + weight * other.tokens_drawn,
            self.differs_drawn + weight * other.differs_drawn,
        )

    @property
    def share(self) -> NDArray[np.float64]:
        """(E,) weighted share of tokens that differ: sum(w d) / sum(w t)."""
        return np.asarray(self.differs / self.tokens)

    @property
    def upper_bound(self) -> NDArray[np.float64]:
        """(E,) upper 95 % bound of that share, one-sided: the percentile of the resampled ratios.

        All exits share the draws, so bounds are ordered where counts are.
        """
        return np.asarray(np.quantile(self.differs_drawn / self.tokens_drawn[:, None], UPPER_SHARE, axis=0))


def resample(evidence: Evidence, rng: np.random.Generator) -> Resampled:
    """Bootstrap over prompts, with replacement. With several sources, each is resampled within itself."""
    tokens = evidence.weights * evidence.tokens
    differs = evidence.weights[:, None] * evidence.disagreements
    drawn = counts_drawn(len(evidence.tokens), RESAMPLES, rng)
    return Resampled(float(tokens.sum()), differs.sum(axis=0), drawn @ tokens, drawn @ differs)


def choose_cap(
    exits: tuple[int, ...],
    resampled: Resampled,
    max_disagreement: float,
    allowed: tuple[bool, ...] | None = None,
) -> CapChoice:
    """The shallowest exit whose upper bound is at most `max_disagreement`, else full depth, which never differs.

    `allowed` (E,) bars exits for other reasons, such as bits per character; full depth is never barred here.
    """
    share, bound = resampled.share, resampled.upper_bound
    within = bound <= max_disagreement
    if allowed is not None:
        within &= np.asarray(allowed)
    within[-1] = True
    return CapChoice(exits[int(within.argmax())], tuple(share.tolist()), tuple(bound.tolist()))
