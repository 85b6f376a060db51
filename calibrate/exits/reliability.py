"""Figures of exits: reliability of confidences, layers saved at a given agreement, and statistics of a trace.

Reliability compares a confidence with how often the exit's token equals full depth's. Tokens are put into bins of equal
width by their confidence. The expected calibration error (ECE) is the mean over tokens of the gap between the two in
their bin (Guo et al. 2017, arXiv 1706.04599, equation 3). The last exit agrees with itself and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.exits.replay import JointExits, joint_exits, replay
from helios_sim.exits.rule import MEASURES, Confidence, PerToken
from helios_sim.exits.trace import ExitTrace

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


def risk_scale(exits: Sequence[int], n_layers: int) -> NDArray[np.float64]:
    """The weight of a risk at each exit, (E,): inversely proportional to the layers saved, 1 at the first exit."""
    return (n_layers - exits[0]) / (n_layers - np.asarray(exits, dtype=np.float64))


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Results of one threshold on a set of texts. The cost of a check is expressed in layers of the model."""

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


BINS = 15
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Reliability:
    """The reliability of one exit's confidence, by bin. Empty bins are left out."""

    confidence: FloatArray  # (B,), mean of the tokens in each bin
    agreement: FloatArray  # (B,), share of them that agree with full depth
    tokens: NDArray[np.int64]  # (B,)
    ece: float


@dataclass(frozen=True, slots=True, eq=False)
class AtThreshold:
    """Results over all tokens of the trace with per-token exits at one threshold."""

    threshold: float
    layers_per_token: float
    left_early: float  # share of tokens that exit before the last layer
    agreement: float  # share of tokens equal to full depth's


@dataclass(frozen=True, slots=True, eq=False)
class ExitStatistics:
    """Statistics of a trace with K tasks and E exits, the last being full depth. Shares are shares of tokens."""

    trace: ExitTrace
    confidence: Confidence
    threshold: float
    tokens: NDArray[np.int64]  # (K,)
    unchanged: FloatArray  # (K, E), share that agrees with full depth if all tokens exit there
    exit_share: FloatArray  # (K, E), share that exits there at the threshold; rows sum to 1
    agreement: FloatArray  # (K,), share of tokens equal to full depth's at the threshold
    layers_per_token: FloatArray  # (K,)
    reliability: tuple[Reliability, ...]  # one per exit below the last
    sweep: tuple[AtThreshold, ...]
    bits_per_char: FloatArray | None  # (K,), of full depth, on human text only

    @property
    def exits(self) -> tuple[int, ...]:
        return self.trace.exits

    @property
    def all_unchanged(self) -> FloatArray:
        """Unchanged shares (E,) over the tokens of all tasks."""
        return np.asarray(self.trace.agree.mean(axis=0, dtype=np.float64))


def exit_statistics(trace: ExitTrace, threshold: float, confidence: Confidence) -> ExitStatistics:
    """Compute the statistics. Raises UserError if the trace has no such confidence."""
    believed = probabilities(trace, confidence)
    depths = np.asarray(trace.exits, dtype=np.float64)
    left = replay(trace, PerToken(threshold, confidence), trace.n_layers)
    tasks = range(len(trace.tasks))
    rows = [slice(trace.task_first[k], trace.task_first[k + 1]) for k in tasks]
    n_exits = len(trace.exits)
    bits = None
    if trace.bits is not None and trace.human_text:
        bits = np.array([trace.bits[r, -1].sum(dtype=np.float64) for r in rows]) / trace.task_chars()
    return ExitStatistics(
        trace=trace,
        confidence=confidence,
        threshold=threshold,
        tokens=np.diff(trace.task_first),
        unchanged=np.array([trace.agree[r].mean(axis=0, dtype=np.float64) for r in rows]),
        exit_share=np.array([np.bincount(left.exit_index[r], minlength=n_exits) / (r.stop - r.start) for r in rows]),
        agreement=np.array([left.agreed[r].mean() for r in rows]),
        layers_per_token=np.array([depths[left.exit_index[r]].mean() for r in rows]),
        reliability=tuple(reliability(believed[:, e], trace.agree[:, e]) for e in range(n_exits - 1)),
        sweep=tuple(_at(trace, t, confidence) for t in sorted({*THRESHOLDS, threshold})),
        bits_per_char=bits,
    )


def probabilities(trace: ExitTrace, confidence: Confidence) -> NDArray[np.float32]:
    """The predicted probability of agreement (T, E - 1) at each exit below the last.

    The classifier's record is 1 - (1 - p) x risk_scale, which can be negative; this returns p.
    """
    record = trace.recorded(confidence)[:, :-1]
    if confidence is Confidence.CLASSIFIER and record.size:
        scale = risk_scale(trace.exits[:-1], trace.n_layers)
        return np.clip(1 - (1 - record) / scale, 0, 1).astype(np.float32)
    return record


def measures(trace: ExitTrace) -> list[Confidence]:
    """The recorded confidences that are meant as probabilities of agreement."""
    return [c for c, measure in MEASURES.items() if measure.probability and c in trace.confidences]


def reliability(confidence: NDArray[np.float32], agree: NDArray[np.bool_]) -> Reliability:
    """The reliability at one exit, from confidences and agreement (T,)."""
    values = confidence.astype(np.float64)
    place = np.minimum((values * BINS).astype(np.int64), BINS - 1)
    tokens = np.bincount(place, minlength=BINS)
    there = tokens > 0
    mean = np.bincount(place, values, BINS)[there] / tokens[there]
    agreed = np.bincount(place, agree, BINS)[there] / tokens[there]
    ece = expected_calibration_error(values, agree, BINS)
    return Reliability(mean, agreed, tokens[there].astype(np.int64), ece)


def joint_of_pairs(traces: Sequence[ExitTrace], threshold: float) -> list[JointExits]:
    """Joint exits of each pair of models that were traced on the same text. Other pairs are left out."""
    found = []
    for first, second in combinations(traces, 2):
        try:
            found.append(
                joint_exits(first, PerToken(threshold, _rule(first)), second, PerToken(threshold, _rule(second)))
            )
        except UserError:  # different texts, or no confidences
            continue
    return found


def _rule(trace: ExitTrace) -> Confidence:
    return measures(trace)[0] if measures(trace) else Confidence.MAX_PROBABILITY


def _at(trace: ExitTrace, threshold: float, confidence: Confidence) -> AtThreshold:
    left = replay(trace, PerToken(threshold, confidence), trace.n_layers)
    depths = np.asarray(trace.exits, dtype=np.float64)
    return AtThreshold(
        threshold,
        float(depths[left.exit_index].mean()),
        float((left.exit_index < len(trace.exits) - 1).mean()),
        float(left.agreed.mean()),
    )
