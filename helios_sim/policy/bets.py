"""A sequential test of a mean: bets against it, whose capital is evidence at whatever time one looks.

Losses lie from 0 to 1, such as the share of a prompt's tokens that differ from full depth, or 0 and 1 of single tokens.
While the mean of each, given those before, keeps to the limit, the capital of a fair bettor has an expectation of at
most 1 at every step, so that it ever reaches 1 / failure with a probability of at most `failure` (Ville's inequality;
bets as in Waudby-Smith and Ramdas, arXiv 2010.09686). No number of draws is fixed beforehand, and looking after each
one costs nothing.

The capital is spread over stakes, since the best one depends on what is not known, and over the draws at which betting
begins: the share that begins at draw j is 1 / (j (j + 1)), so that a mean that turns bad after a long good time has to
make good a factor of j (j + 1) and not all that was lost before.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Shares of the largest stake with which a capital cannot turn negative. Single tokens call for small ones, whole
# prompts, whose losses spread less, for large ones.
STAKES = (0.64, 0.32, 0.16, 0.08, 0.04, 0.02)
_NEAREST = 1e-6  # of a limit to 0 and 1, where bets have no stakes
_MOST = 1e100  # of a capital, which is then proof enough


class Bets:
    """Side by side for E means, which need not be independent of each other."""

    def __init__(self, means: int, limit: float, *, that_above: bool) -> None:
        """`that_above`: bets that the mean is above `limit`, else that it is below."""
        self._limit = min(max(limit, _NEAREST), 1.0 - _NEAREST)
        self._that_above = that_above
        self._stakes = np.array(STAKES)[:, None]
        self._invested = np.zeros((len(STAKES), means))
        self.draws = np.zeros(means, np.int64)  # since each was begun

    def add(self, losses: NDArray[np.float64]) -> None:
        """One draw of each mean, (E,)."""
        self.draws += 1
        begins = 1.0 / (self.draws * (self.draws + 1)) / len(STAKES)
        away = losses - self._limit
        gain = away / self._limit if self._that_above else -away / (1.0 - self._limit)
        self._invested = np.minimum((self._invested + begins) * (1.0 + self._stakes * gain), _MOST)

    @property
    def capital(self) -> NDArray[np.float64]:
        """(E,) what a capital of 1 has become, with the part that has not begun to bet."""
        return np.asarray(self._invested.sum(axis=0) + 1.0 / (self.draws + 1))

    def begin(self, means: NDArray[np.bool_]) -> None:
        """Anew for some of the means, (E,)."""
        self._invested[:, means] = 0.0
        self.draws[means] = 0


class CapControl:
    """Which exits of one model may serve as its cap, by what its full depth says of tokens that were served.

    An exit is barred when bets that it changes more than `limit` of the tokens have won, and freed when bets that it
    changes less have; each has a probability of at most `failure` to be wrong, at any time. The last exit is full
    depth, which is never barred.
    """

    def __init__(
        self, exits: tuple[int, ...], allowed: NDArray[np.bool_], never: NDArray[np.bool_], limit: float, failure: float
    ) -> None:
        """`allowed` (E,) at the start; `never` (E,) for other reasons than what is observed."""
        self.exits = exits
        self.allowed = allowed & ~never
        self.never = never
        self.failure = failure
        self.allowed[-1] = True
        self._above = Bets(len(exits), limit, that_above=True)
        self._below = Bets(len(exits), limit, that_above=False)

    @property
    def cap(self) -> int:
        """The shallowest exit that is allowed."""
        return self.exits[int(self.allowed.argmax())]

    @property
    def capital(self) -> NDArray[np.float64]:
        """(E,) of the bets that an allowed exit changes too much, and that a barred one does not."""
        return np.where(self.allowed, self._above.capital, self._below.capital)

    def add(self, agrees: NDArray[np.bool_]) -> None:
        """One prompt: (n, E) whether the exit's token is full depth's. Prompts are the draws, since their tokens are
        alike."""
        if not len(agrees):
            return
        losses = 1.0 - agrees.mean(axis=0)
        self._above.add(losses)
        self._below.add(losses)
        turned = (self.capital >= 1.0 / self.failure) & ~self.never
        turned[-1] = False
        self.allowed = self.allowed ^ turned
        self._above.begin(turned)
        self._below.begin(turned)
