"""Evidence of prompts on a model's exits: weighted sums, and the bound of the cap rule. Sums add terms in order.

`policy/cap.py` gives the formulas. The last source is the observed prompts, which have further counts.
"""

from __future__ import annotations

from math import sqrt

from helios_sim.core.layout import Numbers

Z = 1.6448536269514722  # the normal quantile of 95 %
# Rows of `found`, each by exit. The last row holds one number: the weighted tokens of observed prompts.
SHARE, BOUND, DIFFERS, CONFIDENT, FIRST, TOKENS = range(6)


def weigh(
    starts: Numbers,
    tokens: Numbers,
    differs: Numbers,
    weights: Numbers,
    confident: Numbers,
    first: Numbers,
    found: Numbers,
) -> int:
    """Weigh P prompts: `tokens` and `weights` (P,), `differs` (P, E). Source s begins at prompt `starts[s]`, (S + 1,).

    `confident` and `first` (n, E) belong to the last n prompts. Writes `found` (6, E); returns n.
    """
    prompts, n = len(tokens), len(confident)
    total = 0.0
    for p in range(prompts):
        total += weights[p] * tokens[p]
    seen = 0.0
    for p in range(n):
        seen += weights[prompts - n + p] * tokens[prompts - n + p]
    found[TOKENS, 0] = seen
    for e in range(differs.shape[1]):
        share = 0.0
        for p in range(prompts):
            share += weights[p] * differs[p, e]
        share /= total
        variance = third = 0.0
        for s in range(len(starts) - 1):
            mean = 0.0
            for p in range(starts[s], starts[s + 1]):
                mean += weights[p] * (differs[p, e] - share * tokens[p])
            size = starts[s + 1] - starts[s]
            mean /= size
            squares = cubes = 0.0
            for p in range(starts[s], starts[s + 1]):
                residual = weights[p] * (differs[p, e] - share * tokens[p]) - mean
                squares += residual * residual
                cubes += residual * residual * residual
            variance += squares * (size / max(1, size - 1))
            third += cubes
        spread = sqrt(variance)
        cubed = variance * spread
        skew = third / cubed if cubed > 0.0 else 0.0
        bound = share + spread / total * (Z + skew * (2 * Z * Z + 1) / 6)
        found[SHARE, e], found[BOUND, e] = share, min(1.0, bound)
        of_differs = of_confident = of_first = 0.0
        for p in range(n):
            weight = weights[prompts - n + p]
            of_differs += weight * differs[prompts - n + p, e]
            of_confident += weight * confident[p, e]
            of_first += weight * first[p, e]
        found[DIFFERS, e], found[CONFIDENT, e], found[FIRST, e] = of_differs, of_confident, of_first
    return n
