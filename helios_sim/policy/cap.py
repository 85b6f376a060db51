"""The cap rule: how shallow a model may be cut without changing too many tokens, by an upper bound over prompts.

The paper publishes no rule; this one is ours. The bound is that of a ratio estimator. A prompt is one draw, since its
tokens are alike. Shares of disagreement are skewed, since most prompts show none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from helios_sim.core import machine
from helios_sim.core.evidence import TOKENS, weigh
from helios_sim.core.layout import Storage

_LOCK = Lock()  # the compiled function must have one caller at a time

@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """Counts of P prompts at E exits; the last exit is full depth."""

    tokens: NDArray[np.int64]  # (P,)
    disagreements: NDArray[np.int64]  # (P, E) tokens that differ from full depth, confident or not
    weights: NDArray[np.float64]  # (P,) above 0; older prompts have less weight


@dataclass(frozen=True, slots=True)
class CapChoice:
    """The chosen cap, with the share of changed tokens at each exit."""

    layers: int
    share: tuple[float, ...]  # (E,) weighted share of tokens that differ
    upper_bound: tuple[float, ...]  # (E,) upper bound of `share`


class Weighed(NamedTuple):
    """Weighted evidence at each exit, (E,) each; the counts are weighted tokens of the observed prompts."""

    share: NDArray[np.float64]  # share of tokens that differ from full depth, by all sources
    bound: NDArray[np.float64]  # upper bound of `share`
    differs: NDArray[np.float64]  # observed tokens that differ from full depth
    confident: NDArray[np.float64]  # observed tokens confident there
    first: NDArray[np.float64]  # observed tokens confident there and at no earlier exit
    tokens: float  # all observed tokens


def weighed(
    sources: Sequence[Evidence],
    confident: NDArray[np.int64] | None = None,
    first: NDArray[np.int64] | None = None,
) -> Weighed:
    """Weighs the evidence: the share of tokens that differ, sum(w d) / sum(w t), and its one-sided upper 95 % bound.

    Each source is a stratum: its prompts were drawn apart from those of other sources. With residuals
    e = w (d - share t), centred in their source, of n prompts there:

        variance of the sum V = sum over sources of n / (n - 1) sum(e^2),  third moment K = sum(e^3)
        bound = share + sqrt(V) / sum(w t) (z + K / V^1.5 (2 z^2 + 1) / 6)

    The first term is the ratio estimator's (Cochran, Sampling Techniques, 1977, 6.4), the second corrects it for skew
    (Hall, "Inverting an Edgeworth expansion", Annals of Statistics 11, 1983). It never turns the bound below the share,
    since |K| <= V^1.5 and (2 z^2 + 1) / 6 < z. A source of one prompt shows no spread.

    `confident` and `first` (n, E) are further counts for the last source, the observed prompts.
    """
    code = machine.loaded()
    storage = Storage(compiled=code is not None)
    starts = np.array([0, *accumulate(len(source.tokens) for source in sources)])
    n_exits = sources[0].disagreements.shape[1]
    none = np.zeros((0, n_exits), np.int64)
    found = np.zeros((6, n_exits))
    arrays = (
        starts, np.concatenate([source.tokens for source in sources], dtype=np.int64),
        np.concatenate([source.disagreements for source in sources], dtype=np.int64),
        np.concatenate([source.weights for source in sources]),
        none if confident is None else confident, none if first is None else first, found,
    )  # fmt: skip
    with _LOCK:
        _weigh(code)(*map(storage.array, arrays))
    share, bound, differs, sure, leave = found[:TOKENS]
    return Weighed(share, bound, differs, sure, leave, float(found[TOKENS, 0]))


@cache
def _weigh(code: machine.Machine | None) -> Callable[..., int]:
    return weigh if code is None else code.weigh()


def choose_cap(
    exits: tuple[int, ...],
    evidence: Weighed,
    max_disagreement: float,
    allowed: tuple[bool, ...] | None = None,
) -> CapChoice:
    """Chooses the shallowest exit with an upper bound of at most `max_disagreement`, else full depth.

    `allowed` (E,) bars exits for other reasons, such as bits per character; full depth is never barred here.
    """
    within = evidence.bound <= max_disagreement
    if allowed is not None:
        within &= np.asarray(allowed)
    within[-1] = True
    return CapChoice(exits[int(within.argmax())], tuple(evidence.share.tolist()), tuple(evidence.bound.tolist()))
