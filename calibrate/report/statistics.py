"""What a trace says about exits, as numbers for the report: shares, agreement, calibration.

Reliability compares a confidence with how often the exit's token equals full depth's. Tokens are put into bins of equal
width by their confidence. The expected calibration error (ECE) is the mean over tokens of the gap between the two in
their bin (Guo et al. 2017, arXiv 1706.04599, equation 3). The last exit agrees with itself and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from calibrate.exits.adapters import risk_scale
from calibrate.exits.reliability import expected_calibration_error
from helios_sim.errors import UserError
from helios_sim.exits.replay import JointExits, joint_exits, replay
from helios_sim.exits.rule import MEASURES, Confidence, PerToken
from helios_sim.exits.trace import ExitTrace

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
