"""A sequential test of a mean by bets against it: the capital of the bettor is evidence at any time.

Losses lie from 0 to 1, such as the share of a prompt's tokens that differ from full depth, or 0 and 1 of single tokens.
While the mean of each loss, given the earlier losses, keeps to the limit, the capital of a fair bettor has an
expectation of at most 1 at every step. So the probability that it ever reaches 1 / failure is at most `failure`
(Ville's inequality; bets as in Waudby-Smith and Ramdas, arXiv 2010.09686). The number of draws need not be fixed
beforehand, and looking after each draw costs nothing.

The capital is spread over stakes, since the best stake is unknown, and over the draws at which betting begins: the
share that begins at draw j is 1 / (j (j + 1)). So if a mean turns bad after a long good time, the capital has to win
back a factor of j (j + 1), and not all that was lost before.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Shares of the largest stake at which a capital cannot turn negative. Losses of single tokens call for small stakes,
# losses of whole prompts, which spread less, for large ones.
STAKES = (0.64, 0.32, 0.16, 0.08, 0.04, 0.02)
_NEAREST = 1e-6  # least distance of a limit from 0 and 1, since no bet is possible at 0 or 1
_MOST = 1e100  # the capital is cut here: it is proof enough


class Bets:
    """Bets on E means side by side, which need not be independent of each other."""

    def __init__(self, means: int, limit: float, *, that_above: bool) -> None:
        """Begins to bet that each mean is above `limit`, or below it if `that_above` is false."""
        self._limit = min(max(limit, _NEAREST), 1.0 - _NEAREST)
        self._that_above = that_above
        self._stakes = np.array(STAKES)[:, None]
        self._invested = np.zeros((len(STAKES), means))
        self.draws = np.zeros(means, np.int64)  # by mean, since its bets began

    def add(self, losses: NDArray[np.float64]) -> None:
        """Adds one draw of each mean, (E,)."""
        self.draws += 1
        begins = 1.0 / (self.draws * (self.draws + 1)) / len(STAKES)
        away = losses - self._limit
        gain = away / self._limit if self._that_above else -away / (1.0 - self._limit)
        self._invested = np.minimum((self._invested + begins) * (1.0 + self._stakes * gain), _MOST)

    @property
    def capital(self) -> NDArray[np.float64]:
        """What a capital of 1 has become, (E,), including the part that has not begun to bet."""
        return np.asarray(self._invested.sum(axis=0) + 1.0 / (self.draws + 1))

    def begin(self, means: NDArray[np.bool_]) -> None:
        """Restarts the bets on the means that are true in `means`, (E,)."""
        self._invested[:, means] = 0.0
        self.draws[means] = 0


class CapControl:
    """Control of the exits that may serve as a model's cap, by comparing served tokens with full depth.

    An exit is barred when bets that it changes more than `limit` of the tokens have won, and freed when bets that it
    changes less have won. Each of these is wrong with a probability of at most `failure`, however often one looks. The
    last exit is full depth, which is never barred.
    """

    def __init__(
        self, exits: tuple[int, ...], allowed: NDArray[np.bool_], never: NDArray[np.bool_], limit: float, failure: float
    ) -> None:
        """Takes the exits `allowed` at the start, (E,), and those barred for good for other reasons, `never`, (E,)."""
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
        """Capital of the bets, (E,): that an allowed exit changes too much, or that a barred exit does not."""
        return np.where(self.allowed, self._above.capital, self._below.capital)

    def add(self, agrees: NDArray[np.bool_]) -> None:
        """Adds one prompt: whether each exit's token equals full depth's, (n, E). Prompts are the draws, since tokens
        of one prompt are alike."""
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
