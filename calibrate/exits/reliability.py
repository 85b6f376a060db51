"""Reliability of confidences (calibration error, temperature, Platt scaling), and what exits save at an agreement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def expected_calibration_error(
    predicted: NDArray[np.floating[Any]], correct: NDArray[np.bool_], bins: int = 15
) -> float:
    """Mean gap between confidence and accuracy over bins of equal width, weighted by their tokens."""
    which = np.minimum((predicted * bins).astype(int), bins - 1)
    count = np.bincount(which, minlength=bins)
    confidence = np.bincount(which, weights=predicted, minlength=bins)
    accuracy = np.bincount(which, weights=correct, minlength=bins)
    return float(np.abs(confidence - accuracy).sum() / count.sum())


def fit_logistic(logit: Array, correct: NDArray[np.bool_], steps: int = 50) -> tuple[float, float]:
    """Slope and offset with the greatest likelihood of sigmoid(slope x logit + offset) (Platt 1999), by Newton's
    method.

    A weak prior towards (1, 0) keeps them finite if all or none are correct. The slope is at least 0.05, so that a
    calibration never reverses an order.
    """
    features = np.column_stack((logit, np.ones_like(logit)))
    weights = np.array([1.0, 0.0])
    pull = 1e-3 * len(logit) ** 0.5
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(features @ weights, -40, 40)))
        gradient = features.T @ (p - correct) + pull * (weights - (1.0, 0.0))
        curvature = (features * (p * (1 - p))[:, None]).T @ features + (pull + 1e-9) * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        weights = weights - np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-9:
            break
    return max(float(weights[0]), 0.05), float(weights[1])


def fit_temperature(confidence: Callable[[float], NDArray[np.floating[Any]]], correct: NDArray[np.bool_]) -> float:
    """The temperature between 0.5 and 3 at which `confidence(temperature)` predicts `correct` best (log loss).

    Found by golden-section search in the logarithm, to a few percent.
    """

    def loss(log_t: float) -> float:
        p = np.clip(confidence(float(np.exp(log_t))).astype(np.float64), 1e-6, 1 - 1e-6)
        return float(-np.where(correct, np.log(p), np.log(1 - p)).mean())

    golden = (5**0.5 - 1) / 2
    low, high = float(np.log(0.5)), float(np.log(3.0))
    inner, outer = high - golden * (high - low), low + golden * (high - low)
    at_inner, at_outer = loss(inner), loss(outer)
    while high - low > 0.08:
        if at_inner < at_outer:
            high, outer, at_outer = outer, inner, at_inner
            inner = high - golden * (high - low)
            at_inner = loss(inner)
        else:
            low, inner, at_inner = inner, outer, at_outer
            outer = low + golden * (high - low)
            at_outer = loss(outer)
    return float(np.exp((low + high) / 2))


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """What one threshold gives on a set of texts. The cost of a check is expressed in layers of the model."""

    threshold: float
    agreement: float  # share of all tokens that equal full depth's
    layers_per_token: float  # layers run
    saved_gross: float  # layers not run, per token
    checks_per_token: float
    saved_net: float  # gross minus the checks' cost
    left: tuple[float, ...]  # share that exits at each depth, the last being full depth

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def point(
    confidence: NDArray[np.floating[Any]],
    agree: NDArray[np.bool_],
    exits: Sequence[int],
    threshold: float,
    check_layers: float,
    leave_layers: float = 0.0,
) -> CurvePoint:
    """The point at one threshold. confidence and agree are (N, E); the last column is full depth, without a check.

    A check costs `check_layers` at every exit that a token reaches, and leaving early `leave_layers` (the adapter).
    """
    sure = confidence[:, :-1] >= threshold
    last = len(exits) - 1
    index = np.where(sure.any(1), sure.argmax(1), last)
    depth = np.asarray(exits)[index]
    gross = float(exits[-1] - depth.mean())
    checks = float(np.minimum(index + 1, last).mean())
    early = float((index < last).mean())
    return CurvePoint(
        threshold=float(threshold),
        agreement=float(agree[np.arange(len(index)), index].mean()),
        layers_per_token=float(depth.mean()),
        saved_gross=gross,
        checks_per_token=checks,
        saved_net=gross - checks * check_layers - early * leave_layers,
        left=tuple(float(x) for x in np.bincount(index, minlength=len(exits)) / len(index)),
    )


def at_agreement(
    confidence: NDArray[np.floating[Any]],
    agree: NDArray[np.bool_],
    exits: Sequence[int],
    agreement: float,
    check_layers: float,
    leave_layers: float = 0.0,
) -> CurvePoint:
    """The point with the smallest threshold that keeps `agreement`.

    A threshold above every confidence, at which no token exits early, always keeps it.
    """
    grid = np.unique(np.quantile(confidence[:, :-1], np.linspace(0, 1, 201)))
    nothing = float(np.nextafter(grid[-1], np.inf))
    best = point(confidence, agree, exits, nothing, check_layers, leave_layers)
    for threshold in grid[::-1]:
        found = point(confidence, agree, exits, threshold, check_layers, leave_layers)
        if found.agreement < agreement:
            break
        best = found
    return best
