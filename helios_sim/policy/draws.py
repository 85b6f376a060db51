"""How often a bootstrap draws each of n things, as numpy's multinomial draws it. Knows nothing of the things.

`Generator.multinomial` takes an exponential and a logarithm for every count. With equal shares both depend only on the
place and on how many draws are left, so the compiled form computes each of them once. Counts and the generator's state
afterwards are the same to the last bit; whether they are is tried before it is used, since numpy may change its method.
"""

from __future__ import annotations

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
