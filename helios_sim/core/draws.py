"""NumPy's multinomial with equal shares, for machine code.

The method is numpy's, to the last bit: conditional binomials, each by inversion (`random_multinomial` and
`random_binomial_inversion` in numpy/random/src/distributions/distributions.c).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

MOST_BY_INVERSION = 30.0  # draws expected at a place; above it numpy uses another method


def draw(rng: np.random.Generator, counts: FloatArray, chances: FloatArray, missed: FloatArray) -> bool:
    """Fills counts of zeros, (R, n). False: a place expects too many, and the counts mean nothing.

    `chances` (n,) is each place's among those that are left. `missed` (n, n + 1) keeps what takes an exponential and a
    logarithm: the chance that of so many draws none falls on the place; 0 where it is not known yet.
    """
    resamples, n = counts.shape
    for row in range(resamples):
        left = n
        for place in range(n - 1):
            rare = chances[place] <= 0.5
            p = chances[place] if rare else 1.0 - chances[place]
            q, expected = 1.0 - p, left * p
            if expected > MOST_BY_INVERSION:
                return False
            if missed[place, left] == 0.0:
                missed[place, left] = math.exp(left * math.log1p(-p))
            most = min(left, int(expected + 10.0 * math.sqrt(expected * q + 1.0)))
            found, below, u = 0, missed[place, left], rng.random()
            while u > below:
                found += 1
                if found > most:
                    found, below, u = 0, missed[place, left], rng.random()
                else:
                    u -= below
                    below = ((left - found + 1) * p * below) / (found * q)
            if not rare:
                found = left - found
            counts[row, place] = found
            left -= found
            if left <= 0:
                break
        if left > 0:
            counts[row, n - 1] = left
    return True
