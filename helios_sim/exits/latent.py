"""A latent Gaussian process that drives the exits of two models. Knows shares and correlations, no published figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError

Floats = NDArray[np.float64]

REFERENCE_EXITS = 32  # where neighbouring tokens' exits were compared: one after each layer of Llama-2-7B
NEAR_LAYERS = 2
LOOK_BACK_TOKENS = 5
_DIGITS = 9  # of what is solved for: beyond that, the order of a sum may differ from machine to machine


@dataclass(frozen=True, slots=True)
class Fit:
    """Hardness of token t for model m: task_shift + Z, with Z standard normal.

    Along a prompt Z is AR(1) with `lag_correlation`; between the models Z is correlated by `cross_correlation`.
    """

    cuts: tuple[tuple[float, ...], ...]  # per model and exit but the last: leaves there when hardness <= cut
    cross_correlation: float
    lag_correlation: float
    task_shift: tuple[float, ...]
    late_helped: float  # of the first model's tokens that miss its first exit, the share that makes the second's
    last_helped: float  # the same of those that need the first model's last exit

    def to_json(self) -> dict[str, Any]:
        """JSON values: lists for tuples, so that a provenance read back equals the one written."""
        return {
            "cuts": [list(cuts) for cuts in self.cuts],
            "cross_correlation": self.cross_correlation,
            "lag_correlation": self.lag_correlation,
            "task_shift": list(self.task_shift),
        }


def fit_latent(
    exit_shares: Sequence[Sequence[float]],
    jointly_early: float,
    near_last_five: float,
    n_tasks: int,
    task_spread: float,
) -> Fit:
    """The process of two models that has these shares of tokens by exit, over equally frequent tasks.

    `jointly_early`: share of tokens at the first exit of at least one of the two. UserError where it cannot be.
    """
    shift = _task_shift(n_tasks, task_spread)
    cuts = tuple(tuple(_cut(below, shift) for below in np.cumsum(shares)[:-1]) for shares in exit_shares)
    first_cut, second_cut = cuts[0][0], cuts[1][0]

    def missed(cross_correlation: float, cut: float = first_cut) -> float:
        return both_above(cut - shift, second_cut - shift, cross_correlation)

    cross = _solve(lambda r: 1 - missed(r) - jointly_early, "jointly_early", jointly_early, (-0.999, 0.999))
    lag = _solve(lambda r: near_share(r) - near_last_five, "near_last_five", near_last_five, (0.0, 0.99))
    late, last = 1 - exit_shares[0][0], exit_shares[0][-1]
    return Fit(
        cuts=cuts,
        cross_correlation=cross,
        lag_correlation=lag,
        task_shift=tuple(shift.tolist()),
        late_helped=1 - missed(cross) / late,
        last_helped=1 - missed(cross, cuts[0][-1]) / last,
    )


def both_above(first_cut: Floats, second_cut: Floats, correlation: float) -> float:
    """P(X > first_cut, Y > second_cut) of standard normals, averaged over the cuts, shape (K,) each.

    Integrates phi(x) P(Y > second_cut | x) from first_cut to first_cut + 12 by Gauss-Legendre.
    """
    from scipy.special import ndtr

    node, weight = np.polynomial.legendre.leggauss(120)
    x = first_cut[:, None] + 6 * (node + 1)
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    tail = ndtr((correlation * x - second_cut[:, None]) / np.sqrt(1 - correlation**2))
    return float(np.mean(6 * (density * tail) @ weight))


def near_share(lag_correlation: float, bins_per_exit: int = 8) -> float:
    """Share of tokens whose exit lies within NEAR_LAYERS of one of the last LOOK_BACK_TOKENS exits.

    32 equally likely exits, driven by a Gaussian AR(1). The latent is cut into equally likely bins, each moved from
    its median; the chain is reversible, so the past of a token is walked like a future, avoiding the layers near it.
    """
    from scipy.special import ndtr, ndtri

    n_bins = REFERENCE_EXITS * bins_per_exit
    edges = ndtri(np.arange(n_bins + 1) / n_bins)
    median = ndtri((np.arange(n_bins) + 0.5) / n_bins)
    reach = ndtr((edges[None, :] - lag_correlation * median[:, None]) / np.sqrt(1 - lag_correlation**2))
    step = np.diff(reach, axis=1)  # (n_bins, n_bins) from, to
    layer = np.arange(n_bins) // bins_per_exit
    far = np.abs(layer[:, None] - np.arange(REFERENCE_EXITS)[None, :]) > NEAR_LAYERS  # (bins, own exit)
    avoided = np.ones(far.shape)
    for _ in range(LOOK_BACK_TOKENS):
        avoided = step @ (far * avoided)
    return float(1 - avoided[np.arange(n_bins), layer].mean())


def latent_paths(fit: Fit, n_prompts: int, prompt_tokens: int, rng: np.random.Generator) -> Floats:
    """Z of both models, shape (2, n_prompts, prompt_tokens); each prompt starts anew from the stationary state."""
    noise = rng.standard_normal((2, prompt_tokens, n_prompts))
    noise[1] = fit.cross_correlation * noise[0] + np.sqrt(1 - fit.cross_correlation**2) * noise[1]
    innovation = np.sqrt(1 - fit.lag_correlation**2)
    for t in range(1, prompt_tokens):
        noise[:, t] = fit.lag_correlation * noise[:, t - 1] + innovation * noise[:, t]
    return np.ascontiguousarray(noise.transpose(0, 2, 1))


def _task_shift(n_tasks: int, task_spread: float) -> Floats:
    """Evenly spaced, mean 0, standard deviation `task_spread`: the first task is the easiest."""
    scores = np.arange(n_tasks) - (n_tasks - 1) / 2
    return task_spread * scores / (scores.std() or 1.0) + 0.0  # no minus zero


def _cut(below: float, shift: Floats) -> float:
    """Hardness that this share of tokens stays below, over all tasks."""
    from scipy.optimize import brentq
    from scipy.special import ndtr

    return round(float(brentq(lambda cut: ndtr(cut - shift).mean() - below, -40, 40, xtol=1e-12)), _DIGITS)


def _solve(excess: Callable[[float], float], name: str, value: float, bracket: tuple[float, float]) -> float:
    from scipy.optimize import brentq

    low, high = (excess(end) + value for end in bracket)
    if not min(low, high) <= value <= max(low, high):
        raise UserError(
            f"exits.parameters.{name}",
            value,
            f"with these exit shares, from {min(low, high):.3f} to {max(low, high):.3f}",
            "choose one in this range",
        )
    return round(float(brentq(excess, *bracket, xtol=1e-12)), _DIGITS)
